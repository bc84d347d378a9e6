"""OSF (arXiv:2504.07097): the smallest singular triplets of a weight are trained, away from the largest, which are kept.

Legend: W = UΣV with U [out, n], V [n, in]; of the n triplets the first `kept` stay and the other r are trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters import dense
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Delta, PeftFormat
from deltune.adapters.ranked import pattern_matches, value_for
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"osf": "OsfConfig"}

METHODS = {
    "osf": {
        "choices": {"delta": "osf"},
        "paper": "arXiv:2504.07097",
        "formula": "ΔW = UΣV − U₀Σ₀V₀ of the smallest triplets; gradients of U, V stay off the largest ones' spans",
        "note": "The paper rewrites W as its factors; here, as in PEFT, the change is added to a W that stays as it is. Only gradients are kept off the frozen spans, so an optimizer that scales them entry by entry can still leave. A step is bound by half of W's triplets being trained, beside a second, frozen, copy of them, and by the two projections of their gradients.",
    },
}


@dataclass(frozen=True)
class OsfConfig(AdapterConfig):
    """All but the largest triplets trained, away from the largest (arXiv:2504.07097)."""

    delta: str = option("osf", "Parametrisation of the change.", choices=("osf",))
    kept: int | float = option(0.5, "Largest triplets that stay as they are: a number, or a share below 1 of all.", gt=0)
    kept_pattern: dict[str, float] = option({}, "Regular expression over the end of a module name to its own `kept`; the first that matches counts.")

    @staticmethod
    def delta_class() -> type[Delta]:
        return Osf


class _KeptOff(torch.autograd.Function):
    """The identity; its gradient loses the part in the span of given orthonormal columns."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(columns)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (columns,) = ctx.saved_tensors
        return gradient - columns @ (columns.mT @ gradient), None


def _osf_to_peft(config: OsfConfig) -> dict[str, Any]:
    def number(kept: float) -> float:
        return kept if kept < 1 else int(kept)  # to PEFT 1.0 is all of them

    # PEFT looks for its expressions anywhere in a name, ours are about its end
    pattern = {rf"(?:^|\.)(?:{key})$": number(value) for key, value in config.kept_pattern.items()}
    return {"effective_rank": number(config.kept), "rank_pattern": pattern or None, "init_weights": True, "target_svd_config": None}


def _osf_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    kept = fields.get("effective_rank")
    ours = re.compile(r"\(\?:\^\|\\\.\)\(\?:(.*)\)\$")  # as written above
    pattern = {(found[1] if (found := ours.fullmatch(key)) else f".*(?:{key}).*"): float(value) for key, value in (fields.get("rank_pattern") or {}).items()}
    return {"kept": 0.5 if kept is None else kept, "kept_pattern": pattern}


def _osf_first(fields: Mapping[str, Any], delta: Delta, tensors: Mapping[str, Tensor], weight: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The frozen triplets, which PEFT's file leaves out."""
    missing = [name for name in delta.frozen_leaves() if delta.frozen_leaves()[name] not in tensors]
    if not missing:
        return {}
    apart = delta.taken_apart(weight())
    return {delta.frozen_leaves()[name]: apart[name].to(delta.U_low.dtype) for name in missing}


class Osf(Delta):
    """ΔW = U Σ V − U₀ Σ₀ V₀ over the smallest triplets. Unchanged at its start."""

    stops_gradient = "the part of U's and V's gradients in the spans of the kept triplets"
    peft = PeftFormat(
        type="OSF",
        write=_osf_to_peft,
        read=_osf_from_peft,
        fields=frozenset({"effective_rank", "rank_pattern", "init_weights", "target_svd_config"}),
        lacks=frozenset({"bias", "exclude_modules", "layers_to_transform", "layers_pattern"}),
        complete=_osf_first,
    )

    def build(self) -> None:
        out, n_in = self.site.n_out, self.site.n_in
        n = min(out, n_in)
        kept = value_for(self.site.name, self.config.kept_pattern, self.config.kept)
        # a whole number in JSON may come back as 8.0
        self.kept = int(n * kept) if kept < 1 else int(kept)
        if not 0 < self.kept < n:
            raise AdapterError(f"{self.site.name}: {self.kept} of its {n} triplets would be kept (kept={kept:g}), and at least one must be kept and one trained")
        r = n - self.kept
        for name, shape in (("U_low", (out, r)), ("S_low", (r,)), ("V_low", (r, n_in))):
            setattr(self, name, nn.Parameter(torch.empty(shape, **self.storage)))
            self.register_buffer(name.replace("low", "first"), torch.empty(shape, **self.storage))
        self.register_buffer("U_high", torch.empty(out, self.kept, **self.storage))
        self.register_buffer("V_high", torch.empty(self.kept, n_in, **self.storage))

    @classmethod
    def check(cls, config: OsfConfig, names: Any) -> None:
        for key in config.kept_pattern:
            if not any(pattern_matches(key, name) for name in names):
                raise AdapterError(f"kept_pattern: {key!r} matches none of the adapted modules, e.g. {names[0]}")

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        pass  # everything starts from W

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        for name, tensor in self.taken_apart(W).items():
            self.get_buffer(name).copy_(tensor)
        for name in ("U", "S", "V"):
            self.get_parameter(f"{name}_low").copy_(self.get_buffer(f"{name}_first"))

    def taken_apart(self, W: Tensor) -> dict[str, Tensor]:
        """The frozen tensors, from W in float32 as PEFT does it, for PEFT repeats this on reading."""
        U, S, V = torch.linalg.svd(W.float(), full_matrices=False)
        k = self.kept
        return {"U_first": U[:, k:], "S_first": S[k:], "V_first": V[k:], "U_high": U[:, :k], "V_high": V[:k]}

    def trained(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, Σ, V, whose gradients stay off the kept triplets."""
        return _KeptOff.apply(self.U_low, self.U_high), self.S_low, _KeptOff.apply(self.V_low.mT, self.V_high.mT).mT

    def product(self) -> tuple[Tensor, Tensor, float]:
        U, S, V = self.trained()
        return torch.cat([U * S, -self.U_first * self.S_first], dim=1), torch.cat([V, self.V_first]), 1.0

    def delta(self, W: Tensor | None) -> Tensor:
        U, S, V = self.trained()
        # as in `out` two products, which cancel exactly where they are equal
        return (U * S) @ V - (self.U_first * self.S_first) @ self.V_first

    def formed(self, dtype: torch.dtype, W: Tensor | None) -> Tensor:
        U, S, V = self.trained()
        return dense.product(U * S, V, dtype) - dense.product(self.U_first * self.S_first, self.V_first, dtype)

    def forms_delta(self, x: Tensor) -> bool:
        r, n_in, n_out = len(self.S_low), self.site.n_in, self.site.n_out
        return self.pays_to_form(x, apart=5 * r * (n_in + n_out), forming=4 * r * n_in * n_out)

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        def through(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
            return F.linear(F.linear(x, V.to(x.dtype)) * S.to(x.dtype), U.to(x.dtype))

        # two equal products and not one of twice the rank, so that their difference at the start is exactly zero
        return through(*self.trained()) - through(self.U_first, self.S_first, self.V_first)

    def frozen_leaves(self) -> dict[str, str]:
        return {name: f"osf_{name}" for name in ("U_first", "S_first", "V_first", "U_high", "V_high")}

    def leaves(self) -> dict[str, str]:
        return {f"{name}_low": f"osf_svd_params.{name}_low" for name in ("U", "S", "V")} | self.frozen_leaves()
