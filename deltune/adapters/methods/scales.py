"""Scales and small rotations of a layer's output or input: RoAd (arXiv:2409.00119) and (IA)³ (arXiv:2205.05638).

Both multiply, so a strength of exactly 1 changes nothing. What is computed is the distance from 1, which a short number
type keeps where 1 + a small step would be rounded away.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Base, Delta, PeftFormat
from deltune.adapters.magnitude import Stretched
from deltune.adapters.targets import ends_with
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"road": "RoadConfig", "ia3": "Ia3Config"}

METHODS = {
    "road": {
        "choices": {"delta": "road"},
        "paper": "arXiv:2409.00119",
        "formula": "y = R(Wx + b), R of 2×2 blocks [c −s; s c], c = α·cos θ, s = α·sin θ",
        "small": {"group_size": 4},
        "note": "The pairs are the two halves of each group, as in PEFT; the paper pairs neighbours, which is the same but for the order of the outputs.",
    },
    "road_2": {
        "choices": {"delta": "road", "variant": "road_2"},
        "paper": "arXiv:2409.00119",
        "formula": "as road, with an α and θ for each output",
        "small": {"group_size": 4},
    },
    "road_4": {
        "choices": {"delta": "road", "variant": "road_4"},
        "paper": "arXiv:2409.00119",
        "formula": "as road, with an α and θ for each of the four entries of a block",
        "small": {"group_size": 4},
    },
    "ia3": {
        "choices": {"delta": "ia3"},
        "paper": "arXiv:2205.05638",
        "formula": "y = l⊙(Wx + b); in the second feed-forward layer y = W(l⊙x) + b",
        "note": "The paper adapts keys, values and the second feed-forward layer: targets=[k_proj,v_proj,down_proj] on a Llama.",
    },
}

# Names of a block's second feed-forward layer in common models
SECOND_FEED_FORWARD = ["down_proj", "fc2", "w2", "wo", "mlp.c_proj", "dense_4h_to_h"]


@dataclass(frozen=True)
class RoadConfig(AdapterConfig):
    """Rotations of pairs of outputs (arXiv:2409.00119)."""

    delta: str = option("road", "Parametrisation of the change.", choices=("road",))
    variant: str = option("road_1", "road_1: one angle and strength a pair; road_2: one an output; road_4: one an entry of the 2×2 block.", choices=("road_1", "road_2", "road_4"))
    group_size: int = option(64, "Outputs in a group, whose first half is paired with its second. Even, and divides every layer's outputs.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return Road


@dataclass(frozen=True)
class Ia3Config(AdapterConfig):
    """A strength for each output, or input (arXiv:2205.05638)."""

    delta: str = option("ia3", "Parametrisation of the change.", choices=("ia3",))
    feed_forward: list[str] | str = option(SECOND_FEED_FORWARD, "Modules whose input is scaled instead of their output: module name endings, or one regular expression over the full name.")

    @staticmethod
    def delta_class() -> type[Delta]:
        return Ia3


class Turned(torch.autograd.Function):
    """h + c ⊙ h + s ⊙ (h with the halves of each group exchanged), for h [..., out], c and s [g, 2, n]: h is all that it keeps."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, c: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(h, c, s)
        return _turned(h, c, s, torch.empty_like(h))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        h, c, s = ctx.saved_tensors
        spare = torch.mul(g, h)
        to_c = _by_output(spare, c)
        for mine, other, into in zip(_halves(g, s), reversed(_halves(h, s)), _halves(spare, s), strict=True):
            torch.mul(mine, other, out=into)
        to_s = _by_output(spare, s)
        return _turned(g, c, s.flip(1), spare) if ctx.needs_input_grad[0] else None, to_c, to_s


def _halves(h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Those of h [..., out], each [..., g, n]."""
    return h.unflatten(-1, s.shape).unbind(-2)


def _turned(h: Tensor, c: Tensor, s: Tensor, out: Tensor) -> Tensor:
    """What `Turned` says, written into `out`. The factors of one output each are one vector, which is faster than a broadcast."""
    torch.addcmul(h, h, c.flatten().to(h.dtype), out=out)
    for other, factor, into in zip(reversed(_halves(h, s)), s.to(h.dtype).unbind(1), _halves(out, s), strict=True):
        into.addcmul_(other, factor)
    return out


def _by_output(product: Tensor, like: Tensor) -> Tensor:
    """The sum over all tokens of [..., out], in the shape and type of `like`."""
    return product.reshape(-1, product.shape[-1]).sum(0).view(like.shape).to(like.dtype)


def scaled(y: Tensor, z: Tensor, d: Tensor) -> Tensor:
    """y + d ⊙ z."""
    return Stretched.apply(y, d, None) if z is y else torch.addcmul(y, z, d.to(y.dtype))


class Road(Delta):
    """y' = R y. Legend: g groups of h pairs; halves [..., g, 2, h]."""

    additive = False
    peft = PeftFormat(
        type="ROAD",
        write=lambda config: {"variant": config.variant, "group_size": config.group_size, "init_weights": True},
        read=lambda fields: {"variant": fields.get("variant", "road_1"), "group_size": fields.get("group_size", 64)},
        fields=frozenset({"variant", "group_size", "init_weights"}),
        lacks=frozenset({"bias", "exclude_modules", "layers_to_transform", "layers_pattern"}),
    )

    def build(self) -> None:
        size, n = self.config.group_size, self.site.n_out
        if size % 2 or n % size:
            fitting = [d for d in range(2, min(n, 256) + 1, 2) if n % d == 0]
            raise AdapterError(f"{self.site.name}: group_size {size} must be even and divide its {n} outputs; {', '.join(map(str, fitting)) or 'none'} would")
        count = {"road_1": n // 2, "road_2": n, "road_4": 2 * n}[self.config.variant]
        self.road_theta = nn.Parameter(torch.empty(count, **self.storage))
        self.road_alpha = nn.Parameter(torch.empty(count, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.road_theta.zero_()
        self.road_alpha.fill_(1.0)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """(α·cos θ − 1, α·sin θ) [g, 2, h]; of the second the half that is subtracted is negative."""
        h = self.config.group_size // 2
        theta, alpha = self.road_theta, self.road_alpha
        if self.config.variant == "road_1":
            theta, alpha = theta.view(-1, 1, h), alpha.view(-1, 1, h)
            c, s = alpha * theta.cos() - 1, alpha * theta.sin()
            return torch.cat([c, c], dim=1), torch.cat([-s, s], dim=1)
        if self.config.variant == "road_2":
            theta, alpha = theta.view(-1, 2, h), alpha.view(-1, 2, h)
            c, s = alpha * theta.cos() - 1, alpha * theta.sin()
        else:
            theta, alpha = theta.view(-1, 2, 2, h), alpha.view(-1, 2, 2, h)  # of a group first those of the cosines
            c, s = alpha[:, 0] * theta[:, 0].cos() - 1, alpha[:, 1] * theta[:, 1].sin()
        return c, torch.cat([-s[:, :1], s[:, 1:]], dim=1)

    def change(self, y: Tensor) -> Tensor:
        """(R − I) y for y [..., out]."""
        c, s = (t.to(y.dtype) for t in self.coefficients())
        halves = y.unflatten(-1, c.shape)
        return torch.addcmul(halves * c, halves.flip(-2), s).flatten(-3)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        seen = base.drop(x)
        return Turned.apply(y, *self.coefficients()) if seen is x else y + self.change(base(seen))

    def delta(self, W: Tensor) -> Tensor:
        return self.change(W.T).T

    def bias_delta(self, W: Tensor | None, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else self.change(bias)


def _ia3_to_peft(config: Ia3Config) -> dict[str, Any]:
    # as an expression, for PEFT's endings need not begin at a dot
    names = config.feed_forward
    pattern = names if isinstance(names, str) else rf"(?:.*\.)?(?:{'|'.join(map(re.escape, names))})" if names else []
    return {"feedforward_modules": pattern, "fan_in_fan_out": False, "init_ia3_weights": True}


def _ia3_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    names = fields.get("feedforward_modules")
    if names is None:
        raise AdapterError("feedforward_modules is missing: the file does not say which layers' inputs are scaled")
    return {"feed_forward": names if isinstance(names, str) or not names else rf".*(?:{'|'.join(map(re.escape, sorted(names)))})"}


class Ia3(Delta):
    """y' = l⊙y, or x' = l⊙x where the layer is a feed-forward one. Unchanged at l = 1."""

    additive = False
    peft = PeftFormat(
        type="IA3",
        write=_ia3_to_peft,
        read=_ia3_from_peft,
        fields=frozenset({"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"}),
        lacks=frozenset({"bias", "layers_to_transform", "layers_pattern"}),
    )

    @classmethod
    def check(cls, config: Ia3Config, names: Sequence[str]) -> None:
        wanted = config.feed_forward
        if isinstance(wanted, str) or wanted == SECOND_FEED_FORWARD:  # the default is a list for many models
            return
        for name in wanted:
            if not any(ends_with(place, name) for place in names):
                raise AdapterError(f"feed_forward: {name!r} matches none of the adapted modules, e.g. {names[0]}")

    def build(self) -> None:
        names = self.config.feed_forward
        try:
            self.on_input = bool(re.fullmatch(names, self.site.name)) if isinstance(names, str) else any(ends_with(self.site.name, name) for name in names)
        except re.error as error:
            raise AdapterError(f"feed_forward: {names!r} is no regular expression: {error}") from None
        shape = (1, self.site.n_in) if self.on_input else (self.site.n_out, 1)
        self.ia3_l = nn.Parameter(torch.empty(shape, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.ia3_l.fill_(1.0)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        step = self.ia3_l.flatten() - 1
        seen = base.drop(x)
        if self.on_input:
            return base(scaled(x, seen, step))
        y = base(x)
        return scaled(y, y if seen is x else base(seen), step)

    def delta(self, W: Tensor) -> Tensor:
        return (self.ia3_l - 1) * W

    def bias_delta(self, W: Tensor | None, bias: Tensor | None) -> Tensor | None:
        return None if bias is None or self.on_input else (self.ia3_l.flatten() - 1) * bias
