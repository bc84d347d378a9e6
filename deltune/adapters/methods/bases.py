"""Changes put together from what the whole model has in common: RandLoRA, VB-LoRA and Uni-LoRA.

Legend: W is [out, in]; r a rank; n a number of bases; h vectors of length b; θ one vector of length d. In RandLoRA `min`
and `max` are the smaller and the larger of a layer's dimensions, and the smaller side is A's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters import dense, draw
from deltune.adapters.bank import Bank, Projection
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Delta, PeftFormat
from deltune.config.fields import option
from deltune.errors import AdapterError
from deltune.weights.scratch import scratch

DELTAS = {"randlora": "RandLoraConfig", "vblora": "VbLoraConfig", "unilora": "UniLoraConfig"}

METHODS = {
    "randlora": {
        "choices": {"delta": "randlora"},
        "paper": "arXiv:2502.00987",
        "formula": "ΔW = s·Σ_j B_j·diag(λ_j)·A·diag(γ_j), n = ⌈min(in, out)/r⌉ random frozen bases, s = α/(r√n)",
        "small": {"rank": 3},
        "note": "The published code and PEFT pair the bases in another order than the formula, and PEFT scales by α/r: peft_compat=true does both, and is set for PEFT's files. The bases are divided by their distribution's deviation, not by their own, so that they can be drawn again bit for bit. PEFT writes the bases once more for every layer; such files are read, and ours hold them once, of which PEFT warns and which it reads all the same. The bases together have full rank, so a step is bound by two products as dear as W's and their gradients, whatever the rank is.",
    },
    "vblora": {
        "choices": {"delta": "vblora"},
        "paper": "arXiv:2405.15179",
        "formula": "ΔW = BA, each piece of A and B the sum of the k likeliest of h shared vectors, weighted by the softmax of their logits",
        "start": 0.005,
        "small": {"rank": 2, "num_vectors": 6, "vector_length": 4},
        "note": "The logits learn ten times as fast as the vectors (1e-2 and 1e-3 in the paper).",
    },
    "unilora": {
        "choices": {"delta": "unilora"},
        "paper": "arXiv:2506.00799",
        "formula": "ΔW = BA, A and B filled with the entries of one trained vector θ, each divided by the root of how often it is used",
        "start": 0.005,
        "small": {"rank": 2, "length": 32},
        "note": "Which entry goes where is drawn with numpy from projection_seed over all layers in the model's order, as PEFT draws it, and is not in the file.",
    },
}


# ---------------------------------------------------------------- RandLoRA


@dataclass(frozen=True)
class RandLoraConfig(AdapterConfig):
    """A full-rank change from random bases (arXiv:2502.00987)."""

    delta: str = option("randlora", "Parametrisation of the change.", choices=("randlora",))
    rank: int = option(32, "Rank of each random base; a smaller one means more bases and more to train.", gt=0)
    alpha: float = option(64.0, "Strength: the change is scaled by alpha / (rank·√n), n being the layer's number of bases; by alpha / rank with peft_compat.", gt=0)
    bases: str = option("dense", "Entries of the bases: dense: uniform; sparse: −1, 0 or 1, two thirds of them 0; very_sparse: one in √min is not 0. All with deviation 1.", choices=("dense", "sparse", "very_sparse"))
    projection_seed: int = option(0, "Seed of the bases, whatever the run's seed.", ge=0)
    save_projection: bool = option(True, "Write the bases into the adapter's file; without it they are drawn again when the file is read.")
    peft_compat: bool = option(False, "Pair the bases and scale the change as PEFT does, which is not the paper's formula. Files in PEFT's format are such.")

    @staticmethod
    def delta_class() -> type[Delta]:
        return RandLora


def num_bases(smallest: int, rank: int) -> int:
    return math.ceil(smallest / rank)


class RandBases(Projection):
    """A [r, 1, min] and B [max, n, r] of the whole model, from its largest dimensions."""

    def build(self) -> None:
        rank, smallest, largest = self.config.rank, min(self.max_in, self.max_out), max(self.max_in, self.max_out)
        self.declare("randlora_A", rank, 1, smallest)
        self.declare("randlora_B", largest, num_bases(smallest, rank), rank)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        smallest = self.randlora_A.shape[2]
        sparsity = {"dense": 0.0, "sparse": 3.0, "very_sparse": math.sqrt(smallest)}[self.config.bases]
        for base in (self.randlora_A, self.randlora_B):
            uniform = draw.uniform(base.shape, 1.0, generator)
            if sparsity:  # ±1 with a chance of 1 in 2·sparsity each, whose deviation is √(1 / sparsity)
                base.copy_(uniform.sign() * (uniform.abs() < 1 / sparsity) * math.sqrt(sparsity))
            else:
                base.copy_(uniform * math.sqrt(3))


class ScaledBases(torch.autograd.Function):
    """A scaled for each base: [n, r, min] with the entries λ[r, n]·A[r, min]·γ[n, min], in `dtype`. Keeps the factors, not products."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, scales: Tensor, gates: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(A, scales, gates)
        found = torch.mul(scales.T.unsqueeze(2), A, out=_of_all(A, gates) if dtype != A.dtype else None)
        return found.mul_(gates.unsqueeze(1)).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, None]:
        A, scales, gates = ctx.saved_tensors
        shared = torch.mul(gradient, A, out=_of_all(A, gates))
        return None, torch.bmm(shared, gates.unsqueeze(2)).squeeze(2).T, torch.bmm(scales.T.unsqueeze(1), shared).squeeze(1), None


def _of_all(A: Tensor, gates: Tensor) -> Tensor:
    """Room for [n, r, min], to be used at once."""
    return scratch("scaled bases", A, A.dtype, len(gates), *A.shape)


class RandLora(Delta):
    """ΔW = s·Σ_j B_j·diag(λ_j)·A·diag(γ_j), or its transpose where out < in. λ = 0 at the start."""

    in_product_form = True
    # PEFT's files hold the bank once more in every layer
    repeats = {"randlora_A": "randlora_A", "randlora_B": "randlora_B"}

    @classmethod
    def banks(cls, config: RandLoraConfig) -> Mapping[str, tuple[str, type[Bank]]]:
        return {"bases": ("model", RandBases)}

    def build(self) -> None:
        rank, smallest, largest = self.config.rank, min(self.site.n_in, self.site.n_out), max(self.site.n_in, self.site.n_out)
        self.smallest, self.largest, self.n = smallest, largest, num_bases(smallest, rank)
        self.scale = self.config.alpha / rank / (1 if self.config.peft_compat else math.sqrt(self.n))
        self.randlora_lambda = nn.Parameter(torch.empty(rank, self.n, **self.storage))
        self.randlora_gamma = nn.Parameter(torch.empty(self.n, smallest, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.randlora_lambda.zero_()
        self.randlora_gamma.fill_(1 / max(self.n, self.smallest))

    def product(self) -> tuple[Tensor, Tensor, float]:
        return self.factors_in(self.randlora_lambda.dtype)

    def running_product(self, W: Tensor) -> tuple[Tensor, Tensor, float]:
        return self.factors_in(W.dtype if dense.is_short(W.dtype) else self.randlora_lambda.dtype)

    def factors_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """(B, A, 1) in this type."""
        B = self.bases.frozen("randlora_B", dtype)[: self.largest, : self.n]  # [max, n, r]
        A = ScaledBases.apply(self.bases.randlora_A[:, 0, : self.smallest], self.randlora_lambda * self.scale, self.randlora_gamma, dtype)
        if self.config.peft_compat:  # base j and rank i of A meet B's entry n·i + j, counted with the rank running fastest
            A = A.transpose(0, 1)
        A, B = A.flatten(0, 1), B.flatten(1)
        return (B, A, 1.0) if self.smallest == self.site.n_in else (A.T, B.T, 1.0)

    def forms_delta(self, x: Tensor) -> bool:
        if dense.is_short(x.dtype):  # no faster there, and a rounded ΔW's gradient gives λ's twice the error
            return False
        rank = self.n * self.config.rank
        apart = rank * (3 * self.smallest + 2 * self.largest)  # the larger factor is frozen
        return self.pays_to_form(x, apart=apart, forming=2 * rank * self.smallest * self.largest)

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        left, right, _ = self.factors_in(x.dtype)
        return F.linear(F.linear(x, right), left)


def _randlora_to_peft(config: RandLoraConfig) -> dict[str, Any]:
    return {
        "r": config.rank,
        "randlora_alpha": int(config.alpha),
        "randlora_dropout": config.dropout,
        "projection_prng_key": config.projection_seed,
        "save_projection": True,
        "sparse": config.bases == "sparse",
        "very_sparse": config.bases == "very_sparse",
        "fan_in_fan_out": False,
    }


def _randlora_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    if not fields.get("save_projection", True):
        raise AdapterError(
            "save_projection is false: the file lacks its random bases, and PEFT draws them in a number type that depends on "
            "the machine, so they cannot be drawn again. Load it with PEFT where it was made, and save it with save_projection"
        )
    return {
        "rank": fields.get("r", 32),
        "alpha": fields.get("randlora_alpha", 640),
        "dropout": fields.get("randlora_dropout", 0.0),
        "bases": "very_sparse" if fields.get("very_sparse") else "sparse" if fields.get("sparse") else "dense",
        "projection_seed": fields.get("projection_prng_key", 0),
        "peft_compat": True,
    }


RandLora.peft = PeftFormat(
    "RANDLORA",
    _randlora_to_peft,
    _randlora_from_peft,
    frozenset({"r", "randlora_alpha", "randlora_dropout", "projection_prng_key", "save_projection", "sparse", "very_sparse", "fan_in_fan_out", "init_weights"}),
    # PEFT's scaling is a whole number by its type, and its bases are always in the file of ours that it reads
    fits=lambda config: config.peft_compat and config.save_projection and float(config.alpha).is_integer() and not config.magnitude,
    lacks=frozenset({"exclude_modules"}),
)


# ---------------------------------------------------------------- VB-LoRA


@dataclass(frozen=True)
class VbLoraConfig(AdapterConfig):
    """LoRA whose factors are put together from a shared bank of vectors (arXiv:2405.15179)."""

    delta: str = option("vblora", "Parametrisation of the change.", choices=("vblora",))
    rank: int = option(4, "Rank of the change.", gt=0)
    num_vectors: int = option(256, "Vectors in the bank; the paper has 90 on GLUE and 2048 for Mistral.", gt=0)
    vector_length: int = option(256, "Length of each vector; it must divide every adapted layer's dimensions.", gt=0)
    topk: int = option(2, "Vectors that are added up in each piece.", gt=0)
    bank_bound: float = option(0.02, "The vectors start uniform within ± this.", gt=0)
    logits_std: float = option(0.1, "Deviation of the logits' start.", gt=0)
    topk_only: bool = option(False, "Write only the chosen vectors' numbers and weights into the file, much smaller and for use as it is: trained on, each piece keeps its vectors.")

    @staticmethod
    def delta_class() -> type[Delta]:
        return VbLora

    def problems(self) -> list[str]:
        many = self.topk > self.num_vectors
        return super().problems() + ([f"topk is {self.topk}; there are {self.num_vectors} vectors to choose from"] if many else [])


class VectorBank(Bank):
    def build(self) -> None:
        self.vblora_vector_bank = nn.Parameter(torch.empty(self.config.num_vectors, self.config.vector_length, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.vblora_vector_bank.copy_(draw.uniform(self.vblora_vector_bank.shape, self.config.bank_bound, generator))

    def leaves(self) -> dict[str, str]:
        return {"vblora_vector_bank": "vblora_vector_bank"}


UNCHOSEN = -1e4  # a logit that no training brings among the likeliest, and that is finite in every type
LEAST = 1e-30  # below a weight that is told from zero


def _index_type(count: int) -> torch.dtype:
    """The smallest type that numbers so many vectors, as PEFT chooses it."""
    return torch.uint8 if count < 1 << 8 else torch.int16 if count < 1 << 15 else torch.int32


class VbLora(Delta):
    """ΔW = B·A with pieces Σ_k softmax(the k largest logits)·vector. Not zero at the start: both factors are small."""

    in_product_form = True

    @classmethod
    def banks(cls, config: VbLoraConfig) -> Mapping[str, tuple[str, type[Bank]]]:
        return {"vectors": ("model", VectorBank)}

    def build(self) -> None:
        config, site = self.config, self.site
        for what, size in (("in", site.n_in), ("out", site.n_out)):
            if size % config.vector_length:
                fitting = [n for n in range(1, size + 1) if site.n_in % n == site.n_out % n == 0]
                raise AdapterError(
                    f"{site.name}: vector_length is {config.vector_length}, and does not divide its {what} dimension {size}; "
                    f"of this layer {site.n_out}×{site.n_in} it can be {', '.join(map(str, fitting))}"
                )
        pieces_in, pieces_out = site.n_in // config.vector_length, site.n_out // config.vector_length
        self.vblora_logits_A = nn.Parameter(torch.empty(config.rank, pieces_in, config.num_vectors, **self.storage))
        self.vblora_logits_B = nn.Parameter(torch.empty(pieces_out, config.rank, config.num_vectors, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        for logits in (self.vblora_logits_A, self.vblora_logits_B):
            logits.copy_(draw.normal(logits.shape, self.config.logits_std, generator))

    def _pieces(self, logits: Tensor) -> Tensor:
        """[.., .., h] -> [.., .., b]"""
        likeliest, places = logits.topk(self.config.topk, dim=-1)
        weights = torch.softmax(likeliest, dim=-1).flatten(0, 1)
        pieces = F.embedding_bag(places.flatten(0, 1), self.vectors.vblora_vector_bank, mode="sum", per_sample_weights=weights)
        return pieces.unflatten(0, logits.shape[:2])

    def product(self) -> tuple[Tensor, Tensor, float]:
        A = self._pieces(self.vblora_logits_A).flatten(1)  # [r, in]
        B = self._pieces(self.vblora_logits_B).transpose(1, 2).flatten(0, 1)  # [out, r]
        return B, A, 1.0

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        B, A, _ = self.product()
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))

    def lr_ratios(self) -> dict[str, float]:
        return {"vblora_logits_A": 10.0, "vblora_logits_B": 10.0}  # 1e-2, where the vectors have 1e-3

    def to_file(self) -> dict[str, Tensor]:
        if not self.config.topk_only:
            return super().to_file()
        found: dict[str, Tensor] = {}
        for leaf, logits in (("vblora_logits_A", self.vblora_logits_A), ("vblora_logits_B", self.vblora_logits_B)):
            likeliest, places = logits.detach().topk(self.config.topk, dim=-1)
            found[f"{leaf}_topk_indices"] = places.to(_index_type(self.config.num_vectors))
            # the weights add up to 1, so the last one is left out
            found[f"{leaf}_topk_weights"] = torch.softmax(likeliest, dim=-1)[..., :-1].contiguous()
        return found

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        if not self.config.topk_only:
            return super().from_file(tensors)
        for leaf, logits in (("vblora_logits_A", self.vblora_logits_A), ("vblora_logits_B", self.vblora_logits_B)):
            places = tensors[f"{leaf}_topk_indices"].long()
            if int(places.min()) < 0 or int(places.max()) >= self.config.num_vectors:
                raise AdapterError(f"{self.site.name}: {leaf}_topk_indices names vectors beyond the {self.config.num_vectors} there are")
            weights = tensors[f"{leaf}_topk_weights"].to(logits)
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
            logits.fill_(UNCHOSEN).scatter_(-1, places.to(logits.device), weights.clamp_min(LEAST).log())


VBLORA = {"rank": "r", "num_vectors": "num_vectors", "vector_length": "vector_length", "topk": "topk", "dropout": "vblora_dropout", "bank_bound": "init_vector_bank_bound", "logits_std": "init_logits_std", "topk_only": "save_only_topk_weights"}
VBLORA_DEFAULTS = {"rank": 4, "num_vectors": 256, "vector_length": 256, "topk": 2, "dropout": 0.0, "bank_bound": 0.02, "logits_std": 0.1, "topk_only": False}

VbLora.peft = PeftFormat(
    "VBLORA",
    lambda config: {field: getattr(config, name) for name, field in VBLORA.items()} | {"fan_in_fan_out": False},
    lambda fields: {name: fields.get(field, VBLORA_DEFAULTS[name]) for name, field in VBLORA.items()},
    frozenset(VBLORA.values()) | {"fan_in_fan_out"},
    fits=lambda config: not config.magnitude,
)


# ---------------------------------------------------------------- Uni-LoRA


@dataclass(frozen=True)
class UniLoraConfig(AdapterConfig):
    """All of LoRA's entries taken from one short vector (arXiv:2506.00799)."""

    delta: str = option("unilora", "Parametrisation of the change.", choices=("unilora",))
    rank: int = option(4, "Rank of the change.", gt=0)
    length: int = option(256, "Length of the vector, which is all that is trained.", gt=0)
    bound: float = option(0.02, "The vector starts uniform within ± this.", gt=0)
    projection_seed: int = option(42, "Seed of which entry goes where, whatever the run's seed.", ge=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return UniLora


def balanced_places(count: int, length: int, seed: int) -> np.ndarray:
    """For each of `count` entries the place in a vector that it is taken from, each place as often as another or once more.

    Shuffled with numpy from the seed, in the calls that PEFT makes, for its files rely on them.
    """
    generator = np.random.default_rng(seed)
    places = np.arange(length).repeat(count // length)
    if count % length:
        places = np.append(places, generator.choice(length, size=count % length, replace=False))
    generator.shuffle(places)
    return places


class Theta(Bank):
    """θ [d], and how often each entry is used in the whole model."""

    def build(self) -> None:
        rank, length = self.config.rank, self.config.length
        self.unilora_theta_d = nn.Parameter(torch.empty(length, **self.storage))
        sizes = [rank * (site.n_in + site.n_out) for site in self.sites]
        places = balanced_places(sum(sizes), length, self.config.projection_seed)
        ends = np.cumsum(sizes)
        # the layers take these when they are built
        self.places = {site.name: places[end - size : end] for site, end, size in zip(self.sites, ends, sizes, strict=True)}
        uses = torch.from_numpy(np.bincount(places, minlength=length)).clamp_min(1)  # an entry without use is never read
        self.register_buffer("norm", uses.to(torch.float32).rsqrt().to(**self.storage), persistent=False)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.unilora_theta_d.copy_(draw.uniform(self.unilora_theta_d.shape, self.config.bound, generator))

    def leaves(self) -> dict[str, str]:
        return {"unilora_theta_d": "unilora_theta_d"}


class UniLora(Delta):
    """ΔW = B·A with A[i, j] = θ[p(i, j)] / √uses, and B likewise; p is frozen. Not zero at the start, but small."""

    in_product_form = True

    @classmethod
    def banks(cls, config: UniLoraConfig) -> Mapping[str, tuple[str, type[Bank]]]:
        return {"theta": ("model", Theta)}

    def build(self) -> None:
        places = torch.from_numpy(self.theta.places.pop(self.site.name)).to(self.site.device)
        self.register_buffer("places", places, persistent=False)  # drawn again from the seed

    def reset(self, generator: torch.Generator) -> None:
        """Its only tensor is the vector, which the bank starts."""

    def product(self) -> tuple[Tensor, Tensor, float]:
        entries = (self.theta.unilora_theta_d * self.theta.norm).index_select(0, self.places)
        split = self.config.rank * self.site.n_in
        return entries[split:].view(self.site.n_out, -1), entries[:split].view(-1, self.site.n_in), 1.0

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        B, A, _ = self.product()
        return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


UNILORA = {"rank": "r", "length": "theta_d_length", "dropout": "unilora_dropout", "bound": "init_theta_d_bound", "projection_seed": "proj_seed"}
UNILORA_DEFAULTS = {"rank": 4, "length": 256, "dropout": 0.0, "bound": 0.02, "projection_seed": 42}

UniLora.peft = PeftFormat(
    "UNILORA",
    lambda config: {field: getattr(config, name) for name, field in UNILORA.items()} | {"fan_in_fan_out": False},
    lambda fields: {name: fields.get(field, UNILORA_DEFAULTS[name]) for name, field in UNILORA.items()},
    frozenset(UNILORA.values()) | {"fan_in_fan_out", "init_weights"},
    fits=lambda config: not config.magnitude,
    lacks=frozenset({"exclude_modules"}),
)
