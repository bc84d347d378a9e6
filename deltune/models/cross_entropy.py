"""Cross-entropy of a linear layer's output without the output: a chunk of rows at a time, its gradient in the same pass.

A chunk of logits is made by one matrix product, turned in place into the gradient of its summed loss, and used up by
the products that follow from it; so nothing is recomputed and nothing as large as [rows, vocab] is ever held. Exponents
and sums are taken in float32 (float64 for float64) on blocks of rows that stay in a core's cache: there a pass over the
logits costs a tenth of what it costs in memory.

Shapes: states [rows, width]; weight [vocab, width]; bias [vocab]; z and logits [rows, vocab]; targets [rows]. There may
be fewer targets than states: what is beyond them is filler, which is multiplied and counts for nothing (see filler.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltune.models.filler import rounded

# Bytes of one chunk of logits, and the rows that it has in any case: with fewer the weight is read too often (docs/loss.md).
CHUNK_BYTES = {"cpu": 28 << 20, "cuda": 256 << 20}
MIN_ROWS = 256
# Bytes of the float32 block on which exponents are taken; on a CPU half of a core's second-level cache, for each thread.
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
TILE_BYTES = 8 << 20  # of a weight's gradient that is made in a short type before it is added up in float32
LIFT = {torch.float16: 64.0}  # by what the chunk's gradient is larger in a type whose small numbers end early


@dataclass(frozen=True)
class Tail:
    """From the output z of a model's head to its logits: scale·z, or softcap·tanh(scale·z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        if self.softcap is None:
            return z if self.scale == 1.0 else z * self.scale
        return (z * (self.scale / self.softcap)).tanh() * self.softcap


def linear_cross_entropy(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, tail: Tail = Tail(), *,
    chunk: int | None = None, device: str | None = None,
) -> Tensor:
    """Σ −log softmax(tail(states·weightᵀ + bias))[target], a scalar in float32 (float64 for float64).

    `chunk` is the number of rows in one, `device` the type of device whose sizes are taken (default: where states are).
    Under autocast the products are in its type, as a linear layer's are. Gradients of states, weight and bias are made
    in the forward pass, where they are needed, and can be taken once.
    """
    kernel = _liger(states, weight, tail, bias)
    if kernel is not None:
        return kernel(weight, states if tail.scale == 1.0 else states * tail.scale, targets, bias)
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (states, weight, bias))
    return _LinearCrossEntropy.apply(states, weight, bias, targets, tail, needs, chunk, device)


def _liger(states: Tensor, weight: Tensor, tail: Tail, bias: Tensor | None) -> Callable[..., Tensor] | None:
    """Liger's kernel of the same loss (arXiv:2410.10989), where it is installed and can serve: on CUDA, in one type, and
    with the scale taken to the states, which a bias does not allow."""
    if not states.is_cuda or (tail.scale != 1.0 and bias is not None) or importlib.util.find_spec("liger_kernel") is None:
        return None
    if not _product_dtype(states, weight) == states.dtype == weight.dtype:
        return None
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=tail.softcap, accum_dtype=torch.float32)


@torch.no_grad()
def linear_scores(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, tail: Tail = Tail(), *, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """(loss of each row in float32, whether its target is the most probable token), each [rows]."""
    dtype = _product_dtype(states, weight)
    states, weight, bias = (None if t is None else t.to(dtype) for t in (states, weight, bias))
    losses, hits = [], []
    for rows, z in _chunks(states, weight, bias, chunk or chunk_rows(weight, dtype, states.device.type)):
        wanted = targets[rows]
        found, right = _score_(z[: len(wanted)], wanted, tail, gradient=False, hits=True)
        losses.append(found)
        hits.append(right)
    empty = states.new_zeros(0, dtype=_wide(dtype))
    return torch.cat([empty, *losses]), torch.cat([empty.bool(), *hits])


def cross_entropy_of(z: Tensor, targets: Tensor, tail: Tail = Tail()) -> Tensor:
    """The same of a head's output that is there already, as a scalar; what is kept is its gradient."""
    return _CrossEntropy.apply(z, targets, tail, torch.is_grad_enabled() and z.requires_grad)


def scores_of(z: Tensor, targets: Tensor, tail: Tail = Tail()) -> tuple[Tensor, Tensor]:
    """As `linear_scores`, of a head's output that is there already."""
    losses, hits = _score_(z.clone(), targets, tail, gradient=False, hits=True)
    return losses, hits


def chunk_rows(weight: Tensor, dtype: torch.dtype, device: str, trained: bool = False) -> int:
    """Rows in a chunk of logits. For a trained weight at least as many as it has columns: the chunk is then as large as
    the weight's gradient, which is there anyway, and has to be gone through the less often."""
    vocab, width = weight.shape
    rows = max(MIN_ROWS, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (vocab * dtype.itemsize))
    return max(rows, width) if trained else rows


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, tail: Tail,
        needs: tuple[bool, bool, bool], chunk: int | None, device: str | None,
    ) -> Tensor:
        dtype = _product_dtype(states, weight)
        x, W, b = (None if t is None else t.detach().to(dtype) for t in (states, weight, bias))
        kind = device or states.device.type
        num_rows = chunk or chunk_rows(weight, dtype, kind, trained=needs[1])
        lift = LIFT.get(dtype, 1.0)
        loss = x.new_zeros((), dtype=_wide(dtype))
        x_grad = torch.empty_like(x) if needs[0] else None
        b_sum = loss.new_zeros(bias.shape) if needs[2] else None
        W_sum = _WeightGradient(weight, dtype, single=len(x) <= num_rows) if needs[1] else None
        for rows, z in _chunks(x, W, b, num_rows):
            wanted = targets[rows]
            found, _ = _score_(z[: len(wanted)], wanted, tail, gradient=any(needs), lift=lift, sums=b_sum, device=kind)
            z[len(wanted) :] = 0
            loss += found.sum()
            if x_grad is not None:
                torch.mm(z, W, out=x_grad[rows])
            if W_sum is not None:
                W_sum.add(z, x[rows])
        ctx.lift = lift
        ctx.gradients = (x_grad, None if W_sum is None else W_sum.sum, b_sum)
        ctx.dtypes = (states.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        made = _once(ctx)
        factor = gradient / ctx.lift
        scaled = (None if g is None else g.mul_(factor).to(dtype) for g, dtype in zip(made, ctx.dtypes, strict=True))
        return *scaled, None, None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, targets: Tensor, tail: Tail, needed: bool) -> Tensor:
        made = z.detach().clone()
        ctx.lift = LIFT.get(z.dtype, 1.0)
        losses, _ = _score_(made, targets, tail, gradient=needed, lift=ctx.lift)
        if needed:
            ctx.save_for_backward(made)  # and not as an attribute, which a checkpoint around this would not let go
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _first_only()
        (made,) = ctx.saved_tensors
        return made * (gradient / ctx.lift), None, None, None


def _once(ctx: Any) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass has made. They are scaled in place and given away, so there is no second time."""
    _first_only()
    if ctx.gradients is None:
        raise RuntimeError("the gradient of a loss that was computed in chunks can be taken only once: compute the loss anew")
    made, ctx.gradients = ctx.gradients, None
    return made


def _first_only() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("a loss that was computed in chunks has no second derivative. What fits: fast=off")


class _WeightGradient:
    """Σ over chunks of zᵀ·states [vocab, width] in float32; where there is a `single` chunk, its product as it comes."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, single: bool):
        self.direct = single or dtype == _wide(dtype)
        # zeros and not empty memory, since there may be no chunk at all
        self.sum = torch.zeros(weight.shape, dtype=dtype if self.direct else _wide(dtype), device=weight.device)
        self.tile = max(1, TILE_BYTES // (weight.shape[1] * dtype.itemsize))

    def add(self, z: Tensor, states: Tensor) -> None:
        if self.direct:
            torch.addmm(self.sum, z.T, states, out=self.sum)  # counters of FLOPs do not know `addmm_`
            return
        for part, total in zip(z.split(self.tile, dim=1), self.sum.split(self.tile), strict=True):
            total.add_(part.T @ states)


def _chunks(states: Tensor, weight: Tensor, bias: Tensor | None, num_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """(rows, states·weightᵀ + bias of these rows) in one workspace, which the next chunk overwrites. Chunks are even, but for
    what rounding leaves."""
    total = len(states)
    if total == 0:
        return
    size = min(num_rows, rounded(-(-total // -(-total // num_rows))))
    workspace = states.new_empty(min(size, total), weight.shape[0])
    for start in range(0, total, size):
        rows = slice(start, min(start + size, total))
        z = workspace[: rows.stop - rows.start]
        if bias is None:
            torch.mm(states[rows], weight.T, out=z)
        else:
            torch.addmm(bias, states[rows], weight.T, out=z)
        yield rows, z


def _score_(
    z: Tensor, targets: Tensor, tail: Tail, *, gradient: bool, hits: bool = False, lift: float = 1.0,
    sums: Tensor | None = None, device: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(loss of each row, whether the target is the first largest logit). With `gradient`, z becomes lift · the gradient
    of the summed loss; else its content is lost. `sums` [vocab] has the sums of its columns added to it, unrounded."""
    num_rows, vocab = z.shape
    wide, kind = _wide(z.dtype), device or z.device.type
    losses = z.new_empty(num_rows, dtype=wide)
    right = z.new_empty(num_rows, dtype=torch.bool) if hits else None
    cores = torch.get_num_threads() if kind == "cpu" else 1
    size = max(1, min(num_rows, cores * BLOCK_BYTES.get(kind, BLOCK_BYTES["cuda"]) // (vocab * wide.itemsize)))
    scratch = None if z.dtype == wide else z.new_empty(size, vocab, dtype=wide)
    slopes = z.new_empty(size, vocab, dtype=wide) if gradient and tail.softcap is not None else None
    # without numbers one block stands for all: they differ in nothing
    starts = range(0, num_rows, size)[: 1 if z.device.type == "meta" else None]
    for start in starts:
        rows = slice(start, min(start + size, num_rows))
        part, wanted = z[rows], targets[rows, None]
        block = part if scratch is None else scratch[: len(part)].copy_(part)
        slope = None
        if tail.softcap is not None:
            block.mul_(tail.scale / tail.softcap).tanh_()
            if slopes is not None:
                slope = torch.mul(block, block, out=slopes[: len(part)]).neg_().add_(1.0)
            block.mul_(tail.softcap)
        elif tail.scale != 1.0:
            block.mul_(tail.scale)
        top = block.amax(-1, keepdim=True)
        losses[rows] = (top - block.gather(1, wanted)).squeeze(1)
        if right is not None:
            right[rows] = block.argmax(-1) == targets[rows]
        total = block.sub_(top).exp_().sum(-1, keepdim=True)
        losses[rows] += total.log().squeeze(1)
        if not gradient:
            continue
        size_of_one = tail.scale * lift
        block.mul_(size_of_one / total)
        block.scatter_(1, wanted, block.gather(1, wanted) - size_of_one)
        if slope is not None:
            block.mul_(slope)
        if sums is not None:
            sums += block.sum(0)
        if scratch is not None:
            part.copy_(block)
    return losses, right


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type of exponents and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product_dtype(states: Tensor, weight: Tensor) -> torch.dtype:
    """The type in which a linear layer would multiply these now, which autocast has a say in."""
    return torch.nn.functional.linear(states[:0], weight[:0]).dtype
