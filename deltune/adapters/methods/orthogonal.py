"""Rotations of a layer's input in blocks: OFT (arXiv:2306.07280, 2506.19847) and BOFT (arXiv:2311.06243).

Legend: W' = diag(s)·W·Rᵀ with R orthogonal, so y = W (Rᵀ x): the input is turned (a row of inputs x becomes x·R), and W
is needed only for merging. A block of R is [b, b] and there are n of them, n·b = in. What is computed is R − I, zero at
the start whatever the number type. Q is skew, and everywhere here Cayley(Q) = (I + Q)(I − Q)⁻¹, whose series is
I + 2Q + 2Q² + …
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltune.adapters import dense
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Base, Delta, PeftFormat
from deltune.adapters.magnitude import Stretched
from deltune.config.fields import option
from deltune.errors import AdapterError
from deltune.weights.scratch import copied

DELTAS = {"oft": "OftConfig", "boft": "BoftConfig"}

METHODS = {
    "oft": {
        "choices": {"delta": "oft"},
        "paper": "arXiv:2306.07280",
        "formula": "W' = W·Rᵀ, R = blockdiag((I + Q)(I − Q)⁻¹), Q skew",
        "small": {"block_size": 4},
        "note": "The authors' code has both signs of Q, and PEFT's exact and series forms differ in it. Here it is one sign; files of PEFT's exact form are read and written with Q turned.",
    },
    "oftv2": {
        "choices": {"delta": "oft", "cayley": "neumann"},
        "paper": "arXiv:2506.19847",
        "formula": "as oft, with the block I + 2Q + 2Q² + 2Q³ + Q⁴",
        "small": {"block_size": 4},
        "note": "PEFT's 3 terms are 4; its 1 and 2 are no part of the series and are refused.",
    },
    "coft": {
        "choices": {"delta": "oft", "coft": True},
        "paper": "arXiv:2306.07280",
        "formula": "as oft, with ‖Q‖ of a block at most eps·b²/√n",
        "small": {"block_size": 4, "eps": 0.0625},
        "note": "The authors pull the parameter back after each step; here the bound is part of the formula, so that a forward pass changes no weight and the gradient is that of the function. PEFT's bound lacks the b², and with its default eps hardly lets a block turn; it is bound=peft, which its files are read with.",
    },
    "boft": {
        "choices": {"delta": "boft"},
        "paper": "arXiv:2311.06243",
        "formula": "W' = diag(s)·W·Rᵀ, R = Π_m P_m blockdiag(Cayley(Q_m)) P_mᵀ (butterfly)",
        "small": {"factors": 2},
        "note": "More than one factor needs no extension here; PEFT without its CUDA extension reads such a file with one factor.",
    },
}


@dataclass(frozen=True)
class BlocksConfig(AdapterConfig):
    """What rotations in blocks have."""

    block_size: int = option(32, "Width of a block; divides every layer's inputs. 0 where `blocks` is given.", ge=0)
    blocks: int = option(0, "Number of blocks, instead of block_size; 0: as many as block_size makes.", ge=0)
    block_dropout: float = option(0.0, "Share of blocks that do not turn in a training step.", ge=0, lt=1)


@dataclass(frozen=True)
class OftConfig(BlocksConfig):
    """Orthogonal fine-tuning (arXiv:2306.07280)."""

    delta: str = option("oft", "Parametrisation of the change.", choices=("oft",))
    cayley: str = option("exact", "exact: (I + Q)(I − Q)⁻¹, orthogonal; neumann: the first terms of its series (arXiv:2506.19847).", choices=("exact", "neumann"))
    terms: int = option(5, "Terms of the series, the last with half its weight.", ge=2)
    coft: bool = option(False, "Bound each block's ‖Q‖ (COFT).")
    eps: float = option(6e-5, "Strength of the bound of COFT, see bound.", gt=0)
    bound: str = option("authors", "The bound of COFT on a block's ‖Q‖. authors: eps · block_size² / √blocks; peft: eps / √blocks.", choices=("authors", "peft"))
    block_share: bool = option(False, "One rotation for all blocks.")
    strength: bool = option(False, "Learn a strength for each output too.")
    sign: str = option("plus", "Sign of Q, as a record in the file: (I + Q)(I − Q)⁻¹.", choices=("plus",))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Oft

    def problems(self) -> list[str]:
        idle = [f"{key} has no effect without coft=true" for key, default in (("eps", 6e-5), ("bound", "authors")) if not self.coft and getattr(self, key) != default]
        if self.cayley == "exact" and self.terms != 5:
            idle.append("terms has no effect: it belongs to cayley=neumann")
        return [*idle, *super().problems()]


@dataclass(frozen=True)
class BoftConfig(BlocksConfig):
    """Butterfly orthogonal fine-tuning (arXiv:2311.06243)."""

    delta: str = option("boft", "Parametrisation of the change.", choices=("boft",))
    block_size: int = option(4, "Width of a block; divides every layer's inputs. 0 where `blocks` is given.", ge=0)
    factors: int = option(2, "Butterfly factors: 1 turns blocks of block_size, m reach over 2^(m−1) of them.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return Boft


# ---------------------------------------------------------------- skew matrices and blocks

WIDE = 32  # blocks narrower than this are multiplied several at once
SEGMENT = 1024  # butterflies that stay within so many inputs are multiplied with each other before they meet the input


@functools.cache
def _upper(size: int, device: torch.device) -> Tensor:
    """Where the entries above the diagonal of a matrix [size, size] lie, row by row, flat."""
    rows, columns = torch.triu_indices(size, size, 1, device=device)
    return rows * size + columns


class Skew(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, size: int) -> Tensor:
        ctx.upper = _upper(size, values.device)
        Q = values.new_zeros(*values.shape[:-1], size * size).index_copy_(-1, ctx.upper, values).unflatten(-1, (size, size))
        return Q - Q.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient - gradient.mT).flatten(-2).index_select(-1, ctx.upper), None


def skew(values: Tensor, size: int) -> Tensor:
    """Q [..., size, size] from what stands above its diagonals [..., size(size − 1)/2], row by row."""
    return Skew.apply(values, size)


@functools.cache
def _places(n: int, size: int, i: int, segment: int, device: torch.device) -> Tensor:
    """Where the entries of a butterfly factor's blocks [n / size, size, size] lie in a matrix [segment, n], flat."""
    inputs = torch.arange(n, device=device).view(-1, 2, 2**i, size // 2).transpose(1, 2).reshape(-1, size) if i else torch.arange(n, device=device).view(-1, size)
    return ((inputs % segment).unsqueeze(2) * n + inputs.unsqueeze(1)).flatten()


def full_precision(tensor: Tensor) -> torch.autocast:
    """What is small and exact stays out of autocast."""
    return torch.autocast(tensor.device.type, enabled=False)


class Cayley(torch.autograd.Function):
    """D = (I + Q)(I − Q)⁻¹ − I = 2(I − Q)⁻¹Q. With M = (I − Q)⁻¹ = I + D/2 a change of Q changes it by 2M·dQ·M, so its gradient
    takes products alone."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor) -> Tensor:
        # I − Q always has an inverse, so whether there was one is not asked
        D = torch.linalg.solve_ex(torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) - Q, 2 * Q).result
        ctx.save_for_backward(D)
        return D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        N = ctx.saved_tensors[0].mT / 2  # Mᵀ − I
        half = gradient + N @ gradient
        return 2 * (half + half @ N)


def cayley(Q: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹ − I for a batch; exactly zero at Q = 0."""
    Q = Q.to(torch.promote_types(Q.dtype, torch.float32))  # there are no solvers in 16 bits
    with full_precision(Q):
        return Cayley.apply(Q)


def neumann(Q: Tensor, terms: int) -> Tensor:
    """2Q + … + 2Q^(terms−2) + Q^(terms−1): the same series, cut off."""
    Q = Q.to(torch.promote_types(Q.dtype, torch.float32))
    found = Q
    with full_precision(Q):
        for _ in range(terms - 2):
            found = 2 * Q + Q @ found
    return found


def wider(D: Tensor) -> Tensor:
    """The same block-diagonal matrix in fewer and wider blocks, for products of very small ones are slow."""
    n, b, _ = D.shape
    together = max(g for g in range(1, max(1, WIDE // b) + 1) if n % g == 0)
    if together == 1:
        return D
    eye = torch.eye(together, dtype=D.dtype, device=D.device)
    return (D.view(-1, together, b, 1, b) * eye.view(1, together, 1, together, 1)).reshape(-1, together * b, together * b)


def turn_blocks(x: Tensor, D: Tensor) -> Tensor:
    """x + x·blockdiag(D) [..., in] for D [n, b, b], or [1, b, b] for the same in every block."""
    n, b, _ = D.shape
    if n > 1 and x.numel() >= WIDE * n * b:  # wider blocks have more entries than fewer rows of x
        D = wider(D)
    if n == 1:
        z = x.reshape(-1, b)
        return torch.addmm(z, z, D[0].to(x.dtype)).view(x.shape)
    return TurnedBlocks.apply(x, D)


class TurnedBlocks(torch.autograd.Function):
    """x + x·blockdiag(D) [..., in] for D [n, b, b], computed in x's type: x is all that it keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, D: Tensor) -> Tensor:
        ctx.save_for_backward(x, D)
        return _turned(x, D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, D = ctx.saved_tensors
        to_D = None
        if ctx.needs_input_grad[1]:
            blocks = [_blocks(tensor, D) for tensor in (x, g)]
            if dense.is_short(x.dtype) and x.device.type == "cpu":  # there a product over tokens that lie apart is slow
                blocks = [copied(name, z) for name, z in zip(("blocks", "gradient's blocks"), blocks, strict=True)]
            to_D = torch.bmm(blocks[0].mT, blocks[1]).to(D.dtype)
        return _turned(g, D.mT) if ctx.needs_input_grad[0] else None, to_D


def _blocks(x: Tensor, D: Tensor) -> Tensor:
    """[..., in] as [n, tokens, b]."""
    return x.reshape(-1, *D.shape[:2]).transpose(0, 1)


def _turned(x: Tensor, D: Tensor) -> Tensor:
    """x + x·blockdiag(D), into one new tensor."""
    if dense.is_short(x.dtype):  # where x D is not to be rounded by itself
        y = x.clone(memory_format=torch.contiguous_format)
        _blocks(y, D).baddbmm_(_blocks(x, D), D.to(x.dtype))
        return y
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.bmm(_blocks(x, D), D.to(x.dtype), out=_blocks(y, D))
    return y.add_(x)


class Blocks(Delta):
    """y = s⊙(W (Rᵀ x)) + b with R turning blocks of the input."""

    additive = False
    size: int
    num: int

    def shape(self) -> None:
        """Size and number of blocks. AdapterError if they do not fit the layer."""
        config, n = self.config, self.site.n_in
        if bool(config.block_size) == bool(config.blocks):
            raise AdapterError(f"give block_size or blocks, and 0 for the other; they are {config.block_size} and {config.blocks}")
        self.size = config.block_size or n // config.blocks
        self.num = config.blocks or n // config.block_size
        if self.size * self.num != n:
            which, value = ("block_size", config.block_size) if config.block_size else ("blocks", config.blocks)
            fitting = [d for d in range(2, min(n, 256) + 1) if n % d == 0] or [n]
            raise AdapterError(f"{self.site.name}: {which} {value} does not divide its {n} inputs; {', '.join(map(str, fitting))} do")

    def turned(self, x: Tensor) -> Tensor:
        """Rᵀ x for each row x, that is x·R for rows [..., in]."""
        raise NotImplementedError

    def turned_back(self, x: Tensor) -> Tensor:
        """R x for each row x, that is x·Rᵀ for rows [..., in]."""
        raise NotImplementedError

    def strength(self) -> Tensor | None:
        """s [out], or None for ones."""
        return None

    def without_some(self, D: Tensor) -> Tensor:
        """D [n, b, b] with some blocks that do not turn, in a training step."""
        rate = self.config.block_dropout
        if not rate or not self.training or not next(self.parameters()).requires_grad or D.shape[0] == 1:
            return D
        return D * (torch.rand(D.shape[0], 1, 1, device=D.device) >= rate)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        seen = base.drop(x)
        turned = self.turned(seen)
        y = base(turned if seen is x else x + (turned - seen))
        s = self.strength()
        if s is None:
            return y
        return Stretched.apply(y, s - 1, base.bias())

    def delta(self, W: Tensor) -> Tensor:
        s = self.strength()
        turned = self.turned_back(W)  # W Rᵀ
        return (turned if s is None else s.unsqueeze(1) * turned) - W


# ---------------------------------------------------------------- OFT


def _oft_to_peft(config: OftConfig) -> dict[str, Any]:
    return {
        "r": config.blocks,
        "oft_block_size": config.block_size,
        "module_dropout": config.block_dropout,
        "coft": config.coft,
        "eps": config.eps,
        "block_share": config.block_share,
        "use_cayley_neumann": config.cayley == "neumann",
        "num_cayley_neumann_terms": config.terms,
        "fan_in_fan_out": False,
        "init_weights": True,
    }


def _oft_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    series, terms = fields.get("use_cayley_neumann", True), fields.get("num_cayley_neumann_terms", 5)
    if series and terms < 3:
        raise AdapterError(f"num_cayley_neumann_terms is {terms}; PEFT's sum of so few terms is no part of the series, and is not supported")
    return {
        "blocks": fields.get("r", 0),
        "block_size": fields.get("oft_block_size", 32),
        "block_dropout": fields.get("module_dropout", 0.0),
        "coft": bool(fields.get("coft")),
        "bound": "peft" if fields.get("coft") else "authors",
        "eps": fields.get("eps", 6e-5) if fields.get("coft") else 6e-5,
        "block_share": bool(fields.get("block_share")),
        "cayley": "neumann" if series else "exact",
        "terms": max(4, terms) if series else 5,  # PEFT adds up the same for 3 as for 4
    }


class Oft(Blocks):
    """R = blockdiag(Cayley(Q)) applied to rows of x, that is W' = W·Rᵀ. Unchanged at Q = 0."""

    peft = PeftFormat(
        type="OFT",
        write=_oft_to_peft,
        read=_oft_from_peft,
        fields=frozenset(_oft_to_peft(OftConfig())),
        fits=lambda config: not config.strength and config.terms >= 4 and (config.bound == "peft" or not config.coft),
    )

    def build(self) -> None:
        self.shape()
        count = self.size * (self.size - 1) // 2
        if not count:
            raise AdapterError(f"{self.site.name}: a block of width 1 cannot turn")
        self.oft_R = nn.Parameter(torch.empty(1 if self.config.block_share else self.num, count, **self.storage))
        if self.config.strength:
            self.oft_s = nn.Parameter(torch.empty(self.site.n_out, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.oft_R.zero_()
        if self.config.strength:
            self.oft_s.fill_(1.0)

    def rotation(self) -> Tensor:
        """R − I [n, b, b], of one block where it is shared."""
        Q = skew(self.oft_R, self.size)
        if self.config.coft:
            bound = self.config.eps / math.sqrt(Q.shape[0]) * (self.size**2 if self.config.bound == "authors" else 1)
            Q = Q * (bound / torch.linalg.vector_norm(Q, dim=(1, 2), keepdim=True).clamp(min=bound))
        return cayley(Q) if self.config.cayley == "exact" else neumann(Q, self.config.terms)

    def turned(self, x: Tensor) -> Tensor:
        return turn_blocks(x, self.without_some(self.rotation()))

    def turned_back(self, x: Tensor) -> Tensor:
        return turn_blocks(x, self.rotation().mT)

    def strength(self) -> Tensor | None:
        return self.oft_s if self.config.strength else None

    def leaves(self) -> dict[str, str]:
        return {"oft_R": "oft_R.weight"} | ({"oft_s": "oft_s"} if self.config.strength else {})

    @property
    def flips(self) -> bool:
        """Whether the file has −Q: PEFT's exact form is (I − Q)(I + Q)⁻¹, the transpose of its series."""
        return self.config.cayley == "exact" and self.peft.fits(self.config)

    def to_file(self) -> dict[str, Tensor]:
        tensors = super().to_file()
        return {leaf: -tensor for leaf, tensor in tensors.items()} if self.flips else tensors

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file({leaf: -tensor for leaf, tensor in tensors.items()} if self.flips else tensors)


# ---------------------------------------------------------------- BOFT


def _boft_to_peft(config: BoftConfig) -> dict[str, Any]:
    return {
        "boft_block_size": config.block_size,
        "boft_block_num": config.blocks,
        "boft_n_butterfly_factor": config.factors,
        "boft_dropout": config.block_dropout,
        "fan_in_fan_out": False,
        "init_weights": True,
    }


def _boft_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "block_size": fields.get("boft_block_size", 4),
        "blocks": fields.get("boft_block_num", 0),
        "factors": fields.get("boft_n_butterfly_factor", 1),
        "block_dropout": fields.get("boft_dropout", 0.0),
    }


class Boft(Blocks):
    """Factor i turns blocks of two halves that lie 2^i half blocks apart. Unchanged at zero."""

    peft = PeftFormat(type="BOFT", write=_boft_to_peft, read=_boft_from_peft, fields=frozenset(_boft_to_peft(BoftConfig())))

    def build(self) -> None:
        self.shape()
        m = self.config.factors
        if m > 1 and (self.size % 2 or self.num % 2 ** (m - 1)):
            most = 1 if self.size % 2 else 1 + (self.num & -self.num).bit_length() - 1
            raise AdapterError(f"{self.site.name}: {self.num} blocks of width {self.size} have at most {most} butterfly factors, and factors is {m}")
        self.boft_R = nn.Parameter(torch.empty(m, self.num, self.size, self.size, **self.storage))
        self.boft_s = nn.Parameter(torch.empty(self.site.n_out, 1, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.boft_R.zero_()
        self.boft_s.fill_(1.0)

    def rotations(self) -> Tensor:
        """The blocks less I, [factors, n, b, b]."""
        # in terms of the stored matrix the block is (I − S)(I + S)⁻¹ with S = ½(R − Rᵀ), so Q is −S
        return cayley((self.boft_R.mT - self.boft_R) / 2)

    def factor(self, x: Tensor, D: Tensor, i: int) -> Tensor:
        """Rows of x through P_i blockdiag(I + D) P_iᵀ, which is symmetric in P."""
        if i == 0:
            return turn_blocks(x, D)
        pairs = x.reshape(-1, 2, 2**i, self.size // 2)  # within a segment: half, block, place
        turned = turn_blocks(pairs.transpose(1, 2).reshape(-1, self.site.n_in), D)
        return turned.view(-1, 2**i, 2, self.size // 2).transpose(1, 2).reshape(x.shape)

    def turned(self, x: Tensor) -> Tensor:
        return self.through(x, [self.without_some(D) for D in self.rotations()], back=False)

    def turned_back(self, x: Tensor) -> Tensor:
        return self.through(x, [D.mT for D in self.rotations()], back=True)

    def through(self, x: Tensor, factors: list[Tensor], *, back: bool) -> Tensor:
        """Rows of x through all factors, the last one first, or in order on the way back."""
        order = list(enumerate(factors)) if back else list(reversed(list(enumerate(factors))))
        segment = self.size * 2 ** (len(factors) - 1)  # no factor reaches farther
        if len(factors) == 1 or segment > SEGMENT:
            for i, D in order:
                x = self.factor(x, D, i)
            return x
        whole = None  # less I, [segment, in]: row j is what becomes of the j-th input of each segment
        with full_precision(x):
            for i, D in order:
                alone = self.alone(D, i, segment)
                whole = alone if whole is None else self.factor(whole, D, i) + alone
        return turn_blocks(x, whole.view(segment, -1, segment).transpose(0, 1))

    def alone(self, D: Tensor, i: int, segment: int) -> Tensor:
        """A factor less I, as `through` has their product."""
        places = _places(self.site.n_in, self.size, i, segment, D.device)
        return D.new_zeros(segment * self.site.n_in).index_copy(0, places, D.flatten()).view(segment, -1)

    def strength(self) -> Tensor | None:
        return self.boft_s.squeeze(1)
