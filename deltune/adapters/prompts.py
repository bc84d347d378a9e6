"""How learned vectors enter a decoder and leave its output: callers see their own positions, and no others.

Soft tokens stand in front of the embeddings; a prefix stands in front of the keys and values of every layer. With a
cache both enter once, when the cache is empty; from then on they are in it, and only mask and positions tell of them.

Legend: n is the number of soft tokens, m of prefix positions; ids [batch, seq]; embeddings [batch, seq, width]; a
prefix is [layers, 2 (keys, values), kv_heads, m, head_dim].
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltune.adapters.layers import Site
from deltune.adapters.whole import ModelDelta, decoder, model_site
from deltune.adapters.wrapper import Beside
from deltune.errors import AdapterError


class Prompted(Beside):
    """Runs the prompts of a decoder, those of the adapter that was switched on first in front of the next one's."""

    def hooks(self, host: nn.Module) -> list[RemovableHandle]:
        return [
            host.register_forward_pre_hook(self.enter, with_kwargs=True),
            host.register_forward_hook(self.leave, with_kwargs=True),
        ]

    def enter(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        """The decoder's arguments with the prompts in them."""
        if not self.running:
            return None
        parameters = inspect.signature(host.forward).parameters
        given = dict(zip(parameters, args, strict=False)) | kwargs
        refuse_what_cannot_be_extended(given)
        num_soft, num_prefix = self.num_soft, self.num_prefix
        cache = given.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        first = past == 0
        embeds = given.get("inputs_embeds")
        batch, seq = (given["input_ids"] if embeds is None else embeds).shape[:2]
        refuse_what_has_no_room(host, seq if first else past - num_soft - num_prefix + seq, num_soft + num_prefix)
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None:
            if positions is None and "position_ids" in parameters:
                # by the mask and not by the place in the row: padding on the left must not part prompt and text
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -seq:]
            given["attention_mask"] = torch.cat([mask.new_ones(batch, num_soft + num_prefix), mask], dim=1)
        if positions is not None:
            own = torch.arange(num_prefix, num_prefix + num_soft if first else num_prefix, device=positions.device)
            own = own.to(positions.dtype).expand(positions.shape[0], -1)
            given["position_ids"] = torch.cat([own, positions + num_soft + num_prefix], dim=1)
        if first and num_soft:
            embeds = host.get_input_embeddings()(given["input_ids"]) if embeds is None else embeds
            soft = torch.cat([self.dropped(name, self.adapters[name].soft()) for name in self.running if self.adapters[name].num_soft])
            given["input_ids"] = None
            given["inputs_embeds"] = torch.cat([soft.to(embeds.dtype).expand(batch, -1, -1), embeds], dim=1)
        if first and num_prefix:
            given["past_key_values"] = self.filled(host, cache, batch)
        return (), given

    @property
    def num_positions_taken(self) -> int:
        """Positions of the model's window that are not the caller's; `models.generation` asks."""
        return self.num_soft + self.num_prefix

    @property
    def num_soft(self) -> int:
        return sum(self.adapters[name].num_soft for name in self.running)

    @property
    def num_prefix(self) -> int:
        return sum(self.adapters[name].num_prefix for name in self.running)

    def dropped(self, name: str, vectors: Tensor) -> Tensor:
        rate = self.adapters[name].config.dropout
        return F.dropout(vectors, rate) if rate and self.training and name not in self.fixed else vectors

    def filled(self, host: Any, cache: Any, batch: int) -> Any:
        """The cache that was given, empty, or a new one, with the prefix in it."""
        from transformers import DynamicCache

        if host.training:
            refuse_recomputing(host)
        cache = DynamicCache(config=host.config) if cache is None else cache
        prefix = torch.cat([self.dropped(name, self.adapters[name].prefix()) for name in self.running if self.adapters[name].num_prefix], dim=3)
        kind = prefix.device.type  # in autocast the layers' keys and values are of its type
        dtype = torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else host.dtype
        for layer, (keys, values) in enumerate(prefix.to(dtype)):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)
        return cache

    def leave(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The decoder's output without the positions of soft tokens, and without a cache that nobody asked for."""
        if self.num_prefix and kwargs.get("use_cache") is False and not isinstance(output, tuple):
            output.past_key_values = None  # else `generate` would go on from it
        num_soft = self.num_soft
        if not num_soft or not self.has_soft(kwargs):
            return None
        if isinstance(output, tuple):  # hidden states of layers, if any, stay as they are
            return (output[0][:, num_soft:], *output[1:])
        output.last_hidden_state = output.last_hidden_state[:, num_soft:]
        if "hidden_states" in output:
            output.hidden_states = tuple(states[:, num_soft:] for states in output.hidden_states)
        return output

    def has_soft(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether soft tokens were put in front, told by what the decoder was called with: nothing else is in the cache
        then. No state is kept between the two hooks, so nothing is left over from a forward that failed."""
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        return embeds is not None and (cache is None or cache.get_seq_length() == self.num_prefix + embeds.shape[1])


def refuse_recomputing(host: nn.Module) -> None:
    """AdapterError if layers are recomputed in the backward pass: transformers then takes the cache from them."""
    if any(layer.gradient_checkpointing for layer in host.modules() if hasattr(layer, "gradient_checkpointing")):
        raise AdapterError(
            "a prefix lives in the cache, and recomputed layers are not given one, so it would have no effect in training. "
            "What fits: model.gradient_checkpointing=none, or a method whose prompt is at the input"
        )


def refuse_what_has_no_room(host: Any, num_text: int, num_own: int) -> None:
    """AdapterError where a text has room in the model's window by itself and not with the prompt in front: positions
    past the window are untrained, and models with learned positions have none."""
    config = host.config.get_text_config()
    window = config.max_position_embeddings if hasattr(config, "max_position_embeddings") else None
    if window is not None and num_text <= window < num_text + num_own:
        raise AdapterError(
            f"a prompt of {num_own} positions and a text of {num_text} tokens are more than the model's window of {window}. "
            f"What fits: texts of at most {window - num_own} (data.max_length), or a shorter prompt"
        )


def refuse_what_cannot_be_extended(given: Mapping[str, Any]) -> None:
    """AdapterError for arguments that say something of each position and that a prompt has no word for."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    cache = given.get("past_key_values")
    if cache is not None and cache.is_compileable:
        raise AdapterError(f"a prompt makes the sequence longer, and a {type(cache).__name__} has one size. What fits: a DynamicCache")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise AdapterError("a prompt needs an attention mask [batch, seq]")
    if positions is not None and positions.ndim != 2:
        raise AdapterError(f"a prompt needs positions [batch, seq], and these are {list(positions.shape)}")
    if given.get("token_type_ids") is not None:
        raise AdapterError("a prompt's positions have no token type; call the model without token_type_ids")


class Prompt(ModelDelta):
    """Learned vectors in front of what a decoder reads. Subclasses give `soft` or `prefix`, and say how many."""

    named_alone = True
    beside = Prompted
    num_soft: int = 0
    num_prefix: int = 0
    method: ClassVar[str]

    @classmethod
    def find(cls, model: nn.Module, config: Any) -> dict[str, nn.Module]:
        name, found = decoder(model, cls.method)
        return {name: found}

    @classmethod
    def site_of(cls, name: str, host: Any) -> Site:
        config = host.config.get_text_config()
        return model_site(name, config.hidden_size, host.get_input_embeddings().weight)

    def soft(self) -> Tensor:
        """[n, width]"""
        raise NotImplementedError

    def prefix(self) -> Tensor:
        """[layers, 2, kv_heads, m, head_dim]"""
        raise NotImplementedError
