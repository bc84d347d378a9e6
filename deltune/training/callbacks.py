"""What happens around the loop: records that it emits, and the callback that users and our own parts subclass.

Callbacks see records and return nothing; they never change the weights. All run on every rank; those that write
check `dist.is_main()`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunInfo:
    """Known before the first step."""

    folder: Path
    name: str
    num_steps: int
    start_step: int  # 0, or the step a resumed run continues after
    num_trainable: int
    num_parameters: int
    config: dict[str, Any]  # the resolved config, plain values
    parameter_table: list[dict[str, Any]] = field(default_factory=list)  # module type, tensors, trainable, total
    flops_per_token: float = 0.0
    peak_flops: float = 0.0  # of one device, FLOP/s
    description: dict[str, Any] = field(default_factory=dict)  # data counts, versions, device: for report and card


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. All numbers are over the whole step: every micro-batch, every rank."""

    step: int  # 1 is the first
    epoch: float
    loss: float  # mean cross-entropy per trained token
    grad_norm: float  # before clipping
    lr: float
    num_trained_tokens: int
    num_tokens: int  # without padding
    seconds: float  # of this step
    data_seconds: float  # of those, spent waiting for the step's batches
    tokens_per_second: float
    peak_memory_bytes: int
    flops: float
    mfu: float
    skipped: bool = False  # the update was not applied (not finite)
    extra: dict[str, float] = field(default_factory=dict)  # named scalars of the user's own forward_step


@dataclass(frozen=True)
class EvalRecord:
    step: int
    metrics: dict[str, float]
    is_best: bool
    seconds: float


@dataclass(frozen=True)
class Sample:
    prompt: str
    reference: str
    before: str = ""
    after: str = ""


@dataclass
class Outcome:
    """How a run ended; `deltune.train` returns it."""

    folder: Path
    step: int
    stopped_by: str  # "completed", "early_stop", "already_complete"
    metrics_before: dict[str, float] = field(default_factory=dict)
    metrics_after: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best_metric: float | None = None
    adapter: Path | None = None  # or the whole model's folder without an adapter
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0
    model: Any = None
    tokenizer: Any = None


class Callback:
    """Override what you need. `deltune.train(config, callbacks=[MyCallback()])`."""

    def on_start(self, info: RunInfo) -> None: ...

    def on_step(self, record: StepRecord) -> None: ...

    def on_eval(self, record: EvalRecord) -> None: ...

    def before_save(self, step: int) -> None:
        """What a callback has recorded up to this step must outlast a power cut from now on: a resumed run goes on after it."""

    def on_save(self, step: int, path: Path) -> None: ...

    def on_event(self, step: int, message: str) -> None:
        """Something out of the ordinary: a skipped step, a rollback, a fall back to an older checkpoint."""

    def on_end(self, outcome: Outcome) -> None: ...

    def close(self) -> None:
        """Give back what was opened. Called last, also after a fault; may be called twice."""
