"""Low-rank changes cut into blocks: MELoRA, GraLoRA, BD-LoRA, PRoLoRA.

Legend: W is [out, in]; r is the rank; s the scale; x is [..., in]. blockdiag(M₁ … Mₙ) has the blocks on its diagonal and
zeros elsewhere. A batch of n products for n blocks passes over x and y, and such a layer is in no node with others; where
blockdiag has few zeros to multiply with it is formed instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters import draw
from deltune.adapters.config import RankedConfig
from deltune.adapters.delta import Delta, PeftFormat
from deltune.adapters.dense import is_short
from deltune.adapters.fit import must_divide
from deltune.adapters.init import starts, svd
from deltune.adapters.layers import Site
from deltune.adapters.ranked import SCALINGS, Ranked
from deltune.config.fields import option
from deltune.errors import AdapterError
from deltune.log import logger

DELTAS = {"melora": "MeloraConfig", "gralora": "GraloraConfig", "bd_lora": "BdLoraConfig", "prolora": "ProloraConfig"}

METHODS = {
    "melora": {
        "choices": {"delta": "melora"},
        "paper": "arXiv:2402.17263",
        "formula": "ΔW = s·blockdiag(Bᵢ)·blockdiag(Aᵢ), s = α/(rank of one block)",
        "small": {"rank": 2},
        "note": "As in the authors' code rank is that of one block, so there are as many parameters as in LoRA of this rank, and the change has rank blocks × rank. init=pissa and olora start from W's own diagonal blocks, which is not in the paper.",
    },
    "gralora": {
        "choices": {"delta": "gralora"},
        "paper": "arXiv:2505.20355",
        "formula": "ΔW = s·(k×k blocks, each a product of rank r/k, + B_g A_g of rank h), s = α/(r + h)",
        "small": {"rank": 4, "alpha": 8.0},
        "note": "rank is that of the blocks without the hybrid part, as in PEFT; the authors' rank is the sum of both.",
    },
    "bd_lora": {
        "choices": {"delta": "bd_lora"},
        "paper": "arXiv:2510.23346",
        "formula": "ΔW = s·BA with B or A block-diagonal, as the layer's outputs or inputs are spread over devices",
        "small": {"rank": 2, "diagonal_a": ["conv"], "diagonal_b": ["linear"]},
    },
    "prolora": {
        "choices": {"delta": "prolora"},
        "paper": "arXiv:2402.16902",
        "formula": "ΔW = s·[B_shared, B_u]·[A_shared; A_u]; A_shared: one chunk m times, each rolled along the ranks; B_shared likewise, n times",
        "small": {"rank": 4, "unshared": 1},
    },
}


def few(zeros: int, site: Site) -> bool:
    """Whether multiplying each input and output by so many zeros takes less than passes over them, by measurement."""
    return zeros <= (256 if is_short(site.dtype) else 32)


def each(x: Tensor, blocks: Tensor) -> Tensor:
    """blockdiag(blocks) x for x [..., n·i] and blocks [n, o, i]: [..., n·o]."""
    n, rows, columns = blocks.shape
    parts = x.reshape(-1, n, columns).transpose(0, 1)  # [n, tokens, i]
    return torch.bmm(parts, blocks.to(x.dtype).mT).transpose(0, 1).reshape(*x.shape[:-1], n * rows)


def diagonal(blocks: Tensor) -> Tensor:
    """blockdiag(blocks) for blocks [n, o, i]: [n·o, n·i]."""
    return torch.block_diag(*blocks)


# ---------------------------------------------------------------- MELoRA


@dataclass(frozen=True)
class MeloraConfig(RankedConfig):
    """Small LoRAs side by side on the diagonal (arXiv:2402.17263)."""

    delta: str = option("melora", "Parametrisation of the change.", choices=("melora",))
    rank: int = option(8, "Rank of each block; see rank_counts.", gt=0)
    alpha: float = option(16.0, "Strength: each block is scaled by alpha / (rank of one block), or its root with scaling=rslora.", gt=0)
    blocks: int = option(2, "Number of blocks; divides every layer's inputs and outputs.", gt=0)
    rank_counts: str = option("block", "block: rank is that of one block, the paper's mini rank; whole: of all blocks together, so each has rank / blocks.", choices=("block", "whole"))
    init: str = option("kaiming", "Start of each block. kaiming: A uniform within ±1/√(inputs of the block), B zero; pissa: the largest components of W's block; olora: the QR of W's block. What starts from W is taken out again, so nothing changes at first.", choices=("kaiming", "pissa", "olora"))
    svd: str = option("fast", "Decomposition of init=pissa. fast: randomised; full: exact.", choices=("fast", "full"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Melora

    def problems(self) -> list[str]:
        idle = [f"svd has no effect with init={self.init}: it belongs to init=pissa"] if self.svd != "fast" and self.init != "pissa" else []
        return [*idle, *super().problems()]


class Melora(Ranked):
    """ΔW = s·blockdiag(B)·blockdiag(A), A [n, r, in/n], B [n, out/n, r], or that less its start."""

    @property
    def in_product_form(self) -> bool:
        return few((self.config.blocks - 1) * self.rank * (2 if self.is_taken_out else 1), self.site)

    def build(self) -> None:
        n, site = self.config.blocks, self.site
        must_divide(site, "blocks", n, inputs=site.n_in, outputs=site.n_out)
        if self.config.rank_counts == "whole":
            if self.rank % n:
                raise AdapterError(f"{site.name}: rank is {self.rank} for all {n} blocks together, which do not divide it; {n * max(1, self.rank // n)} would do")
            self.rank //= n
            self.scale = SCALINGS[self.config.scaling](self.alpha, self.rank)
        self.is_taken_out = self.config.init != "kaiming"
        if self.is_taken_out and self.rank > min(site.n_in, site.n_out) // n:
            raise AdapterError(f"{site.name}: init={self.config.init} gives a block a rank of at most {min(site.n_in, site.n_out) // n}, and it is {self.rank}")
        self.lora_A = nn.Parameter(torch.empty(n, self.rank, site.n_in // n, **self.storage))
        self.lora_B = nn.Parameter(torch.empty(n, site.n_out // n, self.rank, **self.storage))
        if self.is_taken_out:
            self.register_buffer("start_A", torch.empty_like(self.lora_A.data))
            self.register_buffer("start_B", torch.empty_like(self.lora_B.data))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.lora_A.copy_(draw.kaiming(self.lora_A.shape, generator, fan=self.lora_A.shape[2]))
        self.lora_B.zero_()
        if self.is_taken_out:
            self.start_A.copy_(self.lora_A)
            self.start_B.copy_(self.lora_B)

    @property
    def starts_from_base(self) -> bool:
        return self.is_taken_out

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        rows, columns = self.lora_B.shape[1], self.lora_A.shape[2]
        for i in range(self.config.blocks):
            block = W[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns]
            if self.config.init == "pissa":
                A, B = starts.split(*svd.largest(block, self.rank, generator, self.config.svd), self.scale)
            else:
                A, B = starts.olora(block, self.rank, self.scale, generator, self.config)
            self.lora_A[i].copy_(A)
            self.lora_B[i].copy_(B)
        self.start_A.copy_(self.lora_A)
        self.start_B.copy_(self.lora_B)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Blocks of B and A with ΔW = s·blockdiag(B)·blockdiag(A)."""
        A, B = self.lora_A, self.lora_B
        if not self.is_taken_out:
            return B, A
        # B·A − B₀·A₀ as B·(A − A₀) + (B − B₀)·A₀: exactly zero at the start, in one product of rank 2r
        return torch.cat([B, B - self.start_B], dim=2), torch.cat([A - self.start_A, self.start_A], dim=1)

    def taken_out(self) -> tuple[Tensor, Tensor, float] | None:
        return (diagonal(self.start_B), diagonal(self.start_A), self.scale) if self.is_taken_out else None

    def product(self) -> tuple[Tensor, Tensor, float]:
        B, A = self.pair()
        return diagonal(B), diagonal(A), self.scale

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        B, A = self.pair()
        return each(each(x, A) * self.scale, B)

    def ranked(self) -> dict[str, int]:
        return {"lora_A": 1, "lora_B": 2}


# ---------------------------------------------------------------- GraLoRA


@dataclass(frozen=True)
class GraloraConfig(RankedConfig):
    """A low-rank product for each block of the weight (arXiv:2505.20355)."""

    delta: str = option("gralora", "Parametrisation of the change.", choices=("gralora",))
    rank: int = option(32, "Rank of the blocks of one row together; each block has rank / blocks.", gt=0)
    alpha: float = option(64.0, "Strength: the change is scaled by alpha / (rank + hybrid_rank), or its root with scaling=rslora.", gt=0)
    blocks: int = option(2, "Number of blocks in each direction; divides rank and every layer's inputs and outputs. The paper takes 2 up to rank 32, 4 from 64.", gt=0)
    hybrid_rank: int = option(0, "Rank of a plain LoRA beside the blocks.", ge=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return Gralora


class Gralora(Ranked):
    """Block (j, n) of ΔW is s·(rows n of B_j)ᵀ(columns j of A_n)ᵀ: every row of blocks meets every column of them.

    A [k, in/k, r], B [k, r, out/k], as in PEFT's files; the r of each are k groups of q = r/k.
    """

    peft = PeftFormat(
        type="GRALORA",
        write=lambda config: {
            "r": config.rank,
            "alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
            "gralora_k": config.blocks,
            "hybrid_r": config.hybrid_rank,
            "gralora_dropout": config.dropout,
            "init_weights": True,
            "fan_in_fan_out": False,
        },
        read=lambda fields: {
            "rank": fields.get("r", 32),
            "alpha": fields.get("alpha", 64),
            "blocks": fields.get("gralora_k", 2),
            "hybrid_rank": fields.get("hybrid_r", 0),
            "dropout": fields.get("gralora_dropout", 0.0),
        },
        fields=frozenset({"r", "alpha", "gralora_k", "hybrid_r", "gralora_dropout", "init_weights", "fan_in_fan_out"}),
        fits=lambda config: not (config.rank_pattern or config.alpha_pattern or config.magnitude) and config.scaling == "standard",
        lacks=frozenset({"exclude_modules"}),
    )

    @property
    def in_product_form(self) -> bool:
        return few((self.config.blocks - 1) * self.rank, self.site)

    def build(self) -> None:
        k, hybrid, site = self.config.blocks, self.config.hybrid_rank, self.site
        must_divide(site, "blocks", k, rank=self.rank, inputs=site.n_in, outputs=site.n_out)
        self.scale = SCALINGS[self.config.scaling](self.alpha, self.rank + hybrid)
        self.gralora_A = nn.Parameter(torch.empty(k, site.n_in // k, self.rank, **self.storage))
        self.gralora_B = nn.Parameter(torch.empty(k, self.rank, site.n_out // k, **self.storage))
        if hybrid:
            self.general_A = nn.Parameter(torch.empty(hybrid, site.n_in, **self.storage))
            self.general_B = nn.Parameter(torch.empty(site.n_out, hybrid, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.gralora_A.copy_(draw.kaiming(self.gralora_A.shape, generator, fan=self.gralora_A.shape[1]))
        self.gralora_B.zero_()
        if self.config.hybrid_rank:
            self.general_A.copy_(draw.kaiming(self.general_A.shape, generator))
            self.general_B.zero_()

    def exchanged(self, z: Tensor) -> Tensor:
        """Group j of block n becomes group n of block j: [..., k·r] to [..., k·r]."""
        k = self.config.blocks
        return z.unflatten(-1, (k, k, -1)).transpose(-3, -2).flatten(-3)

    def product(self) -> tuple[Tensor, Tensor, float]:
        left, right = diagonal(self.gralora_B.mT), self.exchanged(diagonal(self.gralora_A)).T
        if self.config.hybrid_rank:
            left, right = torch.cat([left, self.general_B], dim=1), torch.cat([right, self.general_A])
        return left, right, self.scale

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        out = each(self.exchanged(each(x, self.gralora_A.mT) * self.scale), self.gralora_B.mT)
        if self.config.hybrid_rank:
            out = out + F.linear(F.linear(x, self.general_A.to(x.dtype)) * self.scale, self.general_B.to(x.dtype))
        return out

    def leaves(self) -> dict[str, str]:
        general = {"general_A": "gralora_A_general.weight", "general_B": "gralora_B_general.weight"} if self.config.hybrid_rank else {}
        return {"gralora_A": "gralora_A", "gralora_B": "gralora_B"} | general


# ---------------------------------------------------------------- BD-LoRA

# Layers whose inputs are spread over devices when a model is served, and those whose outputs are
SPREAD_INPUTS = ["o_proj", "out_proj", "down_proj", "c_proj"]
SPREAD_OUTPUTS = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "qkv_proj", "gate_up_proj", "c_attn", "c_fc"]


@dataclass(frozen=True)
class BdLoraConfig(RankedConfig):
    """LoRA with one block-diagonal factor, for serving over several devices (arXiv:2510.23346)."""

    delta: str = option("bd_lora", "Parametrisation of the change.", choices=("bd_lora",))
    blocks: int = option(2, "Number of blocks: the number of devices that will serve it. Divides rank and, of the layers concerned, the inputs or outputs.", gt=0)
    diagonal_a: list[str] = option(SPREAD_INPUTS, "Parts of names of the modules whose A is block-diagonal: those with inputs spread over devices.")
    diagonal_b: list[str] = option(SPREAD_OUTPUTS, "Parts of names of the modules whose B is block-diagonal: those with outputs spread over devices.")
    strict: bool = option(True, "Refuse modules that are in neither list; otherwise they get a plain LoRA.")

    @staticmethod
    def delta_class() -> type[Delta]:
        return BdLora


def _bd_lora_to_peft(config: BdLoraConfig) -> dict[str, Any]:
    def plain(alpha: float) -> float:
        return int(alpha) if float(alpha).is_integer() else alpha

    return {
        "r": config.rank,
        "lora_alpha": plain(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.scaling == "rslora",
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: plain(alpha) for key, alpha in config.alpha_pattern.items()},
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "use_bdlora": {
            "target_modules_bd_a": list(config.diagonal_a),
            "target_modules_bd_b": list(config.diagonal_b),
            "nblocks": config.blocks,
            "match_strict": config.strict,
        },
    }


def _bd_lora_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    start = fields.get("init_lora_weights", True)
    if start not in (True, False, "gaussian"):
        raise AdapterError(f"init_lora_weights is {start!r} beside use_bdlora; whether the base was changed at the start cannot be told")
    own = fields["use_bdlora"]
    known = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}
    if not isinstance(own, dict) or not own.keys() <= known:
        raise AdapterError(f"use_bdlora is {own!r}; known in it are {', '.join(sorted(known))}")
    return {
        "rank": fields.get("r", 8),
        "alpha": fields.get("lora_alpha", 8),
        "dropout": fields.get("lora_dropout", 0.0),
        "scaling": "rslora" if fields.get("use_rslora") else "standard",
        "rank_pattern": fields.get("rank_pattern") or {},
        "alpha_pattern": fields.get("alpha_pattern") or {},
        "blocks": own.get("nblocks", 1),
        "diagonal_a": own.get("target_modules_bd_a") or [],
        "diagonal_b": own.get("target_modules_bd_b") or [],
        "strict": bool(own.get("match_strict", True)),
    }


class BdLora(Ranked):
    """ΔW = s·BA. A block-diagonal factor holds its n blocks one below the other: A [r, in/n] or B [out, r/n]."""

    in_product_form = True
    peft = PeftFormat(
        type="LORA",
        write=_bd_lora_to_peft,
        read=_bd_lora_from_peft,
        fields=frozenset({"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "fan_in_fan_out", "use_bdlora"}),
        harmless={"megatron_core": "megatron.core", "qalora_group_size": 16},
        fits=lambda config: not config.magnitude,
        told=lambda fields: bool(fields.get("use_bdlora")),
    )

    def build(self) -> None:
        config, site = self.config, self.site
        in_a, in_b = (any(part in site.name for part in parts) for parts in (config.diagonal_a, config.diagonal_b))
        if in_a and in_b:
            raise AdapterError(f"{site.name}: it is meant by diagonal_a and by diagonal_b, and only one factor can be block-diagonal")
        if config.strict and not (in_a or in_b):
            raise AdapterError(f"{site.name}: it is meant neither by diagonal_a nor by diagonal_b; name it in one of them, or set strict=false for a plain LoRA on it")
        self.blocks_a, self.blocks_b = (config.blocks if has else 1 for has in (in_a, in_b))
        if in_a:
            must_divide(site, "blocks", config.blocks, rank=self.rank, inputs=site.n_in)
        if in_b:
            must_divide(site, "blocks", config.blocks, rank=self.rank, outputs=site.n_out)
        self.lora_A = nn.Parameter(torch.empty(self.rank, site.n_in // self.blocks_a, **self.storage))
        self.lora_B = nn.Parameter(torch.empty(site.n_out, self.rank // self.blocks_b, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        # a block of A is drawn wider than LoRA's A: within ±√6/√in of the block, as PEFT's layer of the paper has it
        fan = self.lora_A.shape[1]
        bound = (6 / fan) ** 0.5 if self.blocks_a > 1 else fan**-0.5
        self.lora_A.copy_(draw.uniform(self.lora_A.shape, bound, generator))
        self.lora_B.zero_()

    def product(self) -> tuple[Tensor, Tensor, float]:
        return diagonal(self.lora_B.unflatten(0, (self.blocks_b, -1))), diagonal(self.lora_A.unflatten(0, (self.blocks_a, -1))), self.scale

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        return _times(_times(x, self.lora_A, self.blocks_a) * self.scale, self.lora_B, self.blocks_b)

    def leaves(self) -> dict[str, str]:
        return {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}


def _times(x: Tensor, stacked: Tensor, blocks: int) -> Tensor:
    return F.linear(x, stacked.to(x.dtype)) if blocks == 1 else each(x, stacked.unflatten(0, (blocks, -1)))


# ---------------------------------------------------------------- PRoLoRA


@dataclass(frozen=True)
class ProloraConfig(RankedConfig):
    """LoRA whose factors repeat one chunk, rolled along the ranks (arXiv:2402.16902)."""

    delta: str = option("prolora", "Parametrisation of the change.", choices=("prolora",))
    unshared: int | None = option(None, "How many of the ranks have rows of A and columns of B that do not repeat; a quarter of the rank by default.", ge=0)
    repeat_in: int = option(2, "Number of times that the chunk of A stands side by side.", gt=0)
    repeat_out: int = option(2, "Number of times that the chunk of B stands one below the other.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return Prolora


class Prolora(Ranked):
    """ΔW = s·BA. Chunk i of A is A₀ with row j being row (j + i·stride) mod (r − u) of it; B is the same, standing.

    A₀ [r − u, ⌈in/m⌉] and A_u [u, in]; B₀ [⌈out/n⌉, r − u] and B_u [out, u]; what goes over `in` or `out` is cut off.
    """

    in_product_form = True

    @classmethod
    def check(cls, config: ProloraConfig, names: Sequence[str]) -> None:
        super().check(config, names)
        unshared = config.rank // 4 if config.unshared is None else config.unshared
        if unshared == 0 and config.repeat_in == config.repeat_out > 1:
            logger.warning("prolora: with unshared=0 and repeat_in = repeat_out = %d, blocks of the change along the diagonal are all equal; give it some unshared ranks", config.repeat_in)

    def build(self) -> None:
        config, site = self.config, self.site
        self.unshared = self.rank // 4 if config.unshared is None else config.unshared
        if self.unshared >= self.rank:
            raise AdapterError(f"{site.name}: unshared is {self.unshared}, and the rank {self.rank}; at most {self.rank - 1} fit")
        shared = self.rank - self.unshared
        self.stride_in, self.stride_out = (max(shared // times, 1) for times in (config.repeat_in, config.repeat_out))
        self.shared_A = nn.Parameter(torch.empty(shared, -(-site.n_in // config.repeat_in), **self.storage))
        self.shared_B = nn.Parameter(torch.empty(-(-site.n_out // config.repeat_out), shared, **self.storage))
        if self.unshared:
            self.unshared_A = nn.Parameter(torch.empty(self.unshared, site.n_in, **self.storage))
            self.unshared_B = nn.Parameter(torch.empty(site.n_out, self.unshared, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        # the fan of both is all of `in`, though a chunk is narrower (the paper's rectified start)
        self.shared_A.copy_(draw.kaiming(self.shared_A.shape, generator, fan=self.site.n_in))
        self.shared_B.zero_()
        if self.unshared:
            self.unshared_A.copy_(draw.kaiming(self.unshared_A.shape, generator))
            self.unshared_B.zero_()

    def product(self) -> tuple[Tensor, Tensor, float]:
        config, site = self.config, self.site
        A = torch.cat([self.shared_A.roll(-i * self.stride_in, 0) for i in range(config.repeat_in)], dim=1)[:, : site.n_in]
        B = torch.cat([self.shared_B.roll(-i * self.stride_out, 1) for i in range(config.repeat_out)], dim=0)[: site.n_out]
        if self.unshared:
            A, B = torch.cat([A, self.unshared_A]), torch.cat([B, self.unshared_B], dim=1)
        return B, A, self.scale

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        B, A, scale = self.product()
        return F.linear(F.linear(x, A.to(x.dtype)) * scale, B.to(x.dtype))
