"""Adapted: a frozen layer with named deltas. Its output is the base's, changed by each active delta in turn.

Merging writes the deltas into a copy of the stored weight and keeps the original, so unmerging is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune import weights
from deltune.adapters.config import name_of
from deltune.adapters.delta import Delta
from deltune.adapters.layers import out_in, site_of
from deltune.adapters.wrapper import Wrapper
from deltune.dist import gathered
from deltune.errors import AdapterError


class Fused(Protocol):
    def answer(self, layer: Adapted, x: Tensor) -> Tensor | None:
        """What the layer answers to x; None where it is to compute that plainly."""


class Taken(NamedTuple):
    """What was taken out of a quantised layer before it was rounded, see quantised.py."""

    name: str  # of the adapter whose start it is
    exact: Callable[[], Tensor]  # gives W [out, in] as its file has it


class Adapted(Wrapper):
    """A Linear, Conv1D, Embedding or norm with deltas. Called as the layer is called."""

    def __init__(self, name: str, layer: nn.Module):
        super().__init__(layer)
        self.site = site_of(name, layer)
        self.merged: list[str] = []
        self._originals: dict[str, nn.Parameter] = {}  # the layer's own tensors while deltas are merged
        self.taken: Taken | None = None
        self.fused: Fused | None = None  # what computes this layer in one node where it can, see fused.py
        self._squares: tuple[Tensor, tuple[Any, ...], Tensor] | None = None  # a weight, what tells that it has changed, ‖rows‖²

    def forward(self, x: Tensor) -> Tensor:
        y = None if self.fused is None else self.fused.answer(self, x)
        return Below(self, self.to_run())(x) if y is None else y

    def to_run(self) -> list[str]:
        """The adapters that act now and are not in the weight. AdapterError if one in it would have to be trained."""
        if self.merged and self.training and torch.is_grad_enabled() and not self.fixed.issuperset(self.merged):
            raise AdapterError(f"{self.site.name}: adapters {', '.join(self.merged)} are merged and would not be trained; unmerge the model first")
        return [name for name in self.running if name not in self.merged]

    def dropout_of(self, name: str) -> float:
        """The share of its input that this adapter drops now."""
        silent = not self.training or name in self.fixed or self.site.kind == "embedding"
        return 0.0 if silent else self.adapters[name].config.dropout

    def originals(self) -> dict[str, Tensor]:
        """The base layer's tensors as they were before any merge."""
        return self._originals or dict(self.base_layer.named_parameters(recurse=False))

    def row_squares(self) -> Tensor:
        """‖W‖² of each row [out] of the layer's weight as it stands, float32 or wider; worked out when the weight changes.

        A change through `.data` goes unseen, as it does by autograd.
        """
        weight = self.base_layer.weight
        with gathered(weight):
            state = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
            if self._squares is None or self._squares[0] is not weight or self._squares[1] != state:
                # the weight itself is kept, not its id or address: those are given to another one once it is freed
                self._squares = (weight, state, weights.row_squares(out_in(self.base_layer, weight)))
        return self._squares[2]

    def merge(self, names: Sequence[str]) -> None:
        """Fold these deltas into the layer's weight. `unmerge` takes them out again, bit for bit."""
        self.check_mergeable(names)
        self._originals = weights.snapshot(self.base_layer)
        self.fold(names)
        self.merged = list(names)

    def unmerge(self) -> None:
        weights.restore(self.base_layer, self._originals)
        self._squares = None  # which would keep the merged weight alive
        self._originals, self.merged = {}, []

    def check_mergeable(self, names: Sequence[str], *, exactly: bool = False) -> None:
        for name in names:
            delta = self.adapters[name]
            why = delta.no_matrix(delta.config)
            if why and (exactly or not delta.merges_roughly(delta.config)):
                raise AdapterError(f"{self.site.name}: adapter {name} ({name_of(delta.config)}) cannot be merged, for {why}")
            if delta.adds_bias and not self.site.has_bias:
                raise AdapterError(f"{self.site.name}: adapter {name} changes the bias, and this layer has none to merge into")

    @torch.no_grad()
    def fold(self, names: Sequence[str], share: float = 1.0) -> None:
        """Write deltas, or a share of each, into the base layer's own tensors, one after the other."""
        layer, stored = self.base_layer, self.base_layer.weight
        if weights.is_quantised(stored):  # nothing is rounded to codes anew: the layer has plain values from here on
            layer.weight = nn.Parameter(weights.dequantised(stored, torch.float32), requires_grad=stored.requires_grad)
        for name in names:
            delta: Delta = self.adapters[name]
            product, moves_bias = delta.product(), type(delta).bias_delta is not Delta.bias_delta
            # a product without a bias needs no W, which would be a whole copy of a weight in a short type
            W = weights.float_view(out_in(layer, layer.weight)) if product is None or moves_bias or self.site.kind == "norm" else None
            bias = layer.bias if self.site.has_bias else None
            bias_delta = delta.bias_delta(W, bias) if moves_bias else None
            if product is None or self.site.kind == "norm":
                weights.add_to_weight(layer.weight, out_in(layer, delta.delta(W) * share))
            else:
                left, right, scale = product
                stored = (left, right) if self.site.kind == "linear" else (right.T, left.T)
                weights.add_product_to_weight(layer.weight, *stored, scale * share)
            if bias_delta is not None:
                weights.add_to_weight(bias, bias_delta * share)
        if weights.is_quantised(stored):
            layer.weight.data = layer.weight.data.to(stored.dtype)  # once, and not for each delta


class Below:
    """The layer as the delta at `place` among the running ones finds it: the base with the deltas before it."""

    __slots__ = ("adapted", "place", "running")

    def __init__(self, adapted: Adapted, running: Sequence[str], place: int | None = None):
        self.adapted = adapted
        self.running = running
        self.place = len(running) if place is None else place

    def __call__(self, x: Tensor) -> Tensor:
        if self.place == 0:
            return self.adapted.base_layer(x)
        below = Below(self.adapted, self.running, self.place - 1)
        return self.adapted.adapters[self.running[below.place]](x, below)

    def weight(self) -> Tensor:
        layer = self.adapted.base_layer
        with gathered(layer.weight):
            W = weights.float_view(out_in(layer, layer.weight))
        before = self.running[: self.place]
        self.adapted.check_mergeable(before, exactly=True)
        for name in before:
            delta = self.adapted.adapters[name]
            W = W + delta.delta(W)
        return W

    def stored(self) -> Tensor:
        if self.place:
            return self.weight()
        layer = self.adapted.base_layer
        with gathered(layer.weight):
            return out_in(layer, layer.weight.detach())

    def row_squares(self) -> Tensor | None:
        return None if self.place else self.adapted.row_squares()

    def bias(self) -> Tensor | None:
        layer = self.adapted.base_layer
        if not self.adapted.site.has_bias:
            return None
        with gathered(layer.bias):
            b = weights.float_view(layer.bias)
        before = self.running[: self.place]
        for place, name in enumerate(before):
            delta = self.adapted.adapters[name]
            if type(delta).bias_delta is not Delta.bias_delta:
                change = delta.bias_delta(Below(self.adapted, self.running, place).weight(), b)
                b = b if change is None else b + change
        return b

    def called_with(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        layer = self.adapted.base_layer
        tensors = {"weight": out_in(layer, W).to(layer.weight.dtype)}
        if b is not None:
            tensors["bias"] = b.to(layer.bias.dtype)
        return torch.func.functional_call(layer, tensors, (x,))

    @property
    def bare(self) -> bool:
        return self.place == 0 and not watched(self.adapted.base_layer)

    def drop(self, x: Tensor) -> Tensor:
        rate = self.adapted.dropout_of(self.running[self.place])
        return F.dropout(x, rate) if rate else x


def watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class does: by hooks, or by a forward put on the module itself."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)
