"""LoRA (arXiv:2106.09685): ΔW = s·B·A with A [rank, in] and B [out, rank], by every start that such a pair can have.

Scaling: alpha / rank, or alpha / √rank (rsLoRA, arXiv:2312.03732). On an embedding A is [rank, rows], B is [dim, rank].
A start that takes its product out of W (PiSSA and others) leaves W as it is: ΔW = s·(B·A - B₀·A₀), with copies A₀ and B₀
of the start. So the first step is exact, nothing is rounded into the base, and the file is a plain LoRA of rank 2r.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.adapters.config import RankedConfig
from deltune.adapters.delta import Delta, PeftFormat
from deltune.adapters.init import starts
from deltune.adapters.magnitude import Magnitude
from deltune.adapters.ranked import Ranked
from deltune.config.fields import option
from deltune.errors import AdapterError
from deltune.weights import float_view

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
    "pissa": {
        "choices": {"delta": "lora", "init": "pissa"},
        "paper": "arXiv:2404.02948",
        "formula": "ΔW = s·(BA - B₀A₀); s·B₀A₀ = the r largest components of W",
        "small": {"rank": 2},
        "note": "The base is not rewritten: the start is kept frozen beside it. The decomposition is randomised; svd=full is exact.",
    },
    "milora": {
        "choices": {"delta": "lora", "init": "milora"},
        "paper": "arXiv:2406.09044",
        "formula": "ΔW = s·(BA - B₀A₀); s·B₀A₀ = the r smallest components of W",
        "small": {"rank": 2},
        "note": "part=mid, max and random take other components, as the authors' code can.",
    },
    "olora": {
        "choices": {"delta": "lora", "init": "olora"},
        "paper": "arXiv:2406.01775",
        "formula": "ΔW = s·(BA - B₀A₀); W = QR, B₀ = Q[:, :r], A₀ = R[:r]",
        "small": {"rank": 2},
    },
    "dude": {
        "choices": {"delta": "dora", "init": "pissa"},
        "paper": "arXiv:2505.14367",
        "formula": "W' = diag(m / sg‖W + ΔW‖row)·(W + ΔW), ΔW = s·(BA - B₀A₀) as in PiSSA",
        "small": {"rank": 2},
    },
    "mica": {
        "choices": {"delta": "lora", "init": "mica", "train": "A"},
        "paper": "arXiv:2604.01694",
        "formula": "ΔW = s·BA, B = U[:, -r:] of W = U S Vᵀ and frozen",
        "small": {"rank": 2},
    },
    "loftq": {
        "choices": {"delta": "lora", "init": "loftq"},
        "paper": "arXiv:2310.08659",
        "formula": "ΔW = s·(BA - B₀A₀); in turn Q = the rounded W - R, R = s·B₀A₀ = the best rank-r part of W - Q",
        "small": {"rank": 2},
        "note": "On a quantised base W - R is rounded once more at the end, as with every start that is taken out of W. On another base NF4 tells what would be lost, and W stays as it is. Factors are divided by √s, which the published code leaves out.",
    },
    "lora_orthogonal": {
        "choices": {"delta": "lora", "init": "orthogonal"},
        "paper": "PEFT's init_lora_weights=orthogonal",
        "formula": "ΔW = s·BA; B₀A₀ = 0 with neither of them zero",
        "start": 1e-5,
        "small": {"rank": 4, "alpha": 64.0},
        "note": "B₀A₀ is zero up to rounding. The rank must be even.",
    },
    "lora_gaussian": {
        "choices": {"delta": "lora", "init": "gaussian"},
        "paper": "arXiv:2106.09685",
        "formula": "ΔW = s·BA, A from N(0, 1/r²)",
        "small": {"rank": 4, "alpha": 4.0},
    },
    "nzlora": {
        "choices": {"delta": "lora", "init": "nonzero"},
        "paper": "arXiv:2505.23194",
        "formula": "ΔW = s·BA, A and B from U(±γ/√in)",
        "start": 0.5,
        "small": {"rank": 2, "alpha": 2.0},
        "note": "Not a no-op by intention; residual=true makes it one. Public texts differ on the bound for γ ≠ 1 (γ/√in here, √(γ/in) elsewhere).",
    },
    "lora_fa": {
        "choices": {"delta": "lora", "train": "B", "optim.rule": "lora_fa"},
        "paper": "arXiv:2308.03303",
        "formula": "ΔW = s·BA, A frozen; g'B = s⁻²·gB(AAᵀ + 1e-8·I)⁻¹",
        "small": {"rank": 2},
    },
    "lora_plus": {
        "choices": {"delta": "lora", "optim.rule": "lora_plus"},
        "paper": "arXiv:2402.12354",
        "formula": "ΔW = s·BA, lr(B) = 16·lr(A)",
        "small": {"rank": 2},
    },
}


@dataclass(frozen=True)
class LoraConfig(RankedConfig):
    """Low-rank adaptation (arXiv:2106.09685)."""

    delta: str = option("lora", "Parametrisation of the change.", choices=("lora",))
    init: str = option("kaiming", "Start of A and B. kaiming: A uniform within ±1/√in, B zero; gaussian: A normal with deviation 1/rank, B zero (an embedding's A is zero, its B normal); orthogonal: B·A zero, neither of them zero; nonzero: both uniform within ±gamma/√in. From the weight: pissa: its largest components; milora: its smallest; olora: its QR; mica: B its smallest left vectors, A zero; loftq: what rounding to codes loses of it.", choices=("kaiming", "gaussian", "orthogonal", "nonzero", *starts.FROM_BASE))
    train: str = option("both", "Which factors are trained; the other one stays as it starts. Alone, the trained one is the one that starts at zero.", choices=("both", "A", "B"))
    svd: str = option("fast", "Decomposition of the weight. fast: randomised for the largest components, inverse iteration for the smallest; full: all of it, which takes minutes where fast takes a second.", choices=("fast", "full"))
    part: str = option("min", "Which components init=milora takes.", choices=("min", "mid", "max", "random"))
    gamma: float = option(1.0, "Bound of init=nonzero: gamma/√in.", gt=0)
    residual: bool = option(False, "With init=nonzero: take the start out of the weight again, so that nothing changes at first.")
    loftq_iterations: int = option(1, "Alternations of init=loftq.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return Lora

    def problems(self) -> list[str]:
        return [*super().problems(), *(problem for problem in _start_problems(self))]


@dataclass(frozen=True)
class DoraConfig(LoraConfig):
    """LoRA with strength and direction apart (arXiv:2402.09353)."""

    delta: str = option("dora", "Parametrisation of the change.", choices=("dora",))
    magnitude: bool = option(True, "Learn each output's strength apart from its direction.", choices=(True,))


DECOMPOSED = ("pissa", "milora", "mica", "loftq")


def _start_problems(config: LoraConfig) -> Iterator[str]:
    belongs = (
        ("svd", "fast", config.init in DECOMPOSED, f"init is {', '.join(DECOMPOSED)}"),
        ("part", "min", config.init == "milora", "init=milora"),
        ("gamma", 1.0, config.init == "nonzero", "init=nonzero"),
        ("residual", False, config.init == "nonzero", "init=nonzero; other starts that are not zero are always taken out of the weight"),
        ("loftq_iterations", 1, config.init == "loftq", "init=loftq"),
    )
    for key, default, fits, where in belongs:
        if getattr(config, key) != default and not fits:
            yield f"{key} has no effect with init={config.init}: it belongs to {where}"
    if config.init == "milora" and config.part in ("mid", "random") and config.svd == "full":
        yield f"svd has no effect with part={config.part}, which needs the full decomposition anyway"
    if config.init == "mica" and config.train == "B":
        yield "train=B cannot go with init=mica: A starts at zero and would stay there, so nothing would be learned"


# ---------------------------------------------------------------- PEFT's fields

# With these starts PEFT leaves the base as it is, so the tensors alone define the function.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# With these it rewrites the base by something that can be computed again from the unchanged base. So it is with no other:
# pissa_niter_… is random, corda and lora_ga need the data, loftq has another base.
REPEATABLE_STARTS = ("pissa", "olora")


def takes_start_out(config: LoraConfig) -> bool:
    return config.init in starts.RESIDUAL or config.residual


def _to_peft(config: LoraConfig) -> dict[str, Any]:
    times = 2 if takes_start_out(config) else 1  # of the rank in the file
    strength = math.sqrt(times) if config.scaling == "rslora" else times

    def plain(alpha: float) -> float:
        alpha = alpha * strength
        return int(alpha) if float(alpha).is_integer() else alpha

    return {
        "r": config.rank * times,
        "lora_alpha": plain(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.scaling == "rslora",
        "use_dora": config.magnitude,
        "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
        "rank_pattern": {key: rank * times for key, rank in config.rank_pattern.items()},
        "alpha_pattern": {key: plain(alpha) for key, alpha in config.alpha_pattern.items()},
        "fan_in_fan_out": False,
    }


def _from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    start = fields.get("init_lora_weights", True)
    if start not in (*PLAIN_STARTS, *REPEATABLE_STARTS):
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
        "init": start if start in ("gaussian", "mica", *REPEATABLE_STARTS) else "kaiming",
        "train": "A" if start == "mica" else "both",
        "rank_pattern": fields.get("rank_pattern") or {},
        "alpha_pattern": fields.get("alpha_pattern") or {},
    }


def _complete(fields: Mapping[str, Any], delta: Delta, tensors: Mapping[str, Tensor], W: Callable[[], Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors of one layer with the start that it took out of the base, as ours are saved: [A; A₀] and [B, -B₀]."""
    inner = delta.inner if isinstance(delta, Magnitude) else delta
    start = fields.get("init_lora_weights")
    if start not in REPEATABLE_STARTS:
        return dict(tensors)
    assert isinstance(inner, Lora)
    a, b = inner.leaves().values()
    if inner.site.kind == "embedding":  # there PEFT takes the plain start, whatever it is told
        A0, B0 = torch.zeros(inner.lora_A.shape), torch.zeros(inner.lora_B.shape)
    else:
        if start == "olora" and inner.site.kind == "conv1d":
            raise AdapterError(f"{inner.site.name}: PEFT decomposes a Conv1D transposed, so an olora adapter on it is not OLoRA")
        asked = dataclasses.replace(inner.config, svd="full") if start == "pissa" else inner.config
        A0, B0 = starts.FROM_BASE[start](W().float(), inner.rank, inner.scale, torch.Generator(), asked)
    given = {name: tensors[name] for name in (a, b) if name in tensors}
    if len(given) == 2:
        given = {a: torch.cat([given[a], A0.to(given[a])]), b: torch.cat([given[b], -B0.to(given[b])], 1)}
    return {**tensors, **given}


PEFT = PeftFormat(
    type="LORA",
    write=_to_peft,
    read=_from_peft,
    # fan_in_fan_out tells how the base stores W; the base itself tells us. eva_config tells how A was started.
    fields=frozenset({"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "eva_config"}),
    harmless={"megatron_core": "megatron.core", "qalora_group_size": 16},
    complete=_complete,
)


class Lora(Ranked):
    """ΔW = s·B·A, or s·(B·A - B₀·A₀) after a start that is taken out of W. Unchanged at its start, but for init=nonzero."""

    kinds = ("linear", "conv1d", "embedding")
    in_product_form = True
    factors = ("lora_A", "lora_B")
    looks_at_stored = True
    peft = PEFT

    @classmethod
    def trained_factors(cls, config: LoraConfig) -> tuple[str, ...]:
        return {"both": ("lora_A", "lora_B"), "A": ("lora_A",), "B": ("lora_B",)}[config.train]

    def build(self) -> None:
        config, site = self.config, self.site
        if config.init in starts.FROM_BASE and self.rank > min(site.n_in, site.n_out):
            raise AdapterError(f"{site.name}: init={config.init} gives a rank of at most min(in, out) = {min(site.n_in, site.n_out)}, and rank is {self.rank}")
        if config.init == "orthogonal" and self.rank % 2:
            raise AdapterError(f"{site.name}: init=orthogonal needs an even rank, and it is {self.rank}; {self.rank + 1} fits")
        A, B = torch.empty(self.rank, site.n_in, **self.storage), torch.empty(site.n_out, self.rank, **self.storage)
        self._declare("lora_A", A, trained=config.train != "B")
        self._declare("lora_B", B, trained=config.train != "A")
        self.is_taken_out = takes_start_out(config)
        if self.is_taken_out:
            self._declare("start_A", torch.empty_like(A), trained=False)
            self._declare("start_B", torch.empty_like(B), trained=False)

    def _declare(self, name: str, tensor: Tensor, *, trained: bool) -> None:
        if trained:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        pair = starts.from_nothing(self.rank, self.site.n_in, self.site.n_out, generator, self.config, self.site.kind == "embedding")
        self._begin_with(*pair)

    @property
    def starts_from_base(self) -> bool:
        return self.config.init in starts.FROM_BASE

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        if self.config.init not in starts.READ_STORED:
            W = float_view(W)
        rounding = {"rounding": self.site.rounding} if self.config.init == "loftq" else {}
        self._begin_with(*starts.FROM_BASE[self.config.init](W, self.rank, self.scale, generator, self.config, **rounding))

    def _begin_with(self, A: Tensor, B: Tensor) -> None:
        self.lora_A.copy_(A)
        self.lora_B.copy_(B)
        if self.is_taken_out:
            self.start_A.copy_(self.lora_A)  # as rounded to the stored type
            self.start_B.copy_(self.lora_B)

    @property
    def needs_original(self) -> str:
        return "init=loftq is about what rounding loses" if self.config.init == "loftq" else ""

    def taken_out(self) -> tuple[Tensor, Tensor, float] | None:
        return (self.start_B, self.start_A, self.scale) if self.is_taken_out else None

    def product(self) -> tuple[Tensor, Tensor, float]:
        if not self.is_taken_out:
            return self.lora_B, self.lora_A, self.scale
        return torch.cat([self.lora_B, -self.start_B], 1), torch.cat([self.lora_A, self.start_A]), self.scale

    def running_product(self, W: Tensor | None) -> tuple[Tensor, Tensor, float]:
        if not self.is_taken_out:
            return self.product()
        # B·A - B₀·A₀ as B·(A - A₀) + (B - B₀)·A₀: zeros at the start, and differences are taken before they are rounded
        B = torch.cat([self.lora_B, self.lora_B - self.start_B], 1)
        return B, torch.cat([self.lora_A - self.start_A, self.start_A]), self.scale

    def out(self, x: Tensor, W: Tensor | None) -> Tensor:
        B, A, scale = self.running_product(W)
        if self.site.kind == "embedding":
            # gradients of ids that come often add up in the stored type; only what is rank wide is in it
            z = (F.embedding(x, A.T, self.site.padding_idx) * scale).to(self.site.dtype)  # [..., rank]
            return F.linear(z, B.to(z.dtype))
        # the scale goes on the rank-sized tensor, the smallest there is
        z = F.linear(x, A.to(x.dtype)) * scale
        return F.linear(z, B.to(x.dtype))

    def ranked(self) -> dict[str, int]:
        return {"lora_A": 0, "lora_B": 1}

    def leaves(self) -> dict[str, str]:
        if self.site.kind == "embedding":
            return {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
        return {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def to_file(self) -> dict[str, Tensor]:
        B, A, _ = self.product()
        a, b = self.leaves().values()
        return {a: A.detach(), b: B.detach()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        a, b = self.leaves().values()
        self.lora_A.copy_(tensors[a][: self.rank])
        self.lora_B.copy_(tensors[b][:, : self.rank])
        if self.is_taken_out:
            self.start_A.copy_(tensors[a][self.rank :])
            self.start_B.copy_(-tensors[b][:, self.rank :])
