"""The `optim` and `schedule` sections. Light to import."""

from __future__ import annotations

from dataclasses import dataclass

from deltune.config.fields import Choice, option

NO_DECAY = ["*bias", "*norm*", "*lora_magnitude_vector*"]


@dataclass(frozen=True)
class OptimConfig:
    """What every optimizer has."""

    name: str = option("adamw", "Optimizer.")
    lr: float = option(2e-4, "Peak learning rate.", gt=0)
    weight_decay: float = option(0.0, "Decoupled weight decay.", ge=0)
    no_decay: list[str] = option(NO_DECAY, "Parameters without weight decay, by name pattern (* and ? match any text).")
    lr_scales: dict[str, float] = option({}, "Name pattern to multiplier of the learning rate; the first pattern that matches counts.")
    lr_values: dict[str, float] = option({}, "Name pattern to a learning rate of its own; not together with lr_scales.")
    rule: str = option("none", "Rule over an adapter's pairs (A, B). lora_plus: B's learning rate is rule_ratio times A's (arXiv:2402.12354); lora_fa: B's gradient is corrected for a frozen A (arXiv:2308.03303).", choices=("none", "lora_plus", "lora_fa"))
    rule_ratio: float = option(16.0, "Ratio of rule=lora_plus.", gt=0)
    max_grad_norm: float | None = option(1.0, "Clip the global gradient norm to this; null does not clip.", gt=0)


@dataclass(frozen=True)
class AdamW(OptimConfig):
    """Adam with decoupled weight decay (arXiv:1711.05101), torch's fused kernel."""

    name: str = option("adamw", "Optimizer.", choices=("adamw",))
    beta1: float = option(0.9, "Decay of the gradient's mean.", ge=0, lt=1)
    beta2: float = option(0.999, "Decay of the gradient's square.", ge=0, lt=1)
    eps: float = option(1e-8, "Added to the denominator.", gt=0)


@dataclass(frozen=True)
class SmallAdamW(AdamW):
    """AdamW with moments in float32 whatever the parameter's type, or in 8 bits by blocks (arXiv:2110.02861), and paged or not (arXiv:2305.14314)."""

    name: str = option("adamw_8bit", "Optimizer.", choices=("paged_adamw", "adamw_8bit", "paged_adamw_8bit"))


@dataclass(frozen=True)
class Lion(OptimConfig):
    """The sign of a mean of gradients (arXiv:2302.06675): one moment, in float32 or in 8 bits by blocks, paged or not. Wants a rate 3 to 10 times smaller than AdamW's."""

    name: str = option("lion", "Optimizer.", choices=("lion", "lion_8bit", "paged_lion", "paged_lion_8bit"))
    beta1: float = option(0.9, "Share of the moment in the update's sign.", ge=0, lt=1)
    beta2: float = option(0.99, "Decay of the moment.", ge=0, lt=1)


@dataclass(frozen=True)
class SGD(OptimConfig):
    """Gradient descent with momentum."""

    name: str = option("sgd", "Optimizer.", choices=("sgd",))
    momentum: float = option(0.0, "Momentum.", ge=0, lt=1)
    nesterov: bool = option(False, "Nesterov's momentum.")


@dataclass(frozen=True)
class ScheduleConfig:
    """Warm-up, which every schedule has. Progress is counted in optimizer steps."""

    name: str = option("cosine", "Shape of the learning rate after warm-up.")
    warmup: float = option(0.03, "Linear warm-up: below 1 a fraction of all steps, else a number of steps.", ge=0)
    auto_warmup_steps: int = option(0, "During these first steps the rate is min(lr * auto_warmup_rate, lr * step / warm-up steps).", ge=0)
    auto_warmup_rate: float = option(0.05, "See auto_warmup_steps.", gt=0, le=1)


@dataclass(frozen=True)
class Constant(ScheduleConfig):
    """The peak rate to the end."""

    name: str = option("constant", "Schedule.", choices=("constant",))


@dataclass(frozen=True)
class Linear(ScheduleConfig):
    """A straight line from the peak to the floor."""

    name: str = option("linear", "Schedule.", choices=("linear",))
    floor: float = option(0.0, "Rate at the end, as a fraction of the peak.", ge=0, le=1)


@dataclass(frozen=True)
class Cosine(ScheduleConfig):
    """Half a cosine from the peak to the floor (arXiv:1608.03983)."""

    name: str = option("cosine", "Schedule.", choices=("cosine",))
    floor: float = option(0.1, "Rate at the end, as a fraction of the peak.", ge=0, le=1)


@dataclass(frozen=True)
class Exponential(ScheduleConfig):
    """Exponential decay that reaches the floor at the last step."""

    name: str = option("exponential", "Schedule.", choices=("exponential",))
    floor: float = option(0.1, "Rate at the end, as a fraction of the peak.", gt=0, le=1)


@dataclass(frozen=True)
class Polynomial(ScheduleConfig):
    """(1 - progress)^power from the peak to the floor."""

    name: str = option("polynomial", "Schedule.", choices=("polynomial",))
    power: float = option(2.0, "Exponent.", gt=0)
    floor: float = option(0.0, "Rate at the end, as a fraction of the peak.", ge=0, le=1)


@dataclass(frozen=True)
class CosineRestarts(ScheduleConfig):
    """Several half cosines, each from the peak to the floor (arXiv:1608.03983)."""

    name: str = option("cosine_restarts", "Schedule.", choices=("cosine_restarts",))
    cycles: int = option(4, "Number of half cosines.", ge=1)
    cycle_warmup: int = option(0, "Steps of linear warm-up after each restart.", ge=0)
    floor: float = option(0.0, "Rate at the end of a cycle, as a fraction of the peak.", ge=0, le=1)


@dataclass(frozen=True)
class WSD(ScheduleConfig):
    """Warm-up, a stable stretch, then a decay (arXiv:2404.06395)."""

    name: str = option("wsd", "Schedule.", choices=("wsd",))
    decay: float = option(0.1, "Last part that decays: below 1 a fraction of all steps, else a number of steps.", gt=0)
    shape: str = option("linear", "Shape of the decay.", choices=("linear", "cosine", "sqrt"))
    floor: float = option(0.0, "Rate at the end, as a fraction of the peak.", ge=0, le=1)


OPTIMIZERS = Choice(
    "name",
    {
        "adamw": AdamW,
        "paged_adamw": SmallAdamW,
        "adamw_8bit": SmallAdamW,
        "paged_adamw_8bit": SmallAdamW,
        "lion": Lion,
        "lion_8bit": Lion,
        "paged_lion": Lion,
        "paged_lion_8bit": Lion,
        "sgd": SGD,
    },
    default="adamw",
    help="Optimizer, learning rate, weight decay.",
)
SCHEDULES = Choice(
    "name",
    {
        "constant": Constant,
        "linear": Linear,
        "cosine": Cosine,
        "exponential": Exponential,
        "polynomial": Polynomial,
        "cosine_restarts": CosineRestarts,
        "wsd": WSD,
    },
    default="cosine",
    help="Learning-rate schedule.",
)
