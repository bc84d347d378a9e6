"""HRA (arXiv:2405.17484): a layer's input is reflected a few times, W' = W·Π(I − 2uuᵀ), and no matrix is formed for it.

Legend: R [in, in] is the product, so y = W (R x). What is computed is R − I, as a product of two factors of small rank; in
a node, which layers with one x share, it is W(R − I) as such a product.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltune.adapters import draw
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Base, Delta, PeftFormat
from deltune.adapters.methods.orthogonal import full_precision
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"hra": "HraConfig"}

METHODS = {
    "hra": {
        "choices": {"delta": "hra"},
        "paper": "arXiv:2405.17484",
        "formula": "W' = W·Π_i (I − 2u_i u_iᵀ), u_i of length 1, pairs of equals at the start",
        "small": {"rank": 4},
    },
    "hra_gs": {
        "choices": {"delta": "hra", "gram_schmidt": True},
        "paper": "arXiv:2405.17484",
        "formula": "W' = W·(I − 2QQᵀ)(I − 2Q₀Q₀ᵀ), Q = Gram-Schmidt(u)",
        "small": {"rank": 4},
        "note": "The paper's orthogonal reflections can neither be pairs of equals (0/0 in public code) nor leave the layer unchanged, so the start is undone by a frozen reflection; exact_start=false is the paper.",
    },
}


@dataclass(frozen=True)
class HraConfig(AdapterConfig):
    """Householder reflections (arXiv:2405.17484)."""

    delta: str = option("hra", "Parametrisation of the change.", choices=("hra",))
    rank: int = option(8, "Number of reflections; even, for they start as pairs that undo each other.", gt=0)
    gram_schmidt: bool = option(False, "Make the reflections orthogonal to each other.")
    exact_start: bool = option(True, "With gram_schmidt: undo the start by a frozen reflection, so that nothing changes.")

    @staticmethod
    def delta_class() -> type[Delta]:
        return Hra

    def problems(self) -> list[str]:
        idle = ["exact_start has no effect without gram_schmidt=true"] if not self.exact_start and not self.gram_schmidt else []
        return [*idle, *super().problems()]


def _hra_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"rank": fields.get("r", 8), "gram_schmidt": bool(fields.get("apply_GS")), "exact_start": not fields.get("apply_GS")}


class Hra(Delta):
    """Reflections of the input, never formed as a matrix: two products with [in, rank] and one [rank, rank] solve.

    A pair of reflections with u and v = u + d is I + [u d] K [u d]ᵀ with K = [[−2δ, 2 − 2δ], [−2, −2]], δ = ‖d‖²: nothing
    at all for d = 0, in any arithmetic. Pairs after one another make I + P S Pᵀ with S = (I − K G)⁻¹K, G the part of
    PᵀP above its 2×2 blocks (the compact WY form).
    """

    additive = False
    peft = PeftFormat(
        type="HRA",
        write=lambda config: {"r": config.rank, "apply_GS": config.gram_schmidt, "init_weights": True},
        read=_hra_from_peft,
        fields=frozenset({"r", "apply_GS", "init_weights"}),
        fits=lambda config: config.exact_start != config.gram_schmidt,
    )

    @property
    def in_product_form(self) -> bool:
        return torch.is_grad_enabled()  # the one token of a text that is generated is not worth a product with W

    def build(self) -> None:
        rank, n = self.config.rank, self.site.n_in
        if self.config.gram_schmidt and rank > n:
            raise AdapterError(f"{self.site.name}: {rank} reflections cannot be orthogonal to each other in {n} inputs; rank may be {n} at most")
        self.hra_u = nn.Parameter(torch.empty(n, rank, **self.storage))
        self.undoes = self.config.gram_schmidt and self.config.exact_start
        if self.undoes:
            self.register_buffer("hra_start", torch.empty(n, rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        n, rank = self.hra_u.shape
        if self.config.gram_schmidt:
            self.hra_u.copy_(draw.kaiming((n, rank), generator))
            if self.undoes:
                self.hra_start.copy_(self.hra_u)
            return
        if rank % 2:
            raise AdapterError(f"rank {rank} is odd: reflections start as pairs that undo each other, so {rank + 1} or {rank - 1}")
        self.hra_u.copy_(draw.kaiming((n, rank // 2), generator).repeat_interleave(2, dim=1))

    def pairs(self) -> tuple[Tensor, Tensor]:
        """P [in, 2·pairs] and S [2·pairs, 2·pairs] with Π(I − 2uuᵀ) = I + P S Pᵀ."""
        U = unit_columns(self.hra_u)
        turns = pair_turns(U.shape[1], U.dtype, U.device)
        with full_precision(U):
            P = U @ turns.apart
            gram = P.mT @ P
            K = torch.addcmul(turns.plain, turns.by_size, gram.diagonal().roll(-1).unsqueeze(1))  # δ stands one further on
            return P, torch.linalg.solve_triangular(turns.eye - K @ (gram * turns.later), K, upper=True, unitriangular=True)

    def change(self, x: Tensor, *, back: bool = False) -> Tensor:
        """(R − I) x for each row of x, or (Rᵀ − I) x, where W' = W·R."""
        if not self.config.gram_schmidt:
            P, S = self.pairs()
            return x @ P.to(x.dtype) @ (S if back else S.mT).to(x.dtype) @ P.mT.to(x.dtype)
        left, right = self.turn()
        if back:
            left, right = right.mT, left.mT
        return x @ left.to(x.dtype) @ right.to(x.dtype)

    def turn(self) -> tuple[Tensor, Tensor]:
        """(L [in, k], M [k, in]) with rows x(R − I)ᵀ = x L M, where the reflections are orthogonal to each other.

        With P = U V the projection of now and P₀ = U₀ V₀ that of the start, (I − 2P)(I − 2P₀) − I = −2(P − P₀)(I − 2P₀).
        For rows on the left of it that is x(I − 2P₀)[U₀, U − U₀] times [V − V₀; V], which is zero to the bit at the start.
        """
        U, V = projection(self.hra_u)
        if not self.undoes:
            return U, -2 * V
        U0, V0 = projection(self.hra_start)
        with full_precision(U):
            L, M = torch.cat([U0, U - U0], dim=1), torch.cat([V - V0, V])
            # x(I − 2P₀)L = x(L − 2U₀V₀L), and of that the columns of L are combinations
            return L, -2 * torch.cat([torch.addmm(V - V0, V0 @ L, M, alpha=-2), V])

    def running_product(self, W: Tensor) -> tuple[Tensor, Tensor, float]:
        """W(R − I) as [out, k]·[k, in]."""
        if self.config.gram_schmidt:
            left, right = self.turn()
            return W @ right.mT.to(W.dtype), left.mT, 1.0
        P, S = self.pairs()
        return W @ (P @ S).to(W.dtype), P.mT, 1.0

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x + self.change(base.drop(x)))

    def delta(self, W: Tensor) -> Tensor:
        return self.change(W, back=True)


class Turns(NamedTuple):
    """What makes pairs of reflections out of their vectors, all but `apart` [2·pairs, 2·pairs]."""

    apart: Tensor  # [rank, 2·pairs]: (u, v) to (u, v − u)
    plain: Tensor  # K where δ is 0
    by_size: Tensor  # what K gains for each δ
    later: Tensor  # 1 above the 2×2 blocks
    eye: Tensor


@functools.lru_cache(maxsize=64)
def pair_turns(rank: int, dtype: torch.dtype, device: torch.device) -> Turns:
    with torch.inference_mode(False):
        pairs = (rank + 1) // 2
        eye = torch.eye(pairs, dtype=dtype, device=device)
        apart, plain, by_size = (torch.kron(eye, eye.new_tensor(block)) for block in ([[1, -1], [0, 1]], [[0, 2], [-2, -2]], [[-2, -2], [0, 0]]))
        if rank % 2:  # one that has no pair: I − 2uuᵀ
            plain[-2:, -2:] = eye.new_tensor([[-2, 0], [0, 0]])
            by_size[-2:] = 0
        later = torch.kron(eye.new_ones(pairs, pairs).triu(1), eye.new_ones(2, 2))
        return Turns(apart[:rank], plain, by_size, later, torch.eye(2 * pairs, dtype=dtype, device=device))


def unit_columns(U: Tensor) -> Tensor:
    U = U.to(torch.promote_types(U.dtype, torch.float32))
    return U / torch.linalg.vector_norm(U, dim=0)


def projection(U: Tensor) -> tuple[Tensor, Tensor]:
    """(U, (UᵀU)⁻¹Uᵀ): onto the span of U, which is what Gram-Schmidt's vectors span.

    A column that depends on others adds nothing, and nothing is divided by zero.
    """
    U = unit_columns(U)
    with full_precision(U):
        gram = U.mT @ U + 8 * torch.finfo(U.dtype).eps * torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        return U, torch.linalg.solve(gram, U.mT)
