"""Which token comes next: greedy or drawn, within a list of texts or free. transformers' loop asks after each token.

Shapes: ids [batch, seq], padded on the left; scores [batch, vocab].
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from deltune.errors import ConfigError, NumericsError
from deltune.models.decoding import warpers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltune.models.generation import GenerateOptions


class Trie:
    """Token sequences by their beginnings."""

    def __init__(self, sequences: Collection[Sequence[int]]):
        self.root: dict[int, dict] = {}
        for sequence in sequences:
            node = self.root
            for token in sequence:
                node = node.setdefault(token, {})

    def after(self, ids: Sequence[int]) -> list[int]:
        """The tokens that may follow; none after a whole sequence, and none after what begins no sequence."""
        node = self.root
        for token in ids:
            node = node.get(token)
            if node is None:
                return []
        return list(node)


def trie_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], eos: Collection[int]) -> Trie:
    """Of texts that each end with an EOS. ConfigError where no token ends an answer, or a text has no tokens."""
    if not eos:
        raise ConfigError("choices: the model has no EOS token that could end one of them; decoding.stop_ids names one")
    written = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts}
    for text, ids in written.items():
        if not ids:
            raise ConfigError(f"choices: {text!r} has no tokens")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in eos else min(eos)
    return Trie([[*ids, end] for ids in written.values()])


class Only:
    """transformers' logits processor: after `width` tokens of prompt and padding only what a trie allows."""

    def __init__(self, trie: Trie, width: int, end: int):
        self.trie, self.width, self.end = trie, width, end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(input_ids[:, self.width :].tolist()):
            allowed = self.trie.after(ids) or [self.end]  # a row that has ended goes on beside the others
            kept[row, allowed] = scores[row, allowed]
        return kept


def check_numbers(scores: torch.Tensor, numbers: Sequence[int | str], num_before: int) -> None:
    """NumericsError for NaN among the scores [batch, vocab] of these prompts' next tokens."""
    broken = scores.isnan().any(dim=-1)
    if broken.any():
        number = numbers[int(broken.nonzero()[0]) * len(numbers) // len(scores)]
        raise NumericsError(f"the model's scores for prompt {number} are not numbers (NaN) at new token {num_before + 1}")


class Chooser:
    """transformers' logits processor: leaves each row a single token with a finite score, if it draws.

    A row draws one number a token, from a generator of its own: its draws do not depend on the rest of the batch.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], numbers: Sequence[int | str], options: GenerateOptions):
        self.options = options
        self.warpers = warpers(options.decoding)
        self.numbers = numbers
        self.generators = [random.Random(f"{options.seed}:{number}") for number in numbers]
        self.lengths = list(map(len, prompts))
        self.width = max(self.lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        check_numbers(scores, self.numbers, input_ids.shape[1] - self.width)
        if self.options.repetition_penalty != 1.0:
            scores = self._penalise(input_ids, scores)
        if self.options.temperature == 0:
            return scores
        exact = scores.cpu() if scores.device.type == "mps" else scores  # MPS has no float64
        exact = exact / self.options.temperature
        for warper in self.warpers:
            exact = warper(input_ids, exact)
        order, keep, probabilities = nucleus(exact, self.options)
        cumulative = (probabilities * keep).cumsum(-1)
        draws = torch.tensor(
            [generator.random() for generator in self.generators], device=exact.device, dtype=torch.float64
        )
        place = torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None], right=True)
        place = place.clamp(max=(keep.sum(-1) - 1)[:, None])  # rounding: never beyond the kept ones
        return torch.full_like(scores, -torch.inf).scatter_(1, order.gather(1, place).to(scores.device), 0.0)

    def _penalise(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Divide positive scores, and multiply negative ones, of tokens that appeared; padding did not appear."""
        scores = scores.clone()
        for row, length in enumerate(self.lengths):
            seen = input_ids[row, self.width - length :].unique()
            values = scores[row, seen]
            scores[row, seen] = torch.where(
                values > 0, values / self.options.repetition_penalty, values * self.options.repetition_penalty
            )
        return scores


def nucleus(scores: torch.Tensor, options: GenerateOptions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token ids from most to least probable, which of them may be drawn, float64 probabilities), each [batch, vocab].

    top_k, then top_p of what top_k leaves, then min_p; each leaves the first few of the order, and at least one.
    """
    probabilities, order = scores.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    keep = probabilities > 0  # 0 is what something before took out
    if options.top_k:
        keep[:, options.top_k :] = False
    if options.top_p < 1:
        cumulative = (probabilities * keep).cumsum(-1)
        keep &= cumulative - probabilities < options.top_p * cumulative[:, -1:]
        keep[:, 0] = True
    if options.min_p:
        keep &= probabilities >= options.min_p * probabilities[:, :1]
    return order, keep, probabilities
