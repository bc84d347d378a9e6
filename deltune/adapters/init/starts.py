"""Starts of a pair with ΔW = s·B·A: each gives A [rank, in] and B [out, rank] from a generator, or from W [out, in].

A start whose product is not zero leaves the function alone only if whoever asked subtracts it again: RESIDUAL names
those that are meant so. Random numbers are drawn on the CPU in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltune.adapters import draw
from deltune.adapters.init import svd
from deltune.weights import Rounding, float_view

if TYPE_CHECKING:
    from deltune.adapters.methods.lora import LoraConfig  # what a config says of its start

Pair = tuple[Tensor, Tensor]

# ---------------------------------------------------------------- without looking at W


def one_zero(rank: int, n_in: int, n_out: int, generator: torch.Generator, asked: LoraConfig, embedding: bool = False) -> Pair:
    """One factor drawn, the other zero: B, or the one that is trained alone. An embedding's A is zero, as in PEFT."""
    zero_a = asked.train == "A" or (embedding and asked.train == "both")
    shape = (n_out, rank) if zero_a else (rank, n_in)
    if embedding:
        drawn = draw.normal(shape, 1.0, generator)
    elif asked.init == "gaussian":
        drawn = draw.normal(shape, 1 / rank, generator)
    else:
        drawn = draw.kaiming(shape, generator, fan=n_out if zero_a else n_in)
    return (torch.zeros(rank, n_in), drawn) if zero_a else (drawn, torch.zeros(n_out, rank))


def orthogonal(rank: int, n_in: int, n_out: int, generator: torch.Generator) -> Pair:
    """B·A = 0 up to rounding while neither is zero: halves of an orthogonal matrix's rows, spread by Gaussians, over ten."""
    Q = draw.orthogonal(rank, rank, generator)
    A = draw.normal((n_in, rank // 2), 1.0, generator) @ Q[1::2] / 10
    B = draw.normal((n_out, rank // 2), 1.0, generator) @ Q[0::2] / 10
    return A.T, B


def nonzero(rank: int, n_in: int, n_out: int, generator: torch.Generator, gamma: float) -> Pair:
    """Both uniform within ±γ/√in (arXiv:2505.23194); B's fan is `in` as well."""
    bound = gamma / n_in**0.5
    return draw.uniform((rank, n_in), bound, generator), draw.uniform((n_out, rank), bound, generator)


def from_nothing(rank: int, n_in: int, n_out: int, generator: torch.Generator, asked: LoraConfig, embedding: bool = False) -> Pair:
    """The start without data. For a start that looks at W it is the plain one, a no-op, until W is looked at."""
    if asked.init == "orthogonal":
        return orthogonal(rank, n_in, n_out, generator)
    if asked.init == "nonzero":
        return nonzero(rank, n_in, n_out, generator, asked.gamma)
    return one_zero(rank, n_in, n_out, generator, asked, embedding)


# ---------------------------------------------------------------- from W


def split(U: Tensor, S: Tensor, V: Tensor, scale: float) -> Pair:
    """The pair with scale·B·A = U S Vᵀ, its values shared evenly: both factors are divided by √scale."""
    root = (S / scale).sqrt()
    return (V * root).T, U * root


def pissa(W: Tensor, rank: int, scale: float, generator: torch.Generator, asked: LoraConfig) -> Pair:
    """The largest components of W (arXiv:2404.02948)."""
    return split(*svd.largest(W, rank, generator, asked.svd), scale)


def milora(W: Tensor, rank: int, scale: float, generator: torch.Generator, asked: LoraConfig) -> Pair:
    """The smallest components of W (arXiv:2406.09044), or others: those in the middle, the largest, some at random."""
    k = min(W.shape)
    if asked.part == "min":
        return split(*svd.smallest(W, rank, generator, asked.svd), scale)
    if asked.part == "max":
        return pissa(W, rank, scale, generator, asked)
    begin = (k - rank) // 2
    places = range(begin, begin + rank) if asked.part == "mid" else torch.randperm(k, generator=generator)[:rank].sort()[0].tolist()
    return split(*svd.chosen(W, places), scale)


def olora(W: Tensor, rank: int, scale: float, generator: torch.Generator, asked: LoraConfig) -> Pair:
    """B = Q[:, :r], A = R[:r] of W = QR (arXiv:2406.01775); the scale comes on top, as published.

    Q's first r columns are those of W's first r columns alone, and the first r rows of R are QᵀW.
    """
    Q = torch.linalg.qr(float_view(W[:, :rank]))[0]
    return svd.left_product(Q, W), Q


def mica(W: Tensor, rank: int, scale: float, generator: torch.Generator, asked: LoraConfig) -> Pair:
    """B: left singular vectors of the smallest values; A zero (arXiv:2604.01694)."""
    U = svd.smallest(W, rank, generator, asked.svd)[0]
    return torch.zeros(rank, W.shape[1], dtype=W.dtype, device=W.device), U


def loftq(W: Tensor, rank: int, scale: float, generator: torch.Generator, asked: LoraConfig, rounding: Rounding | None = None) -> Pair:
    """What rounding loses of W (arXiv:2310.08659): in turn Q = the rounded W - R and R = the best rank-r part of W - Q.

    It is the base's own rounding, or NF4 in blocks of 64 for a base that is not quantised. Both factors are divided by √s, so that s·B·A = R for any alpha; the published code holds for s = 1 alone.
    """
    parts = None
    for _ in range(asked.loftq_iterations):
        rest = W if parts is None else W - (parts[0] * parts[1]) @ parts[2].T
        parts = svd.largest(W - (rounding or Rounding()).round_trip(rest), rank, generator, asked.svd)
    assert parts is not None
    return split(*parts, scale)


FROM_BASE: dict[str, Callable[[Tensor, int, float, torch.Generator, LoraConfig], Pair]] = {
    "pissa": pissa,
    "milora": milora,
    "olora": olora,
    "mica": mica,
    "loftq": loftq,
}
RESIDUAL = frozenset({"pissa", "milora", "olora", "loftq"})  # their s·B·A is taken out of W
READ_STORED = frozenset({"pissa", "olora"})  # take W in the type that it is stored in; the others in float32 or wider
