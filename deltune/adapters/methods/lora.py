"""LoRA (arXiv:2106.09685): ΔW = s·B·A with A [rank, in] and B [out, rank]; one of the two starts at zero.

Scaling: alpha / rank, or alpha / √rank (rsLoRA, arXiv:2312.03732). On an embedding A is [rank, rows], B is [dim, rank].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters import draw
from deltune.adapters.config import RankedConfig
from deltune.adapters.delta import Delta, PeftFormat
from deltune.adapters.ranked import Ranked
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"lora": "LoraConfig", "dora": "DoraConfig"}

METHODS = {
    "lora": {
        "choices": {"delta": "lora"},
        "paper": "arXiv:2106.09685",
        "formula": "ΔW = s·BA, s = α/r",
        "small": {"rank": 2},
    },
    "rslora": {
        "choices": {"delta": "lora", "scaling": "rslora"},
        "paper": "arXiv:2312.03732",
        "formula": "ΔW = s·BA, s = α/√r",
        "small": {"rank": 2},
    },
    "dora": {
        "choices": {"delta": "dora"},
        "paper": "arXiv:2402.09353",
        "formula": "W' = diag(m / sg‖W + s·BA‖row)·(W + s·BA), s = α/r",
        "small": {"rank": 2},
    },
}


@dataclass(frozen=True)
class LoraConfig(RankedConfig):
    """Low-rank adaptation (arXiv:2106.09685)."""

    delta: str = option("lora", "Parametrisation of the change.", choices=("lora",))
    init: str = option("kaiming", "Start of A: kaiming: uniform within ±1/√in; gaussian: normal with deviation 1/rank. B starts at zero. An embedding starts with A zero and B normal.", choices=("kaiming", "gaussian"))

    @staticmethod
    def delta_class() -> type[Delta]:
        return Lora


@dataclass(frozen=True)
class DoraConfig(LoraConfig):
    """LoRA with strength and direction apart (arXiv:2402.09353)."""

    delta: str = option("dora", "Parametrisation of the change.", choices=("dora",))
    magnitude: bool = option(True, "Learn each output's strength apart from its direction.", choices=(True,))


INITS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "kaiming": draw.kaiming,
    "gaussian": lambda shape, generator: draw.normal(shape, 1 / shape[0], generator),
}


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
        "use_dora": config.magnitude,
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
        "magnitude": bool(fields.get("use_dora")),
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
    fields=frozenset({"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "eva_config"}),
    harmless={"megatron_core": "megatron.core", "qalora_group_size": 16},
)


class Lora(Ranked):
    """ΔW = s·B·A. Unchanged at its start."""

    kinds = ("linear", "conv1d", "embedding")
    factors = ("lora_A", "lora_B")
    peft = PEFT

    def build(self) -> None:
        self.lora_A = nn.Parameter(torch.empty(self.rank, self.site.n_in, **self.storage))
        self.lora_B = nn.Parameter(torch.empty(self.site.n_out, self.rank, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        if self.site.kind == "embedding":
            self.lora_A.zero_()
            self.lora_B.copy_(draw.normal(self.lora_B.shape, 1.0, generator))
        else:
            self.lora_A.copy_(INITS[self.config.init](self.lora_A.shape, generator))
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
