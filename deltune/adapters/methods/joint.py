"""FRoD (arXiv:2512.23485): the layers of one category decomposed together, W = U·diag(λ)·Vᵀ with one V for all of them.

Legend: W is [out, in]; V [in, in], shared; U [out, in] with unit columns, and λ [in], of each layer; S [in, in] is sparse,
with its values at frozen positions that the category shares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters.bank import Bank
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Delta, PeftFormat
from deltune.adapters.entries import Entries
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"frod": "FrodConfig"}

METHODS = {
    "frod": {
        "choices": {"delta": "frod"},
        "paper": "arXiv:2512.23485",
        "formula": "W' = U(diag(λ) + S)Vᵀ, where W = U·diag(λ)·Vᵀ with one V for the layers of a category; S sparse, 0 at the start",
        "small": {"sparse_rate": 0.05},
        "note": "The released layer adds U(diag(λ) + S)Vᵀ to W, and so starts at 2W; here, as in PEFT, it takes W's place. S learns at a tenth of λ's rate (5e-5 and 5e-4). In a checkpoint every layer's U is as large as the layer. A step is bound by products with U and Vᵀ, each as dear as one with W or dearer, and but in float32 on a CPU, where S is multiplied at its places alone, by those with a core as wide as the input.",
    },
}


@dataclass(frozen=True)
class FrodConfig(AdapterConfig):
    """Weights in a joint basis, changed in full rank by a few numbers (arXiv:2512.23485)."""

    delta: str = option("frod", "Parametrisation of the change.", choices=("frod",))
    sparse_rate: float = option(0.01, "Share of S's entries that are trained.", ge=0, le=1)
    ridge: float = option(1e-3, "Added to the diagonal of what is inverted for the joint basis.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return Frod


def num_positions(width: int, rate: float) -> int:
    """Trained entries of S: a share of all, at least one, and none on the diagonal."""
    return min(max(1, int(width * width * rate)), width * (width - 1)) if rate > 0 else 0


def off_diagonal(width: int, count: int, generator: torch.Generator) -> Tensor:
    """Row and column [2, count] of different places off the diagonal, each set of them as likely as another."""
    every = width * (width - 1)
    if 2 * count > every:
        places = torch.randperm(every, generator=generator)[:count]
    else:
        places = torch.empty(0, dtype=torch.int64)
        while len(places) < count:  # without a list of them all, which is as large as V
            more = torch.randint(every, (count - len(places),), generator=generator)
            places = torch.unique(torch.cat([places, more]))
    rows, columns = places // (width - 1), places % (width - 1)
    return torch.stack([rows, columns + (columns >= rows)])


def joint_basis(weights: list[Tensor], ridge: float) -> Tensor:
    """V [in, in] of weights [out, in]. With the QR decomposition of their stack, Q_i the rows of the i-th in Q:

    V = Rᵀ E, E the eigenvectors of the mean of (Q_iᵀQ_i + ridge·I)⁻¹. Fewer rows than columns: the right singular vectors.
    """
    stack = torch.cat(weights)
    width = stack.shape[1]
    if len(stack) < width:
        return torch.linalg.svd(stack, full_matrices=True)[2].T
    Q, R = torch.linalg.qr(stack)
    eye = ridge * torch.eye(width, dtype=stack.dtype, device=stack.device)
    mean = sum(torch.linalg.inv(part.T @ part + eye) for part in Q.split([len(W) for W in weights])) / len(weights)
    return R.T @ torch.linalg.eigh(mean).eigenvectors


class JointBasis(Bank):
    """V, and where S may be other than zero. All of it is in files and checkpoints: decompositions differ between machines."""

    def build(self) -> None:
        widths = {site.n_in for site in self.sites}
        if len(widths) > 1:
            names = ", ".join(f"{site.name} {site.n_in}" for site in self.sites[:3])
            raise AdapterError(f"frod: layers called {self.key} must have one input width, and these differ: {names}")
        width = self.max_in
        count = num_positions(width, self.config.sparse_rate)
        device = self.storage["device"]
        self.register_buffer("frod_V", torch.empty(width, width, **self.storage))
        self.register_buffer("frod_s_indices", torch.zeros(2, count, dtype=torch.int64, device=device))
        self.register_buffer("frod_s_size", torch.full((2,), width, dtype=torch.int64, device=device))
        self._entries: tuple[Tensor, int, Entries] | None = None

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.frod_s_indices.copy_(off_diagonal(self.max_in, self.frod_s_indices.shape[1], generator))

    def entries(self) -> Entries:
        """Where diag(λ) + S can be other than zero: the diagonal, then S's places. Told anew where these have changed."""
        known, indices, width = self._entries, self.frod_s_indices, self.max_in
        if known is None or known[0] is not indices or known[1] != indices._version:
            with torch.inference_mode(False):  # training may come after an evaluation
                diagonal = torch.arange(width, device=indices.device) * (width + 1)
                places = torch.cat([diagonal, indices[0] * width + indices[1]])
                known = self._entries = (indices, indices._version, Entries.at(places, width, width, indices.device))
        return known[2]

    @torch.no_grad()
    def start(self, weights: Mapping[str, Callable[[], Tensor]], generator: torch.Generator) -> None:
        self.frod_V.copy_(joint_basis([read() for read in weights.values()], self.config.ridge))

    def leaves(self) -> dict[str, str]:
        return {name: f"{name}.{self.key}" for name in self.state_dict()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file(tensors)
        width = self.max_in
        inside = ((self.frod_s_indices >= 0) & (self.frod_s_indices < width)).all()
        if not inside or self.frod_s_size.tolist() != [width, width]:
            raise AdapterError(f"frod_s_indices.{self.key}: places outside of {width}×{width}, this model's")


class Frod(Delta):
    """ΔW = U(diag(λ − λ₀) + S)Vᵀ, which is U(diag(λ) + S)Vᵀ − W, and zero to the bit at the start."""

    @classmethod
    def banks(cls, config: FrodConfig) -> Mapping[str, tuple[str, type[Bank]]]:
        return {"joint": ("category", JointBasis)}

    def build(self) -> None:
        n_in = self.site.n_in
        self.frod_lambda_l = nn.Parameter(torch.empty(n_in, **self.storage))
        self.frod_lambda_s_values = nn.Parameter(torch.empty(self.joint.frod_s_indices.shape[1], **self.storage))
        # from V and W at a start and a load; a checkpoint keeps them, for there V comes back after that
        self.register_buffer("U", torch.empty(self.site.n_out, n_in, **self.storage))
        self.register_buffer("lambda_0", torch.empty(n_in, **self.storage))
        self.measured = False

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.frod_lambda_s_values.zero_()

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        self._measure(W)
        self.frod_lambda_l.copy_(self.lambda_0)
        self.measured = True

    @torch.no_grad()
    def ready(self, W: Tensor) -> None:
        if not self.measured:  # once: where the base moves, U and λ₀ stay
            self._measure(W)
            self.measured = True

    def _measure(self, W: Tensor) -> None:
        """U and λ₀ with W = U·diag(λ₀)·Vᵀ."""
        V = self.joint.frod_V.to(torch.float64)
        try:
            scaled = torch.linalg.solve(V, W.to(torch.float64).T).T
        except torch.linalg.LinAlgError:  # inputs that no layer uses
            scaled = W.to(torch.float64) @ torch.linalg.pinv(V, rtol=1e-6).T
        norms = torch.linalg.vector_norm(scaled, dim=0)
        self.lambda_0.copy_(norms)
        self.U.copy_(torch.where(norms > 1e-12, scaled / norms, 0))

    def values(self) -> Tensor:
        """Of diag(λ − λ₀) + S, the core, at `entries`."""
        return torch.cat([self.frod_lambda_l - self.lambda_0, self.frod_lambda_s_values])

    def right(self, dtype: torch.dtype) -> Tensor:
        """core · Vᵀ [in, in]."""
        return self.joint.entries()(self.joint.frozen("frod_V", dtype), self.values()).T

    def product(self) -> tuple[Tensor, Tensor, float]:
        return self.U, self.right(self.U.dtype), 1.0

    def formed(self, dtype: torch.dtype, W: Tensor | None) -> Tensor:
        return self.frozen("U", dtype) @ self.right(dtype)

    def forms_delta(self, x: Tensor) -> bool:
        n_in, n_out = self.site.n_in, self.site.n_out
        core = 0 if self.joint.entries().by_entry(x) else n_in  # what a row takes to go through the core
        return self.pays_to_form(x, apart=n_in * (2 * n_in + 3 * core + 2 * n_out), forming=2 * n_in**2 * (core + n_out))

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        z = F.linear(x, self.joint.frozen("frod_V", x.dtype).T)  # [..., in]
        return F.linear(self.joint.entries()(z, self.values()), self.frozen("U", x.dtype))

    def lr_ratios(self) -> dict[str, float]:
        return {"frod_lambda_s_values": 0.1}

    def leaves(self) -> dict[str, str]:
        return {"frod_lambda_l": "frod_lambda_l", "frod_lambda_s_values": "frod_lambda_s_values"}


def _to_peft(config: FrodConfig) -> dict[str, Any]:
    return {
        "sparse_rate": config.sparse_rate,
        "regularization_alpha": config.ridge,
        "frod_dropout": config.dropout,
        "save_projection": True,
        "fan_in_fan_out": False,
    }


def _from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    if not fields.get("save_projection", True):
        raise AdapterError(
            "save_projection is false: the file lacks the joint basis, and to repeat its decomposition of the base's weights "
            "gives another one on another machine. Load it with PEFT where it was made, and save it with save_projection"
        )
    return {
        "sparse_rate": fields.get("sparse_rate", 0.01),
        "ridge": fields.get("regularization_alpha", 1e-3),
        "dropout": fields.get("frod_dropout", 0.0),
    }


Frod.peft = PeftFormat(
    "FROD",
    _to_peft,
    _from_peft,
    # the seed and init_weights are about the start, which the file's tensors are past
    frozenset({"sparse_rate", "regularization_alpha", "frod_dropout", "save_projection", "projection_prng_key", "init_weights", "fan_in_fan_out"}),
    harmless={"progressbar": True},
    fits=lambda config: not config.magnitude,
    lacks=frozenset({"exclude_modules"}),
)
