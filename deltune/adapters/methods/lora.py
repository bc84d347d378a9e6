"""LoRA (arXiv:2106.09685): ΔW = s·B·A with A [rank, in] and B [out, rank]; one of the two starts at zero.

Scaling: alpha / rank, or alpha / √rank (rsLoRA, arXiv:2312.03732). On an embedding A is [rank, rows], B is [dim, rank].
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Delta, PeftFormat
from deltune.config.fields import option
from deltune.errors import AdapterError


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """Low-rank adaptation (arXiv:2106.09685)."""

    method: str = option("lora", "Adaptation method.", choices=("lora",))
    rank: int = option(8, "Rank of the change.", gt=0)
    alpha: float = option(16.0, "Strength: the change is scaled by alpha / rank, or alpha / √rank with scaling=rslora.", gt=0)
    scaling: str = option("standard", "standard: alpha / rank; rslora: alpha / √rank (arXiv:2312.03732).", choices=("standard", "rslora"))
    init: str = option("kaiming", "Start of A: kaiming: uniform within ±1/√in; gaussian: normal with deviation 1/rank. B starts at zero. An embedding starts with A zero and B normal.", choices=("kaiming", "gaussian"))
    rank_pattern: dict[str, int] = option({}, "Regular expression over the end of a module name to its own rank; the first that matches counts.")
    alpha_pattern: dict[str, float] = option({}, "Regular expression over the end of a module name to its own alpha; the first that matches counts.")

    @staticmethod
    def delta() -> type[Delta]:
        return Lora


SCALINGS: dict[str, Callable[[float, int], float]] = {
    "standard": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
}


DRAWN = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


def _kaiming(A: Tensor, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(A.shape[1])  # kaiming_uniform with a = √5
    return torch.empty(A.shape, **DRAWN).uniform_(-bound, bound, generator=generator)


def _gaussian(A: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty(A.shape, **DRAWN).normal_(std=1 / A.shape[0], generator=generator)


INITS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"kaiming": _kaiming, "gaussian": _gaussian}


def value_for(name: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """The value of the first key that matches the end of a module's full name, from a dot or the beginning on."""
    return next((value for key, value in pattern.items() if pattern_matches(key, name)), default)


def pattern_matches(key: str, name: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({key})$", name) is not None
    except re.error as error:
        raise AdapterError(f"rank_pattern or alpha_pattern: {key!r} is no regular expression: {error}") from None


# ---------------------------------------------------------------- PEFT's fields

# With these starts PEFT leaves the base as it is, so the tensors alone define the function.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def _to_peft(config: LoraConfig) -> dict[str, Any]:
    def plain(alpha: float) -> float:
        return int(alpha) if float(alpha).is_integer() else alpha

    return {
        "r": config.rank,
        "lora_alpha": plain(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.scaling == "rslora",
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {key: plain(alpha) for key, alpha in config.alpha_pattern.items()},
        "fan_in_fan_out": False,
    }


def _from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    start = fields.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise AdapterError(
            f"init_lora_weights is {start!r}: this adapter belongs to a base whose weights were changed at its start, and "
            "the file does not hold that change. Save it again with PEFT's path_initial_model_for_weight_conversion, "
            "which writes an adapter for the unchanged base"
        )
    return {
        "rank": fields.get("r", 8),
        "alpha": fields.get("lora_alpha", 8),
        "dropout": fields.get("lora_dropout", 0.0),
        "scaling": "rslora" if fields.get("use_rslora") else "standard",
        "init": "gaussian" if start == "gaussian" else "kaiming",
        "rank_pattern": fields.get("rank_pattern") or {},
        "alpha_pattern": fields.get("alpha_pattern") or {},
    }


PEFT = PeftFormat(
    type="LORA",
    write=_to_peft,
    read=_from_peft,
    # fan_in_fan_out tells how the base stores W; the base itself tells us. eva_config tells how A was started.
    fields=frozenset({"r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "eva_config"}),
    harmless={"megatron_core": "megatron.core", "qalora_group_size": 16},
)


class Lora(Delta):
    """ΔW = s·B·A. Unchanged at its start."""

    kinds = ("linear", "conv1d", "embedding")
    factors = ("lora_A", "lora_B")
    peft = PEFT

    @classmethod
    def check(cls, config: LoraConfig, names: Sequence[str]) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            for key in getattr(config, field):
                if not any(pattern_matches(key, name) for name in names):
                    raise AdapterError(f"{field}: {key!r} matches none of the adapted modules, e.g. {names[0]}")

    def build(self) -> None:
        config: LoraConfig = self.config
        self.rank = value_for(self.site.name, config.rank_pattern, config.rank)
        alpha = value_for(self.site.name, config.alpha_pattern, config.alpha)
        if self.rank < 1:
            raise AdapterError(f"{self.site.name}: rank_pattern gives it rank {self.rank}; a rank is at least 1")
        self.scale = SCALINGS[config.scaling](alpha, self.rank)
        self.lora_A = nn.Parameter(torch.empty(self.rank, self.site.n_in, **self.storage))
        self.lora_B = nn.Parameter(torch.empty(self.site.n_out, self.rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        if self.site.kind == "embedding":
            self.lora_A.zero_()
            self.lora_B.copy_(torch.empty(self.lora_B.shape, **DRAWN).normal_(generator=generator))
        else:
            self.lora_A.copy_(INITS[self.config.init](self.lora_A, generator))
            self.lora_B.zero_()

    def product(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_B, self.lora_A, self.scale

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        if self.site.kind == "embedding":
            z = F.embedding(x, self.lora_A.T, self.site.padding_idx)  # [..., rank]
            return F.linear(z * self.scale, self.lora_B)
        # the scale goes on the rank-sized tensor, the smallest there is
        z = F.linear(x, self.lora_A.to(x.dtype)) * self.scale
        return F.linear(z, self.lora_B.to(x.dtype))

    def ranked(self) -> dict[str, int]:
        return {"lora_A": 0, "lora_B": 1}

    def leaves(self) -> dict[str, str]:
        if self.site.kind == "embedding":
            return {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
        return {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
