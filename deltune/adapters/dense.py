"""Dense: (W + D) x where a change D of W's size is formed anyway, and its gradients, in as few products as stay exact.

Legend: W and D are [out, in], x is [..., in], g the gradient of y [..., out]; "short" are types below float32. In float32
or wider W + D is one product: it is rounded as finely as the products are. In a short type a small D would vanish in W,
at every x alike, so it is a product of its own, added to W x. The gradient g (W + D) is one product in every type: what
the sum loses there is below the rounding of the result, and no parameter depends on it. So a step takes two products
besides W's two in a short type, and one in the others: gᵀx, the gradient of D.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltune.weights.scratch import copied


def is_short(dtype: torch.dtype) -> bool:
    return dtype.itemsize < 4


def plus(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor) -> Tensor:
    """(W + D) x + b, all of one type. W has no gradient."""
    return Plus.apply(x, W, b, D)


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left·right in this type: each factor is rounded to it, and sums are formed in float32."""
    return left.to(dtype) @ right.to(dtype)


def joined(x: Tensor, W: Tensor, b: Tensor | None, D: Tensor) -> Tensor:
    """(W + D) x + b [..., out], without gradient."""
    if not is_short(x.dtype):
        return F.linear(x, W + D, b)
    y = F.linear(x, W, b)
    y.view(-1, len(W)).addmm_(x.reshape(-1, x.shape[-1]), D.T)
    return y


def outer(g: Tensor, x: Tensor) -> Tensor:
    """gᵀx [out, in]: what W's gradient would be."""
    across = g.reshape(-1, g.shape[-1]).T
    if is_short(g.dtype) and g.device.type == "cpu":
        across = copied("across", across)  # with a transposed left factor such products take up to twice as long
    return across @ x.reshape(-1, x.shape[-1])


class Plus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, D: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, D)
        return joined(x, W, b, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        x, W, D = ctx.saved_tensors
        to_x = g @ (W + D) if ctx.needs_input_grad[0] else None
        to_b = g.reshape(-1, g.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return to_x, None, to_b, outer(g, x) if ctx.needs_input_grad[3] else None
