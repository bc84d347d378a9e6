"""Methods whose change is made from the frozen weight itself: it transforms W's input, or is a function or projection of W.

Legend: W [out, in]; x [..., in]. RidgeLoRA (NeurIPS 2025), PEANuT (arXiv:2410.01870), DEFT with PaRa (arXiv:2509.22793).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltune.adapters import draw
from deltune.adapters.config import AdapterConfig, RankedConfig
from deltune.adapters.delta import Base, Delta, PeftFormat
from deltune.adapters.ranked import Ranked
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"ridgelora": "RidgeLoraConfig", "peanut": "PeanutConfig", "deft": "DeftConfig"}

METHODS = {
    "ridgelora": {
        "choices": {"delta": "ridgelora"},
        "paper": "https://openreview.net/forum?id=0RF80tUWuv",
        "formula": "W' = W·(I + T − T₀), T = κ·diag(ρ) + s·BA with B [in, r], s = α/r",
        "small": {"rank": 2},
        "note": "The paper's start is the identity only up to a projection; T₀ is what it is at the start, so that nothing changes (exact=false leaves it out). The deviation and mean of ρ's start are not in the paper. Its loss on the nuclear norm of T − I, with a negative weight, is off by default: it takes an in×in SVD in each layer and step.",
    },
    "peanut": {
        "choices": {"delta": "peanut"},
        "paper": "arXiv:2410.01870",
        "formula": "ΔW = s·B·MLP(f(A·W)) with A [r, out], B [out, r]; side=in: ΔWᵀ = s·B·MLP(f(A·Wᵀ))",
        "small": {"rank": 3, "depth": 1},
        "note": "side=in is what the authors use for language models, with s = α/r.",
    },
    "deft": {
        "choices": {"delta": "deft", "para": False},
        "paper": "arXiv:2509.22793",
        "formula": "ΔW = L·(s·R − GᵀW), L = P and G = relu(P), or L = G = the Q of P's QR; R starts as GᵀW / s",
        "small": {"rank": 3},
        "note": "The start of R, which changes nothing, is PEFT's; what the authors take could not be checked. Dropout is on the whole change; PEFT's is on R's part alone.",
    },
    "para": {
        "choices": {"delta": "deft", "para": True},
        "paper": "arXiv:2509.22793",
        "formula": "ΔW = −L·GᵀW, L = P and G = relu(P), or L = G = the Q of P's QR",
        "start": 0.01,
        "small": {"rank": 3},
        "note": "DEFT without R: it takes directions out of W and so changes it from the start.",
    },
}


# ---------------------------------------------------------------- RidgeLoRA


@dataclass(frozen=True)
class RidgeLoraConfig(RankedConfig):
    """A ridge-like square transform of the layer's input (NeurIPS 2025)."""

    delta: str = option("ridgelora", "Parametrisation of the change.", choices=("ridgelora",))
    mu: float = option(2.0, "Mean of the normal whose sigmoid is the start of the first `rank` entries of ρ.")
    sigma: float = option(1.0, "Deviation of that normal.", ge=0)
    beta: float = option(0.0, "Weight of the mean nuclear norm of T − I in the loss; the paper's are negative, -0.1 to -0.001. Not 0, it takes an SVD in each layer and step.")
    exact: bool = option(True, "Take out what the transform does at the start, so that nothing changes; false is the paper's.")

    @staticmethod
    def delta_class() -> type[Delta]:
        return RidgeLora


class RidgeLora(Ranked):
    """y = W(x + Tx − T₀x) + b, T = κ·diag(ρ) + s·BA. T₀ is T at its start, kept in frozen copies; I instead unless `exact`.

    Dropout is in BA's branch alone, on what both B·A and B₀·A₀ see.
    """

    additive = False
    averages_loss = True

    def build(self) -> None:
        n, r = self.site.n_in, self.rank
        if r > n:
            raise AdapterError(f"{self.site.name}: ridgelora with rank {r} needs as many inputs, and this layer has {n}; rank can be 1 to {n}")
        self.ridge_A = nn.Parameter(torch.empty(r, n, **self.storage))
        self.ridge_B = nn.Parameter(torch.empty(n, r, **self.storage))
        self.ridge_rho = nn.Parameter(torch.empty(n, **self.storage))
        self.ridge_kappa = nn.Parameter(torch.empty(1, **self.storage))
        if self.config.exact:
            self.register_buffer("first_A", torch.empty(r, n, **self.storage))
            self.register_buffer("first_B", torch.empty(n, r, **self.storage))
            self.register_buffer("first_rho", torch.empty(n, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        n, r = self.site.n_in, self.rank
        rho = torch.ones(n, **draw.DRAWN)
        rho[:r] = torch.sigmoid(self.config.mu + draw.normal((r,), self.config.sigma, generator))
        M = draw.normal((n, r), r**-0.5, generator)
        self.ridge_A.copy_(M.T)
        # s·B·A = (I − diag ρ)·(M⁺)ᵀMᵀ, and (M⁺)ᵀMᵀ is a projection: T is not I, as the paper has it, hence the copies
        self.ridge_B.copy_((1 - rho).unsqueeze(1) * torch.linalg.pinv(M).T / self.scale)
        self.ridge_rho.copy_(rho)
        self.ridge_kappa.fill_(1)
        if self.config.exact:
            self.first_A.copy_(self.ridge_A)
            self.first_B.copy_(self.ridge_B)
            self.first_rho.copy_(self.ridge_rho)

    def diagonal(self) -> Tensor:
        return self.ridge_kappa * self.ridge_rho - (self.first_rho if self.config.exact else 1)

    def forms_delta(self, x: Tensor) -> bool:
        return True

    def in_one(self, x: Tensor, base: Base) -> Tensor:
        W, b, A, B = base.stored(), base.bias(), self.ridge_A, self.ridge_B
        if self.config.exact:  # B·A − B₀·A₀ as B·(A − A₀) + (B − B₀)·A₀: zeros at the start
            A, B = torch.cat([A - self.first_A, self.first_A]), torch.cat([B, B - self.first_B], 1)
        own = (self.diagonal(), A, B * self.scale)
        return Turned.apply(x, W, None if b is None else b.to(x.dtype), *(t.to(x.dtype) for t in own))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.goes_in_one(x) and base.bare:
            return self.in_one(x, base)
        seen = base.drop(x)
        change = self.branch(seen, self.ridge_A, self.ridge_B)
        if self.config.exact:
            change = change - self.branch(seen, self.first_A, self.first_B)  # before x is added: equal branches leave exactly x
        return base(x + (self.diagonal().to(x.dtype) * x + change).to(x.dtype))

    def branch(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A.to(x.dtype)) * self.scale, B.to(x.dtype))

    def delta(self, W: Tensor | None) -> Tensor:
        change = W * self.diagonal() + (W @ (self.ridge_B * self.scale)) @ self.ridge_A
        return change - (W @ (self.first_B * self.scale)) @ self.first_A if self.config.exact else change

    def loss(self) -> Tensor | None:
        if not self.config.beta:
            return None
        T = torch.diag(self.ridge_kappa * self.ridge_rho - 1) + (self.ridge_B * self.scale) @ self.ridge_A
        return self.config.beta * torch.linalg.matrix_norm(T, ord="nuc")


class Turned(torch.autograd.Function):
    """W(x + d ⊙ x + B A x) + b for x [..., in], d [in], A [r, in] and B [in, r]; W and b have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, d: Tensor, A: Tensor, B: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        z = flat @ A.T
        ctx.save_for_backward(x, W, d, A, B, z)
        return F.linear(torch.addcmul(flat, flat, d).addmm_(z, B.T).view(x.shape), W, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, d, A, B, z = ctx.saved_tensors
        flat, by_turned = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]) @ W
        by_z, spare = by_turned @ B, by_turned * flat
        by_d = spare.sum(0)
        dx = torch.addcmul(by_turned, by_turned, d, out=spare).addmm_(by_z, A).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, by_d, by_z.T @ flat, (z.T @ by_turned).T


# ---------------------------------------------------------------- PEANuT


@dataclass(frozen=True)
class PeanutConfig(AdapterConfig):
    """A small network that makes the change out of the weight (arXiv:2410.01870)."""

    delta: str = option("peanut", "Parametrisation of the change.", choices=("peanut",))
    rank: int = option(32, "Width of the network.", gt=0)
    depth: int = option(0, "Pairs of an encoder and a decoder [rank, rank] between A and B.", ge=0)
    act_fn: str = option("relu", "The network's non-linearity.", choices=("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "mish", "linear"))
    scale: float = option(1.0, "Strength: the change is scaled by this.", gt=0)
    side: str = option("out", "out: the network reads W's columns; in: its rows, as in the authors' code for language models.", choices=("out", "in"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Peanut


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "linear": lambda x: x,
}


def _peanut_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    act = fields.get("act_fn", "relu")
    if act not in ACTIVATIONS:
        raise AdapterError(f"act_fn is {act!r}; supported are {', '.join(ACTIVATIONS)}")
    return {"rank": fields.get("r", 32), "depth": fields.get("depth", 0), "act_fn": act, "scale": float(fields.get("scaling", 1.0))}


class Peanut(Delta):
    """ΔW = s·B·h(W), h [rank, in] = the network on A·W, column by column. So ΔW has a rank and is never made for a forward."""

    reads_base = True
    in_product_form = True
    peft = PeftFormat(
        type="PEANUT",
        write=lambda config: {"r": config.rank, "depth": config.depth, "act_fn": config.act_fn, "scaling": config.scale, "init_weights": True},
        read=_peanut_from_peft,
        fields=frozenset({"r", "depth", "act_fn", "scaling", "init_weights"}),  # the last tells the start
        fits=lambda config: config.side == "out" and not config.magnitude,
        lacks=frozenset({"bias"}),
    )

    def build(self) -> None:
        r, n = self.config.rank, self.site.n_out if self.config.side == "out" else self.site.n_in
        self.peanut_A = nn.Parameter(torch.empty(r, n, **self.storage))
        self.peanut_B = nn.Parameter(torch.empty(n, r, **self.storage))
        self.peanut_encoders = nn.ParameterList([torch.empty(r, r, **self.storage) for _ in range(self.config.depth)])
        self.peanut_decoders = nn.ParameterList([torch.empty(r, r, **self.storage) for _ in range(self.config.depth)])

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        for parameter in (self.peanut_A, *self.peanut_encoders, *self.peanut_decoders):
            parameter.copy_(draw.kaiming(parameter.shape, generator))
        self.peanut_B.zero_()

    def hidden(self, W: Tensor) -> Tensor:
        """What the network makes of W: [rank, in], or with side=in [rank, out]."""
        act = ACTIVATIONS[self.config.act_fn]
        h = act(self.peanut_A.to(W.dtype) @ (W if self.config.side == "out" else W.T))
        passed = []
        for encoder in self.peanut_encoders:
            passed.append(h)
            h = act(encoder.to(h.dtype) @ h)
        for decoder in self.peanut_decoders:
            h = act(decoder.to(h.dtype) @ h) + passed.pop()
        return h

    def made(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """(left [out, rank], right [rank, in]) with ΔW = left·right."""
        h, B = self.hidden(W), self.peanut_B * self.config.scale
        return (B, h) if self.config.side == "out" else (h.T, B.T)

    def running_product(self, W: Tensor) -> tuple[Tensor, Tensor, float]:
        return *self.made(W), 1.0

    def delta(self, W: Tensor | None) -> Tensor:
        left, right = self.made(W)
        return left @ right.to(left.dtype)

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        left, right = self.made(W)
        return F.linear(F.linear(x, right.to(x.dtype)), left.to(x.dtype))

    def leaves(self) -> dict[str, str]:
        return {name: f"{name}.weight" for name in self.state_dict()}


# ---------------------------------------------------------------- DEFT


@dataclass(frozen=True)
class DeftConfig(AdapterConfig):
    """A part of the weight projected out, and another put in its place (arXiv:2509.22793)."""

    delta: str = option("deft", "Parametrisation of the change.", choices=("deft",))
    rank: int = option(8, "Rank of the projection, at most the layer's outputs; a layer with fewer takes as many as it has.", gt=0)
    alpha: float | None = option(None, "What is put in is scaled by alpha / rank; null for 1.", gt=0)
    decomposition: str = option("relu", "The projection: relu: P·relu(P)ᵀ, which is none in the strict sense; qr: onto P's columns.", choices=("relu", "qr"))
    para: bool = option(False, "Only take out, put nothing in (PaRa).")

    @staticmethod
    def delta_class() -> type[Delta]:
        return Deft


class Taken(torch.autograd.Function):
    """GᵀW [rank, in] for a frozen W: in G's type, and what is kept of W is W as it is stored. The gradient is in W's type,
    as those of x are."""

    @staticmethod
    def forward(ctx: Any, G: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return G.T @ W.to(G.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (W,) = ctx.saved_tensors
        return (W @ gradient.T.to(W.dtype)).to(gradient.dtype), None


class Deft(Delta):
    """ΔW = L·(s·R − Gᵀ·W): the directions G of the output lose what W gives them, and get s·R·x instead. Of low rank."""

    reads_base = True
    in_product_form = True
    peft = PeftFormat(
        type="DEFT",
        write=lambda config: {
            "r": config.rank,
            "alpha": config.alpha,
            "decomposition_method": config.decomposition,
            "para": config.para,
            "deft_dropout": config.dropout,
            "init_weights": True,
            "fan_in_fan_out": False,
        },
        read=lambda fields: {
            "rank": fields.get("r", 8),
            "alpha": fields.get("alpha") or None,
            "decomposition": fields.get("decomposition_method", "relu"),
            "para": bool(fields.get("para")),
            "dropout": fields.get("deft_dropout", 0.0),
        },
        # the last three tell the start, and how the base stores W
        fields=frozenset({"r", "alpha", "decomposition_method", "para", "deft_dropout", "init_weights", "init_scale", "fan_in_fan_out"}),
        fits=lambda config: not config.magnitude,
    )

    def build(self) -> None:
        self.rank = min(self.config.rank, self.site.n_out)  # a projection of [out] has no more; PEFT does so too
        self.scale = self.config.alpha / self.rank if self.config.alpha else 1.0
        self.deft_P = nn.Parameter(torch.empty(self.site.n_out, self.rank, **self.storage))
        if not self.config.para:
            self.deft_R = nn.Parameter(torch.empty(self.rank, self.site.n_in, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.deft_P.copy_(draw.normal(self.deft_P.shape, 0.02, generator))

    @property
    def starts_from_base(self) -> bool:
        return not self.config.para

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        _, G = self.sides(W.dtype)
        self.deft_R.copy_((G.T @ W) / self.scale)

    def sides(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(L, G), each [out, rank], in a type that QR exists for: this one, or float32."""
        P = self.deft_P.to(torch.promote_types(dtype, torch.float32))
        if self.config.decomposition == "relu":
            return P, F.relu(P)
        Q = torch.linalg.qr(P).Q
        return Q, Q

    def made(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """(left [out, rank], right [rank, in]) with ΔW = left·right. The right side is exactly zero at the start."""
        L, G = self.sides(W.dtype)
        with torch.autocast(W.device.type, enabled=False):  # the difference of two that nearly cancel
            taken = Taken.apply(G, W)
        return L, -taken if self.config.para else self.deft_R.to(taken.dtype) * self.scale - taken

    def running_product(self, W: Tensor) -> tuple[Tensor, Tensor, float]:
        return *self.made(W), 1.0

    def delta(self, W: Tensor | None) -> Tensor:
        left, right = self.made(W)
        return left @ right

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        left, right = self.made(W)
        return F.linear(F.linear(x, right.to(x.dtype)), left.to(x.dtype))
