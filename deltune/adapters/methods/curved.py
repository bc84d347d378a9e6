"""Methods with a non-linearity in the change: on the entries of the matrix BA, which stays a matrix, or on activations.

Legend: A [rank, in], B [out, rank]; x [..., in]; s is alpha / rank.
SineLoRA (arXiv:2403.19243), LoRAN (EMNLP Findings 2024), LoDA (MERL TR2023-150), AuroRA (arXiv:2505.18738).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltune.adapters import dense, draw
from deltune.adapters.config import AdapterConfig, RankedConfig
from deltune.adapters.delta import Base, Delta
from deltune.adapters.ranked import Ranked
from deltune.config.fields import option
from deltune.weights.scratch import scratch

DELTAS = {"sinelora": "SineLoraConfig", "loran": "LoranConfig", "loda": "LodaConfig", "aurora": "AuroraConfig"}

METHODS = {
    "sinelora": {
        "choices": {"delta": "sinelora"},
        "paper": "arXiv:2403.19243",
        "formula": "ΔW = s·sin(ω·BA) / g, g = √in, s = α/r",
        "small": {"rank": 2, "omega": 20.0},
        "note": "The paper has an ω for each rank and the authors' code no default; ours is 200, whose first step is 200/√in times LoRA's.",
    },
    "loran": {
        "choices": {"delta": "loran"},
        "paper": "https://aclanthology.org/2024.findings-emnlp.177",
        "formula": "ΔW = s·φ(BA), φ(z) = z + a·ρ(z)·sin(f·z), s = α/r",
        "small": {"rank": 2, "freq": 100.0, "amplitude": 0.05},
        "note": "Sources leave open whether ρ is ReLU (the default here) or the identity, and whether there is a scale. on=activation puts φ on BAx, as a public copy does; that cannot be merged. A step is bound by the sine and its slope at every entry of W, in float32 since the frequency times a short type's rounding is more than a period, and by one product more for the gradient of ΔW.",
    },
    "loda": {
        "choices": {"delta": "loda", "plus": False},
        "paper": "MERL TR2023-150",
        "formula": "ΔW(x) = s·f(B·f(M₂·f(M₁·f(A·x)))), f = LeakyReLU, s = α/r",
        "small": {"rank": 2},
        "note": "Told by a survey, for neither code nor the full text is public; slope and scale are not given there.",
    },
    "loda_plus": {
        "choices": {"delta": "loda", "plus": True},
        "paper": "MERL TR2023-150",
        "formula": "ΔW(x) = s·(B·A·x + f(B·f(M₂·f(M₁·f(A·x))))), f = LeakyReLU, s = α/r",
        "small": {"rank": 2},
        "note": "Told by a survey, for neither code nor the full text is public; slope and scale are not given there.",
    },
    "aurora": {
        "choices": {"delta": "aurora"},
        "paper": "arXiv:2505.18738",
        "formula": "ΔW(x) = s·B·σ(A·x), σ(z) = tanh(H·tanh z) + C·Σᵢ b(zᵢ), b: 8 cubic B-splines on [−1, 1], s = α/r",
        "small": {"rank": 2},
        "note": "The paper trains this and then merges s·B·σ(A), which is another function: mode=paper asks for that merge, mode=static trains what can be merged, and by default a merge is refused. The start of H and C and the splines' grid are not in the paper. It drops 5 % of the inputs.",
    },
}


@dataclass(frozen=True)
class SineLoraConfig(RankedConfig):
    """The sine of a low-rank matrix, which has a high rank (arXiv:2403.19243)."""

    delta: str = option("sinelora", "Parametrisation of the change.", choices=("sinelora",))
    omega: float = option(200.0, "Frequency of the sine; a larger one gives a higher rank and larger first steps.", gt=0)
    gain: float | None = option(None, "What the sine is divided by; null for √in, as in the authors' code.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return SineLora


@dataclass(frozen=True)
class LoranConfig(RankedConfig):
    """Low-rank adaptation with a wave on each entry (EMNLP Findings 2024)."""

    delta: str = option("loran", "Parametrisation of the change.", choices=("loran",))
    amplitude: float = option(5e-5, "Height of the wave.", ge=0)
    freq: float = option(1e4, "Frequency of the wave.", gt=0)
    wave: str = option("relu", "What multiplies the sine: relu: the positive part of the entry; identity: the entry.", choices=("relu", "identity"))
    on: str = option("weight", "weight: on the entries of BA, which can be merged; activation: on BAx.", choices=("weight", "activation"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Loran


@dataclass(frozen=True)
class LodaConfig(RankedConfig):
    """Low-dimensional adaptation: a small network in the place of the product (MERL TR2023-150)."""

    delta: str = option("loda", "Parametrisation of the change.", choices=("loda",))
    plus: bool = option(False, "Add the linear term BAx (LoDA+).")
    slope: float = option(0.8, "LeakyReLU's slope below zero.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return Loda


@dataclass(frozen=True)
class AuroraConfig(RankedConfig):
    """An adaptive non-linear layer between the factors (arXiv:2505.18738)."""

    delta: str = option("aurora", "Parametrisation of the change.", choices=("aurora",))
    rank: int = option(2, "Rank of the change.", gt=0)
    alpha: float = option(4.0, "Strength: the change is scaled by alpha / rank, or alpha / √rank with scaling=rslora.", gt=0)
    mode: str = option("dynamic", "dynamic: σ on activations, no merge; static: σ on A, which is a matrix; paper: σ on activations while training, and a merge puts σ on A, which is another function.", choices=("dynamic", "static", "paper"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Aurora


class Factored(Ranked):
    """A kaiming_uniform and B zero, both trained: unchanged at its start for any function that keeps zero."""

    def build(self) -> None:
        self.lora_A = nn.Parameter(torch.empty(self.rank, self.site.n_in, **self.storage))
        self.lora_B = nn.Parameter(torch.empty(self.site.n_out, self.rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.lora_A.copy_(draw.kaiming(self.lora_A.shape, generator))
        self.lora_B.zero_()


# ---------------------------------------------------------------- on the entries of BA


ROWS = 128  # of a change that are formed together: they stay in the cache through all steps that an entry takes


class EntrywiseOut(torch.autograd.Function):
    """x (W + f(BA))ᵀ + b [..., out], W and b frozen or left out; keeps x, A and B for the backward pass and no out×in tensor.

    f(BA) is formed in A's type, in blocks of rows, and rounded to x's; how it is joined to W see dense.py.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, W: Tensor | None, b: Tensor | None,
        value: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, A, B, W)
        ctx.value, ctx.slope = value, slope
        D = _entrywise(A, B, value, x.dtype)
        return F.linear(x, D) if W is None else dense.joined(x, W, b, D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, W = ctx.saved_tensors
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            D = _entrywise(A, B, ctx.value, grad.dtype)
            grad_x = grad @ (D if W is None else D.add_(W))
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            outer = dense.outer(grad, x)  # [out, in]
            wide = torch.promote_types(A.dtype, torch.float32)  # for the sum over blocks
            grad_A, grad_B = torch.zeros_like(A, dtype=wide), torch.empty_like(B)
            for rows in _blocks(len(B)):
                inner = ctx.slope(B[rows] @ A).mul_(outer[rows])
                grad_A += B[rows].T @ inner
                grad_B[rows] = inner @ A.T
            grad_A = grad_A.to(A.dtype)
        return grad_x, grad_A, grad_B, None, None, None, None


def _entrywise(A: Tensor, B: Tensor, value: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """f(BA) [out, in] in this type."""
    D = torch.empty(len(B), A.shape[1], dtype=dtype, device=A.device)
    for rows in _blocks(len(B)):
        D[rows] = value(B[rows] @ A)
    return D


def _blocks(num_rows: int) -> list[slice]:
    return [slice(begin, begin + ROWS) for begin in range(0, num_rows, ROWS)]


class Entrywise(Factored):
    """ΔW = value(BA), entry by entry, with its derivative `slope`."""

    def value(self, Z: Tensor) -> Tensor:
        """Overwrites Z or not, and makes few tensors: on a CPU one of the weight's size costs more than the sines in it."""
        raise NotImplementedError

    def slope(self, Z: Tensor) -> Tensor:
        """As `value`."""
        raise NotImplementedError

    def delta(self, W: Tensor | None) -> Tensor:
        return self.value(self.lora_B @ self.lora_A)

    def forms_delta(self, x: Tensor) -> bool:
        return True

    def in_one(self, x: Tensor, base: Base) -> Tensor:
        W, b = base.stored(), base.bias()
        return self._applied(x, W, None if b is None else b.to(x.dtype))

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):  # a frequency times a rounded BA would be noise
            return self._applied(x, None, None)

    @torch.compiler.disable  # a node that is given functions of the method's is not what the compiler can trace
    def _applied(self, x: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
        flat = x.unsqueeze(0) if x.ndim == 1 else x
        y = EntrywiseOut.apply(flat, self.lora_A, self.lora_B, W, b, self.value, self.slope)
        return y.view(*x.shape[:-1], self.site.n_out)


class SineLora(Entrywise):
    """ΔW = s·sin(ω·BA) / g. The authors' code divides by √in whatever gain it is given; here `gain` counts."""

    @property
    def height(self) -> float:
        return self.scale / (math.sqrt(self.site.n_in) if self.config.gain is None else self.config.gain)

    def value(self, Z: Tensor) -> Tensor:
        return Z.mul_(self.config.omega).sin_().mul_(self.height)

    def slope(self, Z: Tensor) -> Tensor:
        return Z.mul_(self.config.omega).cos_().mul_(self.height * self.config.omega)


class Loran(Entrywise):
    """ΔW = s·φ(BA), or with on=activation s·φ(BAx), where φ(z) = z + a·ρ(z)·sin(f·z)."""

    @classmethod
    def no_matrix(cls, config: AdapterConfig) -> str:
        return "" if config.on == "weight" else "its wave is on the activations (on=activation), which no matrix does"

    def value(self, Z: Tensor) -> Tensor:
        # ρ(z)·sin(freq·z) as z·sin(freq·ρ(z)): the sine of zero is zero
        wave = self.rho(Z).mul(self.config.freq).sin_()
        return torch.addcmul(Z, Z, wave, value=self.config.amplitude).mul_(self.scale)

    def slope(self, Z: Tensor) -> Tensor:
        # d(z·sin(freq·z)) = sin(freq·z) + freq·z·cos(freq·z), zero where ρ is
        angle = self.rho(Z) * self.config.freq
        wave = torch.sin(angle).addcmul_(angle, torch.cos(angle))
        return wave.mul_(self.config.amplitude * self.scale).add_(self.scale)

    def rho(self, Z: Tensor) -> Tensor:
        return F.relu(Z) if self.config.wave == "relu" else Z

    def forms_delta(self, x: Tensor) -> bool:
        return self.config.on == "weight"

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        if self.config.on == "weight":
            return super().out(x, W)
        z = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        # the sine's argument in float32 at least: freq times a short type's rounding is more than a period
        return self.value(z.to(torch.promote_types(z.dtype, torch.float32))).to(z.dtype)


# ---------------------------------------------------------------- on activations


class Above(torch.autograd.Function):
    """x Wᵀ + b + z Bᵀ + f(h Bᵀ) [tokens, out] for z and h [tokens, rank], either of which may be None; f is LeakyReLU.

    W and b are frozen. Keeps nothing as wide as its output: f's argument is formed again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, B: Tensor, z: Tensor | None, h: Tensor | None, slope: float) -> Tensor:
        dtype, B = B.dtype, B.to(x.dtype)
        ctx.save_for_backward(W, B, z, h)
        ctx.slope, ctx.dtype = slope, dtype
        y = F.linear(x, W, b)
        if h is not None:
            y += F.leaky_relu_(torch.mm(h, B.T, out=scratch("curved", y, y.dtype, *y.shape)), slope)
        return y if z is None else y.addmm_(z, B.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W, B, z, h = ctx.saved_tensors
        to_x = grad @ W if ctx.needs_input_grad[0] else None
        parts = []
        to_z = to_h = None
        if z is not None:
            to_z = grad @ B
            parts.append(z.T @ grad)  # this way round it is the faster product
        if h is not None:
            argument = torch.mm(h, B.T, out=scratch("curved", grad, grad.dtype, *grad.shape))
            inner = torch.ops.aten.leaky_relu_backward.grad_input(grad, argument, ctx.slope, False, grad_input=argument)
            to_h = inner @ B
            parts.append(h.T @ inner)
        return to_x, None, None, sum(parts[1:], parts[0]).T.to(ctx.dtype), to_z, to_h, None


class Curved(Factored):
    """ΔW(x) = B·z + f(B·h) with z and h [..., rank] made of x, f LeakyReLU."""

    slope = 0.0  # of f below zero; not asked for where there is no h

    def narrow(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(z, h) in x's type, each None where there is none."""
        raise NotImplementedError

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        (z, h), B = self.narrow(x), self.lora_B.to(x.dtype)
        curved = None if h is None else F.leaky_relu(F.linear(h, B), self.slope, inplace=True)
        if z is None:
            return curved
        return F.linear(z, B) if curved is None else curved + F.linear(z, B)

    def forms_delta(self, x: Tensor) -> bool:
        return not torch.compiler.is_compiling()  # nothing as wide as W; but `in_one` is the faster way all the same

    def in_one(self, x: Tensor, base: Base) -> Tensor:
        b, flat = base.bias(), x.reshape(-1, x.shape[-1])
        y = Above.apply(flat, base.stored(), None if b is None else b.to(x.dtype), self.lora_B, *self.narrow(flat), self.slope)
        return y.view(*x.shape[:-1], self.site.n_out)


class Loda(Curved):
    """ΔW(x) = s·f(B·h), h = f(M₂·f(M₁·f(A·x))), and s·B·A·x besides with `plus`. One dropout mask for both terms."""

    mergeable = False
    why_not_mergeable = "its change is a small network, not a matrix"

    def build(self) -> None:
        super().build()
        self.mixer_1 = nn.Parameter(torch.empty(self.rank, self.rank, **self.storage))
        self.mixer_2 = nn.Parameter(torch.empty(self.rank, self.rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        super().reset(generator)
        for mixer in (self.mixer_1, self.mixer_2):
            mixer.copy_(draw.kaiming(mixer.shape, generator))

    @property
    def slope(self) -> float:
        return self.config.slope

    def narrow(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z = F.linear(x, self.lora_A.to(x.dtype)) * self.scale  # f(s·z) = s·f(z) for s > 0
        h = F.leaky_relu(z, self.slope)
        for mixer in (self.mixer_1, self.mixer_2):
            h = F.leaky_relu(F.linear(h, mixer.to(x.dtype)), self.slope)
        return z if self.config.plus else None, h


CELLS = 5  # of the grid on [−1, 1]
ORDER = 3  # of the splines
BASES = CELLS + ORDER


class CubicSplines(torch.autograd.Function):
    """Σᵢ b(zᵢ) [..., 8] over the last dimension of z: the cubic B-splines with equal cells on [−1, 1], each zero but for four
    cells. Keeps z alone; within, the splines are the first dimension, which leaves long rows to go through."""

    STEP = 2 / CELLS

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        _, wide, narrow = CubicSplines.distances(z)
        found = (wide * wide).mul_(wide).sub_((narrow * narrow).mul_(narrow), alpha=4)
        return (found.sum(-1) / 6).movedim(0, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        away, wide, narrow = CubicSplines.distances(z)
        slopes = wide.square_().sub_(narrow.square_(), alpha=4).mul_(away.sign_()).mul_(grad.movedim(-1, 0).unsqueeze(-1))
        return slopes.sum(0).mul_(-0.5 / CubicSplines.STEP)

    @staticmethod
    def distances(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many cells z is away from each spline's middle [8, ...], and what that lacks of two cells and of one, if anything."""
        middles = torch.arange(BASES, device=z.device, dtype=z.dtype) - (1 + CubicSplines.STEP) / CubicSplines.STEP
        away = z / CubicSplines.STEP - middles.view(-1, *[1] * z.ndim)
        near = away.abs()
        return away, (2 - near).clamp_min_(0), (1 - near).clamp_min_(0)


class Aurora(Curved):
    """ΔW(x) = s·B·σ(A·x), σ(z) = tanh(H·tanh z) + C·Σᵢ b(zᵢ); static: s·B·σ(A)·x, with σ on each column of A."""

    mergeable = False
    why_not_mergeable = "it was trained with its curve on the activations, and with the curve on A, as the paper merges it, it is another function; adapter.mode=paper asks for that, and adapter.mode=static trains what can be merged"

    @classmethod
    def no_matrix(cls, config: AdapterConfig) -> str:
        return "" if config.mode == "static" else cls.why_not_mergeable

    @classmethod
    def merges_roughly(cls, config: AdapterConfig) -> bool:
        return config.mode == "paper"

    def build(self) -> None:
        super().build()
        self.aurora_H = nn.Parameter(torch.empty(self.rank, self.rank, **self.storage))
        self.aurora_C = nn.Parameter(torch.empty(self.rank, BASES, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        super().reset(generator)
        self.aurora_H.copy_(draw.normal(self.aurora_H.shape, math.sqrt(1 / self.rank), generator))  # xavier_normal
        self.aurora_C.copy_(draw.uniform(self.aurora_C.shape, 0.1, generator))

    def curve(self, z: Tensor) -> Tensor:
        """σ on the last dimension [..., rank]; in float32 at least, for z is small and the splines are steep."""
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        H, C = self.aurora_H.to(z.dtype), self.aurora_C.to(z.dtype)
        return torch.tanh(F.linear(torch.tanh(z), H)) + F.linear(CubicSplines.apply(z), C)

    def product(self) -> tuple[Tensor, Tensor, float]:
        """What a merge adds; the trained function itself only with mode=static."""
        return self.lora_B, self.curve(self.lora_A.T).T, self.scale

    def narrow(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.config.mode == "static":
            z = F.linear(x, self.curve(self.lora_A.T).T.to(x.dtype))
        else:
            z = self.curve(F.linear(x, self.lora_A.to(x.dtype))).to(x.dtype)
        return z * self.scale, None
