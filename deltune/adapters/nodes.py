"""Autograd nodes of adapted linear layers and of gated products: they save as little as there is, and pass over [tokens, out] once.

Legend: y = x Wᵀ + b + s (x Aᵀ) Bᵀ with x [..., in], W [out, in], A [r, in], B [out, r]; with a stretch d [out] (a gain
that is learned apart, less 1) y = (1 + d) ⊙ (y - b) + b. W and b are frozen. All products are taken in one type, that
of the activations; A and B may be stored in a longer one, and their gradients come back in it.

Layers that are fed the same x share the product with their stacked A, and the sum of their gradients by x is formed in
place. Where x carries a recipe what that is made of is saved in its place. Dropout's mask is drawn again, never saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltune.recipe import Recipe, recipe_of


class Layer(NamedTuple):
    """The tensors of one linear layer with at most one pair (A, B)."""

    weight: Tensor
    bias: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    stretch: Tensor | None = None


class How(NamedTuple):
    scale: float = 1.0
    dropout: float = 0.0  # of what A sees of x


WIDTH = len(Layer._fields)


@dataclass(frozen=True)
class Activation:
    """An elementwise function, and its gradient by (gradient of the output, input, where to write it)."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


def _silu_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)


def _gelu_backward(approximate: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda grad, x, out: torch.ops.aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out)


def _relu_backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, _silu_backward),
    "gelu": Activation(F.gelu, _gelu_backward("none")),
    "gelu_tanh": Activation(lambda x: F.gelu(x, approximate="tanh"), _gelu_backward("tanh")),
    "relu": Activation(F.relu, _relu_backward),
}


def any_activation(function: Callable[[Tensor], Tensor]) -> Activation:
    """An elementwise function whose gradient nobody wrote down: autograd finds it, on the function computed again."""

    def backward(grad: Tensor, x: Tensor, out: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = function(x)
        return out.copy_(torch.autograd.grad(y, x, grad)[0])

    return Activation(function, backward)


# ---------------------------------------------------------------- products, without autograd


def base_product(x: Tensor, layer: Layer, dtype: torch.dtype) -> Tensor:
    """x Wᵀ + b, a fresh tensor."""
    return F.linear(x, layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))


def add_product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out + left @ right in place, in one pass. All are matrices."""
    return torch.addmm(out, left, right, out=out)


def rows(x: Tensor) -> Tensor:
    """[..., n] as [tokens, n]."""
    return x.reshape(-1, x.shape[-1])


def _stacked(layers: Sequence[Layer], hows: Sequence[How], of: Sequence[int], dtype: torch.dtype) -> Tensor:
    """s·A of these layers, one below the other [sum of r, in]."""
    parts = [layers[i].A if hows[i].scale == 1 else layers[i].A * hows[i].scale for i in of]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def _ranks(layers: Sequence[Layer], of: Sequence[int]) -> list[int]:
    return [layers[i].A.shape[0] for i in of]


def _sharing(layers: Sequence[Layer], hows: Sequence[How]) -> tuple[list[int], list[int]]:
    """Numbers of the layers whose pairs see x itself, and of those that see it through dropout."""
    pairs = [i for i, layer in enumerate(layers) if layer.A is not None]
    return [i for i in pairs if not hows[i].dropout], [i for i in pairs if hows[i].dropout]


@dataclass
class Products:
    """What the forward pass of layers with one input leaves for their backward pass."""

    outputs: list[Tensor]
    narrow: list[Tensor | None]  # s·A x [tokens, r] of each layer
    states: list[Tensor | None]  # of the random numbers, before each layer's dropout


def products(x: Tensor, layers: Sequence[Layer], hows: Sequence[How], dtype: torch.dtype) -> Products:
    """The outputs [..., out] of layers that are fed x [..., in], which is of this dtype."""
    flat = rows(x)
    plain, dropping = _sharing(layers, hows)
    narrow: list[Tensor | None] = [None] * len(layers)
    states: list[Tensor | None] = [None] * len(layers)
    if plain:
        z = flat @ _stacked(layers, hows, plain, dtype).T
        for i, part in zip(plain, z.split(_ranks(layers, plain), dim=1), strict=True):
            narrow[i] = part
    for i in dropping:  # in the layers' order, as they would draw one after the other
        states[i] = _random_state(x.device)
        narrow[i] = F.dropout(flat, hows[i].dropout) @ _stacked(layers, hows, [i], dtype).T
    outputs = []
    for i, layer in enumerate(layers):
        y = base_product(x, layer, dtype)
        y2 = y.view(-1, y.shape[-1])
        if narrow[i] is not None:
            add_product(y2, narrow[i], layer.B.to(dtype).T)
        if layer.stretch is not None:
            short = layer.stretch.to(dtype)  # as the difference from 1 it counts where 1 + d would be 1
            y2.addcmul_(y2, short)
            if layer.bias is not None:
                y2.sub_(layer.bias.to(dtype) * short)
        outputs.append(y)
    return Products(outputs, narrow, states)


@dataclass(frozen=True)
class Needed:
    """Which gradients are asked for: by x, and by A, B and the stretch of each layer."""

    x: bool
    layers: tuple[tuple[bool, bool, bool], ...]

    @property
    def any(self) -> bool:
        return self.x or any(any(of) for of in self.layers)

    @property
    def reads_x(self) -> bool:
        return any(A for A, _, _ in self.layers)


def products_backward(
    grads: Sequence[Tensor | None], x: Tensor | None, layers: Sequence[Layer], hows: Sequence[How], made: Products, needed: Needed,
) -> tuple[Tensor | None, list[tuple[Tensor | None, Tensor | None, Tensor | None]]]:
    """Gradients by x [tokens, in], and by A, B and the stretch of each layer. x [tokens, in] is read if `reads_x` only."""
    dx: Tensor | None = None
    found: list[list[Tensor | None]] = [[None, None, None] for _ in layers]
    by_narrow: dict[int, Tensor] = {}
    for i, (grad, layer) in enumerate(zip(grads, layers, strict=True)):
        if grad is None:
            continue
        for_A, for_B, for_stretch = needed.layers[i]
        g, dtype = rows(grad), grad.dtype
        if layer.stretch is not None:
            spare = torch.mul(g, rows(made.outputs[i])) if for_stretch else torch.empty_like(g)
            found[i][2] = _stretch_gradient(g, spare, layer) if for_stretch else None
            g = torch.addcmul(g, g, layer.stretch.to(dtype), out=spare)
        if needed.x:
            W = layer.weight.to(dtype)
            dx = g @ W if dx is None else add_product(dx, g, W)
        if layer.A is None:
            continue
        if needed.x or for_A:
            by_narrow[i] = g @ layer.B.to(dtype)
        if for_B:  # this way round it is the faster product
            found[i][1] = (made.narrow[i].T @ g).T.to(layer.B.dtype)
    plain, dropping = ([i for i in of if i in by_narrow] for of in _sharing(layers, hows))
    if plain:
        dz = by_narrow[plain[0]] if len(plain) == 1 else torch.cat([by_narrow[i] for i in plain], dim=1)
        if needed.x:
            add_product(dx, dz, _stacked(layers, hows, plain, dz.dtype))
        wanted = [needed.layers[i][0] for i in plain]
        if any(wanted):
            parts = (dz.T @ x).split(_ranks(layers, plain))
            for i, part, want in zip(plain, parts, wanted, strict=True):
                found[i][0] = _times(part.to(layers[i].A.dtype), hows[i].scale) if want else None
    for i in dropping:
        dz = by_narrow[i]
        noise = _noise_again(dz.shape[0], layers[i].A.shape[1], dz, hows[i].dropout, made.states[i])
        if needed.x:
            dx.addcmul_(dz @ _stacked(layers, hows, [i], dz.dtype), noise)
        if needed.layers[i][0]:
            found[i][0] = _times((dz.T @ noise.mul_(x)).to(layers[i].A.dtype), hows[i].scale)
    return dx, [tuple(of) for of in found]


def _times(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else tensor * scale


def _stretch_gradient(g: Tensor, gy: Tensor, layer: Layer) -> Tensor:
    """Σ g ⊙ h over tokens [out], of g ⊙ y. h = (y - b) / (1 + d) is what was stretched; y is saved, which others hold as well.

    Where the gain is zero h cannot be told from y. Such a row has no weights, so h and its gradient are zero as well.
    """
    d = layer.stretch
    found = gy.sum(0).to(d.dtype)
    if layer.bias is not None:
        found = found - layer.bias.to(d.dtype) * g.sum(0).to(d.dtype)
    return torch.where(d == -1, 0, found / (1 + d))


def _random_state(device: torch.device) -> Tensor | None:
    if device.type == "meta":
        return None
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _noise_again(num: int, width: int, like: Tensor, rate: float, state: Tensor | None) -> Tensor:
    """What dropout multiplied with, [tokens, in]. The run's random numbers go on as if nothing had been drawn."""
    ones = like.new_ones(num, width)
    if state is None:
        return F.dropout(ones, rate)
    now = _random_state(like.device)
    _set_random_state(like.device, state)
    try:
        return F.dropout(ones, rate)
    finally:
        _set_random_state(like.device, now)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Within a node every product is in the type that the node says."""
    kind = "cpu" if device.type == "meta" else device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


# ---------------------------------------------------------------- nodes


@dataclass(frozen=True)
class Form:
    """What a node is told besides tensors."""

    hows: tuple[How, ...]
    dtype: torch.dtype  # in which it computes
    recipe: Recipe | None
    middle: Middle | None = None  # for a feed-forward node


def _save(ctx: Any, form: Form, x: Tensor, cast: Tensor, layers: Sequence[Layer], parts: Sequence[tuple[int, Products]], *others: Tensor) -> None:
    """Keep for backward what it needs of layers: x or what it is made of, tensors of the layers, narrow products."""
    read = any(ctx.needs_input_grad[2 + WIDTH * i + 2] for i, _ in enumerate(layers) if form.middle is None or i < len(layers) - 1)
    kept = () if not read else (cast,) if form.recipe is None else form.recipe.saved
    numbers = [z for _, made in parts for z in made.narrow]
    stretched = [y if layer.stretch is not None else None for (at, made) in parts for layer, y in zip(layers[at:], made.outputs, strict=False)]
    ctx.save_for_backward(*kept, *(t for layer in layers for t in layer), *numbers, *stretched, *others)
    # what a recipe is made of goes the way of saved tensors alone, which checkpointing follows
    recipe = None if form.recipe is None else replace(form.recipe, saved=())
    ctx.form, ctx.counts = replace(form, recipe=recipe), (len(kept), len(layers))
    ctx.states = [state for _, made in parts for state in made.states]
    ctx.shape, ctx.x_dtype = x.shape, x.dtype
    ctx.set_materialize_grads(False)


class _Kept(NamedTuple):
    x: tuple[Tensor, ...]
    layers: list[Layer]
    made: Products
    others: tuple[Tensor, ...]


def _kept(ctx: Any) -> _Kept:
    saved = ctx.saved_tensors
    num_x, num = ctx.counts
    at = num_x + WIDTH * num
    layers = [Layer(*saved[num_x + WIDTH * i : num_x + WIDTH * (i + 1)]) for i in range(num)]
    made = Products(list(saved[at + num : at + 2 * num]), list(saved[at : at + num]), ctx.states)
    return _Kept(saved[:num_x], layers, made, saved[at + 2 * num :])


def _x_again(form: Form, kept: _Kept) -> Tensor | None:
    if not kept.x:
        return None
    x = kept.x[0] if form.recipe is None else form.recipe.make(kept.x)
    return rows(x).to(form.dtype)


def _needed(ctx: Any) -> Needed:
    flags = ctx.needs_input_grad
    return Needed(flags[1], tuple(tuple(flags[2 + WIDTH * i + 2 : 2 + WIDTH * (i + 1)]) for i in range(ctx.counts[1])))


def _part(made: Products, of: slice) -> Products:
    return Products(made.outputs[of], made.narrow[of], made.states[of])


class LinearNode(torch.autograd.Function):
    """Linear layers that are fed the same x: (form, x, *tensors of each layer) -> their outputs."""

    @staticmethod
    def forward(ctx: Any, form: Form, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        layers = layers_of(tensors)
        with without_autocast(x.device):
            cast = x.to(form.dtype)
            made = products(cast, layers, form.hows, form.dtype)
        _save(ctx, form, x, cast, layers, [(0, made)])
        return tuple(made.outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        kept, form = _kept(ctx), ctx.form
        with without_autocast(kept.layers[0].weight.device):
            dx, found = products_backward(grads, _x_again(form, kept), kept.layers, form.hows, kept.made, _needed(ctx))
        return (None, _as_x(ctx, dx), *_flat(found))


def layers_of(tensors: Sequence[Tensor | None]) -> list[Layer]:
    return [Layer(*tensors[i : i + WIDTH]) for i in range(0, len(tensors), WIDTH)]


def _as_x(ctx: Any, dx: Tensor | None) -> Tensor | None:
    return None if dx is None else dx.view(ctx.shape).to(ctx.x_dtype)


def _flat(found: Sequence[tuple[Tensor | None, ...]]) -> list[Tensor | None]:
    return [gradient for of in found for gradient in (None, None, *of)]


@dataclass(frozen=True)
class Middle:
    """What stands between the first and the last layers of a feed-forward block: act(gate) ⊙ up, or act alone.

    `chunked`: gate and up are the halves of one layer's output, the gate being the half of that number.
    """

    activation: Activation
    gated: bool
    chunked: int | None = None

    def inputs(self, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        if self.chunked is None:
            return outputs[0], outputs[1] if self.gated else None
        halves = outputs[0].chunk(2, dim=-1)
        return halves[self.chunked], halves[1 - self.chunked]

    def forward(self, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
        """(act(gate), the product)."""
        a = self.activation.forward(gate)
        return a, a if up is None else a * up

    def product(self, gate: Tensor, up: Tensor | None) -> Tensor:
        return self.forward(gate, up)[1]

    def backward(self, dh: Tensor, gate: Tensor, up: Tensor | None, a: Tensor, spare: Tensor | None) -> list[Tensor]:
        """Gradients by the first layers' outputs. Overwrites dh, a and `spare`, a tensor of their size if there is one."""
        if up is None:
            return [self.activation.backward(dh, gate, a if spare is None else spare)]
        if self.chunked is None:
            d_up = torch.mul(dh, a, out=torch.empty_like(dh) if spare is None else spare)
            return [self.activation.backward(dh.mul_(up), gate, a), d_up]
        whole = dh.new_empty(*dh.shape[:-1], 2 * dh.shape[-1])
        halves = whole.chunk(2, dim=-1)
        torch.mul(dh, a, out=halves[1 - self.chunked])
        self.activation.backward(dh.mul_(up), gate, halves[self.chunked])
        return [whole]


class GatedNode(torch.autograd.Function):
    """act(gate) ⊙ up of two tensors, which are all that it saves."""

    @staticmethod
    def forward(ctx: Any, middle: Middle, gate: Tensor, up: Tensor) -> Tensor:
        ctx.middle = middle
        ctx.save_for_backward(gate, up)
        return middle.product(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        a = ctx.middle.activation.forward(gate)
        d_up = dh * a
        return None, ctx.middle.activation.backward(dh * up, gate, a), d_up


class FeedForwardNode(torch.autograd.Function):
    """(form, x, *tensors of the first layers and of the last) -> last(middle(first(x))). Saves the first layers' outputs."""

    @staticmethod
    def forward(ctx: Any, form: Form, x: Tensor, *tensors: Tensor | None) -> Tensor:
        layers = layers_of(tensors)
        with without_autocast(x.device):
            cast = x.to(form.dtype)
            first = products(cast, layers[:-1], form.hows[:-1], form.dtype)
            h = form.middle.product(*form.middle.inputs(first.outputs))
            last = products(h, layers[-1:], form.hows[-1:], form.dtype)
        _save(ctx, form, x, cast, layers, [(0, first), (len(layers) - 1, last)], *first.outputs)
        return last.outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        kept, form, needed = _kept(ctx), ctx.form, _needed(ctx)
        of_first = Needed(needed.x, needed.layers[:-1])
        of_last = Needed(of_first.any, needed.layers[-1:])
        dx, found = None, [(None, None, None)] * (len(kept.layers) - 1)
        with without_autocast(grad.device):
            gate, up = form.middle.inputs(kept.others)
            gate, up = rows(gate), None if up is None else rows(up)
            a, h = form.middle.forward(gate, up) if of_last.reads_x else (form.middle.activation.forward(gate), None)
            dh, found_last = products_backward([grad], h, kept.layers[-1:], form.hows[-1:], _part(kept.made, slice(-1, None)), of_last)
            if of_first.any:
                grads = form.middle.backward(dh, gate, up, a, h)
                first = _part(kept.made, slice(0, -1))
                dx, found = products_backward(grads, _x_again(form, kept), kept.layers[:-1], form.hows[:-1], first, of_first)
        return (None, _as_x(ctx, dx), *_flat([*found, *found_last]))


def linears(x: Tensor, layers: Sequence[Layer], hows: Sequence[How], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The outputs of layers that are fed x, computed in `dtype`."""
    return LinearNode.apply(Form(tuple(hows), dtype, recipe_of(x)), x, *(t for layer in layers for t in layer))


def feed_forward(x: Tensor, layers: Sequence[Layer], hows: Sequence[How], middle: Middle, dtype: torch.dtype) -> Tensor:
    """The last layer of the middle of the others, which are fed x, computed in `dtype`."""
    return FeedForwardNode.apply(Form(tuple(hows), dtype, recipe_of(x), middle), x, *(t for layer in layers for t in layer))
