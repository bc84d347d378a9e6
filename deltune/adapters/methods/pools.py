"""Changes made of a layer's own part and of pools that several layers draw from: RaSA, DenseLoRA and BSLoRA.

Legend: W is [out, in]; r a rank; L the number of layers that share a pool; A [.., in] and B [out, ..] are factors; KU is
uniform within ±1/√(a tensor's second dimension).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltune.adapters import draw
from deltune.adapters.bank import Bank
from deltune.adapters.config import AdapterConfig, RankedConfig
from deltune.adapters.delta import Base, Delta
from deltune.adapters.layers import Site
from deltune.adapters.nodes import ACTIVATIONS
from deltune.adapters.ranked import Ranked
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"rasa": "RasaConfig", "denselora": "DenseLoraConfig", "bslora": "BsLoraConfig"}

METHODS = {
    "rasa": {
        "choices": {"delta": "rasa"},
        "paper": "arXiv:2503.12576",
        "formula": "ΔW = [B_p, B_s]·diag(e)·[A_p; A_s], A_p of r − k ranks, A_s of k·L shared by the L layers of a type",
        "small": {"rank": 4},
    },
    "denselora": {
        "choices": {"delta": "denselora"},
        "paper": "arXiv:2505.23808",
        "formula": "Δy = s·GELU(B·M·GELU(A·x)), A and B one pair for each type of layer, s = α/r",
        "small": {"rank": 4},
    },
    "bslora": {
        "choices": {"delta": "bslora"},
        "paper": "ICML 2025, poster 45733",
        "formula": "ΔW = s·(B_u A_u + φ(B_block A_block) + φ(B_model A_model)), φ fits a shared pair to the layer: slice, gate or kron; s = 2",
        "small": {"rank": 2, "block_rank": 2, "model_rank": 3, "share": 4},
        "note": "The published code leaves dropout out of kron, and its merge is LoRA's; here dropout acts in every form, and merging is exact.",
    },
}


# ---------------------------------------------------------------- RaSA


@dataclass(frozen=True)
class RasaConfig(AdapterConfig):
    """LoRA that gives some of its ranks into a pool of the layers of one type (arXiv:2503.12576)."""

    delta: str = option("rasa", "Parametrisation of the change.", choices=("rasa",))
    rank: int = option(8, "Ranks that a layer pays for: its own and those it gives into the pool.", gt=1)
    shared_rank: int = option(1, "Ranks of each layer that go into the pool; the paper takes an eighth of the rank.", gt=0)
    alpha: float = option(8.0, "Strength, in the start of e: half of it over the layer's own ranks, half over the pool's.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return Rasa

    def problems(self) -> list[str]:
        short = self.shared_rank >= self.rank
        return super().problems() + ([f"shared_rank is {self.shared_rank}; it must be below the rank, {self.rank}"] if short else [])


class RasaPool(Bank):
    """A [k·L, in] and B [out, k·L]."""

    def build(self) -> None:
        n_out, n_in = self.one_shape()
        ranks = self.config.shared_rank * len(self.sites)
        self.A = nn.Parameter(torch.empty(ranks, n_in, **self.storage))
        self.B = nn.Parameter(torch.empty(n_out, ranks, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.A.copy_(draw.kaiming(self.A.shape, generator))
        self.B.zero_()


class Rasa(Delta):
    """ΔW = [B_p, B_s]·diag(e)·[A_p; A_s] with no scale but e. B = 0 at the start."""

    in_product_form = True

    @classmethod
    def banks(cls, config: RasaConfig) -> Mapping[str, tuple[str, type[Bank]]]:
        return {"pool": ("type", RasaPool)}

    def build(self) -> None:
        self.own_rank = self.config.rank - self.config.shared_rank
        self.A = nn.Parameter(torch.empty(self.own_rank, self.site.n_in, **self.storage))
        self.B = nn.Parameter(torch.empty(self.site.n_out, self.own_rank, **self.storage))
        self.e = nn.Parameter(torch.empty(self.own_rank + self.pool.A.shape[0], **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.A.copy_(draw.kaiming(self.A.shape, generator))
        self.B.zero_()
        self.e[: self.own_rank] = 0.5 * self.config.alpha / self.own_rank
        self.e[self.own_rank :] = 0.5 * self.config.alpha / self.pool.A.shape[0]

    def product(self) -> tuple[Tensor, Tensor, float]:
        return torch.cat([self.B, self.pool.B], 1) * self.e, torch.cat([self.A, self.pool.A]), 1.0

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        A, B = torch.cat([self.A, self.pool.A]), torch.cat([self.B, self.pool.B], 1)
        return F.linear(F.linear(x, A.to(x.dtype)) * self.e.to(x.dtype), B.to(x.dtype))

    def ranked(self) -> dict[str, int]:
        return {"e": 0}


# ---------------------------------------------------------------- DenseLoRA


@dataclass(frozen=True)
class DenseLoraConfig(RankedConfig):
    """One encoder and decoder for each type of layer, a small dense matrix for each layer (arXiv:2505.23808)."""

    delta: str = option("denselora", "Parametrisation of the change.", choices=("denselora",))
    rank: int = option(16, "Rank of the encoder and decoder; the layer's own matrix is rank × rank.", gt=0)
    alpha: float = option(32.0, "Strength: the change is scaled by alpha / rank.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return DenseLora


class DensePair(Bank):
    """A [r, in] encodes, B [out, r] decodes."""

    def build(self) -> None:
        n_out, n_in = self.one_shape()
        self.A = nn.Parameter(torch.empty(self.config.rank, n_in, **self.storage))
        self.B = nn.Parameter(torch.empty(n_out, self.config.rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.A.copy_(draw.kaiming(self.A.shape, generator))
        self.B.zero_()


class DenseLora(Ranked):
    """y += s·GELU(B·M·GELU(A·x)). B = 0 at the start, and GELU(0) = 0. Dropout acts on x and after each GELU."""

    mergeable = False
    why_not_mergeable = "it is not linear in the layer's input"

    @classmethod
    def banks(cls, config: DenseLoraConfig) -> Mapping[str, tuple[str, type[Bank]]]:
        return {"pair": ("type", DensePair)}

    def build(self) -> None:
        self.M = nn.Parameter(torch.empty(self.rank, self.rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.M.copy_(draw.kaiming(self.M.shape, generator))

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        # as on the input, dropout is only for the adapter that is trained
        rate = self.config.dropout if self.training and self.M.requires_grad else 0.0
        z = F.dropout(F.gelu(F.linear(x, self.pair.A.to(x.dtype))), rate)
        z = F.linear(z, self.M.to(x.dtype))
        return F.dropout(F.gelu(F.linear(z, self.pair.B.to(x.dtype))), rate) * self.scale

    def forms_delta(self, x: Tensor) -> bool:
        return True

    def in_one(self, x: Tensor, base: Base) -> Tensor:
        b, factors = base.bias(), (self.pair.A, self.M, self.pair.B)
        return Decoded.apply(x, base.stored(), None if b is None else b.to(x.dtype), *(t.to(x.dtype) for t in factors), self.scale)


class Decoded(torch.autograd.Function):
    """W x + b + s·GELU(B·M·GELU(A·x)) for x [..., in]. Nothing as wide as the output is kept; W and b have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, M: Tensor, B: Tensor, scale: float) -> Tensor:
        y = F.linear(x, W, b)
        a = x.reshape(-1, x.shape[-1]) @ A.T
        z = F.gelu(a) @ M.T
        y.view(-1, y.shape[-1]).add_(F.gelu(z @ B.T), alpha=scale)
        ctx.save_for_backward(x, W, A, M, B, a, z)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, M, B, a, z = ctx.saved_tensors
        flat, wide, gelu = g.reshape(-1, g.shape[-1]), z @ B.T, ACTIVATIONS["gelu"]
        by_wide = gelu.backward(flat, wide, wide)
        by_z = by_wide @ (B * ctx.scale)
        by_a = gelu.backward(by_z @ M, a, torch.empty_like(a))
        dx = (flat @ W).addmm_(by_a, A).view(x.shape) if ctx.needs_input_grad[0] else None
        by_B = (z.T @ by_wide).T * ctx.scale
        return dx, None, None, by_a.T @ x.reshape(-1, x.shape[-1]), by_z.T @ F.gelu(a), by_B, None


# ---------------------------------------------------------------- BSLoRA

SHARES = {"kron": 256, "gate": 1024}  # the authors' sizes


@dataclass(frozen=True)
class BsLoraConfig(AdapterConfig):
    """LoRA beside one pair shared by the layers of a block and one by all (BSLoRA, ICML 2025)."""

    delta: str = option("bslora", "Parametrisation of the change.", choices=("bslora",))
    rank: int = option(2, "Rank of the layer's own pair.", gt=0)
    block_rank: int = option(4, "Rank of the pair that the layers of a block share.", gt=0)
    model_rank: int = option(8, "Rank of the pair that all layers share.", gt=0)
    form: str = option("kron", "How a shared pair is made to fit a layer: kron: Kronecker products with the layer's own vectors; gate: through one number, with the layer's own vectors at both ends; slice: a window of tensors as large as the largest layer.", choices=("kron", "gate", "slice"))
    share: int | None = option(None, "Width of the shared pairs with kron, which must divide the layer's dimensions, and with gate; null: 256 with kron, 1024 with gate.", gt=0)
    window: str = option("centre", "Where the window lies with slice.", choices=("centre", "leading"))
    scale: float = option(2.0, "Scale of the change; the authors fix it at 2.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return BsLora

    def problems(self) -> list[str]:
        found = super().problems()
        if self.form == "slice" and self.share is not None:
            found.append("share has no effect with form=slice, whose shared pairs are as large as the largest layer")
        if self.form != "slice" and self.window != "centre":
            found.append(f"window has no effect with form={self.form}")
        return found

    @property
    def width(self) -> int:
        return SHARES[self.form] if self.share is None else self.share


class BsBlockPair(Bank):
    """A [rank, share] and B [share, rank], or with `slice` as wide as the largest layer of the scope."""

    @property
    def rank(self) -> int:
        return self.config.block_rank

    def build(self) -> None:
        sliced = self.config.form == "slice"
        n_out, n_in = (self.max_out, self.max_in) if sliced else (self.config.width, self.config.width)
        self.A = nn.Parameter(torch.empty(self.rank, n_in, **self.storage))
        self.B = nn.Parameter(torch.empty(n_out, self.rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.A.copy_(draw.kaiming(self.A.shape, generator))
        self.B.zero_()


class BsModelPair(BsBlockPair):
    @property
    def rank(self) -> int:
        return self.config.model_rank


class Slice(nn.Module):
    """A window of the shared pair."""

    def __init__(self, config: BsLoraConfig, site: Site, storage: Mapping):
        super().__init__()
        self.config, self.site = config, site

    def reset(self, generator: torch.Generator) -> None:
        """It has no tensors of its own."""

    def _cut(self, tensor: Tensor, dimension: int, width: int) -> Tensor:
        begin = (tensor.shape[dimension] - width) // 2 if self.config.window == "centre" else 0
        return tensor.narrow(dimension, begin, width)

    def product(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return self._cut(B, 0, self.site.n_out), self._cut(A, 1, self.site.n_in)


class Gate(nn.Module):
    """out·(up·B·A·down)·into: the whole of it has rank 1."""

    def __init__(self, config: BsLoraConfig, site: Site, storage: Mapping):
        super().__init__()
        share = config.width
        self.into = nn.Parameter(torch.empty(1, site.n_in, **storage))
        self.down = nn.Parameter(torch.empty(share, 1, **storage))
        self.up = nn.Parameter(torch.empty(1, share, **storage))
        self.outward = nn.Parameter(torch.empty(site.n_out, 1, **storage))

    def reset(self, generator: torch.Generator) -> None:
        for gate in (self.into, self.down, self.up, self.outward):
            gate.copy_(draw.kaiming(gate.shape, generator))

    def product(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return self.outward * (self.up @ (B @ (A @ self.down))), self.into


class Kron(nn.Module):
    """(outward ⊗ B)·(into ⊗ A), with into [1, in/share] and outward [out/share, 1]."""

    def __init__(self, config: BsLoraConfig, site: Site, storage: Mapping):
        super().__init__()
        share = config.width
        for what, size in (("in", site.n_in), ("out", site.n_out)):
            if size % share:
                fitting = [n for n in range(1, size + 1) if site.n_in % n == site.n_out % n == 0]
                raise AdapterError(
                    f"{site.name}: share is {share}, and does not divide its {what} dimension {size}; of this layer "
                    f"{site.n_out}×{site.n_in} it can be {', '.join(map(str, fitting))}"
                )
        self.into = nn.Parameter(torch.empty(1, site.n_in // share, **storage))
        self.outward = nn.Parameter(torch.empty(site.n_out // share, 1, **storage))

    def reset(self, generator: torch.Generator) -> None:
        self.into.copy_(draw.kaiming(self.into.shape, generator))
        self.outward.copy_(draw.kaiming(self.outward.shape, generator))

    def product(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return torch.kron(self.outward, B), torch.kron(self.into, A)


FORMS: dict[str, type[nn.Module]] = {"slice": Slice, "gate": Gate, "kron": Kron}


class BsLora(Delta):
    """ΔW = s·(B_u A_u + φ(block's pair) + φ(model's pair)). Every B is 0 at the start."""

    in_product_form = True

    @classmethod
    def banks(cls, config: BsLoraConfig) -> Mapping[str, tuple[str, type[Bank]]]:
        return {"block": ("block", BsBlockPair), "model": ("model", BsModelPair)}

    def build(self) -> None:
        form = FORMS[self.config.form]
        self.A = nn.Parameter(torch.empty(self.config.rank, self.site.n_in, **self.storage))
        self.B = nn.Parameter(torch.empty(self.site.n_out, self.config.rank, **self.storage))
        self.from_block = form(self.config, self.site, self.storage)
        self.from_model = form(self.config, self.site, self.storage)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.A.copy_(draw.kaiming(self.A.shape, generator))
        self.B.zero_()
        self.from_block.reset(generator)
        self.from_model.reset(generator)

    def product(self) -> tuple[Tensor, Tensor, float]:
        block = self.from_block.product(self.block.A, self.block.B)
        model = self.from_model.product(self.model.A, self.model.B)
        return torch.cat([self.B, block[0], model[0]], 1), torch.cat([self.A, block[1], model[1]]), self.config.scale

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        left, right, scale = self.product()  # one pair of small rank, which is all that acts on x
        return F.linear(F.linear(x, right.to(x.dtype)) * scale, left.to(x.dtype))
