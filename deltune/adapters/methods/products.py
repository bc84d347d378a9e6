"""Changes made of products: two low-rank matrices multiplied entry by entry or with W, Kronecker products, unit vectors.

Legend: W is [out, in]; r is the rank; ⊙ multiplies entry by entry, ⊗ is the Kronecker product; x is [..., in].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters import dense, draw
from deltune.adapters.config import AdapterConfig, RankedConfig
from deltune.adapters.delta import Delta, PeftFormat
from deltune.adapters.layers import Site
from deltune.adapters.ranked import Ranked, check_patterns, rank_at
from deltune.config.fields import option

DELTAS = {"loha": "LohaConfig", "lokr": "LokrConfig", "krona": "KronaConfig", "hira": "HiraConfig", "delora": "DeloraConfig"}

METHODS = {
    "loha": {
        "choices": {"delta": "loha"},
        "paper": "arXiv:2108.06098",
        "formula": "ΔW = s·(B₁A₁)⊙(B₂A₂), s = α/r",
        "small": {"rank": 2},
        "note": "FedPara's product as an adapter. Up to the rank where it pays, it is computed as the rank-r² product that it equals, without ΔW.",
    },
    "lokr": {
        "choices": {"delta": "lokr"},
        "paper": "arXiv:2309.14859",
        "formula": "ΔW = s·C⊗(BA), s = α/r; C and, where it is small, BA whole",
        "small": {"rank": 1},
    },
    "krona": {
        "choices": {"delta": "krona"},
        "paper": "arXiv:2212.10650",
        "formula": "ΔW = s·A⊗B",
        "note": "No code of the authors is public: which factor starts at zero (here A) and the other's distribution (here uniform within ±1/√columns) are ours. Their scaled skip connection belongs to the module beside a block and has no counterpart on a weight.",
    },
    "hira": {
        "choices": {"delta": "hira"},
        "paper": "https://openreview.net/forum?id=TwJrTz9cRS",
        "formula": "ΔW = W⊙(BA)",
        "small": {"rank": 2},
        "note": "No scale, as in the authors' code and PEFT; it needs a high learning rate (1e-3). The authors' layer has no dropout, and none is taken here.",
    },
    "delora": {
        "choices": {"delta": "delora"},
        "paper": "arXiv:2503.18225",
        "formula": "ΔW = (λ/r)·(Σᵢ bᵢaᵢᵀ/(‖bᵢ‖‖aᵢ‖) − the same at the start)·diag(‖W‖ of each column)",
        "small": {"rank": 2},
        "note": "init=frozen is the authors' code: the start's directions are kept, with the λ of now. init=fold is the paper's equation 9: the start is taken off once, with the λ it had. init=zero is PEFT's (its default λ is 15), which the authors call an improvement.",
    },
}


# ---------------------------------------------------------------- LoHa


@dataclass(frozen=True)
class LohaConfig(RankedConfig):
    """Hadamard product of two low-rank products (arXiv:2108.06098)."""

    delta: str = option("loha", "Parametrisation of the change.", choices=("loha",))
    rank: int = option(8, "Rank of each of the two products; that of the change is up to its square.", gt=0)
    alpha: float = option(8.0, "Strength: the change is scaled by alpha / rank, or alpha / √rank with scaling=rslora.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return Loha


def _plain(value: float) -> float:
    """A whole number as PEFT writes it."""
    return int(value) if float(value).is_integer() else value


def _ranked_to_peft(config: RankedConfig) -> dict[str, Any]:
    return {
        "r": config.rank,
        "alpha": _plain(config.alpha),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: _plain(alpha) for key, alpha in config.alpha_pattern.items()},
        "init_weights": True,
    }


def _ranked_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rank": fields.get("r", 8),
        "alpha": fields.get("alpha", 8),
        "rank_pattern": fields.get("rank_pattern") or {},
        "alpha_pattern": fields.get("alpha_pattern") or {},
    }


# How the tensors were started has no part in what they compute
RANKED_FIELDS = frozenset({"r", "alpha", "rank_pattern", "alpha_pattern", "init_weights"})
# What drops ranks or the whole change while training; zero is off
NO_DROPS = {"rank_dropout": 0.0, "module_dropout": 0.0}


def _standard(config: RankedConfig) -> bool:
    return config.scaling == "standard" and not config.magnitude


class Loha(Ranked):
    """ΔW = s·(B₁A₁)⊙(B₂A₂). A₂ starts at zero: the function is unchanged, and A₂ has a gradient from the first step on."""

    peft = PeftFormat(
        type="LOHA",
        write=_ranked_to_peft,
        read=_ranked_from_peft,
        fields=RANKED_FIELDS,
        harmless=NO_DROPS,
        fits=_standard,
        lacks=frozenset({"bias"}),
    )

    def build(self) -> None:
        self.hada_w1_a = nn.Parameter(torch.empty(self.site.n_out, self.rank, **self.storage))
        self.hada_w1_b = nn.Parameter(torch.empty(self.rank, self.site.n_in, **self.storage))
        self.hada_w2_a = nn.Parameter(torch.empty(self.site.n_out, self.rank, **self.storage))
        self.hada_w2_b = nn.Parameter(torch.empty(self.rank, self.site.n_in, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        for factor in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            factor.copy_(draw.kaiming(factor.shape, generator))
        self.hada_w2_b.zero_()

    @property
    def is_cheap_as_product(self) -> bool:
        """Whether the product over pairs of ranks costs less than a product with ΔW."""
        return self.rank**2 * (self.site.n_in + self.site.n_out) <= self.site.n_in * self.site.n_out

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(B [out, r²], A [r², in]) with ΔW = s·BA: entry (o, i) of ΔW is a sum over pairs (j, k) of ranks of
        B₁[o, j]·B₂[o, k] times A₁[j, i]·A₂[k, i]."""
        left = (self.hada_w1_a.unsqueeze(2) * self.hada_w2_a.unsqueeze(1)).flatten(1)
        right = (self.hada_w1_b.unsqueeze(1) * self.hada_w2_b.unsqueeze(0)).flatten(0, 1)
        return left, right

    def product(self) -> tuple[Tensor, Tensor, float] | None:
        return (*self.pairs(), self.scale) if self.is_cheap_as_product else None

    def delta(self, W: Tensor | None) -> Tensor:
        return self.formed(self.hada_w1_a.dtype, W)

    def formed(self, dtype: torch.dtype, W: Tensor | None) -> Tensor:
        return dense.product(self.hada_w1_a, self.hada_w1_b, dtype) * dense.product(self.hada_w2_a, self.hada_w2_b * self.scale, dtype)

    def forms_delta(self, x: Tensor) -> bool:
        n_in, n_out = self.site.n_in, self.site.n_out
        forming = (6 * self.rank + 64) * n_in * n_out  # products of rank r and their gradients, and slow steps of an entry: as 64
        return not self.is_cheap_as_product or self.pays_to_form(x, apart=3 * self.rank**2 * (n_in + n_out), forming=forming)

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        if not self.is_cheap_as_product:
            return F.linear(x, self.formed(x.dtype, W))
        left, right = self.pairs()
        return F.linear(F.linear(x, right.to(x.dtype)) * self.scale, left.to(x.dtype))

    def ranked(self) -> dict[str, int]:
        return {"hada_w1_a": 1, "hada_w1_b": 0, "hada_w2_a": 1, "hada_w2_b": 0}


# ---------------------------------------------------------------- Kronecker products


def near_factors(size: int, factor: int) -> tuple[int, int]:
    """Two numbers with this product, the smaller first: `factor` itself where it divides (then in this order), else the
    largest divisor up to it and up to √size. −1: as near to √size as can be."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = int(size**0.5) if factor == -1 else min(factor, int(size**0.5))
    first = max(number for number in range(1, most + 1) if size % number == 0)
    return first, size // first


def factor_shapes(site: Site, factor: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of two matrices whose Kronecker product is as large as the layer's weight."""
    (left_out, right_out), (left_in, right_in) = near_factors(site.n_out, factor), near_factors(site.n_in, factor)
    return (left_out, left_in), (right_out, right_in)


def kronecker_out(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(left ⊗ right) x for x [..., m·n], left [l, m] and right [k, n]: [..., l·k]."""
    z = F.linear(x.reshape(-1, left.shape[1], right.shape[1]), right.to(x.dtype))  # [tokens, m, k]
    # small products, but nothing is transposed; cast once it is spread, a factor's gradient is summed in its own type
    return torch.bmm(left.expand(len(z), -1, -1).to(x.dtype), z).view(*x.shape[:-1], -1)


FACTOR_HELP = "Size of the first factor's sides where it divides the layer's, else the largest divisor up to it; -1: near the square root."


@dataclass(frozen=True)
class LokrConfig(RankedConfig):
    """Kronecker product with a low-rank factor (arXiv:2309.14859)."""

    delta: str = option("lokr", "Parametrisation of the change.", choices=("lokr",))
    alpha: float = option(8.0, "Strength: the change is scaled by alpha / rank, or alpha / √rank with scaling=rslora.", gt=0)
    rank: int = option(8, "Rank of the second factor, which is kept whole where that is under two times the rank wide and high.", gt=0)
    factor: int = option(-1, FACTOR_HELP, ge=-1)
    decompose_both: bool = option(False, "Make the first factor low-rank too, where it is large enough.")
    zero: str = option("first", "Factor that starts at zero. second is LyCORIS' way.", choices=("first", "second"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Lokr

    def problems(self) -> list[str]:
        return [*(["factor cannot be 0; -1 is near the square root"] if self.factor == 0 else []), *super().problems()]


@dataclass(frozen=True)
class KronaConfig(AdapterConfig):
    """Kronecker product of two whole matrices (arXiv:2212.10650)."""

    delta: str = option("krona", "Parametrisation of the change.", choices=("krona",))
    scale: float = option(1.0, "Strength: the product is multiplied by it. The paper tunes it for each task.", gt=0)
    factor: int = option(-1, FACTOR_HELP, ge=-1)

    @staticmethod
    def delta_class() -> type[Delta]:
        return Krona

    def problems(self) -> list[str]:
        return [*(["factor cannot be 0; -1 is near the square root"] if self.factor == 0 else []), *super().problems()]


class Lokr(Ranked):
    """ΔW = s·w1⊗w2, w1 [l, m], w2 [k, n] with out = l·k and in = m·n; either whole or a product of rank r.

    s = α/r also where both are whole, as in PEFT (LyCORIS takes 1 there).
    """

    widens = "the first factor is spread over the tokens, and its gradient, a matrix for each, is summed in float32"
    peft = PeftFormat(
        type="LOKR",
        write=lambda config: _ranked_to_peft(config) | {
            "decompose_both": config.decompose_both,
            "decompose_factor": config.factor,
            "init_weights": "lycoris" if config.zero == "second" else True,
        },
        read=lambda fields: _ranked_from_peft(fields) | {
            "decompose_both": bool(fields.get("decompose_both")),
            "factor": fields.get("decompose_factor", -1),
            "zero": "second" if fields.get("init_weights") == "lycoris" else "first",
        },
        fields=RANKED_FIELDS | {"decompose_both", "decompose_factor"},
        harmless=NO_DROPS,
        fits=_standard,
        lacks=frozenset({"bias"}),
    )

    def build(self) -> None:
        first, second = factor_shapes(self.site, self.config.factor)
        self._declare("lokr_w1", *first, decompose=self.config.decompose_both)
        self._declare("lokr_w2", *second, decompose=True)

    def _declare(self, name: str, rows: int, columns: int, *, decompose: bool) -> None:
        if decompose and self.rank < max(rows, columns) / 2:
            setattr(self, f"{name}_a", nn.Parameter(torch.empty(rows, self.rank, **self.storage)))
            setattr(self, f"{name}_b", nn.Parameter(torch.empty(self.rank, columns, **self.storage)))
        else:
            setattr(self, name, nn.Parameter(torch.empty(rows, columns, **self.storage)))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        zero = ("lokr_w1", "lokr_w1_a") if self.config.zero == "first" else ("lokr_w2", "lokr_w2_b")  # of two halves one, as in PEFT
        for name, parameter in self.named_parameters():
            if name in zero:
                parameter.zero_()
            else:
                parameter.copy_(draw.kaiming(parameter.shape, generator))

    def whole(self, name: str) -> Tensor:
        own = self._parameters
        return own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"]

    def delta(self, W: Tensor | None) -> Tensor:
        return torch.kron(self.whole("lokr_w1") * self.scale, self.whole("lokr_w2"))

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        return kronecker_out(x, self.whole("lokr_w1") * self.scale, self.whole("lokr_w2"))


class Krona(Delta):
    """ΔW = s·A⊗B, both whole. A starts at zero."""

    widens = Lokr.widens

    def build(self) -> None:
        first, second = factor_shapes(self.site, self.config.factor)
        self.krona_A = nn.Parameter(torch.empty(first, **self.storage))
        self.krona_B = nn.Parameter(torch.empty(second, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.krona_A.zero_()
        self.krona_B.copy_(draw.kaiming(self.krona_B.shape, generator))

    def delta(self, W: Tensor | None) -> Tensor:
        return torch.kron(self.krona_A * self.config.scale, self.krona_B)

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        return kronecker_out(x, self.krona_A * self.config.scale, self.krona_B)


# ---------------------------------------------------------------- HiRA


@dataclass(frozen=True)
class HiraConfig(AdapterConfig):
    """Hadamard product of W and a low-rank product (OpenReview TwJrTz9cRS)."""

    delta: str = option("hira", "Parametrisation of the change.", choices=("hira",))
    rank: int = option(32, "Rank of the product that W is multiplied with.", gt=0)
    rank_pattern: dict[str, int] = option({}, "Regular expression over the end of a module name to its own rank; the first that matches counts.")
    init: str = option("kaiming", "Start of A: kaiming: uniform within ±1/√in; gaussian: normal with deviation 1/rank. B starts at zero. An embedding starts with A zero and B normal.", choices=("kaiming", "gaussian"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Hira


class Hira(Delta):
    """ΔW = W⊙(BA), without a scale. Reads W in every forward."""

    kinds = ("linear", "conv1d", "embedding")
    reads_base = True
    takes_dropout = False
    peft = PeftFormat(
        type="HIRA",
        write=lambda config: {
            "r": config.rank,
            "init_weights": "gaussian" if config.init == "gaussian" else True,
            "fan_in_fan_out": False,
        },
        read=lambda fields: {
            "rank": fields.get("r", 32),
            "init": "gaussian" if fields.get("init_weights") == "gaussian" else "kaiming",
        },
        # hira_dropout acts in training alone, and is refused here; PEFT 0.21 takes a rank_pattern and gives each layer r
        fields=frozenset({"r", "rank_pattern", "init_weights", "fan_in_fan_out", "hira_dropout"}),
        fits=lambda config: not config.magnitude and not config.rank_pattern,
        lacks=frozenset({"bias"}),
    )

    @classmethod
    def check(cls, config: HiraConfig, names: Sequence[str]) -> None:
        check_patterns(names, rank_pattern=config.rank_pattern)

    def build(self) -> None:
        self.rank = rank_at(self.site, self.config.rank_pattern, self.config.rank)
        self.hira_A = nn.Parameter(torch.empty(self.rank, self.site.n_in, **self.storage))
        self.hira_B = nn.Parameter(torch.empty(self.site.n_out, self.rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        if self.site.kind == "embedding":
            self.hira_A.zero_()
            self.hira_B.copy_(draw.normal(self.hira_B.shape, 1.0, generator))
            return
        gaussian = self.config.init == "gaussian"
        self.hira_A.copy_(draw.normal(self.hira_A.shape, 1 / self.rank, generator) if gaussian else draw.kaiming(self.hira_A.shape, generator))
        self.hira_B.zero_()

    def delta(self, W: Tensor) -> Tensor:
        return W * (self.hira_B @ self.hira_A)

    def formed(self, dtype: torch.dtype, W: Tensor) -> Tensor:
        return W * dense.product(self.hira_B, self.hira_A, dtype)

    def forms_delta(self, x: Tensor) -> bool:
        return True

    def out(self, x: Tensor, W: Tensor) -> Tensor:
        if self.site.kind == "embedding":
            z = F.embedding(x, self.hira_A.T, self.site.padding_idx).to(self.site.dtype)
            return F.embedding(x, W.to(z.dtype).T) * F.linear(z, self.hira_B.to(z.dtype))
        return F.linear(x, self.formed(x.dtype, W.to(x.dtype)))

    def ranked(self) -> dict[str, int]:
        return {"hira_A": 0, "hira_B": 1}

    def leaves(self) -> dict[str, str]:
        if self.site.kind == "embedding":
            return {"hira_A": "hira_embedding_A", "hira_B": "hira_embedding_B"}
        return {"hira_A": "hira_A", "hira_B": "hira_B"}


# ---------------------------------------------------------------- DeLoRA


@dataclass(frozen=True)
class DeloraConfig(AdapterConfig):
    """Normalised rank-one terms with a learned bound on their sum (arXiv:2503.18225)."""

    delta: str = option("delora", "Parametrisation of the change.", choices=("delora",))
    rank: int = option(8, "Number of rank-one terms.", gt=0)
    rank_pattern: dict[str, int] = option({}, "Regular expression over the end of a module name to its own rank; the first that matches counts.")
    boundary: float = option(8.0, "Start of λ, which bounds the change: 8 for Llama-2 in the paper, 4 or 12 on GLUE, 15 in PEFT.", gt=0)
    boundary_lr_ratio: float = option(0.5, "Learning rate of λ as a multiple of the rest's (the paper's 5e-3 to 1e-2 for Llama-2).", gt=0)
    init: str = option("frozen", "frozen: A and B random, and the change counts from their start, with the λ of now; fold: with the λ of the start; zero: B zero, with nothing to count from.", choices=("frozen", "fold", "zero"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Delora


class Delora(Delta):
    """ΔW = (B'A − B'₀A₀)·diag(w) with B' = B·diag(λ/(r‖bᵢ‖‖aᵢ‖)) and w the norms of W's columns, as they were at the start.

    The copies A₀, B₀ are tensors of their own and saved; the base is never rewritten. init=zero has none (PEFT's form).
    """

    in_product_form = True
    SMALLEST_NORM = 1e-4  # PEFT's; the authors' code has no such bound, and needs none while nothing starts at zero

    peft = PeftFormat(
        type="DELORA",
        write=lambda config: {
            "r": config.rank,
            "delora_lambda": _plain(config.boundary),
            "rank_pattern": dict(config.rank_pattern),
            "module_dropout": config.dropout,  # a dropout of the input, in spite of its name
            "init_weights": True,
        },
        read=lambda fields: {
            "rank": fields.get("r", 8),
            "boundary": fields.get("delora_lambda", 15),
            "boundary_lr_ratio": 1.0,
            "rank_pattern": fields.get("rank_pattern") or {},
            "dropout": fields.get("module_dropout", 0.0),
            "init": "zero",
        },
        # lambda_pattern is where each layer's λ started; the file holds where it came to
        fields=frozenset({"r", "delora_lambda", "rank_pattern", "lambda_pattern", "module_dropout", "init_weights"}),
        fits=lambda config: config.init == "zero" and not config.magnitude,
    )

    @classmethod
    def check(cls, config: DeloraConfig, names: Sequence[str]) -> None:
        check_patterns(names, rank_pattern=config.rank_pattern)

    def build(self) -> None:
        self.rank = rank_at(self.site, self.config.rank_pattern, self.config.rank)
        self.delora_A = nn.Parameter(torch.empty(self.rank, self.site.n_in, **self.storage))
        self.delora_B = nn.Parameter(torch.empty(self.site.n_out, self.rank, **self.storage))
        self.delora_lambda = nn.Parameter(torch.empty(1, **self.storage))
        self.register_buffer("delora_w_norm", torch.empty(self.site.n_in, **self.storage))
        if self.config.init != "zero":
            self.register_buffer("start_A", torch.empty_like(self.delora_A.data))
            self.register_buffer("start_B", torch.empty_like(self.delora_B.data))
        if self.config.init == "fold":
            self.register_buffer("start_lambda", torch.empty_like(self.delora_lambda.data))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.delora_A.copy_(draw.kaiming(self.delora_A.shape, generator))
        self.delora_lambda.fill_(self.config.boundary)
        if self.config.init == "zero":
            self.delora_B.zero_()
            return
        self.delora_B.copy_(draw.kaiming(self.delora_B.shape, generator))
        self.start_A.copy_(self.delora_A)
        self.start_B.copy_(self.delora_B)
        if self.config.init == "fold":
            self.start_lambda.copy_(self.delora_lambda)

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        self.delora_w_norm.copy_(torch.linalg.vector_norm(W, dim=0))

    def rows(self, A: Tensor, B: Tensor, boundary: Tensor) -> Tensor:
        """A with each row scaled so that B times it is the bounded sum [r, in]."""
        norms = A.norm(dim=1).clamp_min(self.SMALLEST_NORM) * B.norm(dim=0).clamp_min(self.SMALLEST_NORM)
        return (boundary / self.rank / norms).unsqueeze(1) * A * self.delora_w_norm

    def product(self) -> tuple[Tensor, Tensor, float]:
        rows = self.rows(self.delora_A, self.delora_B, self.delora_lambda)
        if self.config.init == "zero":
            return self.delora_B, rows, 1.0
        before = self.rows(self.start_A, self.start_B, self.start_lambda if self.config.init == "fold" else self.delora_lambda)
        # B·R − B₀·R₀ as B·(R − R₀) + (B − B₀)·R₀: one product of rank 2r, and exactly zero at the start
        return torch.cat([self.delora_B, self.delora_B - self.start_B], dim=1), torch.cat([rows - before, before]), 1.0

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        left, right, _ = self.product()
        return F.linear(F.linear(x, right.to(x.dtype)), left.to(x.dtype))

    def lr_ratios(self) -> dict[str, float]:
        return {"delora_lambda": self.config.boundary_lr_ratio}
