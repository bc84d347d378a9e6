"""Norms and rotary embeddings of a loaded model in fewer passes over memory, each one autograd node. What a module computes is
found out by a probe, never by its name; one that is not understood stays as it is, and the record says why.

Shapes: x [..., width]; query and key [batch, heads, seq, head] in any layout, cos and sin [batch or 1, seq, head].
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltune.recipe import set_recipe
from deltune.weights.scratch import copied

ROTARY = "apply_rotary_pos_emb"
ROOM = 1 << 17  # numbers that a thread takes at a time in the wide type: what is made of them stays in its cache


@dataclass(frozen=True)
class Lean:
    """What is computed in fewer passes; or, with `why_not`, what is left as it is."""

    where: str  # full name of the module
    what: str
    why_not: str = ""


def make_lean(model: nn.Module) -> list[Lean]:
    """Put the nodes in the modules' places, by a forward on each instance. Does it anew if it was done before."""
    undo(model)
    found: list[Lean] = []
    for name, module in model.named_modules():
        if _may_be_norm(module):
            form = _form_of(module)
            if isinstance(form, Form):
                module.forward = LeanNorm(module, form)
            found.append(Lean(name, type(module).__name__, "" if isinstance(form, Form) else form))
        rotary = _rotary_of(module)
        if rotary is not None:
            why_not = _not_half_rotated(rotary) or ("it has a forward of its own" if "forward" in vars(module) else "")
            if not why_not:
                module.forward = LeanRotary(module)
            found.append(Lean(name, "rotary embedding", why_not))
    return found


def told(found: list[Lean]) -> list[str]:
    """A line for each kind of module: how many are nodes now, or why they are not."""
    kinds = Counter((record.what, record.why_not) for record in found)
    return [f"{count} x {what}: {why_not or 'one node each'}" for (what, why_not), count in kinds.items()]


def undo(model: nn.Module) -> None:
    """Every module computes by its class again."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), (LeanNorm, LeanRotary)):
            del module.forward


def _plain(*tensors: Tensor) -> bool:
    """Whether a node must not be used: in a compiler, which fuses by itself, and within transforms of functions."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return not all(type(t) in (Tensor, nn.Parameter) and t.numel() for t in tensors)


# -- norms ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """x / rms(x), times `offset` + weight; rounded to the type of x before the weight, or once after it."""

    eps: float
    offset: float
    rounded_first: bool


class LeanNorm:
    """The forward of one norm module. Where it does not fit it calls the class's."""

    def __init__(self, module: nn.Module, form: Form):
        self.module, self.form = module, form

    def __call__(self, x: Tensor) -> Tensor:
        module, form = self.module, self.form
        weight = module.weight
        if _plain(x, weight) or x.dtype != weight.dtype or not x.is_floating_point():
            return type(module).forward(module, x)
        if x.is_cuda:  # torch has one kernel for it there
            return F.rms_norm(x, weight.shape, weight if not form.offset else form.offset + weight, form.eps)
        with torch.no_grad():
            inverse = _inverse_rms(x, form.eps)
        out = _Norm.apply(x, weight, inverse, form)
        return set_recipe(out, functools.partial(_normed, form=form), x, weight, inverse)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms of each row [..., 1], in float32 at least."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x.dtype))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _normed(x: Tensor, weight: Tensor, inverse: Tensor, *, form: Form) -> Tensor:
    short, wide = x.dtype, inverse.dtype
    factor = weight if form.rounded_first else weight.to(wide)
    factor = form.offset + factor if form.offset else factor
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if short == wide:
        return torch.mul(x, inverse, out=out).mul_(factor)
    # an operation on two types makes its wide copies in fresh memory, all rows at once
    rows = max(1, ROOM * torch.get_num_threads() // len(weight))
    for part, scale, target in zip(*(t.reshape(-1, t.shape[-1]).split(rows) for t in (x, inverse, out)), strict=True):
        normed = copied("normed", part, wide).mul_(scale)
        if form.rounded_first:
            target.copy_(normed).mul_(factor)
        else:
            target.copy_(normed.mul_(factor))
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, inverse: Tensor, form: Form) -> Tensor:
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = form.offset
        return _normed(x, weight, inverse, form=form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        factor = weight.to(inverse.dtype) + ctx.offset
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        # LayerNorm's kernel for a mean of zero takes a mean off that an RMS norm does not: it is given back
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(
            gradient.contiguous(), x.contiguous(), weight.shape, torch.zeros_like(inverse), inverse, factor, None, wanted
        )
        if wanted[0]:
            mean = torch.mv(gradient.reshape(-1, len(weight)), factor.to(x.dtype)).view(inverse.shape)
            dx.add_((mean * inverse / len(weight)).to(dx.dtype))
        return dx, None if dw is None else dw.to(weight.dtype), None, None


def _may_be_norm(module: nn.Module) -> bool:
    """A module that holds one vector, takes one tensor and is called a norm; torch's LayerNorm is good as it is."""
    held = [name for name, parameter in module._parameters.items() if parameter is not None]
    if not type(module).__name__.endswith("Norm") or module._modules or isinstance(module, nn.LayerNorm):
        return False
    return held == ["weight"] and module.weight.ndim == 1 and len(inspect.signature(type(module).forward).parameters) == 2


def _form_of(module: nn.Module) -> Form | str:
    """What a norm computes, by a probe of its class on the CPU; or why it is left alone."""
    if "forward" in vars(module):
        return "it has a forward of its own"
    width = min(len(module.weight), 64)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, generator=generator, dtype=torch.float32, device="cpu")
    twin = copy.copy(module)  # its own tables of parameters, not a copy of what they hold
    constants = [v for v in vars(module).values() if isinstance(v, float)]
    try:
        tried: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for dtype in (torch.float32, torch.bfloat16):
            twin._parameters = {"weight": nn.Parameter(weight.to(dtype), requires_grad=False)}
            rows = [(scale * torch.randn(16, width, generator=generator, device="cpu")).to(dtype) for scale in (1.0, 1e-3)]
            with torch.no_grad():
                tried[dtype] = [(x, type(module).forward(twin, x)) for x in rows]
    except (RuntimeError, AttributeError, TypeError) as error:
        return f"it cannot be tried ({type(error).__name__})"
    for eps in constants:
        for offset in (0.0, 1.0):
            for rounded_first in (True, False):
                form = Form(eps, offset, rounded_first)
                if all(_same(form, weight.to(x.dtype), x, out) for pairs in tried.values() for x, out in pairs):
                    return form
    return "it does not compute weight · x / rms(x)"


def _same(form: Form, weight: Tensor, x: Tensor, out: Tensor) -> bool:
    mine = _normed(x, weight, _inverse_rms(x, form.eps), form=form)
    if out.dtype != mine.dtype or out.shape != mine.shape:
        return False
    if x.dtype == torch.float32:
        return torch.allclose(mine, out, rtol=1e-5, atol=1e-7)
    return (mine != out).float().mean().item() < 0.01  # to the bit, but where float32 was next to a border


# -- rotary embedding -------------------------------------------------------------------------------------------


class LeanRotary:
    """The forward of one attention module: its class's, in which the name of the rotary function means ours."""

    def __init__(self, module: nn.Module):
        self.module = module
        forward = type(module).forward
        theirs = forward.__globals__[ROTARY]
        names = {**forward.__globals__, ROTARY: functools.partial(rotate, theirs)}
        self.forward = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
        self.forward.__kwdefaults__ = forward.__kwdefaults__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> LeanRotary:
        return LeanRotary(copy.deepcopy(self.module, memo))


def rotate(theirs: Callable, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q · cos + (−second half of q, first half) · sin, and the same of k; by `theirs` where the node does not fit."""
    fits = q.dtype == k.dtype == cos.dtype == sin.dtype and q.shape[-1] == k.shape[-1] == cos.shape[-1] == sin.shape[-1]
    if not fits or cos.requires_grad or sin.requires_grad or _plain(q, k, cos, sin):
        return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotary.apply(q, cos, sin), _Rotary.apply(k, cos, sin)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out, half = x * cos, x.shape[-1] // 2
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        out, half = gradient * cos, gradient.shape[-1] // 2
        out[..., :half].addcmul_(gradient[..., half:], sin[..., half:])
        out[..., half:].addcmul_(gradient[..., :half], sin[..., :half], value=-1)
        return out, None, None


def _rotary_of(module: nn.Module) -> Callable | None:
    """The rotary function that a module's forward calls by its global name."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    return forward.__globals__.get(ROTARY)


@functools.lru_cache(maxsize=64)
def _not_half_rotated(theirs: Callable) -> str:
    """Why a rotary function is another than ours; empty if a probe finds them equal."""
    if list(inspect.signature(theirs).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return "its rotary function takes other arguments"
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(shape, generator=generator, device="cpu") for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8)))
    try:
        expected = theirs(q, k, cos, sin)
    except (RuntimeError, TypeError):
        return "its rotary function takes cos and sin of another width than the head's"
    with torch.no_grad():
        mine = rotate(theirs, q, k, cos, sin)
    if all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(mine, expected, strict=True)):
        return ""
    return "its rotary function turns other pairs than the two halves (interleaved, or partial)"
