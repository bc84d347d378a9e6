"""Sparse changes: values at fixed entries of the weight, chosen before training; SHiRA and Super-Tuning.

Legend: W is [out, in]; n entries are trained, `values` [n]; x is [..., in].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters import draw
from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Base, Delta, PeftFormat
from deltune.adapters.entries import Entries, by_magnitude, permuted, scattered
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"shira": "ShiraConfig", "supertuning": "SuperTuningConfig"}

METHODS = {
    "shira": {
        "choices": {"delta": "shira"},
        "paper": "arXiv:2406.13175",
        "formula": "ΔW = v at r·(in + out) fixed entries, 0 elsewhere",
        "small": {"rank": 2},
        "note": "Masks that need no data: random, magnitude (the paper's WM) and struct, whose rows the paper leaves open: the diagonal and rows at even distances. Its masks from gradients and SNIP need data. PEFT adds the entries to a bfloat16 weight, which is one product less a step and loses each that is below the weight's rounding; here they act.",
    },
    "supertuning": {
        "choices": {"delta": "supertuning"},
        "paper": "arXiv:2607.09287",
        "formula": "ΔW = v at the (1 − sparsity)·in·out entries where |W| is largest, + s·BA if a rank is given, s = α/r",
        "small": {"sparsity": 0.8},
        "note": "rank gives the paper's hybrid, Supra. Dropout acts on what the whole change sees of x; in PEFT on the low-rank part alone.",
    },
}


@dataclass(frozen=True)
class ShiraConfig(AdapterConfig):
    """Sparse high-rank adaptation (arXiv:2406.13175)."""

    delta: str = option("shira", "Parametrisation of the change.", choices=("shira",))
    rank: int = option(32, "Number of trained entries: rank · (in + out), as many as LoRA of this rank has. It does not bound the rank of the change.", gt=0)
    mask: str = option("random", "Which entries: random; magnitude: the largest of the weight; struct: the diagonal and rows at even distances.", choices=("random", "magnitude", "struct"))
    mask_seed: int | None = option(None, "Seed of the random entries, the same for layers of one size, as PEFT draws them; null draws them from the run's seed and the layer's name.")

    @staticmethod
    def delta_class() -> type[Delta]:
        return Shira

    def problems(self) -> list[str]:
        idle = ["mask_seed has no effect: mask is not random"] if self.mask_seed is not None and self.mask != "random" else []
        return idle + super().problems()


@dataclass(frozen=True)
class SuperTuningConfig(AdapterConfig):
    """Training the weight's largest entries (arXiv:2607.09287)."""

    delta: str = option("supertuning", "Parametrisation of the change.", choices=("supertuning",))
    sparsity: float = option(0.99, "Share of the weight's entries that stay as they are.", ge=0, lt=1)
    select: str = option("top", "top: the entries of largest magnitude are trained; bottom: those of smallest.", choices=("top", "bottom"))
    rank: int | None = option(None, "Rank of a LoRA pair beside the entries (the paper's Supra); null for none.", gt=0)
    alpha: float | None = option(None, "Strength of that pair, which is scaled by alpha / rank; null is twice the rank.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return SuperTuning

    def problems(self) -> list[str]:
        idle = ["alpha has no effect without a rank"] if self.alpha is not None and self.rank is None else []
        return idle + super().problems()


class Sparse(Delta):
    """ΔW from `values` at `entries`. Unchanged at its start."""

    def build(self) -> None:
        count = self.count()
        self.entries = Entries(self.site.n_out, self.site.n_in, count, self.site.device, persistent=True)
        self.values = nn.Parameter(torch.empty(count, **self.storage))

    def count(self) -> int:
        """Number of trained entries. Raises AdapterError if the layer has not as many, or none is left."""
        raise NotImplementedError

    def delta(self, W: Tensor | None) -> Tensor:
        return self.entries.dense(self.values)

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        return self.entries(x, self.values)

    def forms_delta(self, x: Tensor) -> bool:
        return self.entries.pays_with_weight(x)

    def in_one(self, x: Tensor, base: Base) -> Tensor:
        return self.entries.plus(x, base.stored(), base.bias(), self.values, self.pair())

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """A and B of a product BA beside the entries, if there is one."""
        return None

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file(tensors)
        self.entries.check(self.site.name)


# ---------------------------------------------------------------- SHiRA


def _shira_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    # a mask by a function of the user's own has a name of its own; the entries themselves are in the file
    mask = fields.get("mask_type", "random")
    known = mask if mask in ("random", "magnitude", "struct") else "random"
    return {"rank": fields.get("r", 32), "mask": known, "mask_seed": fields.get("random_seed") if known == "random" else None}


def _shira_to_peft(config: ShiraConfig) -> dict[str, Any]:
    return {"r": config.rank, "mask_type": config.mask, "random_seed": config.mask_seed, "fan_in_fan_out": False, "init_weights": True}


LACKS = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern", "bias"})


class Shira(Sparse):
    peft = PeftFormat(
        type="SHIRA",
        write=_shira_to_peft,
        read=_shira_from_peft,
        fields=frozenset({"r", "mask_type", "random_seed", "fan_in_fan_out", "init_weights"}),
        fits=lambda config: not config.dropout,
        lacks=LACKS,
    )

    def count(self) -> int:
        n_out, n_in, rank = self.site.n_out, self.site.n_in, self.config.rank
        if rank * (n_out + n_in) > n_out * n_in:
            raise AdapterError(
                f"{self.site.name}: rank {rank} means {rank * (n_out + n_in):,} entries, and this layer has {n_out * n_in:,}; "
                f"it can be at most {n_out * n_in // (n_out + n_in)}"
            )
        return rank * (n_out + n_in)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.values.zero_()
        total, count, seed = self.site.n_out * self.site.n_in, self.count(), self.config.mask_seed
        if self.config.mask == "struct":
            self.entries.put(structured(self.site.n_out, self.site.n_in, count))
        elif self.config.mask == "random":
            self.entries.put(scattered(total, count, generator) if seed is None else permuted(total, count, seed).sort().values)

    @property
    def starts_from_base(self) -> bool:
        return self.config.mask == "magnitude"

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        self.entries.put(by_magnitude(W, self.count()))

    def leaves(self) -> dict[str, str]:
        return {"values": "shira_weight", "entries.places": "shira_indices"}


def structured(n_out: int, n_in: int, count: int) -> Tensor:
    """Flat places of the diagonal, and of rows at even distances, the last of them in part."""
    diagonal = torch.arange(min(n_out, n_in)) * (n_in + 1)
    num_rows = min(n_out, -(-(count - len(diagonal)) // max(1, n_in - 1)))
    rows = torch.arange(num_rows) * n_out // max(1, num_rows)
    whole = (rows.unsqueeze(1) * n_in + torch.arange(n_in)).flatten()
    rest = whole[~torch.isin(whole, diagonal)]
    return torch.cat([diagonal, rest[: count - len(diagonal)]]).sort().values


# ---------------------------------------------------------------- Super-Tuning


def _super_to_peft(config: SuperTuningConfig) -> dict[str, Any]:
    return {
        "sparsity": config.sparsity,
        "select_top": config.select == "top",
        "r": config.rank,
        "lora_alpha": None if config.rank is None else _strength(config),
        "lora_dropout": config.dropout if config.rank is not None else 0.0,
        "init_weights": True,
        "save_precomputed_indices": True,
    }


def _super_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    if fields.get("save_precomputed_indices") is False:
        raise AdapterError("save_precomputed_indices is false: the file does not hold which entries were trained. Save it again with PEFT and that field true")
    rank = fields.get("r")
    return {
        "sparsity": fields.get("sparsity", 0.99),
        "select": "top" if fields.get("select_top", True) else "bottom",
        "rank": rank,
        "alpha": fields.get("lora_alpha") if rank is not None else None,
        "dropout": fields.get("lora_dropout", 0.0) if rank is not None else 0.0,
    }


def _strength(config: SuperTuningConfig) -> float:
    return 2.0 * config.rank if config.alpha is None else config.alpha


class SuperTuning(Sparse):
    peft = PeftFormat(
        type="SUPERTUNING",
        write=_super_to_peft,
        read=_super_from_peft,
        fields=frozenset({"sparsity", "select_top", "r", "lora_alpha", "lora_dropout", "init_weights", "save_precomputed_indices"}),
        fits=lambda config: config.rank is not None or not config.dropout,
        lacks=LACKS,
    )

    def build(self) -> None:
        super().build()
        if self.config.rank is not None:
            self.scale = _strength(self.config) / self.config.rank
            self.lora_A = nn.Parameter(torch.empty(self.config.rank, self.site.n_in, **self.storage))
            self.lora_B = nn.Parameter(torch.empty(self.site.n_out, self.config.rank, **self.storage))

    def count(self) -> int:
        total = self.site.n_out * self.site.n_in
        count = int(total * (1 - self.config.sparsity))  # as PEFT rounds, so that its files fit
        if count < 1:
            raise AdapterError(f"{self.site.name}: sparsity {self.config.sparsity} leaves none of its {total:,} entries to train; it must be at most {1 - 1 / total:.6g}")
        return count

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.values.zero_()
        if self.config.rank is not None:
            self.lora_A.copy_(draw.kaiming(self.lora_A.shape, generator))
            self.lora_B.zero_()

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        self.entries.put(by_magnitude(W, self.count(), top=self.config.select == "top"))

    def delta(self, W: Tensor | None) -> Tensor:
        sparse = super().delta(W)
        return sparse if self.config.rank is None else sparse + self.scale * (self.lora_B @ self.lora_A)

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        y, pair = super().out(x, W), self.pair()
        return y if pair is None else y + F.linear(F.linear(x, pair[0].to(x.dtype)), pair[1].to(x.dtype))

    def pair(self) -> tuple[Tensor, Tensor] | None:
        return None if self.config.rank is None else (self.lora_A * self.scale, self.lora_B)

    def leaves(self) -> dict[str, str]:
        pair = {"lora_A": "supertuning_lora_A.weight", "lora_B": "supertuning_lora_B.weight"}
        return {"values": "supertuning_values"} | (pair if self.config.rank is not None else {})

    def to_file(self) -> dict[str, Tensor]:
        return super().to_file() | {"supertuning_indices": self.entries.flat().int()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        flat = tensors["supertuning_indices"].long().to(self.values.device)
        self.entries.put(flat)
        super().from_file(tensors)
