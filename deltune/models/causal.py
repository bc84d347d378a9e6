"""Causal attention of whole rows, or of the documents in one, as one autograd node on CPUs. It never makes the half of the
square that causal attention does not see, and cuts documents without a zero-filled gradient for each.

The forward pass is torch's kernel, and so is the backward pass where that is quicker. In bfloat16 it takes six times as
long as the forward one; then each block of queries is taken against the keys before it, in batched products. Scores and
their softmax are float32 at least; probabilities and gradients are rounded as factors of the products only.

Shapes: query and output gradient [rows, heads, seq, head], key and value [rows, key heads, seq, head]; documents are
ranges along seq that cover it. heads = key heads x groups.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# documents of at most so many tokens have their backward pass in blocks here, others in torch's kernel (docs/attention.md)
LONGEST = {torch.bfloat16: 512}
BLOCK = 128  # queries at a time
ROOM = 1 << 18  # scores at a time: 1 MB in float32, so that what is made of them stays in a core's cache


def quicker(query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int]) -> bool:
    """Whether this node is to be used, and not torch's attention for each document."""
    if query.device.type not in ("cpu", "meta") or not torch.is_grad_enabled() or not query.numel():
        return False
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False  # the first fuses by itself, transforms of functions want more than a backward pass
    fits = query.dtype == key.dtype == value.dtype and query.shape[-1] == key.shape[-1] == value.shape[-1]
    return fits and (len(starts) > 2 or starts[-1] <= LONGEST.get(query.dtype, 0))


def attend(query: Tensor, key: Tensor, value: Tensor, starts: Sequence[int], scale: float) -> Tensor:
    """The output [rows, seq, heads, head]. `starts` are where documents begin, and seq."""
    return _Causal.apply(query, key, value, tuple(starts), scale)


def _short(starts: Sequence[int], dtype: torch.dtype) -> Iterator[tuple[int, int, bool]]:
    """Each document, and whether its backward pass goes in blocks."""
    for begin, end in itertools.pairwise(starts):
        yield begin, end, end - begin <= LONGEST.get(dtype, 0)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, starts: tuple[int, ...], scale: float) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        parts, kept = [], []
        for begin, end, short in _short(starts, query.dtype):
            q, k, v = query[:, :, begin:end], _per_head(key[:, :, begin:end], groups), _per_head(value[:, :, begin:end], groups)
            out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
            parts.append(out.transpose(1, 2))
            if not short:
                kept += [out, sums]
        ctx.save_for_backward(query, key, value, *kept)
        ctx.starts, ctx.scale = starts, scale
        # where the output is kept it is not given away too, for it would then be its own graph's saved tensor
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0].clone() if kept else parts[0].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        gradient, rest = gradient.transpose(1, 2), iter(kept)
        # laid out as the projections' outputs were: [rows, seq, heads, head]
        dq, dk, dv = (t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (query, key, value))
        with torch.autocast("cpu", enabled=False):
            for begin, end, short in _short(ctx.starts, query.dtype):
                q, k, v, g, *into = (t[:, :, begin:end] for t in (query, key, value, gradient, dq, dk, dv))
                if short:
                    _in_blocks(q, k, v, g, *into, ctx.scale)
                    continue
                heads, groups = k.shape[1], q.shape[1] // k.shape[1]
                found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    g, q, _per_head(k, groups), _per_head(v, groups), next(rest), next(rest), 0.0, True, scale=ctx.scale
                )
                for target, slope in zip(into, found, strict=True):
                    target.copy_(slope if slope.shape[1] == target.shape[1] else slope.unflatten(1, (heads, groups)).sum(2))
        return dq, dk, dv, None, None


def _per_head(tensor: Tensor, groups: int) -> Tensor:
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _in_blocks(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float) -> None:
    """Fill dq, dk and dv of one document, or of one in every row, some heads at a time."""
    rows, heads, length, head = query.shape
    groups = heads // key.shape[1]
    many = max(1, ROOM // (groups * min(BLOCK, length) * length))  # key heads at a time
    for row, first in itertools.product(range(rows), range(0, key.shape[1], many)):
        own, of_queries = slice(first, first + many), slice(first * groups, (first + many) * groups)
        q, g = (t[row, of_queries].reshape(-1, groups, length, head) for t in (query, gradient))
        k, v = (t[row, own].contiguous() for t in (key, value))
        _heads(q, k, v, g, scale, dq[row, of_queries].unflatten(0, (-1, groups)), dk[row, own], dv[row, own])


def _heads(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """The same for queries [n, groups, seq, head], keys and values [n, seq, head]."""
    n, groups, length, head = q.shape
    short, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    keys, values = k.to(wide).mul(scale).transpose(1, 2), v.transpose(1, 2)
    sums = None
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        rows = groups * (end - begin)
        queries, slopes = (t[:, :, begin:end].reshape(n, rows, head) for t in (q, g))
        scores = torch.bmm(queries.to(wide), keys[:, :, :end], out=_scratch("scores", q, wide, n, rows, end))
        scores.view(n, groups, end - begin, end)[..., begin:] += _unseen(end - begin, wide, str(q.device))
        torch.softmax(scores, -1, out=scores)
        p = scores if short == wide else _scratch("probabilities", q, short, n, rows, end).copy_(scores)
        ds = torch.bmm(slopes, values[:, :, :end], out=_scratch("slopes", q, short, n, rows, end))
        torch._softmax_backward_data(ds, p, -1, short, grad_input=ds)  # which sums in float32
        torch.mul(torch.bmm(ds, k[:, :end]).view(n, groups, end - begin, head), scale, out=dq[:, :, begin:end])
        more = torch.bmm(ds.transpose(1, 2), queries), torch.bmm(p.transpose(1, 2), slopes)
        if begin == 0 and end == length:
            sums = more
        else:  # blocks are added up in the wide type
            sums = sums or [torch.zeros(n, length, head, dtype=wide, device=q.device) for _ in more]
            for total, part in zip(sums, more, strict=True):
                total[:, :end] += part
    dk.copy_(sums[0].mul_(scale))
    dv.copy_(sums[1])


_SCRATCH = threading.local()


def _scratch(name: str, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory that every block uses again: fresh memory is given page by page, which takes longer than to fill it."""
    if like.is_meta:
        return torch.empty(shape, dtype=dtype, device=like.device)  # an account of memory must not depend on earlier ones
    held: dict[Any, Tensor] = vars(_SCRATCH)
    key, size = f"{name} {dtype} {like.device}", math.prod(shape)
    if key not in held or held[key].numel() < size:
        held[key] = torch.empty(size, dtype=dtype, device=like.device)
    return held[key][:size].view(shape)


@functools.lru_cache(maxsize=64)
def _unseen(length: int, dtype: torch.dtype, device: str) -> Tensor:
    """-inf where a key comes after the query [queries, keys], else 0."""
    return torch.full((length, length), float("-inf"), dtype=dtype, device=device).triu_(1)
