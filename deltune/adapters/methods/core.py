"""Methods with a small core between two factors: ΔW = s·B·C·A. They differ in what starts where, and in what is trained.

Legend: A [rank, in], B [out, rank], C [rank, rank]; U [out, rank], Σ, V [in, rank] are singular triplets of W; s is alpha / rank.
MoSLoRA (arXiv:2406.11909), NLoRA with SLoRA and IntTune (arXiv:2502.14482), NoRA (arXiv:2408.10280), LoRA-XS
(arXiv:2405.17604), KaSA (arXiv:2412.06071).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters import draw
from deltune.adapters.config import RankedConfig
from deltune.adapters.delta import Delta, PeftFormat
from deltune.adapters.init.svd import largest, smallest
from deltune.adapters.ranked import Ranked
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"moslora": "MosLoraConfig", "nlora": "NLoraConfig", "nora": "NoraConfig", "lora_xs": "LoraXsConfig", "kasa": "KasaConfig"}

METHODS = {
    "moslora": {
        "choices": {"delta": "moslora"},
        "paper": "arXiv:2406.11909",
        "formula": "ΔW = s·B·M·A, s = α/r",
        "small": {"rank": 2},
    },
    "nlora": {
        "choices": {"delta": "nlora", "mode": "nlora"},
        "paper": "arXiv:2502.14482",
        "formula": "ΔW = s·(B·N·A − B₀·N₀·A₀), A₀ = W[:r,:], B₀ = W[:,:r], N₀ = W[:r,:r], s = α/r",
        "small": {"rank": 2, "alpha": 0.5},
        "note": "The start is the authors' code's; the paper's pseudo-inverse for N₀ is not offered, for on a random weight it makes the start many times as large as W. With residual=false, as the authors have it, the start changes the function by s·B₀N₀A₀. A start of .2·‖W‖ or more is refused.",
    },
    "slora": {
        "choices": {"delta": "nlora", "mode": "slora"},
        "paper": "arXiv:2502.14482",
        "formula": "ΔW = s·B·N·A, s = α/r",
        "small": {"rank": 2},
    },
    "inttune": {
        "choices": {"delta": "nlora", "mode": "inttune"},
        "paper": "arXiv:2502.14482",
        "formula": "ΔW = s·B·(N − N₀)·A, A = W[:r,:] and B = W[:,:r] frozen, N₀ = W[:r,:r], s = α/r",
        "small": {"rank": 4, "alpha": 1.0},
    },
    "nora": {
        "choices": {"delta": "nora"},
        "paper": "arXiv:2408.10280",
        "formula": "ΔW = s·B·B'·A'·A, A = Vᵀ and B = U·Σ frozen, s = α/r",
        "small": {"rank": 4, "inner_rank": 2, "alpha": 4.0},
        "note": "The authors start both inner factors at random, so their function changes at the start; here B' is zero. They weigh W by the size of its inputs before the SVD, which needs data; here all inputs count alike. Only their code for CLIP is public, so the rank for language models is ours.",
    },
    "lora_xs": {
        "choices": {"delta": "lora_xs"},
        "paper": "arXiv:2405.17604",
        "formula": "ΔW = s·B·R·A, A = Σ·Vᵀ and B = U frozen, s = α/r",
        "small": {"rank": 4, "alpha": 4.0},
        "note": "R starts at zero; the authors draw it with a deviation of 1e-5 (init_std).",
    },
    "kasa": {
        "choices": {"delta": "kasa"},
        "paper": "arXiv:2412.06071",
        "formula": "ΔW = s·B·diag(d)·A − U·Σ·Vᵀ of the r smallest triplets, s = α/r; loss + mean over layers of β‖d‖² + γ(‖BᵀB − I‖ + ‖AAᵀ − I‖)",
        "start": 0.6,
        "small": {"rank": 2},
        "note": "Not unchanged at its start by design: the r smallest singular triplets of W are left out (init=dropped begins with them in the branch instead). The truncated weight is never written, so the adapter comes off. The authors' Gram matrices are in×in and out×out; ours are r×r, which have the same minimum and a gradient about √in times as strong.",
    },
}


# ---------------------------------------------------------------- configs


@dataclass(frozen=True)
class MosLoraConfig(RankedConfig):
    """Mixture of subspaces in LoRA (arXiv:2406.11909)."""

    delta: str = option("moslora", "Parametrisation of the change.", choices=("moslora",))
    mixer_init: str = option("kaiming", "Start of the mixer M: kaiming: uniform within ±1/√rank; orthogonal.", choices=("kaiming", "orthogonal"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return MosLora


@dataclass(frozen=True)
class NLoraConfig(RankedConfig):
    """Factors cut out of W, as in Nyström's method (arXiv:2502.14482)."""

    delta: str = option("nlora", "Parametrisation of the change.", choices=("nlora",))
    mode: str = option("nlora", "nlora: three factors cut out of W, all trained; slora: three factors, with LoRA's start; inttune: cut out of W, only the middle one trained.", choices=("nlora", "slora", "inttune"))
    residual: bool = option(True, "Subtract what the factors cut out of W add at the start, so that nothing changes; the authors do not.")
    alpha: float = option(8.0, "Strength: the change is scaled by alpha / rank, or alpha / √rank with scaling=rslora.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return NLora

    def problems(self) -> list[str]:
        idle = self.mode == "slora" and not self.residual
        return super().problems() + (["residual has no effect with mode=slora, which starts at zero"] if idle else [])


@dataclass(frozen=True)
class NoraConfig(RankedConfig):
    """A LoRA inside a frozen one made of W's singular vectors (arXiv:2408.10280)."""

    delta: str = option("nora", "Parametrisation of the change.", choices=("nora",))
    rank: int = option(64, "Rank of the frozen outer factors.", gt=0)
    inner_rank: int = option(16, "Rank of the trained inner factors, at most rank.", gt=0)
    alpha: float = option(1.0, "Strength: the change is scaled by alpha / rank, or alpha / √rank with scaling=rslora.", gt=0)
    split: str = option("left", "Where W's singular values go: left: B = UΣ, A = Vᵀ; right: B = U, A = ΣVᵀ; sqrt: √Σ to both.", choices=("left", "right", "sqrt"))
    svd: str = option("fast", "fast: randomised; full: the full decomposition.", choices=("fast", "full"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Nora


@dataclass(frozen=True)
class LoraXsConfig(RankedConfig):
    """A trained core between frozen singular vectors (arXiv:2405.17604)."""

    delta: str = option("lora_xs", "Parametrisation of the change.", choices=("lora_xs",))
    rank: int = option(64, "Rank of the change; rank² numbers are trained in each layer.", gt=0)
    alpha: float = option(64.0, "Strength: the change is scaled by alpha / rank, or alpha / √rank with scaling=rslora.", gt=0)
    init_std: float = option(0.0, "Deviation of the core's random start; 0 changes nothing, the authors take 1e-5.", ge=0)
    svd: str = option("fast", "fast: randomised; full: the full decomposition.", choices=("fast", "full"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return LoraXs


@dataclass(frozen=True)
class KasaConfig(RankedConfig):
    """Knowledge-aware singular-value adaptation (arXiv:2412.06071)."""

    delta: str = option("kasa", "Parametrisation of the change.", choices=("kasa",))
    init: str = option("zero", "zero: B starts at zero, and W loses its smallest singular triplets, as published; dropped: the branch starts as those triplets, so nothing changes.", choices=("zero", "dropped"))
    beta: float = option(1e-4, "Weight of ‖d‖² in the loss.", ge=0)
    gamma: float = option(1e-3, "Weight in the loss of how far A's rows and B's columns are from orthonormal.", ge=0)
    svd: str = option("fast", "fast: inverse iteration; full: the full decomposition.", choices=("fast", "full"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Kasa


# ---------------------------------------------------------------- methods


class Cored(Ranked):
    """ΔW = s·B·core·A, with lora_A and lora_B trained or frozen."""

    lora_A: Tensor
    lora_B: Tensor

    def core(self) -> Tensor:
        """[rank, rank]"""
        raise NotImplementedError

    def declare(self, name: str, *shape: int, trained: bool = True, saved: bool = True) -> None:
        tensor = torch.empty(*shape, **self.storage)
        if trained:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor, persistent=saved)

    def declare_factors(self, *, trained: bool = True, saved: bool = True) -> None:
        self.declare("lora_A", self.rank, self.site.n_in, trained=trained, saved=saved)
        self.declare("lora_B", self.site.n_out, self.rank, trained=trained, saved=saved)

    def check_rank(self, most: int | None = None) -> None:
        most = min(self.site.n_in, self.site.n_out) if most is None else most
        if self.rank > most:
            raise AdapterError(
                f"{self.site.name}: {self.config.delta} with rank {self.rank} takes that many rows and columns of a weight "
                f"{self.site.n_out}×{self.site.n_in}; this layer takes a rank of 1 to {most}, which rank_pattern can give it"
            )

    def product(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_B @ self.core(), self.lora_A, self.scale

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        return through(x, self.lora_A, self.core() * self.scale, self.lora_B)


def through(x: Tensor, *factors: Tensor) -> Tensor:
    """x through one factor after the other, in x's type."""
    for factor in factors:
        x = F.linear(x, factor.to(x.dtype))
    return x


class MosLora(Cored):
    """ΔW = s·B·M·A. Unchanged at its start, for B is zero."""

    in_product_form = True

    def build(self) -> None:
        self.declare_factors()
        self.declare("mixer", self.rank, self.rank)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.lora_A.copy_(draw.kaiming(self.lora_A.shape, generator))
        self.lora_B.zero_()
        self.mixer.copy_(draw.orthogonal(self.rank, self.rank, generator) if self.config.mixer_init == "orthogonal" else draw.kaiming(self.mixer.shape, generator))

    def core(self) -> Tensor:
        return self.mixer

    def ranked(self) -> dict[str, int]:
        return {"lora_A": 0, "lora_B": 1}


class NLora(Cored):
    """ΔW = s·(B·N·A − B₀·N₀·A₀). The frozen copies are slices of W, so they are cut again and not saved.

    IntTune freezes A and B, so that only the difference of the cores is left: s·B·(N − N₀)·A.
    """

    in_product_form = True
    MOST = 0.2  # of ‖W‖: what a start may add, or subtract

    def build(self) -> None:
        mode = self.config.mode
        self.cuts, self.kept = mode != "slora", False
        if self.cuts:
            self.check_rank()
        self.declare_factors(trained=mode != "inttune", saved=mode != "inttune")
        self.declare("lora_N", self.rank, self.rank)
        self.subtracts = self.cuts and self.config.residual
        if self.subtracts:
            self.declare("first_N", self.rank, self.rank, trained=False, saved=False)
            if mode == "nlora":
                self.declare("first_A", self.rank, self.site.n_in, trained=False, saved=False)
                self.declare("first_B", self.site.n_out, self.rank, trained=False, saved=False)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        if not self.cuts:
            self.lora_A.copy_(draw.kaiming(self.lora_A.shape, generator))
            self.lora_B.zero_()
            self.lora_N.copy_(draw.kaiming(self.lora_N.shape, generator))

    @property
    def starts_from_base(self) -> bool:
        return self.cuts

    def cut(self, W: Tensor) -> dict[str, Tensor]:
        r = self.rank
        return {"A": W[:r], "B": W[:, :r], "N": W[:r, :r]}

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        cut = self.cut(W)
        left = cut["B"] @ cut["N"]
        # ‖B N A‖² is the sum of (BN)ᵀ(BN) ⊙ A Aᵀ, without the out×in product
        size = self.scale * float(((left.T @ left) * (cut["A"] @ cut["A"].T)).sum().clamp_min(0).sqrt())
        part = size / max(float(torch.linalg.matrix_norm(W)), torch.finfo(W.dtype).tiny)
        if part >= self.MOST:
            raise AdapterError(
                f"{self.site.name}: {self.config.mode}'s start is {part:.2g} of this layer's weight (Frobenius norms), and the method "
                f"is meant for a small part, below {self.MOST:g}; an alpha below {self.alpha * self.MOST / part:.2g} gives that"
            )
        for name, tensor in cut.items():
            getattr(self, f"lora_{name}").copy_(tensor)
        self.keep(W)

    @torch.no_grad()
    def ready(self, W: Tensor) -> None:
        if not self.kept:  # where the base moves, what was cut at the start stays
            self.keep(W)

    def keep(self, W: Tensor) -> None:
        """The frozen slices."""
        self.kept = True
        for name, tensor in self.cut(W).items():
            if self.subtracts and (name == "N" or self.config.mode == "nlora"):
                getattr(self, f"first_{name}").copy_(tensor)
            if self.config.mode == "inttune" and name != "N":
                getattr(self, f"lora_{name}").copy_(tensor)

    def core(self) -> Tensor:
        return self.lora_N - self.first_N if self.subtracts and self.config.mode == "inttune" else self.lora_N

    def product(self) -> tuple[Tensor, Tensor, float]:
        left, right, scale = super().product()
        if not self.subtracts or self.config.mode == "inttune":
            return left, right, scale
        return torch.cat([left, -self.first_B @ self.first_N], 1), torch.cat([right, self.first_A]), scale

    def running_product(self, W: Tensor) -> tuple[Tensor, Tensor, float]:
        if not self.subtracts or self.config.mode == "inttune":
            return self.product()
        # B·N·A − B₀·N₀·A₀ as B·N·(A − A₀) + (B·(N − N₀) + (B − B₀)·N₀)·A₀: zeros at the start
        moved = self.lora_B @ (self.lora_N - self.first_N) + (self.lora_B - self.first_B) @ self.first_N
        return torch.cat([self.lora_B @ self.lora_N, moved], 1), torch.cat([self.lora_A - self.first_A, self.first_A]), self.scale

    def delta(self, W: Tensor | None) -> Tensor:
        change = (self.lora_B @ (self.core() * self.scale)) @ self.lora_A
        if not self.subtracts or self.config.mode == "inttune":
            return change
        # each by itself: equal factors then cancel exactly, and in one sum over both they would not
        return change - (self.first_B @ (self.first_N * self.scale)) @ self.first_A

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        y = super().out(x, W)
        if not self.subtracts or self.config.mode == "inttune":
            return y
        return y - through(x, self.first_A, self.first_N * self.scale, self.first_B)


class Nora(Cored):
    """ΔW = s·B·(B'·A')·A with B and A frozen. Unchanged at its start, for B' is zero."""

    in_product_form = True

    def build(self) -> None:
        self.check_rank()
        inner = self.config.inner_rank
        if inner > self.rank:
            raise AdapterError(f"{self.site.name}: inner_rank is {inner}, and the outer factors have rank {self.rank}; inner_rank can be 1 to {self.rank}")
        self.declare_factors(trained=False)
        self.declare("inner_A", inner, self.rank)
        self.declare("inner_B", self.rank, inner)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.inner_A.copy_(draw.kaiming(self.inner_A.shape, generator))
        self.inner_B.zero_()  # drawn at random by the authors, whose function so changes at the start

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        U, S, V = largest(W, self.rank, generator, self.config.svd)
        left, right = {"left": (S, torch.ones_like(S)), "right": (torch.ones_like(S), S), "sqrt": (S.sqrt(), S.sqrt())}[self.config.split]
        self.lora_B.copy_(U * left)
        self.lora_A.copy_((V * right).T)

    def core(self) -> Tensor:
        return self.inner_B @ self.inner_A

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        return through(x, self.lora_A, self.inner_A * self.scale, self.inner_B, self.lora_B)


class LoraXs(Cored):
    """ΔW = s·B·R·A with B and A frozen. Unchanged at its start unless `init_std` draws R."""

    in_product_form = True

    def build(self) -> None:
        self.check_rank()
        self.declare_factors(trained=False)
        self.declare("lora_R", self.rank, self.rank)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.lora_R.copy_(draw.normal(self.lora_R.shape, self.config.init_std, generator))

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        U, S, V = largest(W, self.rank, generator, self.config.svd)
        self.lora_B.copy_(U)
        self.lora_A.copy_((V * S).T)  # the singular values on the input side, as in the authors' code

    def core(self) -> Tensor:
        return self.lora_R


# ---------------------------------------------------------------- KaSA


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _kasa_to_peft(config: KasaConfig) -> dict[str, Any]:
    return {
        "r": config.rank,
        "lora_alpha": _whole(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.scaling == "rslora",
        "init_lora_weights": True,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: _whole(alpha) for key, alpha in config.alpha_pattern.items()},
        "fan_in_fan_out": False,
        "kasa_config": {"beta": config.beta, "gamma": config.gamma},
    }


def _kasa_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    kasa = fields["kasa_config"]
    if not isinstance(kasa, dict) or not kasa.keys() <= {"beta", "gamma"}:
        raise AdapterError(f"kasa_config is {kasa!r}; a mapping with beta and gamma is expected")
    start = fields.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal", "eva", "mica"):
        raise AdapterError(f"init_lora_weights is {start!r} beside kasa_config: both change the base's weights, and the file does not hold that change")
    return {
        "rank": fields.get("r", 8),
        "alpha": fields.get("lora_alpha", 8),
        "dropout": fields.get("lora_dropout", 0.0),
        "scaling": "rslora" if fields.get("use_rslora") else "standard",
        "rank_pattern": fields.get("rank_pattern") or {},
        "alpha_pattern": fields.get("alpha_pattern") or {},
        **kasa,
    }


def _kasa_complete(fields: Mapping[str, Any], delta: Delta, tensors: Mapping[str, Tensor], W: Callable[[], Tensor]) -> dict[str, Tensor]:
    """With what PEFT's file leaves out: PEFT truncates the base itself, by a full decomposition, when it reads one."""
    if any(leaf in tensors for leaf in (DROPPED_A, DROPPED_B)):
        return dict(tensors)
    assert isinstance(delta, Kasa)
    U, S, V = smallest(W(), delta.rank, torch.Generator(), "full")
    return {**tensors, DROPPED_A: V.T, DROPPED_B: U * S}


DROPPED_A, DROPPED_B = "kasa_dropped_A", "kasa_dropped_B"  # PEFT passes over these


class Kasa(Cored):
    """ΔW = s·B·diag(d)·A − UΣVᵀ of the `rank` smallest triplets of W, which are saved beside PEFT's tensors."""

    in_product_form = True
    averages_loss = True  # as in the authors' code; PEFT leaves the sum to the user
    peft = PeftFormat(
        type="LORA",
        write=_kasa_to_peft,
        read=_kasa_from_peft,
        fields=frozenset({"r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "kasa_config", "eva_config"}),
        harmless={"megatron_core": "megatron.core", "qalora_group_size": 16},
        fits=lambda config: not config.magnitude,  # PEFT takes one of the two
        told=lambda fields: fields.get("kasa_config") is not None,
        complete=_kasa_complete,
    )

    def build(self) -> None:
        self.check_rank(most=min(self.site.n_in, self.site.n_out) - 1)  # something of W is to be left
        self.declare_factors()
        self.declare("lora_diag", self.rank)
        self.declare("dropped_A", self.rank, self.site.n_in, trained=False)
        self.declare("dropped_B", self.site.n_out, self.rank, trained=False)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.lora_A.copy_(draw.kaiming(self.lora_A.shape, generator))
        self.lora_B.zero_()
        self.lora_diag.copy_(draw.normal(self.lora_diag.shape, 1.0, generator))

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        U, S, V = smallest(W, self.rank, generator, self.config.svd)
        self.dropped_B.copy_(U * S)
        self.dropped_A.copy_(V.T)
        if self.config.init == "dropped":
            self.lora_A.copy_(V.T)
            self.lora_B.copy_(U)
            self.lora_diag.copy_(S / self.scale)

    def taken_out(self) -> tuple[Tensor, Tensor, float]:
        return self.dropped_B, self.dropped_A, 1.0

    def product(self) -> tuple[Tensor, Tensor, float]:
        left = self.lora_B * (self.lora_diag * self.scale)
        return torch.cat([left, -self.dropped_B], 1), torch.cat([self.lora_A, self.dropped_A]), 1.0

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        z = F.linear(x, self.lora_A.to(x.dtype)) * (self.lora_diag * self.scale).to(x.dtype)
        return F.linear(z, self.lora_B.to(x.dtype)) - through(x, self.dropped_A, self.dropped_B)

    def loss(self) -> Tensor | None:
        config = self.config
        if not config.beta and not config.gamma:
            return None
        eye = torch.eye(self.rank, device=self.lora_A.device, dtype=self.lora_A.dtype)
        grams = self.lora_B.T @ self.lora_B - eye, self.lora_A @ self.lora_A.T - eye
        return config.beta * self.lora_diag.square().sum() + config.gamma * sum(torch.linalg.matrix_norm(gram) for gram in grams)

    def ranked(self) -> dict[str, int]:
        return {"lora_A": 0, "lora_B": 1, "lora_diag": 0}

    def leaves(self) -> dict[str, str]:
        return {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_diag": "lora_diag", "dropped_A": DROPPED_A, "dropped_B": DROPPED_B}
