"""Run: the sections of a training run put together."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltune.adapters.config import ADAPTERS, AdapterConfig, name_of
from deltune.config.fields import choice, option, section
from deltune.data.config import DataConfig, Source
from deltune.engines.config import ENGINES, EngineConfig
from deltune.models.config import QUANTS, ModelConfig, QuantConfig
from deltune.optim.config import OPTIMIZERS, SCHEDULES, OptimConfig, ScheduleConfig
from deltune.settings.rules import (
    data_rules,
    evaluation_rules,
    length_rules,
    model_rules,
    optimizer_rules,
    quant_rules,
    record_rules,
)
from deltune.training.config import CheckpointConfig, EvalConfig, LogConfig, TrainConfig


@dataclass(frozen=True)
class Run:
    """A training run."""

    name: str | None = option(None, "Folder below `output`; null makes one of model, method, data and a hash of the config.")
    output: str = option("runs", "Folder of all runs.")
    seed: int = option(42, "Seed of adapter start, dropout and random model starts.", ge=0)
    fast: str = option("auto", "auto computes attention, norms, loss and adapters in their fast forms wherever these are exact; off runs the plain ones.", choices=("auto", "off"))
    resume: str = option("auto", "Continue the run that is in the folder: if there is one; never (a run there is an error); must be there.", choices=("auto", "never", "must"))
    model: ModelConfig = section(ModelConfig, "Base model.", primary="path")
    quant: QuantConfig = choice(QUANTS)
    data: DataConfig = section(DataConfig, "Training and evaluation data.", primary="train")
    adapter: AdapterConfig | None = choice(ADAPTERS)
    optim: OptimConfig = choice(OPTIMIZERS)
    schedule: ScheduleConfig = choice(SCHEDULES)
    engine: EngineConfig = choice(ENGINES)
    train: TrainConfig = section(TrainConfig, "Length, batches, policy for numbers that break.")
    eval: EvalConfig = section(EvalConfig, "Evaluation during training.")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "Checkpoints.")
    log: LogConfig = section(LogConfig, "Progress and records.")

    @property
    def folder(self) -> Path:
        """Where the run leaves everything, relative to the current folder unless `output` is absolute."""
        return Path(self.output) / (self.name or self._made_name())

    @property
    def result(self) -> str:
        """What the run leaves in its folder: `adapter`, or `model` where the model's own weights have moved."""
        return "model" if self.adapter is None or self.adapter.schedule.moves_base else "adapter"

    def _made_name(self) -> str:
        content = {key: value for key, value in self.to_dict().items() if key not in ("name", "output", "resume")}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        first = self.data.train[0]
        source = first.path if isinstance(first, Source) else first
        parts = (Path(self.model.path).name, name_of(self.adapter) if self.adapter else "full", Path(source).stem)
        return "-".join([*(re.sub(r"[^\w.]+", "-", part).strip("-.")[:40] or "x" for part in parts), digest])

    def to_dict(self) -> dict[str, Any]:
        """The resolved config as plain values."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The resolved config as text that `deltune train FILE` reads back to an equal Run."""
        from deltune.config.yaml_file import write

        return write(self.to_dict())

    def problems(self) -> list[str]:
        rules = (length_rules, optimizer_rules, model_rules, quant_rules, data_rules, evaluation_rules, record_rules)
        return [problem for rule in rules for problem in rule(self)]
