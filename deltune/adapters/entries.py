"""Entries: a matrix that is zero but at fixed places, and its product with activations at the cost of these places alone.

Legend: the matrix is [out, in] with n values [n] at `places` [2, n], their rows and columns; x is [..., in].
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deltune.adapters import dense
from deltune.errors import AdapterError
from deltune.weights import dequantised, is_quantised
from deltune.weights.scratch import copied, scratch

# Off the CPU: up to this many entries for each row or column, single entries are cheaper than a dense product.
FEW = 2
# On it: from this share of the matrix on, a dense product is cheaper (measured at 2048×2048, 512 tokens, one thread).
MANY = 0.1
SAMPLE = 1 << 16  # entries of a weight from which a bound on its largest is told
BLOCK = 1 << 18  # entries looked at together: few enough to stay in the cache


@functools.lru_cache(maxsize=16)
def permuted(total: int, count: int, seed: int) -> Tensor:
    """The first of a random order of 0 … total − 1, the same for every layer of one size: as PEFT's methods draw places."""
    return torch.randperm(total, generator=torch.Generator("cpu").manual_seed(seed))[:count].clone()


def scattered(total: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers below `total`, in order, all sets alike probable. Costs of the order of count if that is small."""
    if 4 * count > total:
        return torch.randperm(total, generator=generator)[:count].sort().values
    # as many draws as will, but for one in millions, hold enough different ones; of those, some are taken out at random
    repeated = -total * math.log1p(-count / total) - count
    found = _different(torch.randint(total, (math.ceil(count + repeated + 6 * math.sqrt(repeated) + 8),), generator=generator))
    while len(found) < count:
        found = _different(torch.cat([found, torch.randint(total, (count - len(found),), generator=generator)]))
    if len(found) == count:
        return found
    kept = torch.ones(len(found), dtype=torch.bool)
    kept[scattered(len(found), len(found) - count, generator)] = False
    return found[kept]


def _different(numbers: Tensor) -> Tensor:
    """The numbers in order, each once. NumPy sorts whole numbers four times as fast as `unique` does."""
    return torch.from_numpy(np.sort(numbers.numpy())).unique_consecutive()


def by_magnitude(W: Tensor, count: int, *, top: bool = True) -> Tensor:
    """Flat places of the entries of W with the largest magnitude, or the smallest, in order; any of those that are equal."""
    flat, sign = W.reshape(-1), 1.0 if top else -1.0
    if flat.numel() > SAMPLE and 4 * count < flat.numel():
        # a sample tells a bound that some more than these pass, and only they are sorted
        sample = sign * flat[:: flat.numel() // SAMPLE].abs()
        above = min(len(sample) - 1, int(1.2 * count / flat.numel() * len(sample)) + 64)
        bound = sample.kthvalue(len(sample) - above).values
        blocks = [(sign * block.abs() >= bound).nonzero().squeeze(1) + i * BLOCK for i, block in enumerate(flat.split(BLOCK))]
        passing = torch.cat(blocks)
        if len(passing) >= count:
            return passing[(sign * flat[passing].abs()).topk(count, sorted=False).indices].sort().values
    return (sign * flat.abs()).topk(count, sorted=False).indices.sort().values


class Entries(nn.Module):
    """The places, and what can be done with values there. `persistent`: whether a file must hold the places."""

    def __init__(self, n_out: int, n_in: int, count: int, device: torch.device, *, persistent: bool):
        super().__init__()
        self.n_out, self.n_in = n_out, n_in
        self.register_buffer("places", torch.empty(2, count, dtype=torch.int32, device=device), persistent=persistent)
        self._found: dict[str, tuple[Tensor, int, Any]] = {}  # what was found from the places, with what tells that they are still these

    @classmethod
    def at(cls, flat: Tensor, n_out: int, n_in: int, device: torch.device) -> Entries:
        """Entries that need not be saved, at these places."""
        entries = cls(n_out, n_in, len(flat), device, persistent=False)
        entries.put(flat)
        return entries

    @torch.no_grad()
    def put(self, flat: Tensor) -> None:
        """Set the places, each given as row · in + column."""
        self.places.copy_(torch.stack([flat // self.n_in, flat % self.n_in]))

    def flat(self) -> Tensor:
        """row · in + column of each place [n]."""
        return self.found("flat", lambda: self.places[0].long() * self.n_in + self.places[1])

    def found(self, what: str, find: Callable[[], Any]) -> Any:
        """What is found from the places; found anew where they have changed."""
        places, version, found = self._found.get(what, (None, None, None))
        if places is not self.places or version != self.places._version:
            with torch.inference_mode(False):  # training may come after an evaluation
                found = find()
            self._found[what] = (self.places, self.places._version, found)
        return found

    def check(self, name: str) -> None:
        """Raise AdapterError if a place is outside of the matrix."""
        rows, columns = self.places.long()
        if bool(((rows < 0) | (rows >= self.n_out) | (columns < 0) | (columns >= self.n_in)).any()):
            raise AdapterError(f"{name}: the file has entries outside of the layer's weight of {self.n_out}×{self.n_in}")

    def dense(self, values: Tensor) -> Tensor:
        """The matrix [out, in]."""
        # several times as fast as scatter_add
        return values.new_zeros(self.n_out * self.n_in).index_add(0, self.flat(), values).view(self.n_out, self.n_in)

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        """The matrix times x [..., out], in x's type."""
        if self.by_entry(x):
            y = Product.apply(x.reshape(-1, self.n_in), values.to(x.dtype), self.layout())
            return y.reshape(*x.shape[:-1], self.n_out)
        if x.device.type == "cpu" or values.numel() > FEW * (self.n_out + self.n_in):
            return DenseProduct.apply(x, values, self)
        rows, columns = self.places.long()
        picked = x.index_select(-1, columns) * values.to(x.dtype)
        return x.new_zeros(*x.shape[:-1], self.n_out).index_add(-1, rows, picked)

    def by_entry(self, x: Tensor) -> bool:
        """Whether sparse products are the faster ones. A short type has none, and fast dense ones."""
        few = self.places.shape[1] < MANY * self.n_out * self.n_in
        return x.device.type == "cpu" and few and not dense.is_short(x.dtype)

    def pays_with_weight(self, x: Tensor) -> bool:
        """Whether `plus` is cheaper than a product beside W's: it passes over W, where `forward` takes the entries for each
        token, and one of either costs about the same (measured at 2048×768, one thread)."""
        tokens = x.numel() // self.n_in
        return not self.by_entry(x) or tokens * self.places.shape[1] > self.n_out * self.n_in

    def plus(self, x: Tensor, W: Tensor, b: Tensor | None, values: Tensor, pair: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(W + the matrix) x + b [..., out], in x's type, which is W's; how the two are joined see dense.py. With a pair of
        thin matrices, A [r, in] and B [out, r], B A x is added."""
        A, B = (None, None) if pair is None else (factor.to(x.dtype) for factor in pair)
        return PlusEntries.apply(x, W, None if b is None else b.to(x.dtype), values, A, B, self)

    def outer(self, g: Tensor, x: Tensor) -> Tensor:
        """The entries of gᵀx [n], the gradient of the values. The product is the faster with its narrower side on the left."""
        if self.n_out <= self.n_in:
            return dense.outer(g, x).view(-1).take(self.flat())
        across = self.found("across", lambda: self.places[1].long() * self.n_out + self.places[0])
        return dense.outer(x, g).view(-1).take(across)

    def layout(self) -> Layout:
        """The places sorted by row and by column."""
        return self.found("layout", lambda: Layout.of(self.places, self.n_out, self.n_in))


@dataclass(frozen=True)
class Layout:
    """Places in compressed rows, for the matrix and for its transpose: where rows begin, columns, and which value each is."""

    shape: tuple[int, int]
    begins: Tensor
    columns: Tensor
    order: Tensor
    begins_t: Tensor
    columns_t: Tensor
    order_t: Tensor

    @classmethod
    def of(cls, places: Tensor, n_out: int, n_in: int) -> Layout:
        rows, columns = places.long()
        order, order_t = (rows * n_in + columns).argsort(), (columns * n_out + rows).argsort()
        return cls(
            (n_out, n_in), _begins(rows, n_out), columns[order].int(), order, _begins(columns, n_in), rows[order_t].int(), order_t
        )

    def matrix(self, values: Tensor) -> Tensor:
        return _compressed(self.begins, self.columns, values[self.order], self.shape)

    def transpose(self, values: Tensor) -> Tensor:
        return _compressed(self.begins_t, self.columns_t, values[self.order_t], self.shape[::-1])


def _times(S: Tensor, across: Tensor) -> Tensor:
    """(S · across)ᵀ for S in compressed rows; without autocast, for its short types have no such product."""
    with torch.autocast("cpu", enabled=False):
        return torch.mm(S, across).T


def _begins(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows.new_zeros(1), torch.bincount(rows, minlength=count).cumsum(0)]).int()


def _compressed(begins: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    _hear_the_notice()
    return torch.sparse_csr_tensor(begins, columns, values, shape, check_invariants=False)


@functools.cache
def _hear_the_notice() -> None:
    """torch says once a process that these tensors are in beta state; users of an adapter need not read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1), check_invariants=False)


class Product(torch.autograd.Function):
    """y = x Sᵀ for x [tokens, in]. The gradient of a value is one dot product over tokens, so no out×in tensor arises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.layout = layout
        return _times(layout.matrix(values), x.T.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, values = ctx.saved_tensors
        layout: Layout = ctx.layout
        to_x = to_values = None
        across = gradient.T.contiguous()  # [out, tokens], once for both
        if ctx.needs_input_grad[0]:
            to_x = _times(layout.transpose(values), across)
        if ctx.needs_input_grad[1]:
            to_values = _sampled(across, x, values, layout)
        return to_x, to_values, None


class DenseProduct(torch.autograd.Function):
    """y = x Sᵀ for x [..., in] by a product with the whole matrix, which is formed for it each time and kept nowhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, entries: Entries) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.entries = entries
        return nn.functional.linear(x, _alone(values, entries, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, values = ctx.saved_tensors
        entries: Entries = ctx.entries
        to_x = to_values = None
        if ctx.needs_input_grad[0]:  # under autocast the gradient's type is the shorter one
            to_x = (gradient @ _alone(values, entries, gradient.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            to_values = entries.outer(gradient, x.to(gradient.dtype)).to(values.dtype)
        return to_x, to_values, None


class PlusEntries(torch.autograd.Function):
    """As dense.plus, with a change that is its values at some places: nothing but these is kept of it, and in float32 on a
    CPU no gradient but theirs is formed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, values: Tensor, A: Tensor | None, B: Tensor | None, entries: Entries,
    ) -> Tensor:
        z = None if A is None else x.reshape(-1, entries.n_in) @ A.T
        ctx.save_for_backward(x, W, values, A, B, z)
        ctx.entries = entries
        if dense.is_short(x.dtype):
            y = dense.joined(x, W, b, _alone(values, entries, x.dtype))
        else:
            y = nn.functional.linear(x, _summed(W, values, entries.flat()), b)
        if z is not None:
            y.view(-1, entries.n_out).addmm_(z, B.T)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, W, values, A, B, z = ctx.saved_tensors
        entries: Entries = ctx.entries
        rows, g = x.reshape(-1, entries.n_in), gradient.reshape(-1, entries.n_out)
        to_x = to_values = to_A = to_B = None
        if ctx.needs_input_grad[0]:
            to_x = g @ _summed(W, values, entries.flat())
        if A is not None:
            to_z = g @ B
            to_A, to_B = to_z.T @ rows, (z.T @ g).T
            if to_x is not None:
                to_x.addmm_(to_z, A)
        if ctx.needs_input_grad[3] and entries.by_entry(x):
            to_values = _sampled(g.T.contiguous(), rows, values.to(x.dtype), entries.layout()).to(values.dtype)
        elif ctx.needs_input_grad[3]:
            to_values = entries.outer(g, rows).to(values.dtype)
        return None if to_x is None else to_x.view(x.shape), None, None, to_values, to_A, to_B, None


def _summed(W: Tensor, values: Tensor, flat: Tensor) -> Tensor:
    """W with the values added at their places, for use at once."""
    # values that exist anyway are written on
    return _added(dequantised(W) if is_quantised(W) else copied("entries added", W), values, flat)


def _alone(values: Tensor, entries: Entries, dtype: torch.dtype) -> Tensor:
    """The matrix in this type, for use at once."""
    return _added(scratch("entries alone", values, dtype, entries.n_out, entries.n_in).zero_(), values, entries.flat())


def _added(whole: Tensor, values: Tensor, flat: Tensor) -> Tensor:
    whole.view(-1).index_add_(0, flat, values.to(whole.dtype))
    return whole


def _sampled(across: Tensor, x: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """The entries of across [out, tokens] times x [tokens, in], in the order of the values."""
    sampled = torch.sparse.sampled_addmm(layout.matrix(torch.zeros_like(values)), across, x, beta=0.0)
    return torch.empty_like(values).index_copy_(0, layout.order, sampled.values())
