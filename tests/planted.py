"""A model that knows what to say after each prompt: a decoder with Hugging Face's interface whose only layer looks up the
whole text so far. What it was not told it answers by a code that hangs on that text, like a model with random weights.

Shapes: ids [batch, seq]; a text's hash is a number of 64 bits, kept in the cache as the layer's keys [batch, 1, seq, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

BITS = 9  # of a token's code: up to 512 tokens
BASE = 0x9E3779B97F4A7C15  # odd, so that its powers never end
LONGEST = 1 << 14
SURE, FIRST, UNSURE = 10.0, 1.5, 0.3  # steepness of a known token, of the first of an answer, of an unknown one


def _powers() -> torch.Tensor:
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.cumprod(np.full(LONGEST, BASE, dtype=np.uint64)).astype(np.int64))


class PlantedConfig(PretrainedConfig):
    model_type = "planted"

    def __init__(self, vocab_size: int = 264, num_hidden_layers: int = 1, hidden_size: int = BITS, **others):
        self.vocab_size, self.num_hidden_layers, self.hidden_size = vocab_size, num_hidden_layers, hidden_size
        super().__init__(**others)


class Planted(PreTrainedModel, GenerationMixin):
    config_class = PlantedConfig

    def __init__(self, config: PlantedConfig):
        super().__init__(config)
        self.embedding, self.lm_head = nn.Embedding(config.vocab_size, 1), nn.Linear(BITS, config.vocab_size, bias=False)
        self.powers = _powers()
        self.known: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.post_init()
        with torch.no_grad():
            self.lm_head.weight.copy_(self.codes(torch.arange(config.vocab_size)))

    @staticmethod
    def codes(tokens: torch.Tensor) -> torch.Tensor:
        """[..., BITS] of +1 and -1"""
        return ((tokens[..., None] >> torch.arange(BITS)) & 1).float() * 2 - 1

    def plant(self, answers: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """After each prompt the model says these tokens."""
        found: dict[int, tuple[int, float]] = {}
        for prompt, said in answers:
            ids = torch.tensor([*prompt, *said])
            hashes = ((ids + 1) * self.powers[: len(ids)]).cumsum(0).tolist()
            for i, token in enumerate(said):
                found.setdefault(hashes[len(prompt) + i - 1], (token, SURE if i else FIRST))
        keys = torch.tensor(sorted(found))
        tokens, steepness = zip(*(found[key] for key in keys.tolist()), strict=True)
        self.known = keys, torch.tensor(tokens), torch.tensor(steepness)

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False, logits_to_keep=0, **others):
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = input_ids.shape[1]
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -length:]
        before = past if attention_mask is None else attention_mask[:, :past].sum(1, keepdim=True)
        places = (before + seen.cumsum(1) - 1).clamp(min=0)
        hashes = ((input_ids + 1) * self.powers[places] * seen).cumsum(1)
        if past:
            hashes = hashes + past_key_values.layers[0].keys[:, 0, -1]
        if use_cache:
            past_key_values = DynamicCache(config=self.config) if past_key_values is None else past_key_values
            past_key_values.update(hashes[:, None, :, None], hashes[:, None, :, None], 0)
        if logits_to_keep:
            hashes = hashes[:, -logits_to_keep:]
        return CausalLMOutputWithPast(logits=self.lm_head(self.states(hashes)), past_key_values=past_key_values)

    def states(self, hashes: torch.Tensor) -> torch.Tensor:
        unknown = self.codes((hashes * BASE_SIGNED) >> 40) * UNSURE
        if self.known is None:
            return unknown
        keys, tokens, steepness = self.known
        place = torch.searchsorted(keys, hashes.contiguous()).clamp(max=len(keys) - 1)
        told = (keys[place] == hashes)[..., None]
        return torch.where(told, self.codes(tokens[place]) * steepness[place][..., None], unknown)


BASE_SIGNED = BASE - (1 << 64)
