"""Changes inside fixed factors of the weight: W = UΣVᵀ is taken apart once, and only what stands between is learned.

Legend: U [out, n], V [n, in] with orthonormal columns and rows; r of the n triplets are used. The base is never taken
apart itself: the change is added to a frozen W, so that its bits stay and a short base can be adapted too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters import dense, draw
from deltune.adapters.bank import Bank
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Delta, PeftFormat
from deltune.adapters.init.svd import chosen, largest
from deltune.adapters.methods.orthogonal import cayley, neumann, skew
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"svft": "SvftConfig", "psoft": "PsoftConfig", "tinylora": "TinyLoraConfig"}

METHODS = {
    "svft": {
        "choices": {"delta": "svft"},
        "paper": "arXiv:2405.19597",
        "formula": "ΔW = U·diag(m)·Vᵀ, W = UΣVᵀ",
        "note": "The authors' code replaces W by its factors and starts from random m times a gate of ½, so it changes the layer; here m is 0 and added to W. U and V are saved with the adapter, which is then larger than the layer.",
    },
    "svft_banded": {
        "choices": {"delta": "svft", "pattern": "banded"},
        "paper": "arXiv:2405.19597",
        "formula": "ΔW = U·M·Vᵀ, M zero but for 2d + 1 diagonals",
        "small": {"off_diagonals": 1},
    },
    "svft_random": {
        "choices": {"delta": "svft", "pattern": "random"},
        "paper": "arXiv:2405.19597",
        "formula": "ΔW = U·M·Vᵀ, M zero but for as many places as the band has, drawn at the start",
        "small": {"off_diagonals": 1},
    },
    "psoft": {
        "choices": {"delta": "psoft"},
        "paper": "arXiv:2505.11235",
        "formula": "ΔW = U_rΣ_r(R − I)V_rᵀ, R = diag(b)·(I + Q)(I − Q)⁻¹·diag(a), Q skew",
        "small": {"rank": 4},
        "note": "The paper has no α, and PEFT's cancels. PEFT's file holds R alone, and what R means depends on the signs of the triplets; ours holds both factors too, which PEFT passes over. Of the authors' layer no public copy was found.",
    },
    "tinylora": {
        "choices": {"delta": "tinylora"},
        "paper": "arXiv:2602.04118",
        "formula": "ΔW = U_r√Σ_r (Σ_i v_i P_i) √Σ_r V_rᵀ, P_i frozen, v shared by groups of layers",
        "small": {"num_trained": 4},
    },
}


@dataclass(frozen=True)
class SvftConfig(AdapterConfig):
    """Singular vectors fixed, a sparse matrix learned between them (arXiv:2405.19597)."""

    delta: str = option("svft", "Parametrisation of the change.", choices=("svft",))
    pattern: str = option("plain", "Where M is learned: plain: its diagonal; banded: also off_diagonals to each side; random: as many places anywhere; top_k: as many where uᵀv is largest, in square layers.", choices=("plain", "banded", "random", "top_k"))
    off_diagonals: int = option(16, "Diagonals to each side of the main one, and so the number of entries of every pattern but plain.", ge=0)
    rank: int = option(0, "Largest triplets that M mixes; 0: all.", ge=0)
    gate: bool = option(False, "Multiply M by σ(g) with a learned number g.")
    svd: str = option("fast", "With a rank: fast: randomised; full: exact.", choices=("fast", "full"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Svft

    def problems(self) -> list[str]:
        idle = ["off_diagonals has no effect: pattern=plain has none"] if self.pattern == "plain" and self.off_diagonals != 16 else []
        if self.svd != "fast" and not self.rank:
            idle.append("svd has no effect without a rank: all triplets take the full decomposition anyway")
        return [*idle, *super().problems()]


@dataclass(frozen=True)
class PsoftConfig(AdapterConfig):
    """A rotation and two strengths within the largest triplets (arXiv:2505.11235)."""

    delta: str = option("psoft", "Parametrisation of the change.", choices=("psoft",))
    rank: int = option(32, "Triplets that are turned.", gt=0)
    orthogonal: bool = option(True, "R is a rotation; false: any matrix.")
    strength_in: bool = option(True, "Learn a strength for each triplet before the rotation.")
    strength_out: bool = option(True, "Learn a strength for each triplet after the rotation.")
    cayley: str = option("exact", "exact: (I + Q)(I − Q)⁻¹; neumann: the first terms of its series.", choices=("exact", "neumann"))
    terms: int = option(5, "Terms of the series, the last with half its weight.", ge=2)
    bound: float | None = option(None, "With cayley=neumann: Q is scaled down to this norm where it is longer; below 1.", gt=0, lt=1)
    split: str = option("out", "Where the singular values go: out: ΔW = UΣ(R − I)Vᵀ, which keeps angles; both: their roots on each side.", choices=("out", "both"))
    svd: str = option("lowrank", "lowrank: torch.svd_lowrank, randomised from svd_seed; full: exact.", choices=("lowrank", "full"))
    svd_steps: int = option(10, "Power steps of svd=lowrank.", ge=0)
    svd_seed: int = option(0, "Seed of svd=lowrank, part of what PEFT's file means.", ge=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return Psoft

    def problems(self) -> list[str]:
        series = self.orthogonal and self.cayley == "neumann"
        idle = [f"{key} has no effect: it belongs to cayley=neumann" for key, default in (("terms", 5), ("bound", None)) if not series and getattr(self, key) != default]
        return [*idle, *super().problems()]


@dataclass(frozen=True)
class TinyLoraConfig(AdapterConfig):
    """A few numbers for a whole group of layers (arXiv:2602.04118)."""

    delta: str = option("tinylora", "Parametrisation of the change.", choices=("tinylora",))
    rank: int = option(2, "Triplets of each layer that are mixed.", gt=0)
    num_trained: int = option(64, "Trained numbers of a group of layers.", gt=0)
    weight_tying: float = option(0.0, "Share of groups that is saved: 0: a group for each layer; 1: one group for all.", ge=0, le=1)
    init: str = option("zeros", "Start of the trained numbers: zeros, which changes nothing; uniform: within ±init_bound.", choices=("zeros", "uniform"))
    init_bound: float = option(0.02, "Bound of init=uniform.", gt=0)
    projection_seed: int = option(42, "Seed of the frozen P, to which the layer's number is added.", ge=0)
    save_projection: bool = option(True, "Save P; false: it is drawn again from projection_seed.")
    svd: str = option("fast", "fast: randomised; full: exact.", choices=("fast", "full"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return TinyLora

    def problems(self) -> list[str]:
        idle = ["init_bound has no effect: it belongs to init=uniform"] if self.init != "uniform" and self.init_bound != 0.02 else []
        return [*idle, *super().problems()]


def at_most(delta: Delta, rank: int) -> None:
    """AdapterError if a layer has not this many triplets."""
    n = min(delta.site.n_in, delta.site.n_out)
    if rank > n:
        raise AdapterError(f"{delta.site.name}: rank {rank} is more than its {n} singular triplets; give at most that")


# ---------------------------------------------------------------- SVFT


class Svft(Delta):
    """ΔW = U M V with M sparse. Unchanged at M = 0."""

    def build(self) -> None:
        config, out, n_in = self.config, self.site.n_out, self.site.n_in
        at_most(self, config.rank)
        if config.pattern == "top_k" and out != n_in:
            raise AdapterError(f"{self.site.name}: pattern=top_k compares output with input directions, and the layer is {out}×{n_in}; use banded or random there")
        self.n = n = config.rank or min(out, n_in)
        d = min(config.off_diagonals, n - 1)
        count = n if config.pattern == "plain" else n * (2 * d + 1) - d * (d + 1)
        self.svft_M = nn.Parameter(torch.empty(count, **self.storage))
        if config.gate:
            self.svft_gate = nn.Parameter(torch.empty((), **self.storage))
        self.register_buffer("svft_U", torch.empty(out, n, **self.storage))
        self.register_buffer("svft_V", torch.empty(n, n_in, **self.storage))
        if config.pattern != "plain":
            self.register_buffer("svft_places", torch.empty(2, count, dtype=torch.int64, device=self.site.device))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.svft_M.zero_()
        if self.config.gate:
            self.svft_gate.zero_()
        if self.config.pattern == "random":
            flat = torch.randperm(self.n**2, generator=generator)[: self.svft_M.numel()].sort()[0]
            self.svft_places.copy_(torch.stack([flat // self.n, flat % self.n]))
        if self.config.pattern == "banded":
            i = torch.arange(self.n)
            band = (i.unsqueeze(1) - i).abs() <= self.config.off_diagonals
            self.svft_places.copy_(band.nonzero().T)

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        how = self.config.svd if self.config.rank else "full"
        U, _, V = largest(W, self.n, generator, how)
        self.svft_U.copy_(U)
        self.svft_V.copy_(V.T)
        if self.config.pattern == "top_k":
            # by value, not by size, as in the authors' code
            flat = (U.T @ V).flatten().topk(self.svft_M.numel()).indices.sort()[0]
            self.svft_places.copy_(torch.stack([flat // self.n, flat % self.n]))

    def values(self) -> Tensor:
        return self.svft_M * torch.sigmoid(self.svft_gate) if self.config.gate else self.svft_M

    def middle(self) -> Tensor:
        """M [n, n]."""
        values = self.values()
        return values.new_zeros(self.n, self.n).index_put(tuple(self.svft_places), values)

    def product(self) -> tuple[Tensor, Tensor, float]:
        if self.config.pattern == "plain":
            return self.svft_U * self.values(), self.svft_V, 1.0
        return self.svft_U @ self.middle(), self.svft_V, 1.0

    def formed(self, dtype: torch.dtype, W: Tensor | None) -> Tensor:
        left = self.svft_U * self.values() if self.config.pattern == "plain" else dense.product(self.svft_U, self.middle(), dtype)
        return dense.product(left, self.svft_V, dtype)

    def forms_delta(self, x: Tensor) -> bool:
        n, n_in, n_out = self.n, self.site.n_in, self.site.n_out
        plain = self.config.pattern == "plain"
        apart = 2 * n * (n_in + n_out) + (0 if plain else 3 * n * n)
        return self.pays_to_form(x, apart=apart, forming=2 * n * n_out * (n_in if plain else n_in + n))

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        z = F.linear(x, self.svft_V.to(x.dtype))  # [..., n]
        z = z * self.values().to(x.dtype) if self.config.pattern == "plain" else F.linear(z, self.middle().to(x.dtype))
        return F.linear(z, self.svft_U.to(x.dtype))


# ---------------------------------------------------------------- PSOFT


def lowrank(W: Tensor, rank: int, steps: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """torch.svd_lowrank from a seed: what PEFT repeats when it reads a file. U [out, r], S [r], V [in, r]."""
    with torch.random.fork_rng([] if W.device.type == "cpu" else [W.device], device_type="cuda" if W.device.type == "cpu" else W.device.type):
        torch.manual_seed(seed)
        return torch.svd_lowrank(W, q=rank, niter=steps)


def _psoft_to_peft(config: PsoftConfig) -> dict[str, Any]:
    return {
        "r": config.rank,
        "psoft_alpha": config.rank,  # it cancels
        "psoft_dropout": config.dropout,
        "fan_in_fan_out": False,
        "ab_svd_init": "psoft_init" if config.split == "out" else "pissa_init",
        "psoft_svd": config.svd,
        "psoft_svd_lowrank_niter": config.svd_steps,
        "random_seed": config.svd_seed,
        "psoft_orth": config.orthogonal,
        "psoft_mag_a": config.strength_in,
        "psoft_mag_b": config.strength_out,
        "use_cayley_neumann": config.cayley == "neumann",
        "num_cayley_neumann_terms": config.terms,
        "cayley_neumann_eps": config.bound,
        "init_weights": True,
    }


def _psoft_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    series, terms = bool(fields.get("use_cayley_neumann")) and fields.get("psoft_orth", True), fields.get("num_cayley_neumann_terms", 5)
    if series and terms < 3:
        raise AdapterError(f"num_cayley_neumann_terms is {terms}; PEFT's sum of so few terms is no part of the series, and is not supported")
    return {
        "rank": fields.get("r", 32),
        "dropout": fields.get("psoft_dropout", 0.0),
        "split": "out" if fields.get("ab_svd_init", "psoft_init") == "psoft_init" else "both",
        "svd": fields.get("psoft_svd", "full"),
        "svd_steps": fields.get("psoft_svd_lowrank_niter", 10),
        "svd_seed": fields.get("random_seed", 0),
        "orthogonal": fields.get("psoft_orth", True),
        "strength_in": fields.get("psoft_mag_a", True),
        "strength_out": fields.get("psoft_mag_b", True),
        "cayley": "neumann" if series else "exact",
        "terms": max(4, terms) if series else 5,  # PEFT adds up the same for 3 as for 4
        "bound": fields.get("cayley_neumann_eps") if series else None,
    }


def _psoft_factors(fields: Mapping[str, Any], delta: Delta, tensors: Mapping[str, Tensor], weight: Callable[[], Tensor]) -> dict[str, Tensor]:
    """A and B, which PEFT's file leaves out."""
    if "psoft_A" in tensors and "psoft_B" in tensors:
        return {}
    A, B = delta.taken_apart(weight())
    # in a type that holds no more than the file, or the adapter would be stored in it
    return {name: tensor.to(delta.psoft_A.dtype) for name, tensor in (("psoft_A", A), ("psoft_B", B))}


class Psoft(Delta):
    """ΔW = B (R − I) A with A and B frozen. Unchanged at Q = 0, a = b = 1."""

    in_product_form = True
    peft = PeftFormat(
        type="PSOFT",
        write=_psoft_to_peft,
        read=_psoft_from_peft,
        fields=frozenset(_psoft_to_peft(PsoftConfig())),
        fits=lambda config: config.cayley == "exact" or config.terms >= 4,
        lacks=frozenset({"bias"}),
        complete=_psoft_factors,
    )

    def build(self) -> None:
        rank = self.config.rank
        at_most(self, rank)
        shape = (rank * (rank - 1) // 2,) if self.config.orthogonal else (rank, rank)
        self.psoft_R = nn.Parameter(torch.empty(shape, **self.storage))
        if self.config.strength_out:
            self.vector_b = nn.Parameter(torch.empty(rank, **self.storage))
        if self.config.strength_in:
            self.vector_a = nn.Parameter(torch.empty(rank, **self.storage))
        self.register_buffer("psoft_A", torch.empty(rank, self.site.n_in, **self.storage))
        self.register_buffer("psoft_B", torch.empty(self.site.n_out, rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        if self.config.orthogonal:
            self.psoft_R.zero_()
        else:
            self.psoft_R.copy_(torch.eye(self.config.rank))
        if self.config.strength_out:
            self.vector_b.fill_(1.0)
        if self.config.strength_in:
            self.vector_a.fill_(1.0)

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        A, B = self.taken_apart(W)
        self.psoft_A.copy_(A)
        self.psoft_B.copy_(B)

    def taken_apart(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r], from W in float32 as PEFT does it, for PEFT repeats this on reading."""
        config, W = self.config, W.float()
        U, S, V = chosen(W, range(config.rank)) if config.svd == "full" else lowrank(W, config.rank, config.svd_steps, config.svd_seed)
        if config.split == "out":
            return V.T, U * S
        return S.sqrt().unsqueeze(1) * V.T, U * S.sqrt()

    def turn(self) -> Tensor:
        """R − I [r, r]."""
        config, eye = self.config, torch.eye(self.config.rank, dtype=self.psoft_R.dtype, device=self.psoft_R.device)
        if config.orthogonal:
            Q = skew(self.psoft_R, config.rank)
            if config.cayley == "neumann" and config.bound is not None:
                Q = Q * (config.bound / torch.linalg.vector_norm(Q).clamp(min=config.bound))
            D = cayley(Q) if config.cayley == "exact" else neumann(Q, config.terms)
        else:
            D = self.psoft_R - eye
        b = self.vector_b.unsqueeze(1) if config.strength_out else eye.new_ones(config.rank, 1)
        a = self.vector_a if config.strength_in else eye.new_ones(config.rank)
        return b * D * a + (b * a - 1) * eye

    def taken_out(self) -> tuple[Tensor, Tensor, float]:
        return self.psoft_B, self.psoft_A, 1.0

    def product(self) -> tuple[Tensor, Tensor, float]:
        return self.psoft_B @ self.turn().to(self.psoft_B.dtype), self.psoft_A, 1.0

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        z = F.linear(F.linear(x, self.psoft_A.to(x.dtype)), self.turn().to(x.dtype))
        return F.linear(z, self.psoft_B.to(x.dtype))

    def leaves(self) -> dict[str, str]:
        own = {"psoft_R": "psoft_R.weight", "psoft_A": "psoft_A", "psoft_B": "psoft_B"}
        if self.config.strength_in:
            own["vector_a"] = "psoft_R.vector_a"
        if self.config.strength_out:
            own["vector_b"] = "psoft_R.vector_b"
        return own


# ---------------------------------------------------------------- TinyLoRA


class TinyNumbers(Bank):
    """v [u] of each group of layers, which are neighbours in the model's order."""

    def build(self) -> None:
        layers = len(self.sites)
        self.num_groups = max(1, round(layers * (1 - self.config.weight_tying)))
        self.group_size = max(1, layers // self.num_groups)
        self.v = nn.ParameterList(torch.empty(self.config.num_trained, **self.storage) for _ in range(self.num_groups))

    def number_of(self, name: str) -> int:
        """A layer's place among the scope's."""
        return next(i for i, site in enumerate(self.sites) if site.name == name)

    def group_of(self, name: str) -> int:
        return min(self.number_of(name) // self.group_size, self.num_groups - 1)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        for v in self.v:
            if self.config.init == "uniform":
                v.copy_(draw.uniform(v.shape, self.config.init_bound, generator))
            else:
                v.zero_()

    def leaves(self) -> dict[str, str]:
        return {f"v.{i}": f"tinylora_v.{i}" for i in range(len(self.v))}


def _tiny_to_peft(config: TinyLoraConfig) -> dict[str, Any]:
    return {
        "r": config.rank,
        "u": config.num_trained,
        "weight_tying": config.weight_tying,
        "projection_seed": config.projection_seed,
        "save_projection": config.save_projection,
        "init_v_bound": config.init_bound,
        "init_weights": "uniform" if config.init == "uniform" else True,
        "tinylora_dropout": config.dropout,
        "fan_in_fan_out": False,
    }


def _tiny_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rank": fields.get("r", 2),
        "num_trained": fields.get("u", 64),
        "weight_tying": float(fields.get("weight_tying", 0.0)),
        "projection_seed": fields.get("projection_seed", 42),
        "save_projection": fields.get("save_projection", True),
        "init_bound": fields.get("init_v_bound", 0.02) if fields.get("init_weights") == "uniform" else 0.02,
        "init": "uniform" if fields.get("init_weights") == "uniform" else "zeros",  # False starts from what is in memory
        "dropout": fields.get("tinylora_dropout", 0.0),
    }


class TinyLora(Delta):
    """ΔW = B (Σ v_i P_i) A. Unchanged at v = 0."""

    in_product_form = True
    tied: TinyNumbers
    peft = PeftFormat(
        type="TINYLORA",
        write=_tiny_to_peft,
        read=_tiny_from_peft,
        fields=frozenset(_tiny_to_peft(TinyLoraConfig())),
        lacks=frozenset({"exclude_modules"}),
    )

    @classmethod
    def banks(cls, config: AdapterConfig) -> Mapping[str, tuple[str, type[Bank]]]:
        return {"tied": ("model", TinyNumbers)}

    def build(self) -> None:
        self.r = r = min(self.config.rank, self.site.n_in, self.site.n_out)
        self.group = self.tied.group_of(self.site.name)
        self.register_buffer("tinylora_A", torch.empty(r, self.site.n_in, **self.storage))
        self.register_buffer("tinylora_B", torch.empty(self.site.n_out, r, **self.storage))
        self.register_buffer("tinylora_P", torch.empty(self.config.num_trained, r, r, **self.storage), persistent=self.config.save_projection)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        # by PEFT's rule and not from the generator, so that a file without P means the same there and here
        own = torch.Generator("cpu").manual_seed(self.config.projection_seed + self.tied.number_of(self.site.name))
        self.tinylora_P.copy_(draw.normal((self.config.num_trained, self.r, self.r), 1 / math.sqrt(self.r), own))

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        U, S, V = largest(W, self.r, generator, self.config.svd)
        self.tinylora_A.copy_((V * S.sqrt()).T)
        self.tinylora_B.copy_(U * S.sqrt())

    def middle(self) -> Tensor:
        """Σ v_i P_i [r, r]."""
        return torch.tensordot(self.tied.v[self.group], self.tinylora_P, dims=1)

    def product(self) -> tuple[Tensor, Tensor, float]:
        return self.tinylora_B @ self.middle(), self.tinylora_A, 1.0

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        z = F.linear(F.linear(x, self.tinylora_A.to(x.dtype)), self.middle().to(x.dtype))
        return F.linear(z, self.tinylora_B.to(x.dtype))

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file(tensors)
        if not self.config.save_projection:
            self.reset(torch.Generator("cpu"))
