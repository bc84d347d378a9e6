"""Bank: tensors that the deltas of one scope share. Every delta of the scope holds the same Bank as a submodule.

Scopes: `model` (one bank), `type` (layers that have one name but for their block's number), `block` (layers of one
decoder block), `category` (PEFT's FRoD: the last two parts of the name), `tied` (layers that hold one weight). A scope's key is part of the tensors' names in
the file where there can be more than one. A delta may hold several banks, each under an attribute of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltune.adapters.config import AdapterConfig
from deltune.adapters.layers import Site
from deltune.adapters.stored import Stored, storage_of
from deltune.errors import AdapterError

NUMBER = re.compile(r"\.\d+(?=\.|$)")


def type_key(name: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `self_attn.q_proj`: what layers of one type have in common."""
    found = list(NUMBER.finditer(f".{name}"))
    return f".{name}"[found[0].end() :].lstrip(".") or name if found else name


def block_key(name: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `model.layers.3`; empty for a layer outside any block."""
    found = NUMBER.search(f".{name}")
    return f".{name}"[1 : found.end()] if found else ""


def category_key(name: str) -> str:
    """`model.layers.3.self_attn.q_proj` -> `self_attn_q_proj`: what PEFT's FRoD calls layers that share a basis."""
    *before, last = name.split(".")
    if not before or before[-1].isdigit():
        return last
    # BERT has two layers `output.dense` in a block; the attention's would else fall together with the other
    return "attention_output" if [*before[-2:], last] == ["attention", "output", "dense"] else f"{before[-1]}_{last}"


SCOPES: dict[str, Callable[[str], str]] = {
    "model": lambda name: "",
    "type": type_key,
    "block": block_key,
    "category": category_key,
}


class Bank(Stored):
    """Shared tensors: Parameters are trained, buffers are not. Written as a Delta is: build, then reset and start."""

    def __init__(self, config: AdapterConfig, key: str, sites: Sequence[Site], name: str = "bank"):
        super().__init__()
        self.config = config
        self.name = name  # the deltas' attribute that holds it
        self.key = key  # of the scope; "" for the whole model
        self.sites = list(sites)  # the scope's layers, in the model's order
        self.build()

    @property
    def storage(self) -> dict[str, Any]:
        return storage_of(self.config, self.sites[0])

    @property
    def max_in(self) -> int:
        return max(site.n_in for site in self.sites)

    @property
    def max_out(self) -> int:
        return max(site.n_out for site in self.sites)

    def one_shape(self) -> tuple[int, int]:
        """(out, in) of the scope's layers; AdapterError if they differ."""
        shapes = {(site.n_out, site.n_in) for site in self.sites}
        if len(shapes) > 1:
            names = ", ".join(f"{site.name} {site.n_out}×{site.n_in}" for site in self.sites[:3])
            raise AdapterError(f"layers that share tensors must have one shape, and these differ: {names}")
        return next(iter(shapes))

    def build(self) -> None:
        raise NotImplementedError

    def reset(self, generator: torch.Generator) -> None:
        """The start without data; see Delta.reset."""
        raise NotImplementedError

    @property
    def starts_from_base(self) -> bool:
        return type(self).start is not Bank.start

    def start(self, weights: Mapping[str, Callable[[], Tensor]], generator: torch.Generator) -> None:
        """The part of the start that looks at the scope's weights: layer name -> a call that gives W [out, in]."""

    def leaves(self) -> dict[str, str]:
        """Names of the saved tensors, each to its name in the file, which comes after the file's common prefix."""
        end = f".{self.key}" if self.key else ""
        return {name: f"{self.name}.{name}{end}" for name in self.state_dict()}


class Projection(Bank):
    """Frozen random tensors that `config.projection_seed` alone decides, whatever the seed of the run.

    The draws are elementwise, on the CPU in float32, so that they come out the same bit for bit: a checkpoint leaves them
    out and a resumed run draws them again. An adapter's file holds them, unless `config.save_projection` is off.
    """

    def declare(self, name: str, *shape: int) -> None:
        """Declare one of the tensors; its name is also the name in the file."""
        self.register_buffer(name, torch.empty(*shape, **self.storage), persistent=False)

    def draw(self, generator: torch.Generator) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.draw(torch.Generator("cpu").manual_seed(self.config.projection_seed))

    def leaves(self) -> dict[str, str]:
        return {name: name for name, _ in self.named_buffers()} if self.config.save_projection else {}

    def to_file(self) -> dict[str, Tensor]:
        return {leaf: self.get_buffer(name) for name, leaf in self.leaves().items()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        if not self.config.save_projection:
            self.draw(torch.Generator("cpu").manual_seed(self.config.projection_seed))
        for name, leaf in self.leaves().items():
            self.get_buffer(name).copy_(tensors[leaf])


def scopes(config: AdapterConfig, sites: Sequence[Site], name: str, scope: str, bank_class: type[Bank]) -> dict[str, Bank]:
    """The bank of each layer, by layer name; layers of one scope get the same one. `name`: the deltas' attribute for it."""
    keys = {site.name: (site.tied_to or site.name) if scope == "tied" else SCOPES[scope](site.name) for site in sites}
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(keys[site.name], []).append(site)
    banks = {key: bank_class(config, key, group, name) for key, group in groups.items()}
    return {site.name: banks[keys[site.name]] for site in sites}
