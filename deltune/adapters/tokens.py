"""Rows of single tokens that an adapter of any method trains beside its own change: `trainable_token_indices`.

They are `TrainableTokens` on the tables that the config names, under the adapter's name, in the file as PEFT writes them.
The rows are trained whole; the base's own rows of tokens that it has been given are zeros (see tables.py), so what the
adapter adds is exactly the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltune.adapters.bank import Bank
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Delta
from deltune.adapters.layers import kind_of
from deltune.adapters.methods.rows import LEAF, Rows, TrainableTokens, TrainableTokensConfig
from deltune.adapters.targets import ends_with, inside, nearest
from deltune.adapters.wrapper import TrainedCopy, original, walk, wrappers
from deltune.errors import AdapterError
from deltune.tables import tables, tied

KEY = "trainable_token_indices"  # PEFT's word
IN_FULL = "What fits: both tables trained in full, adapter.modules_to_save=[embed_tokens, lm_head]"


class RowsBeside(Rows):
    """The rows, by the names that PEFT's LoRA gives them."""

    def leaves(self) -> dict[str, str]:
        return {"rows": f"model.{self.key}.token_adapter.{LEAF}"}


class TokensBeside(TrainableTokens):
    """A part of an adapter whose method is another one."""

    beside_method = True

    @classmethod
    def banks(cls, config: AdapterConfig) -> dict[str, tuple[str, type[Bank]]]:
        return {"shared": ("tied", RowsBeside)}

    def to_file(self) -> dict[str, Tensor]:
        return {}  # PEFT writes the rows once, with the bank

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """The bank has them."""


@dataclass(frozen=True)
class BesideConfig(TrainableTokensConfig):
    """Rows beside a method's change."""

    @staticmethod
    def delta_class() -> type[Delta]:
        return TokensBeside


def places(model: nn.Module, config: AdapterConfig, taken: Mapping[str, nn.Module], saved: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, BesideConfig]]:
    """The tables whose rows a config trains, by full name, each with the config of its part. `taken` are the layers that the
    method adapts, `saved` the modules that are trained in full.

    Raises AdapterError for a name that means no table, or one that is adapted or trained otherwise.
    """
    given = config.trainable_token_indices
    if not given:
        return {}
    modules = {name: module for name, module in walk(model) if name}
    if isinstance(given, dict):
        named = {place: ids for ending, ids in given.items() for place in _ending(modules, ending)}
    else:
        embedding, _ = tables(model)
        named = {next(name for name, module in modules.items() if module is embedding): given}
    found: dict[str, tuple[nn.Module, BesideConfig]] = {}
    for place, ids in named.items():
        if place in taken:
            raise AdapterError(f"{KEY}: {place} is adapted as a whole (targets); name targets without it, or train it in full (modules_to_save)")
        if any(inside(place, other) for other in saved) or isinstance(modules[place], TrainedCopy):
            raise AdapterError(f"{KEY}: {place} is trained in full (modules_to_save), its rows included; leave it out of one of both")
        if kind_of(original(modules[place])) not in TokensBeside.kinds:
            raise AdapterError(f"{KEY}: {place} is a {type(original(modules[place])).__name__}; rows are trained of Embedding and Linear. {IN_FULL}")
        found[place] = modules[place], BesideConfig(targets=[place], token_indices=list(ids), dtype=config.dtype)
    return found


def _ending(modules: Mapping[str, nn.Module], ending: str) -> list[str]:
    found = [name for name in modules if ends_with(name, ending)]
    if not found:
        raise AdapterError(f"{KEY}: {ending!r} matches no module of the model.{nearest(ending, modules)}")
    return found


def ties_agree(found: Mapping[str, tuple[nn.Module, BesideConfig]], ties: Mapping[str, tuple[nn.Module, str]]) -> None:
    """AdapterError if two names mean one table and its rows are not the same."""
    for place, (_, lead) in ties.items():
        if place in found and found[place][1].token_indices != found[lead][1].token_indices:
            raise AdapterError(f"{KEY}: {place} and {lead} are one table, and other rows are given for each")


def for_rows(model: nn.Module, ids: Sequence[int]) -> list[int] | dict[str, list[int]]:
    """`trainable_token_indices` for these rows of both tables: a list where one table is both, which then follows."""
    embedding, head = tables(model)
    if head is None or tied(embedding, head):
        return list(ids)
    names = {id(module): name for name, module in walk(model) if name}
    return {names[id(module)]: list(ids) for module in (embedding, head)}


@torch.no_grad()
def set_rows(model: nn.Module, table: nn.Module, ids: Sequence[int], values: Tensor, name: str = "default") -> None:
    """Start rows [n, dim] of a table, as the adapter trains them: its own rows, or those of its copy of the whole table.

    Raises AdapterError if it trains neither.
    """
    for _, wrapper in wrappers(model):
        if wrapper is table and name in wrapper.adapters:
            part: Any = wrapper.adapters[name]
            rows, order = (part.weight, list(ids)) if isinstance(wrapper, TrainedCopy) else _own_rows(part, ids)
            rows[order] = values.to(rows)
            return
    raise AdapterError(f"new tokens have rows, in the input embeddings or the output head, that this adapter does not train. {IN_FULL}")


def _own_rows(part: Any, ids: Sequence[int]) -> tuple[Tensor, list[int]]:
    if not isinstance(part, TrainableTokens):
        raise AdapterError(f"{part.site.name}: new tokens need rows of their own, and the method adapts the whole table; name targets without it, or train it in full (modules_to_save)")
    place_of = {i: place for place, i in enumerate(part.config.token_indices)}
    lacking = [i for i in ids if i not in place_of]
    if lacking:
        raise AdapterError(f"{part.site.name}: token_indices lacks {lacking[0]}, the row of a new token")
    return part.shared.rows, [place_of[i] for i in ids]
