"""LoRA's pair shared by many layers: VeRA, PVeRA, Tied-LoRA and ShareLoRA. What a layer keeps to itself is small.

Legend: W is [out, in]; r the rank; A [r, in] and B [out, r] are shared, and where layers differ in shape they are as
large as the largest, each layer taking the leading part; b [out], d [r] or [2r], u [r] and v [out] are a layer's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters import draw
from deltune.adapters.bank import Bank, Projection
from deltune.adapters.config import AdapterConfig, RankedConfig
from deltune.adapters.delta import Delta, PeftFormat
from deltune.adapters.ranked import Ranked
from deltune.config.fields import option

DELTAS = {"vera": "VeraConfig", "pvera": "PveraConfig", "tied_lora": "TiedLoraConfig", "sharelora": "ShareLoraConfig"}

METHODS = {
    "vera": {
        "choices": {"delta": "vera"},
        "paper": "arXiv:2310.11454",
        "formula": "ΔW = diag(b)·B·diag(d)·A, A and B random, frozen, one pair for the model",
        "small": {"rank": 3},
    },
    "pvera": {
        "choices": {"delta": "pvera"},
        "paper": "arXiv:2512.07703",
        "formula": "Δy = b ⊙ B(μ + ε ⊙ exp(½ log v)), (μ, log v) = the halves of d ⊙ Ax; ε is drawn in training, 0 otherwise",
        "small": {"rank": 12},
        "note": "The noise comes from torch's global generator, whose state a checkpoint holds. A merged weight has ε = 0. The published code has no KL term, and neither has this.",
    },
    "tied_lora": {
        "choices": {"delta": "tied_lora"},
        "paper": "arXiv:2311.09578",
        "formula": "ΔW = s·diag(v)·B·diag(u)·A, A and B one pair for each type of layer, s = α/r",
        "small": {"rank": 2},
        "note": "The layers' code is not public, and the start of u and v could not be checked: here they are 1, and the first trained one of B, v, u, A is 0. The paper's fused q, k, v share A; here each has its own.",
    },
    "sharelora": {
        "choices": {"delta": "sharelora"},
        "paper": "arXiv:2406.10785",
        "formula": "ΔW = s·BA, s = α/r, with A, B or both one for each type of layer, or for the model",
        "small": {"rank": 2},
        "note": "With part=AB all layers of a type get the same ΔW.",
    },
}


# ---------------------------------------------------------------- VeRA


@dataclass(frozen=True)
class VeraConfig(AdapterConfig):
    """Vectors around one frozen random pair (arXiv:2310.11454)."""

    delta: str = option("vera", "Parametrisation of the change.", choices=("vera",))
    rank: int = option(256, "Rank of the random pair; larger than LoRA's, for a rank costs one number in each layer.", gt=0)
    d_initial: float = option(0.1, "Start of d; b starts at zero.")
    projection_seed: int = option(0, "Seed of the random pair, whatever the run's seed.", ge=0)
    save_projection: bool = option(True, "Write the random pair into the adapter's file; without it the pair is drawn again when the file is read.")

    @staticmethod
    def delta_class() -> type[Delta]:
        return Vera


def he_uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Uniform within ±√(6 / columns): kaiming_uniform of a ReLU's gain. The product is formed as torch forms it, so that
    the draws are PEFT's to the bit."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
    return draw.uniform((rows, columns), bound, generator)


class VeraPair(Projection):
    """A [r, largest in] and B [largest out, r] of the whole model. PEFT's names, and PEFT's draws."""

    names = ("vera_A", "vera_B")
    halves = 1  # rows of A for each rank

    def build(self) -> None:
        rank = self.config.rank
        self.declare(self.names[0], self.halves * rank, self.max_in)
        self.declare(self.names[1], self.max_out, rank)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        for name in self.names:
            tensor = self.get_buffer(name)
            tensor.copy_(he_uniform(*tensor.shape, generator))

    def pair(self, n_out: int, n_in: int) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of a layer: views of the leading part."""
        A, B = (self.get_buffer(name) for name in self.names)
        return A[:, :n_in], B[:n_out]


def _vera_format(kind: str, harmless: frozenset[str] = frozenset(), **own: str) -> PeftFormat:
    """VeRA's fields and PVeRA's, which differ in the name of the dropout and in what PVeRA adds (ours to PEFT's)."""
    theirs = {"rank": "r", "dropout": f"{kind}_dropout", "projection_seed": "projection_prng_key", "save_projection": "save_projection", "d_initial": "d_initial", **own}
    defaults = {"rank": 256, "dropout": 0.0, "projection_seed": 0, "save_projection": True, "d_initial": 0.1, "sample_at_inference": False}

    def write(config: VeraConfig) -> dict[str, Any]:
        return {field: getattr(config, name) for name, field in theirs.items()} | {"fan_in_fan_out": False}

    def read(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {name: fields.get(field, defaults[name]) for name, field in theirs.items()}

    # init_weights is about the start, which the file's tensors are past
    known = frozenset(theirs.values()) | harmless | {"fan_in_fan_out", "init_weights"}
    return PeftFormat(
        kind.upper(), write, read, known, fits=lambda config: not config.magnitude, lacks=frozenset({"exclude_modules"})
    )


class Vera(Delta):
    """ΔW = diag(b)·B·diag(d)·A. b = 0 and d is small at the start, so ΔW = 0 and b has a gradient, for B is not zero."""

    peft = _vera_format("vera")
    in_product_form = True

    @classmethod
    def banks(cls, config: VeraConfig) -> Mapping[str, tuple[str, type[Bank]]]:
        return {"shared": ("model", VeraPair)}

    def build(self) -> None:
        self.vera_lambda_b = nn.Parameter(torch.empty(self.site.n_out, **self.storage))
        self.vera_lambda_d = nn.Parameter(torch.empty(self.config.rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.vera_lambda_b.zero_()
        self.vera_lambda_d.fill_(self.config.d_initial)

    def product(self) -> tuple[Tensor, Tensor, float]:
        A, B = self.shared.pair(self.site.n_out, self.site.n_in)
        return self.vera_lambda_b.unsqueeze(1) * B * self.vera_lambda_d, A, 1.0  # A as it is: it has no gradient

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        A, B = self.shared.pair(self.site.n_out, self.site.n_in)
        z = F.linear(x, A.to(x.dtype)) * self.vera_lambda_d.to(x.dtype)  # [..., r]
        return F.linear(z, B.to(x.dtype)) * self.vera_lambda_b.to(x.dtype)

    def ranked(self) -> dict[str, int]:
        return {"vera_lambda_d": 0}


# ---------------------------------------------------------------- PVeRA


@dataclass(frozen=True)
class PveraConfig(VeraConfig):
    """VeRA with a Gaussian in the middle (arXiv:2512.07703)."""

    delta: str = option("pvera", "Parametrisation of the change.", choices=("pvera",))
    sample_at_inference: bool = option(False, "Draw in eval mode too, instead of taking the mean; such an adapter cannot be merged.")

    @staticmethod
    def delta_class() -> type[Delta]:
        return Pvera


class PveraPair(VeraPair):
    names = ("pvera_A", "pvera_B")
    halves = 2  # the upper for μ, the lower for log v


class Pvera(Delta):
    """y += b ⊙ B(μ + ε ⊙ exp(½ log v)) with (μ, log v) = the halves of d ⊙ Ax. b = 0 at the start."""

    # another seed of the noise is another draw of the same adapter
    peft = _vera_format("pvera", frozenset({"generator_seed"}), sample_at_inference="sample_at_inference")

    @classmethod
    def banks(cls, config: PveraConfig) -> Mapping[str, tuple[str, type[Bank]]]:
        return {"shared": ("model", PveraPair)}

    @classmethod
    def no_matrix(cls, config: PveraConfig) -> str:
        return "with sample_at_inference its output is drawn anew each time" if config.sample_at_inference else ""

    def build(self) -> None:
        self.pvera_lambda_b = nn.Parameter(torch.empty(self.site.n_out, **self.storage))
        self.pvera_lambda_d = nn.Parameter(torch.empty(2 * self.config.rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.pvera_lambda_b.zero_()
        self.pvera_lambda_d.fill_(self.config.d_initial)

    @property
    def samples(self) -> bool:
        """Whether ε is drawn: while this adapter is trained, as with dropout, and not while another one is."""
        return self.config.sample_at_inference or (self.training and self.pvera_lambda_b.requires_grad)

    def product(self) -> tuple[Tensor, Tensor, float]:
        A, B = self.shared.pair(self.site.n_out, self.site.n_in)
        rank = self.config.rank
        return self.pvera_lambda_b.unsqueeze(1) * B, self.pvera_lambda_d[:rank].unsqueeze(1) * A[:rank], 1.0

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        A, B = self.shared.pair(self.site.n_out, self.site.n_in)
        d = self.pvera_lambda_d.to(x.dtype)
        if self.samples:
            mean, log_variance = (F.linear(x, A.to(x.dtype)) * d).chunk(2, dim=-1)
            z = torch.addcmul(mean, torch.randn_like(mean), torch.exp(0.5 * log_variance))
            return F.linear(z, (self.pvera_lambda_b.unsqueeze(1) * B).to(x.dtype))
        rank = self.config.rank
        z = F.linear(x, A[:rank].to(x.dtype)) * d[:rank]
        return F.linear(z, B.to(x.dtype)) * self.pvera_lambda_b.to(x.dtype)


# ---------------------------------------------------------------- Tied-LoRA


@dataclass(frozen=True)
class TiedLoraConfig(RankedConfig):
    """One pair for each type of layer, and two vectors for each layer (arXiv:2311.09578)."""

    delta: str = option("tied_lora", "Parametrisation of the change.", choices=("tied_lora",))
    train: list[str] = option(["A", "B", "u", "v"], "Which of the four are trained; the others keep their start. Without u or v those are 1.", choices=("A", "B", "u", "v"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return TiedLora

    def problems(self) -> list[str]:
        return super().problems() + ([] if self.train else ["train is empty; at least one of A, B, u, v is trained"])

    @property
    def zero(self) -> str:
        """The one that starts at zero. One that is trained, and only one: else nothing would ever get a gradient."""
        return next(name for name in ("B", "v", "u", "A") if name in self.train)


class TiedPair(Bank):
    def build(self) -> None:
        n_out, n_in = self.one_shape()
        for name, shape in (("A", (self.config.rank, n_in)), ("B", (n_out, self.config.rank))):
            tensor = torch.empty(*shape, **self.storage)
            if name in self.config.train:
                setattr(self, name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        for name, tensor in (("A", self.A), ("B", self.B)):
            tensor.copy_(draw.kaiming(tensor.shape, generator))
            if name == self.config.zero:
                tensor.zero_()


class TiedLora(Ranked):
    """ΔW = s·diag(v)·B·diag(u)·A. The first trained one of B, v, u and A starts at zero, the others do not."""

    in_product_form = True

    @classmethod
    def banks(cls, config: TiedLoraConfig) -> Mapping[str, tuple[str, type[Bank]]]:
        return {"tied": ("type", TiedPair)}

    def build(self) -> None:
        for name, width in (("u", self.rank), ("v", self.site.n_out)):
            trained = name in self.config.train
            setattr(self, name, nn.Parameter(torch.empty(width, **self.storage)) if trained else None)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        for name, vector in (("u", self.u), ("v", self.v)):
            if vector is not None:
                vector.fill_(0.0 if name == self.config.zero else 1.0)

    def product(self) -> tuple[Tensor, Tensor, float]:
        left = self.tied.B if self.u is None else self.tied.B * self.u
        return left if self.v is None else self.v.unsqueeze(1) * left, self.tied.A, self.scale

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        z = F.linear(x, self.tied.A.to(x.dtype)) * self.scale  # [..., r]
        z = z if self.u is None else z * self.u.to(x.dtype)
        y = F.linear(z, self.tied.B.to(x.dtype))
        return y if self.v is None else y * self.v.to(x.dtype)


# ---------------------------------------------------------------- ShareLoRA


@dataclass(frozen=True)
class ShareLoraConfig(RankedConfig):
    """LoRA whose A, B or both are shared (arXiv:2406.10785)."""

    delta: str = option("sharelora", "Parametrisation of the change.", choices=("sharelora",))
    part: str = option("A", "What is shared.", choices=("A", "B", "AB"))
    scope: str = option("type", "Among which layers: type: those of one name in all blocks; model: all, each taking the leading part of tensors as large as the largest layer.", choices=("type", "model"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return ShareLora


class SharePart(Bank):
    def build(self) -> None:
        n_out, n_in = self.one_shape() if self.config.scope == "type" else (self.max_out, self.max_in)
        if "A" in self.config.part:
            self.A = nn.Parameter(torch.empty(self.config.rank, n_in, **self.storage))
        if "B" in self.config.part:
            self.B = nn.Parameter(torch.empty(n_out, self.config.rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        if "A" in self.config.part:
            self.A.copy_(draw.kaiming(self.A.shape, generator))
        if "B" in self.config.part:
            self.B.zero_()


class ShareLora(Ranked):
    """ΔW = s·B·A, B = 0 at the start. A part that is shared is in the bank, the other one is the layer's own."""

    in_product_form = True

    @classmethod
    def banks(cls, config: ShareLoraConfig) -> Mapping[str, tuple[str, type[Bank]]]:
        return {"shared": (config.scope, SharePart)}

    def build(self) -> None:
        if "A" not in self.config.part:
            self.A = nn.Parameter(torch.empty(self.rank, self.site.n_in, **self.storage))
        if "B" not in self.config.part:
            self.B = nn.Parameter(torch.empty(self.site.n_out, self.rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        if "A" not in self.config.part:
            self.A.copy_(draw.kaiming(self.A.shape, generator))
        if "B" not in self.config.part:
            self.B.zero_()

    def pair(self) -> tuple[Tensor, Tensor]:
        A = self.shared.A[:, : self.site.n_in] if "A" in self.config.part else self.A
        B = self.shared.B[: self.site.n_out] if "B" in self.config.part else self.B
        return A, B

    def product(self) -> tuple[Tensor, Tensor, float]:
        A, B = self.pair()
        return B, A, self.scale

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        A, B = self.pair()
        return F.linear(F.linear(x, A.to(x.dtype)) * self.scale, B.to(x.dtype))
