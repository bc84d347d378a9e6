"""Starts that are taken out of W, on a quantised layer: it then holds Q(W - C) and C beside it, C = s·B₀·A₀.

Both together are nearer to W than Q(W), for C takes a part of W that is not rounded. The delta is what it is on any base,
ΔW = s·(B·A - B₀·A₀), so that it can be switched, merged and trained as everywhere, and is nothing at its start. W is the
weight before it was rounded, as its file has it: one that is rounded twice is further from it than one that is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltune import weights
from deltune.adapters.adapted import Adapted
from deltune.adapters.delta import Delta
from deltune.adapters.layers import out_in
from deltune.adapters.wrapper import original, wrappers
from deltune.errors import AdapterError

Originals = Callable[[str], Tensor]  # a layer's full name -> its weight as its file has it


def is_quantised(module: nn.Module) -> bool:
    """Whether a layer, or the one in a wrapper, stores its weight quantised."""
    weight = original(module)._parameters.get("weight")
    return weight is not None and weights.is_quantised(weight)


def exact_weight(module: nn.Module, place: str, originals: Originals) -> Tensor:
    """W [out, in] before it was rounded, on the layer's device. Raises AdapterError if it is not that layer's."""
    stored = stored_weight(module)
    W = originals(place)
    if W.shape != stored.shape:
        raise AdapterError(f"{place}: its weight before it was quantised is {list(W.shape)}, and the layer has {list(stored.shape)}: it is another model's")
    return W.to(stored.device)


def stored_weight(module: nn.Module) -> Tensor:
    """The codes of [out, in], whichever way the layer has its weight."""
    layer = original(module)
    return out_in(layer, layer.weight.detach())


def _store(module: nn.Module, weight: Tensor) -> None:
    layer = original(module)
    layer.weight = nn.Parameter(out_in(layer, weight), requires_grad=False)


@torch.no_grad()
def take_out(module: nn.Module, delta: Delta, W: Tensor) -> bool:
    """Have a quantised layer hold Q(W - C) and C, for what the delta's start takes out; False if there is nothing to do.

    A second start on the same layer is not taken out: it finds the layer as it is and changes nothing either way.
    """
    stored, factors = stored_weight(module), delta.taken_out()
    if factors is None or weights.held_beside(stored) is not None:
        return False
    left, right, scale = factors
    _store(module, weights.quantised_beside(stored, W, left * scale, right))
    return True


@torch.no_grad()
def put_back(module: nn.Module, W: Tensor) -> None:
    """Have a quantised layer hold Q(W) again, as it was loaded."""
    _store(module, weights.quantised_like(stored_weight(module), W))


@torch.no_grad()
def follow_starts(model: nn.Module) -> None:
    """Have quantised layers fit the starts that their adapters hold now, e.g. after a checkpoint of another machine was
    loaded, on which a start came out otherwise in its last digits. Where they fit nothing is read or written."""
    for _, layer in wrappers(model):
        if not isinstance(layer, Adapted) or layer.taken is None or layer.taken.name not in layer.adapters or not is_quantised(layer):
            continue
        delta, beside = layer.adapters[layer.taken.name], weights.held_beside(layer.base_layer.weight)
        left, right, scale = delta.taken_out()
        if not all(torch.equal(a, b.to(a)) for a, b in zip(beside, (left * scale, right), strict=True)):
            W = layer.taken.exact()
            put_back(layer, W)
            take_out(layer, delta, W)
