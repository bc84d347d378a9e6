"""Where a run's scalars go besides metrics.jsonl, each sink a name in SINKS, imported only when named.

metrics.jsonl, written before them, is the truth: after a resume a sink ends up with each step once. Nothing leaves the
machine unless the user has set it up: W&B is offline without WANDB_MODE or WANDB_API_KEY, MLflow and Trackio write
where their own variables point, locally without any, and the usage statistics of all of them are switched off.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltune import dist, weights
from deltune.config.suggest import closest
from deltune.errors import ConfigError
from deltune.log import logger
from deltune.training import metrics, storage
from deltune.training.callbacks import Callback, EvalRecord, Outcome, RunInfo, StepRecord
from deltune.training.config import LogConfig

IDS = "sinks.json"  # in the run folder: under which ids the sinks know this run

# our name -> theirs of fields of a step line
STEP_SCALARS = {
    "train/loss": "loss",
    "train/grad_norm": "grad_norm",
    "train/lr": "lr",
    "train/tokens_per_second": "tokens_per_second",
    "train/peak_memory_gb": "peak_memory_bytes",
    "train/mfu": "mfu",
}


def build_sinks(config: LogConfig) -> list[Callback]:
    """The sinks named in `log.sinks`, their packages imported; ConfigError for a name or a package that is not there."""
    sinks = []
    for i, name in enumerate(config.sinks):
        if name not in SINKS:
            raise ConfigError(f"log.sinks[{i}]: no sink {name!r}{closest(name, list(SINKS))}. What fits: {', '.join(SINKS)}.")
        sinks.append(SINKS[name](config))
    return sinks


def step_scalars(line: dict[str, Any]) -> dict[str, float]:
    """The scalars of a step line of metrics.jsonl, by their names at the sinks."""
    values = {name: line[key] for name, key in STEP_SCALARS.items()}
    values["train/peak_memory_gb"] /= 1e9
    return values | {f"train/{name}": value for name, value in line["extra"].items()}


def eval_scalars(line: dict[str, Any]) -> dict[str, float]:
    return {f"eval/{name}": value for name, value in line["metrics"].items()}


class Sink(Callback):
    """What all sinks share: rank 0 alone writes, the steps are those of metrics.jsonl, the run keeps its id."""

    package: str  # to import
    install: str  # what pip is asked for

    def __init__(self, config: LogConfig):
        self.project = config.project
        self.is_open = False
        try:
            self.module = importlib.import_module(self.package)
        except ModuleNotFoundError as error:
            if error.name != self.package:
                raise
            raise ConfigError(
                f"log.sinks: {self.package!r} is not installed. What fits: pip install '{self.install}', or a log.sinks without it."
            ) from None

    def open(self, info: RunInfo) -> None: ...

    def write(self, step: int, scalars: dict[str, float]) -> None: ...

    def shut(self) -> None: ...

    def on_start(self, info: RunInfo) -> None:
        if dist.is_main():
            self.open(info)
            self.is_open = True

    def on_step(self, record: StepRecord) -> None:
        if self.is_open:
            self.write(record.step, step_scalars(vars(record)))

    def on_eval(self, record: EvalRecord) -> None:
        if self.is_open:
            self.write(record.step, eval_scalars(vars(record)))

    def on_end(self, outcome: Outcome) -> None:
        self.close()

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.shut()

    def replay(self, info: RunInfo) -> None:
        """Write what the run logged before it was resumed."""
        for step, scalars in logged(info):
            self.write(step, scalars)


def logged(info: RunInfo) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, scalars) of each line in the folder's metrics.jsonl up to the step that the run goes on after."""
    path = info.folder / metrics.FILE
    if not path.exists():
        return
    for line in metrics.read(path):
        if line["kind"] == "step" and line["step"] <= info.start_step:
            yield line["step"], step_scalars(line)
        elif line["kind"] == "eval" and line["step"] <= info.start_step:
            yield line["step"], eval_scalars(line)


def run_id(folder: Path, sink: str) -> str | None:
    """The id under which a sink knows the run of this folder."""
    path = folder / IDS
    return json.loads(path.read_text(encoding="utf-8")).get(sink) if path.exists() else None


def keep_run_id(folder: Path, sink: str, value: str) -> None:
    path = folder / IDS
    ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    storage.write_json(path, ids | {sink: value})


class TensorBoard(Sink):
    """Event files in the run's folder `tensorboard/`; view with `tensorboard --logdir runs`."""

    package = "tensorboard"
    install = "tensorboard"

    def open(self, info: RunInfo) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.folder = info.folder / "tensorboard"
        self.writer = EventFileWriter(str(self.folder))
        self._begin_at(info.start_step + 1)

    def _begin_at(self, step: int) -> None:
        """Readers drop what they have from this step on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.last = step - 1
        self.writer.add_event(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if step < self.last:  # the run has been rolled back
            self._begin_at(step)
        self.last = step
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        try:
            self.writer.add_event(event)
            # a kill must lose no step that metrics.jsonl has
            self.writer.flush()
        except OSError as error:
            if not weights.says_disk_full(error):
                raise
            raise weights.disk_full(self.folder, event.ByteSize()) from None

    def shut(self) -> None:
        self.writer.close()


class WandB(Sink):
    """Weights & Biases. Synchronising an offline run replaces what was there under its id, so a resumed one replays."""

    package = "wandb"
    install = "deltune[wandb]"

    def __init__(self, config: LogConfig):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        super().__init__(config)

    def open(self, info: RunInfo) -> None:
        offline = os.environ.get("WANDB_MODE", "online" if os.environ.get("WANDB_API_KEY") else "offline") == "offline"
        name = run_id(info.folder, "wandb") or secrets.token_hex(4)
        keep_run_id(info.folder, "wandb", name)
        try:
            self.run = self.module.init(
                project=self.project,
                name=info.name,
                id=name,
                dir=str(info.folder),
                config=info.config,
                mode="offline" if offline else None,
                # online, the server ignores steps that it has
                resume=None if offline else "allow",
            )
        except self.module.errors.Error as error:
            raise ConfigError(f"log.sinks: W&B refused the run: {error}") from None
        if offline:
            logger.info("W&B works offline; send the run later with `wandb sync`, or set WANDB_MODE=online")
            self.replay(info)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self.run.log(scalars, step=step)

    def shut(self) -> None:
        self.run.finish()


class MLflow(Sink):
    """MLflow. It would keep a step twice, so a resumed run asks first which steps it has."""

    package = "mlflow"
    install = "deltune[mlflow]"

    def __init__(self, config: LogConfig):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        super().__init__(config)

    def open(self, info: RunInfo) -> None:
        self.known: dict[str, set[int]] = {}
        self.lost = 0
        try:
            self.client = self.module.MlflowClient()
            self.module.set_experiment(self.project)
            self.run = run_id(info.folder, "mlflow")
            active = self.module.start_run(run_id=self.run, run_name=None if self.run else info.name)
            self.resumed = self.run is not None
            self.run = active.info.run_id
            if not self.resumed:
                self._describe(info)
        except self.module.exceptions.MlflowException as error:
            raise ConfigError(f"log.sinks: MLflow refused the run: {error}") from None
        keep_run_id(info.folder, "mlflow", self.run)
        self.replay(info)

    def _describe(self, info: RunInfo) -> None:
        """The config as parameters, in the portions that MLflow takes (100 at once, values up to 6000 characters)."""
        flat = list(_flat(info.config))
        for i in range(0, len(flat), 100):
            self.module.log_params({name: str(value)[:6000] for name, value in flat[i : i + 100]})

    def write(self, step: int, scalars: dict[str, float]) -> None:
        try:
            fresh = {name: value for name, value in scalars.items() if step not in self._steps(name)}
            if fresh:
                self.module.log_metrics(fresh, step=step, run_id=self.run)
            for name in fresh:
                self.known[name].add(step)
        except self.module.exceptions.MlflowException as error:
            # a tracking server that is away must not end a run; metrics.jsonl has it all
            if not self.lost:
                logger.warning("MLflow does not take step %d (%s); the run goes on", step, error)
            self.lost += 1

    def _steps(self, name: str) -> set[int]:
        if name not in self.known:
            history = self.client.get_metric_history(self.run, name) if self.resumed else []
            self.known[name] = {point.step for point in history}
        return self.known[name]

    def shut(self) -> None:
        if self.lost:
            logger.warning("MLflow did not take %d records of this run; metrics.jsonl has them", self.lost)
        self.module.end_run()


class Trackio(Sink):
    """Trackio, local unless its own variables name a Space. It appends without looking, so a resumed run is written anew."""

    package = "trackio"
    install = "deltune[trackio]"

    def __init__(self, config: LogConfig):
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        super().__init__(config)

    def open(self, info: RunInfo) -> None:
        # the id makes the name this run's own: deleting it can take nobody else's
        known = run_id(info.folder, "trackio")
        name = known or f"{info.name}-{secrets.token_hex(3)}"
        keep_run_id(info.folder, "trackio", name)
        if known:
            for run in self.module.Api().runs(self.project):
                if run.name == known:
                    run.delete()
        self.run = self.module.init(project=self.project, name=name, config=info.config, embed=False)
        self.replay(info)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self.run.log(scalars, step=step)

    def shut(self) -> None:
        self.run.finish()


SINKS: dict[str, type[Sink]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "trackio": Trackio}


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
