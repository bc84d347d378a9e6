"""Changes that repeat a small matrix over the weight: MoRA, MiSS, and C3A with its circulant blocks.

Legend: W is [out, in]; r is the rank, here the side of a tile; x is [..., in]; f counts frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltune.adapters import draw
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Base, Delta, PeftFormat
from deltune.adapters.fit import must_divide
from deltune.adapters.ranked import check_patterns, rank_at, value_for
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"mora": "MoraConfig", "miss": "MissConfig", "miss_bat": "MissBatConfig", "c3a": "C3aConfig"}

METHODS = {
    "mora": {
        "choices": {"delta": "mora"},
        "paper": "arXiv:2405.12130",
        "formula": "ΔW x = the chunks of x, each turned by its place and multiplied by one M [r̂, r̂], side by side; r̂ ≈ √((in + out)·r), even",
        "small": {"rank": 2},
        "note": "No scale. The authors' type 6.",
    },
    "mora_sharing": {
        "choices": {"delta": "mora", "form": "sharing"},
        "paper": "arXiv:2405.12130",
        "formula": "ΔW x = M times the sum of x's chunks, repeated over the outputs; M [r̂, r̂], r̂ ≈ √((in + out)·r)",
        "small": {"rank": 2},
        "note": "No scale. The authors' type 1.",
    },
    "miss": {
        "choices": {"delta": "miss"},
        "paper": "arXiv:2409.15371",
        "formula": "ΔW = DᵀP, P[i, j] = 1 where j ≡ i (mod r): one r-wide shard for all of W",
        "small": {"rank": 3},
        "note": "Formerly Bone. No scale.",
    },
    "miss_bat": {
        "choices": {"delta": "miss_bat"},
        "paper": "arXiv:2409.15371",
        "formula": "ΔW = W D + D for each r×r block of W, one D for each row of blocks",
        "small": {"rank": 4},
    },
    "miss_mini": {
        "choices": {"delta": "miss", "form": "mini"},
        "paper": "arXiv:2409.15371",
        "formula": "as miss, with D an r×r′ matrix repeated out/r′ times",
        "small": {"rank": 4, "mini_rank": 2},
        "note": "r′ is 64, as in the authors' example; PEFT's default is 1, which gives every output the same change.",
    },
    "c3a": {
        "choices": {"delta": "c3a"},
        "paper": "arXiv:2407.19342",
        "formula": "ΔW in b×b blocks, each circulant: entry (k, j) = w[(j − k) mod b] / in",
        "start": 0.3,
        "small": {"block_size": 4},
        "note": "Starts at random as its authors have it; init=zero starts without a change and trains as well.",
    },
}

RANK_PATTERN_HELP = "Regular expression over the end of a module name to its own rank; the first that matches counts."


# ---------------------------------------------------------------- MoRA


@dataclass(frozen=True)
class MoraConfig(AdapterConfig):
    """One square matrix in place of two thin ones (arXiv:2405.12130)."""

    delta: str = option("mora", "Parametrisation of the change.", choices=("mora",))
    rank: int = option(8, "Rank of the LoRA with as many parameters; the square matrix is about √((in + out)·rank) wide.", gt=0)
    rank_pattern: dict[str, int] = option({}, RANK_PATTERN_HELP)
    form: str = option("rope", "rope: each chunk of the input is rotated by its place and multiplied by itself; sharing: the chunks are summed first.", choices=("rope", "sharing"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Mora


def cyclic(x: Tensor, size: int) -> Tensor:
    """The last dimension cut to a size, or gone through again and again until it is reached."""
    whole, rest = divmod(size, x.shape[-1])
    return x[..., :size] if whole == 0 else x if (whole, rest) == (1, 0) else torch.cat([x] * whole + [x[..., :rest]], dim=-1)


class Mora(Delta):
    """Legend: side = r̂ of M [r̂, r̂]; x is filled up with its own beginning to c chunks of r̂."""

    BASE = 10_000.0  # of the rotation's frequencies

    @classmethod
    def check(cls, config: MoraConfig, names: Sequence[str]) -> None:
        check_patterns(names, rank_pattern=config.rank_pattern)

    def build(self) -> None:
        rank = rank_at(self.site, self.config.rank_pattern, self.config.rank)
        side = int(((self.site.n_in + self.site.n_out) * rank) ** 0.5 + 0.5)
        self.side = side // 2 * 2 if self.config.form == "rope" else side
        if self.side == 0:
            raise AdapterError(f"{self.site.name}: form=rope needs a square matrix at least 2 wide; the layer is too small for rank {rank}")
        self.mora = nn.Parameter(torch.empty(self.side, self.side, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.mora.zero_()

    def rotated(self, chunks: Tensor, *, back: bool = False) -> Tensor:
        """Chunk c [..., c, r̂] turned by the angles c·10000^(−2i/r̂), entry i with entry i + r̂/2."""
        wide = torch.promote_types(chunks.dtype, torch.float32)
        count, half = chunks.shape[-2], self.side // 2
        frequencies = self.BASE ** (-torch.arange(half, dtype=wide, device=chunks.device) / half)
        angles = torch.arange(count, dtype=wide, device=chunks.device).unsqueeze(1) * frequencies  # [c, r̂/2]
        cos, sin = angles.cos().to(chunks.dtype), angles.sin().to(chunks.dtype)
        sin = -sin if back else sin
        one, two = chunks.split(half, dim=-1)
        return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        side, n_in, n_out = self.side, self.site.n_in, self.site.n_out
        count = -(-n_in // side)
        if self.config.form == "sharing":
            chunks = cyclic(x, count * side).unflatten(-1, (count, side))
            return cyclic(F.linear(chunks.sum(-2), self.mora.to(x.dtype)), n_out)
        chunks = cyclic(x, count * side).unflatten(-1, (count, side))
        return cyclic(F.linear(self.rotated(chunks), self.mora.to(x.dtype)).flatten(-2), n_out)

    def forms_delta(self, x: Tensor) -> bool:
        return self.site.n_in * self.side <= x.numel() and self.side <= min(self.site.n_in, self.site.n_out)

    def in_one(self, x: Tensor, base: Base) -> Tensor:
        """With as many tokens as M has rows M is turned, and not x."""
        W, b, M = base.stored(), base.bias(), self.mora
        b = None if b is None else b.to(x.dtype)
        if self.config.form == "sharing":
            return Sharing.apply(x, W, b, M.to(x.dtype))
        count = min(-(-self.site.n_in // self.side), -(-self.site.n_out // self.side))  # the answers of others are cut off
        turned = self.rotated(M.unsqueeze(1).expand(-1, count, -1), back=True).transpose(0, 1)
        return Chunked.apply(x, W, b, turned.to(x.dtype))

    def delta(self, W: Tensor | None) -> Tensor:
        # linear in x, so the matrix is what it makes of the unit vectors
        return self.out(torch.eye(self.site.n_in, dtype=self.mora.dtype, device=self.mora.device), None).T


class Sharing(torch.autograd.Function):
    """W x + b + M times the sum of x's chunks, repeated. What is kept of x [..., in] is that sum [tokens, r̂]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, M: Tensor) -> Tensor:
        y, flat, side = F.linear(x, W, b), x.reshape(-1, x.shape[-1]), len(M)
        summed = folded(flat, side)
        if missing := -flat.shape[1] % side:
            summed[:, -missing:] += flat[:, :missing]
        spread(y.view(-1, y.shape[-1]), summed @ M.T)
        ctx.save_for_backward(summed, W, M)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        summed, W, M = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        by_product, dx = folded(flat, len(M)), None
        if ctx.needs_input_grad[0]:
            dx, by_sum = flat @ W, by_product @ M
            spread(dx, by_sum)
            if missing := -dx.shape[1] % len(M):
                dx[:, :missing] += by_sum[:, -missing:]
            dx = dx.view(*g.shape[:-1], -1)
        return dx, None, None, by_product.T @ summed if ctx.needs_input_grad[3] else None


class Chunked(torch.autograd.Function):
    """W x + b + what M [c, r̂, r̂] makes of as many chunks of x [..., in], side by side, cut off or repeated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, M: Tensor) -> Tensor:
        y, flat, (count, side, _) = F.linear(x, W, b), x.reshape(-1, x.shape[-1]), M.shape
        z, whole = flat.new_empty(len(flat), count * side), min(count, flat.shape[1] // side)
        torch.bmm(windows(flat, whole, side), M[:whole].mT, out=windows(z, whole, side))
        if whole < count:
            torch.mm(cyclic_end(flat, side), M[-1].T, out=z[:, -side:])
        spread(y.view(-1, y.shape[-1]), z)
        ctx.save_for_backward(x, W, M)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, M = ctx.saved_tensors
        (count, side, _), n_in = M.shape, x.shape[-1]
        flat, x, whole = g.reshape(-1, g.shape[-1]), x.reshape(-1, n_in), min(count, n_in // side)
        dz, dx, dM = folded(flat, count * side), None, None
        if ctx.needs_input_grad[0]:
            dx = flat @ W
            parts = windows(dx, whole, side)
            torch.baddbmm(parts, windows(dz, whole, side), M[:whole], out=parts)
            if whole < count:
                own, by_end = n_in - whole * side, dz[:, -side:] @ M[-1]
                dx[:, whole * side :] += by_end[:, :own]
                dx[:, : side - own] += by_end[:, own:]
            dx = dx.view(*g.shape[:-1], n_in)
        if ctx.needs_input_grad[3]:
            dM = torch.empty_like(M, memory_format=torch.contiguous_format)
            torch.bmm(windows(dz, whole, side).mT, windows(x, whole, side), out=dM[:whole])
            if whole < count:
                torch.mm(dz[:, -side:].T, cyclic_end(x, side), out=dM[-1])
        return dx, None, None, dM


def windows(x: Tensor, count: int, width: int) -> Tensor:
    """The first chunks of x [tokens, n]: [count, tokens, width], a view."""
    return x[:, : count * width].unflatten(1, (count, width)).transpose(0, 1)


def cyclic_end(x: Tensor, side: int) -> Tensor:
    """What x [tokens, in] has after its whole chunks, and of its beginning what is missing to one more."""
    whole = x.shape[1] // side * side
    return torch.cat([x[:, whole:], x[:, : whole + side - x.shape[1]]], dim=1)


def folded(x: Tensor, width: int) -> Tensor:
    """The sum of x's windows [tokens, width], a fresh tensor; the last window is filled up with zeros."""
    whole = x.shape[1] // width
    if not whole:
        return F.pad(x, (0, width - x.shape[1]))
    total = windows(x, whole, width).sum(0)
    total[:, : x.shape[1] - whole * width] += x[:, whole * width :]
    return total


def spread(y: Tensor, z: Tensor) -> None:
    """z added in place to each of y's windows of its width."""
    whole = y.shape[1] // z.shape[1]
    windows(y, whole, z.shape[1]).add_(z)
    y[:, whole * z.shape[1] :] += z[:, : y.shape[1] - whole * z.shape[1]]


# ---------------------------------------------------------------- MiSS



@dataclass(frozen=True)
class MissConfig(AdapterConfig):
    """A shard repeated over the weight (arXiv:2409.15371)."""

    delta: str = option("miss", "Parametrisation of the change.", choices=("miss",))
    rank: int = option(64, "Width of the shard, at most the layer's inputs.", gt=0)
    rank_pattern: dict[str, int] = option({}, RANK_PATTERN_HELP)
    form: str = option("shard", "shard: repeats over the inputs; mini: over the outputs too.", choices=("shard", "mini"))
    mini_rank: int = option(64, "With form=mini, number of outputs after which the shard repeats; divides the outputs.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return Miss

    def problems(self) -> list[str]:
        idle = ["mini_rank has no effect with form=shard: it belongs to form=mini"] if self.form == "shard" and self.mini_rank != 64 else []
        return [*idle, *super().problems()]


@dataclass(frozen=True)
class MissBatConfig(AdapterConfig):
    """Blocks that act on the weight's own (arXiv:2409.15371)."""

    delta: str = option("miss_bat", "Parametrisation of the change.", choices=("miss_bat",))
    rank: int = option(64, "Side of a block; divides the layer's inputs and outputs.", gt=0)
    rank_pattern: dict[str, int] = option({}, RANK_PATTERN_HELP)

    @staticmethod
    def delta_class() -> type[Delta]:
        return MissBat


def _says_bat(fields: Mapping[str, Any]) -> bool:
    return fields.get("init_weights") == "bat"


def _can_peft(config: MissConfig | MissBatConfig) -> bool:
    return not config.rank_pattern and not config.magnitude


class Miss(Delta):
    """ΔW = DᵀP: column j of ΔW is row j mod r of D [r, out], or of D [r, r'] repeated over the outputs. D starts at zero."""

    ONES = 128  # multiplications of each number of x that a layer in a node of others gains over summing up by itself
    peft = PeftFormat(
        type="MISS",
        write=lambda config: {
            "r": config.rank,
            "miss_dropout": config.dropout,
            "mini_r": config.mini_rank,
            "init_weights": "mini" if config.form == "mini" else True,
        },
        read=lambda fields: {
            "rank": fields.get("r", 64),
            "dropout": fields.get("miss_dropout", 0.0),
            **({"form": "mini", "mini_rank": fields.get("mini_r", 1)} if fields.get("init_weights") == "mini" else {"form": "shard"}),
        },
        fields=frozenset({"r", "miss_dropout", "mini_r", "init_weights"}),
        fits=_can_peft,
    )

    @classmethod
    def check(cls, config: MissConfig, names: Sequence[str]) -> None:
        check_patterns(names, rank_pattern=config.rank_pattern)

    @property
    def in_product_form(self) -> bool:
        return self.rank <= self.ONES  # P has that many rows

    def build(self) -> None:
        self.rank = rank_at(self.site, self.config.rank_pattern, self.config.rank)
        if self.rank > self.site.n_in:
            raise AdapterError(f"{self.site.name}: rank is {self.rank}, and this layer has {self.site.n_in} inputs to sum up in that many; {self.site.n_in} is the most")
        columns = self.site.n_out
        if self.config.form == "mini":
            columns = self.config.mini_rank
            must_divide(self.site, "mini_rank", columns, outputs=self.site.n_out)
        self.times = self.site.n_out // columns
        self.miss_block = nn.Parameter(torch.empty(self.rank, columns, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.miss_block.zero_()

    def product(self) -> tuple[Tensor, Tensor, float]:
        left = self.miss_block.T.repeat(self.times, 1)
        tiles = -(-self.site.n_in // self.rank)
        right = torch.eye(self.rank, dtype=left.dtype, device=left.device).repeat(1, tiles)[:, : self.site.n_in]
        return left, right, 1.0

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        summed = F.pad(x, (0, -x.shape[-1] % self.rank)).unflatten(-1, (-1, self.rank)).sum(-2)  # P x [..., r]
        answer = summed @ self.miss_block.to(x.dtype)
        return answer if self.times == 1 else answer.repeat(*[1] * (x.ndim - 1), self.times)

    def ranked(self) -> dict[str, int]:
        return {"miss_block": 0}


class MissBat(Delta):
    """ΔW = W D + D in each r×r block of W, with one D for each row of blocks, D [out/r, r, r]. D starts at zero."""

    reads_base = True
    peft = PeftFormat(
        type="MISS",
        write=lambda config: {"r": config.rank, "miss_dropout": config.dropout, "mini_r": 1, "init_weights": "bat"},
        read=lambda fields: {"rank": fields.get("r", 64), "dropout": fields.get("miss_dropout", 0.0)},
        fields=frozenset({"r", "miss_dropout", "mini_r", "init_weights"}),
        fits=_can_peft,
        told=_says_bat,
    )

    @classmethod
    def check(cls, config: MissBatConfig, names: Sequence[str]) -> None:
        check_patterns(names, rank_pattern=config.rank_pattern)

    def build(self) -> None:
        self.rank = rank_at(self.site, self.config.rank_pattern, self.config.rank)
        must_divide(self.site, "rank", self.rank, inputs=self.site.n_in, outputs=self.site.n_out)
        self.miss_block = nn.Parameter(torch.empty(self.site.n_out // self.rank, self.rank, self.rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.miss_block.zero_()

    def delta(self, W: Tensor) -> Tensor:
        rank, D = self.rank, self.miss_block.to(W.dtype)
        rows = W.reshape(-1, rank * (self.site.n_in // rank), rank)  # [out/r, r · in/r, r]: a row of blocks, cut into rows
        turned = torch.bmm(rows, D).unflatten(1, (rank, -1))  # [out/r, r, in/r, r]
        return (turned + D.unsqueeze(2)).reshape(W.shape)


# ---------------------------------------------------------------- C3A


@dataclass(frozen=True)
class C3aConfig(AdapterConfig):
    """Circulant blocks (arXiv:2407.19342)."""

    delta: str = option("c3a", "Parametrisation of the change.", choices=("c3a",))
    block_size: int = option(256, "Side of a block; divides every layer's inputs and outputs. There are inputs × outputs / block_size parameters.", gt=0)
    block_size_pattern: dict[str, int] = option({}, "Regular expression over the end of a module name to its own block size; the first that matches counts.")
    init: str = option("xavier", "Start: xavier: uniform within ±√(6/(in + out)), a small change; kaiming: ±1/√in; gaussian: normal with deviation 1; zero: no change.", choices=("xavier", "kaiming", "gaussian", "zero"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return C3a


C3A_STARTS = {"xavier": "xavier_uniform", "kaiming": "kaiming_uniform", "gaussian": "gaussian", "zero": True}


class C3a(Delta):
    """Block (m, n) of ΔW is circulant: entry (k, j) is w[m, n, (j − k) mod b] / in, with w [out/b, in/b, b]."""

    peft = PeftFormat(
        type="C3A",
        write=lambda config: {
            "block_size": config.block_size,
            "block_size_pattern": dict(config.block_size_pattern),
            "init_weights": C3A_STARTS[config.init],
        },
        read=lambda fields: {
            "block_size": fields.get("block_size", 256),
            "block_size_pattern": fields.get("block_size_pattern") or {},
            "init": next((ours for ours, theirs in C3A_STARTS.items() if theirs == fields.get("init_weights")), "xavier"),
        },
        fields=frozenset({"block_size", "block_size_pattern", "init_weights"}),
        fits=lambda config: not config.magnitude,
        lacks=frozenset({"exclude_modules"}),
    )

    @classmethod
    def check(cls, config: C3aConfig, names: Sequence[str]) -> None:
        check_patterns(names, block_size_pattern=config.block_size_pattern)

    def build(self) -> None:
        self.size = value_for(self.site.name, self.config.block_size_pattern, self.config.block_size)
        must_divide(self.site, "block_size", self.size, inputs=self.site.n_in, outputs=self.site.n_out)
        self.c3a_kernel = nn.Parameter(torch.empty(self.site.n_out // self.size, self.site.n_in // self.size, self.size, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        shape, n_in, n_out = self.c3a_kernel.shape, self.site.n_in, self.site.n_out
        match self.config.init:
            case "zero":
                self.c3a_kernel.zero_()
            case "gaussian":
                self.c3a_kernel.copy_(draw.normal(shape, 1.0, generator))
            case "kaiming":
                self.c3a_kernel.copy_(draw.kaiming(shape, generator, fan=n_in))
            case "xavier":
                self.c3a_kernel.copy_(draw.uniform(shape, (6 / (n_in + n_out)) ** 0.5, generator))

    def delta(self, W: Tensor | None) -> Tensor:
        return Circulant.apply(self.c3a_kernel / self.site.n_in)

    def formed(self, dtype: torch.dtype, W: Tensor | None) -> Tensor:
        return Circulant.apply((self.c3a_kernel / self.site.n_in).to(dtype))

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        return F.linear(x, self.formed(x.dtype, W))

    def forms_delta(self, x: Tensor) -> bool:
        return True


class Circulant(torch.autograd.Function):
    """[m·b, n·b] from w [m, n, b], with w[m, n, (j − k) mod b] at entry (k, j) of block (m, n). No sum is formed by indices."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        m, n, b = ctx.sizes = w.shape
        twice = torch.cat([w, w], -1)  # [m, n, 2b]: row b − 1 − k of a block is what begins at k + 1 there
        rows = twice.as_strided((m, b, n, b), (2 * n * b, 1, 2 * b, 1), 1)
        return rows.flip(1).reshape(m * b, n * b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        m, n, b = ctx.sizes
        blocks = gradient.reshape(m, b, n, b)
        twice = torch.cat([blocks, blocks], -1)  # [m, b, n, 2b]
        # a step down and one to the right stay on the same number
        return twice.as_strided((m, b, n, b), (2 * n * b * b, 2 * n * b + 1, 2 * b, 1)).sum(1)
