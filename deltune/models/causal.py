"""Causal attention of whole rows, or of the documents in one, as one autograd node on CPUs, which cuts documents without a
zero-filled gradient for each.

The forward pass is torch's kernel, and so is the backward pass where that is quicker. In bfloat16 it takes five to eight
times as long as the forward one; then the square of probabilities is made again, for some heads at a time, and each
gradient is one batched product. Scores and softmax are float32 at least, and so are sums within a product;
other factors and results are rounded.

Shapes: query and output gradient [rows, heads, seq, head], key and value [rows, key heads, seq, head]; documents are
ranges along seq that cover it. heads = key heads x groups.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltune.weights.scratch import copied, scratch

# documents of at most so many tokens have their backward pass in squares here, others in torch's kernel (docs/attention.md)
LONGEST = {torch.bfloat16: 512}
BLOCK = 128  # queries whose scores are made at a time, with the keys that any of them sees
STEP = 32  # tokens to whose multiples a square is made larger: its products' kernels are made for their shapes (filler.py)
ROOM = 1 << 20  # probabilities at a time: 2 MB in bfloat16, about a core's cache


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
    """Each document, and whether its backward pass goes in squares."""
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
                    _in_squares(q, k, v, g, *into, ctx.scale)
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


def _in_squares(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, scale: float) -> None:
    """Fill dq, dk and dv of one document, or of one in every row, some rows and heads at a time."""
    rows, heads, length = query.shape[:3]
    groups = heads // key.shape[1]
    many = max(1, ROOM // (groups * length * length))  # key heads at a time
    rows_at_once, heads_at_once = max(1, many // key.shape[1]), min(many, key.shape[1])
    for row, first in itertools.product(range(0, rows, rows_at_once), range(0, key.shape[1], heads_at_once)):
        part, last = slice(row, row + rows_at_once), first + heads_at_once
        own, of_queries = (part, slice(first, last)), (part, slice(first * groups, last * groups))
        _square(query[of_queries], key[own], value[own], gradient[of_queries], scale, dq[of_queries], dk[own], dv[own])


def _square(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, scale: float, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """The same at once. n = rows x key heads; the groups' queries stand below each other, as factors of the same keys."""
    tokens, head = key.shape[2:]
    n, groups = key.shape[0] * key.shape[1], query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    length = -(-tokens // STEP) * STEP
    # products of factors that do not lie together take up to three times as long
    q, g = (_longer(name, t, length).view(n, groups * length, head) for name, t in (("query", query), ("gradient", gradient)))
    k, v = (_longer(name, t, length).view(n, length, head) for name, t in (("key", key), ("value", value)))
    p = _probabilities(copied("wide query", q, wide).view(n, groups, length, head), copied("wide key", k, wide), scale, q.dtype)
    p.view(n, groups, length, length)[:, :, tokens:] = 0

    def part(of: Tensor, shape: torch.Size) -> Tensor:
        return of.view(*shape[:2], length, head)[:, :, :tokens]

    found = scratch("found", k, k.dtype, n, length, head)
    dv.copy_(part(torch.bmm(p.transpose(1, 2), g, out=found), dv.shape))
    ds = torch.bmm(g, v.transpose(1, 2), out=scratch("slopes", p, p.dtype, *p.shape))
    torch._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)  # which sums in float32
    torch.mul(part(torch.bmm(ds.transpose(1, 2), q, out=found), dk.shape), scale, out=dk)
    torch.mul(part(torch.bmm(ds, k, out=scratch("found", q, q.dtype, *q.shape)), dq.shape), scale, out=dq)


def _longer(name: str, tensor: Tensor, length: int) -> Tensor:
    """A contiguous copy [rows, heads, length, head] in memory of that name, of zeros beyond the tensor's own tokens."""
    copy, tokens = scratch(name, tensor, tensor.dtype, *tensor.shape[:2], length, tensor.shape[3]), tensor.shape[2]
    copy[:, :, :tokens], copy[:, :, tokens:] = tensor, 0
    return copy


def _probabilities(q: Tensor, k: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """[n, groups x seq, seq] of queries [n, groups, seq, head] and keys [n, seq, head], rounded to `dtype`; a block of queries at
    a time with the keys that any of it sees."""
    n, groups, length, head = q.shape
    p = scratch("probabilities", q, dtype, n, groups, length, length)
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        scores = scratch("scores", q, q.dtype, n, groups, end - begin, end)
        scores[..., :begin] = 0
        scores[..., begin:] = _unseen(end - begin, q.dtype, str(q.device))
        queries = q[:, :, begin:end].reshape(n, -1, head)
        scores.view(n, -1, end).baddbmm_(queries, k[:, :end].transpose(1, 2), alpha=scale)
        p[:, :, begin:end, :end] = torch.softmax(scores, -1, out=scores)
        p[:, :, begin:end, end:] = 0
    return p.view(n, groups * length, length)


@functools.lru_cache(maxsize=64)
def _unseen(length: int, dtype: torch.dtype, device: str) -> Tensor:
    """-inf where a key comes after the query [queries, keys], else 0."""
    return torch.full((length, length), float("-inf"), dtype=dtype, device=device).triu_(1)
