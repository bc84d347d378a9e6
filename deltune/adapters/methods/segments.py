"""Changes of W and b together, in parts: AdaMSS (groups of rows) and GLoRA (a factor, a sum and three paths of the bias)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters import dense, draw
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Base, Delta, PeftFormat
from deltune.adapters.methods.spectral import lowrank
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"adamss": "AdamssConfig", "glora": "GloraConfig"}

METHODS = {
    "adamss": {
        "choices": {"delta": "adamss"},
        "paper": "OpenReview 8ZdWmpYxT0 (NeurIPS 2025)",
        "formula": "Δ[W, b][S_i, :] = B_i A_i V_rᵀ, rows S_i of one cluster of U_r, [W, b] ≈ U_rΣV_rᵀ",
        "small": {"rank": 6, "num_subspaces": 3},
        "note": "Of the authors' code no public copy was found; this is PEFT's form. PEFT clusters again on reading; ours saves which row is in which cluster too, and PEFT passes over that. Freezing subspaces while training (ASA) is an allocator's business and not part of the change.",
    },
    "glora": {
        "choices": {"delta": "glora"},
        "paper": "arXiv:2306.07967",
        "formula": "W' = W + W⊙A + B, b' = b + b⊙D + E + W·C",
        "small": {"rank": 2},
        "note": "The paper searches for the form of each of A to E in each layer; here the form is a setting.",
    },
}

CLUSTER_SEED, CLUSTER_STEPS = 123456789, 10  # PEFT's, which repeats the clustering when it reads a file


@dataclass(frozen=True)
class AdamssConfig(AdapterConfig):
    """Subspaces of a weight's rows, each with a small change (OpenReview 8ZdWmpYxT0)."""

    delta: str = option("adamss", "Parametrisation of the change.", choices=("adamss",))
    rank: int = option(100, "Triplets of [W, b] that are used; at most as many as there are.", gt=0)
    num_subspaces: int = option(5, "Clusters of rows.", gt=0)
    subspace_rank: int = option(1, "Rank of the change of a cluster; at most.", gt=0)
    dynamic_rank: bool = option(False, "Lower the rank of a cluster to what its rows span.")
    threshold: float = option(0.1, "With dynamic_rank: squared singular values below this share of the largest do not count.", gt=0, lt=1)
    svd_seed: int = option(0, "Seed of the randomised SVD, part of what PEFT's file means.", ge=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return Adamss

    def problems(self) -> list[str]:
        idle = ["threshold has no effect without dynamic_rank=true"] if not self.dynamic_rank and self.threshold != 0.1 else []
        return [*idle, *super().problems()]


@dataclass(frozen=True)
class GloraConfig(AdapterConfig):
    """A factor and a sum for the weight and the bias (arXiv:2306.07967)."""

    delta: str = option("glora", "Parametrisation of the change.", choices=("glora",))
    rank: int = option(8, "Rank where a form is lora.", gt=0)
    form_ab: str = option("lora", "Form of A and B, the factor and the sum for W: lora: a product of rank `rank`; vector: one number a row; constant: one number; none.", choices=("lora", "vector", "constant", "none"))
    form_c: str = option("lora", "Form of C [in], by which W moves the bias: lora: a product of rank `rank`; vector; none. Only in layers with a bias.", choices=("lora", "vector", "none"))
    form_de: str = option("constant", "Form of D and E, the factor and the sum for the bias: vector; constant: one number; none. Only in layers with a bias.", choices=("vector", "constant", "none"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Glora

    def problems(self) -> list[str]:
        idle = ["rank has no effect: neither form_ab nor form_c is lora"] if self.rank != 8 and "lora" not in (self.form_ab, self.form_c) else []
        return [*idle, *super().problems()]


# ---------------------------------------------------------------- AdaMSS


def clusters(rows: Tensor, count: int) -> Tensor:
    """The cluster [n] of each row of [n, d], by Lloyd's k-means from `count` rows drawn at CLUSTER_SEED.

    On the CPU with NumPy's generator, so that it is the same everywhere, and the same as scikit-learn's with PEFT's settings.
    """
    import numpy as np

    x = rows.detach().float().cpu()
    n = len(x)
    x = x - x.mean(dim=0)
    close = float(x.var(dim=0, unbiased=False).mean()) * 1e-4
    drawn = np.random.RandomState(CLUSTER_SEED).choice(n, size=count, replace=False, p=np.full(n, 1 / n))
    centres = x[torch.from_numpy(drawn)]
    labels = torch.full((n,), -1)
    for _ in range(CLUSTER_STEPS):
        before, labels = labels, _nearest(x, centres)
        moved = _means(x, labels, centres)
        shift, centres = float((moved - centres).square().sum()), moved
        if torch.equal(before, labels):
            return labels
        if shift <= close:
            break
    return _nearest(x, centres)


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    return (centres.square().sum(dim=1) - 2 * x @ centres.T).argmin(dim=1)


def _means(x: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """The clusters' means; one without a row takes the row that is farthest from its own centre."""
    count = len(centres)
    sums = torch.zeros_like(centres).index_add(0, labels, x)
    sizes = torch.bincount(labels, minlength=count)
    empty = (sizes == 0).nonzero().flatten().tolist()
    if empty:
        farthest = (x - centres[labels]).square().sum(dim=1).topk(len(empty)).indices.tolist()
        for cluster, row in zip(empty, farthest, strict=True):
            sums[labels[row]] -= x[row]
            sizes[labels[row]] -= 1
            sums[cluster], sizes[cluster] = x[row], 1
    return torch.where(sizes.unsqueeze(1) > 0, sums / sizes.clamp(min=1).unsqueeze(1), centres)


ASA = {"use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval", "asa_importance_beta", "asa_uncertainty_beta", "asa_schedule_exponent", "asa_total_steps"}


def _adamss_to_peft(config: AdamssConfig) -> dict[str, Any]:
    return {
        "r": config.rank,
        "num_subspaces": config.num_subspaces,
        "subspace_rank": config.subspace_rank,
        "use_dynamic_rank": config.dynamic_rank,
        "svd_threshold": config.threshold,
        "random_seed": config.svd_seed,
        "init_weights": "orthogonal",
    }


def _adamss_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rank": fields.get("r", 100),
        "num_subspaces": fields.get("num_subspaces", 5),
        "subspace_rank": fields.get("subspace_rank", 1),
        "dynamic_rank": bool(fields.get("use_dynamic_rank")),
        "threshold": fields.get("svd_threshold", 0.1) if fields.get("use_dynamic_rank") else 0.1,
        "svd_seed": fields.get("random_seed", 0),
    }


def _adamss_rows(fields: Mapping[str, Any], delta: Delta, tensors: Mapping[str, Tensor], wide: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Which row is in which cluster, which PEFT's file leaves out; and the shapes of the others, which follow from it."""
    rows = tensors.get("adamss_rows")
    if rows is None:
        rows = clusters(delta.taken_apart(wide())[0], delta.count)
    elif rows.dtype != torch.int64 or rows.shape != delta.adamss_rows.shape or not ((rows >= 0) & (rows < delta.count)).all():
        raise AdapterError(f"{delta.site.name}: adamss_rows does not give a cluster below {delta.count} for each of {delta.site.n_out} rows")
    ranks = torch.tensor([len(tensors[f"adamss_A.{i}"]) if f"adamss_A.{i}" in tensors else 1 for i in range(delta.count)])
    delta.place(rows, ranks.clamp(max=delta.config.subspace_rank))
    return {"adamss_rows": rows}


class Adamss(Delta):
    """Row o of Δ[W, b] is B[o] A[cluster of o] V. Unchanged at B = 0.

    Kept for all rows at once, so that the shapes do not depend on the clusters: A [clusters, ρ, r], B [out, ρ].
    """

    bias_column = True
    peft = PeftFormat(
        type="ADAMSS",
        write=_adamss_to_peft,
        read=_adamss_from_peft,
        fields=frozenset({*_adamss_to_peft(AdamssConfig()), *ASA}),
        lacks=frozenset({"bias", "exclude_modules"}),
        complete=_adamss_rows,
    )

    def build(self) -> None:
        out, width = self.site.n_out, self.site.n_in + self.site.has_bias
        self.r = min(self.config.rank, out, width)
        self.count = min(self.config.num_subspaces, out)
        self.in_product_form = not self.site.has_bias  # whose change goes by the same factors
        rho = self.config.subspace_rank
        self.adamss_A = nn.Parameter(torch.empty(self.count, rho, self.r, **self.storage))
        self.adamss_B = nn.Parameter(torch.empty(out, rho, **self.storage))
        self.register_buffer("adamss_newB", torch.empty(self.r, width, **self.storage))
        self.register_buffer("adamss_rows", torch.zeros(out, dtype=torch.int64, device=self.site.device))
        self.register_buffer("adamss_ranks", torch.ones(self.count, dtype=torch.int64, device=self.site.device))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.adamss_B.zero_()

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        U, V = self.taken_apart(W)
        self.adamss_newB.copy_(V)
        rows = clusters(U, self.count).to(U.device)
        ranks = torch.ones(self.count, dtype=torch.int64)
        self.adamss_A.zero_()
        for i in range(self.count):
            # an orthonormal basis of what the cluster's rows span most
            _, S, Vh = torch.linalg.svd(U[rows == i], full_matrices=False)
            limit = min(self.config.subspace_rank, len(S))
            if self.config.dynamic_rank and limit:
                limit = min(limit, max(1, int(((S / S[0]).square() > self.config.threshold).sum())))
            self.adamss_A[i, :limit].copy_(Vh[:limit])
            ranks[i] = max(1, limit)
        self.place(rows, ranks)

    def taken_apart(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """U [out, r] and V [r, in (+ 1)] of [W, b] in float32 as PEFT does it, for PEFT repeats this on reading."""
        U, _, V = lowrank(W.float(), self.r, 2, self.config.svd_seed)
        return U, V.T

    @torch.no_grad()
    def place(self, rows: Tensor, ranks: Tensor) -> None:
        self.adamss_rows.copy_(rows)
        self.adamss_ranks.copy_(ranks)

    def wide(self) -> tuple[Tensor, Tensor]:
        """E [out, clusters·ρ] and P [clusters·ρ, in (+ 1)] with Δ[W, b] = E P."""
        there = torch.arange(self.adamss_A.shape[1], device=self.adamss_ranks.device) < self.adamss_ranks.unsqueeze(1)
        mine = F.one_hot(self.adamss_rows, self.count).unsqueeze(2) * there  # [out, clusters, ρ]
        E = (mine * self.adamss_B.unsqueeze(1)).flatten(1)
        return E, self.adamss_A.flatten(0, 1) @ self.adamss_newB

    def product(self) -> tuple[Tensor, Tensor, float]:
        E, P = self.wide()
        return E, P[:, : self.site.n_in], 1.0

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        # E P first: a cluster has one direction of the input, so rank ρ·clusters and not r meets the tokens
        E, P = self.wide()
        z = F.linear(x, P[:, : self.site.n_in].to(x.dtype), P[:, -1].to(x.dtype) if self.site.has_bias else None)
        return F.linear(z, E.to(x.dtype))

    @property
    def adds_bias(self) -> bool:
        return self.site.has_bias

    def bias_delta(self, W: Tensor | None, bias: Tensor | None) -> Tensor | None:
        if not self.site.has_bias:
            return None
        E, P = self.wide()
        return E @ P[:, -1]

    def leaves(self) -> dict[str, str]:
        return {"adamss_newB": "adamss_newB", "adamss_rows": "adamss_rows"}  # the others are cut up in the file

    def to_file(self) -> dict[str, Tensor]:
        tensors = {"adamss_newB": self.adamss_newB, "adamss_rows": self.adamss_rows}
        for i, rank in enumerate([1] * self.count if self.adamss_ranks.is_meta else self.adamss_ranks.tolist()):
            tensors[f"adamss_A.{i}"] = self.adamss_A.detach()[i, :rank]
            tensors[f"adamss_B.{i}"] = self.adamss_B.detach()[self.adamss_rows == i, :rank]
        return tensors

    @torch.no_grad()
    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """The clusters are placed already, see `_adamss_rows`."""
        self.adamss_newB.copy_(tensors["adamss_newB"])
        self.adamss_A.zero_()
        self.adamss_B.zero_()
        for i, rank in enumerate(self.adamss_ranks.tolist()):
            self.adamss_A[i, :rank] = tensors[f"adamss_A.{i}"].to(self.adamss_A)
            self.adamss_B[self.adamss_rows == i, :rank] = tensors[f"adamss_B.{i}"].to(self.adamss_B)


# ---------------------------------------------------------------- GLoRA


def _glora_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    forms = fields.get("config_A_B", "lora"), fields.get("config_C", "lora")
    return {
        "rank": fields.get("r", 8) if "lora" in forms else 8,
        "form_ab": forms[0],
        "form_c": forms[1],
        "form_de": fields.get("config_D_E", "constant"),
    }


class Glora(Delta):
    """W' = W + W⊙A + B, b' = b + b⊙D + E + W·C. A path without a form holds nothing. Unchanged at its start."""

    additive = False  # W⊙A and the bias's paths go by what is below, not by x alone
    peft = PeftFormat(
        type="GLORA",
        write=lambda config: {"r": config.rank, "config_A_B": config.form_ab, "config_C": config.form_c, "config_D_E": config.form_de, "init_weights": True},
        read=_glora_from_peft,
        fields=frozenset({"r", "config_A_B", "config_C", "config_D_E", "init_weights"}),
        lacks=frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"}),
        idle=(".glora_A.zeros", ".glora_B.zeros"),  # as large as W, for a path that is not there
    )

    def build(self) -> None:
        config, out, n_in, rank = self.config, self.site.n_out, self.site.n_in, self.config.rank
        self.forms = {"A": config.form_ab, "B": config.form_ab, "C": config.form_c, "D": config.form_de, "E": config.form_de}
        if not self.site.has_bias:
            self.forms |= dict.fromkeys("CDE", "none")
        if set(self.forms.values()) == {"none"}:
            raise AdapterError(f"{self.site.name}: nothing would be trained; form_ab is none, and so are form_c and form_de or the layer has no bias")
        shapes = {"A": (out, n_in), "B": (out, n_in), "C": (n_in, 1), "D": (out,), "E": (out,)}
        for path, form in self.forms.items():
            rows, *columns = shapes[path]
            if form == "lora":
                setattr(self, f"{path}_Xd", nn.Parameter(torch.empty(rows, rank, **self.storage)))
                setattr(self, f"{path}_Xu", nn.Parameter(torch.empty(rank, *columns, **self.storage)))
            elif form == "vector":
                setattr(self, f"{path}_X", nn.Parameter(torch.empty((rows, 1) if columns else (rows,), **self.storage)))
            elif form == "constant":
                setattr(self, f"{path}_X", nn.Parameter(torch.empty(1, **self.storage)))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("_Xu"):
                parameter.copy_(draw.kaiming(parameter.shape, generator))
            else:
                parameter.zero_()

    def path(self, name: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """A, B [out, in], or a shape that spreads to it; C [in, 1]; D, E [out], or [1]. None where there is none. A product
        is formed in `dtype`, by default that of its factors."""
        form = self.forms[name]
        if form == "none":
            return None
        if form == "lora":
            left, right = getattr(self, f"{name}_Xd"), getattr(self, f"{name}_Xu")
            return left @ right if dtype is None else dense.product(left, right, dtype)
        return getattr(self, f"{name}_X")

    def forms_delta(self, x: Tensor) -> bool:
        return self.forms["A"] == "lora"

    def in_one(self, x: Tensor, base: Base) -> Tensor:
        W, b = base.stored(), base.bias()
        change = self.bias_delta(W, b)
        b = b if change is None else b + change
        return dense.plus(x, W, None if b is None else b.to(x.dtype), self.formed(x.dtype, W))

    def formed(self, dtype: torch.dtype, W: Tensor) -> Tensor:
        return torch.addcmul(self.path("B", dtype), W, self.path("A", dtype))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.goes_in_one(x) and base.bare:
            return self.in_one(x, base)
        y, seen = base(x), base.drop(x)
        bias = base.bias()
        out = y
        if self.forms["A"] == "lora":
            out = out + F.linear(seen, self.formed(y.dtype, base.stored().to(y.dtype)))
        elif self.forms["A"] != "none":
            # a number for each row, or for all: what is below is scaled, and W is not needed
            plain = y if seen is x else base(seen)
            plain = plain if bias is None else plain - bias.to(y.dtype)
            out = torch.addcmul(out, plain, self.path("A").flatten().to(y.dtype))
            out = out + seen.sum(dim=-1, keepdim=True) * self.path("B").flatten().to(y.dtype)
        if bias is None:
            return out
        change = self.bias_delta(base.stored() if self.forms["C"] != "none" else None, bias)
        return out if change is None else out + change.to(out.dtype)

    def delta(self, W: Tensor) -> Tensor:
        A, B = self.path("A"), self.path("B")
        return torch.zeros_like(W) if A is None else torch.addcmul(B, W, A)

    def bias_delta(self, W: Tensor | None, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        C, D, E = self.path("C"), self.path("D"), self.path("E")
        parts = [] if D is None else [bias * D + E]
        if C is not None:
            parts.append((W @ C.to(W.dtype)).squeeze(1).to(C.dtype))  # in W's type: there is no copy of W
        return sum(parts[1:], parts[0]) if parts else None

    def leaves(self) -> dict[str, str]:
        return {name: f"glora_{name[0]}.{name[2:]}" for name in self.state_dict()}

    def to_file(self) -> dict[str, Tensor]:
        """PEFT's file has zeros for what is not there; those that are small are written, for PEFT asks for them."""
        shapes = {"C": (self.site.n_in, 1), "D": (self.site.n_out,), "E": (self.site.n_out,)}
        missing = {f"glora_{path}.zeros": torch.zeros(shape, **self.storage) for path, shape in shapes.items() if self.forms[path] == "none"}
        return super().to_file() | missing

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for leaf, tensor in tensors.items():
            if leaf.endswith(".zeros") and tensor.any():
                raise AdapterError(f"{self.site.name}: {leaf} is not zero; it stands for a path that is not there")
        super().from_file(tensors)
