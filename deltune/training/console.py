"""What a run says while it goes on: a bar on a terminal, plain lines elsewhere, on rank 0 only.

The bar is redrawn by the training thread itself, at most ten times a second: there is no second thread that could
outlive a crash or be copied by a fork. Text of users is written as text, never as markup or control codes.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from deltune import dist
from deltune.log import logger
from deltune.training import display
from deltune.training.callbacks import Callback, EvalRecord, Outcome, RunInfo, StepRecord
from deltune.training.config import LogConfig
from deltune.training.curves import RemainingTime, Smooth

REDRAW_SECONDS = 0.1
SMOOTHING = 0.9


class Console(Callback):
    """Progress for people. `stream` is standard output unless a test says otherwise."""

    def __init__(self, config: LogConfig, stream: TextIO | None = None):
        self.config = config
        self.stream = stream
        self.view: _Lines | _Bar | None = None

    def on_start(self, info: RunInfo) -> None:
        if not dist.is_main() or self.config.progress == "off":
            return
        stream = self.stream or sys.stdout
        bar = self.config.progress == "bar" or (
            self.config.progress == "auto" and stream.isatty() and os.environ.get("TERM") != "dumb"
        )
        self.view = _Bar(stream) if bar else _Lines(stream, self.config.lines_every_seconds)
        self.num_steps, self.folder = info.num_steps, info.folder
        self.remaining = RemainingTime(info.num_steps, info.config.get("eval", {}).get("every"))
        self.loss = Smooth(SMOOTHING)
        self.view.head(title(info), head(info))
        self.view.begin(info.start_step, info.num_steps)

    def on_step(self, record: StepRecord) -> None:
        if self.view is None:
            return
        self.remaining.steps.append(record.seconds)
        smoothed = self.loss.add(record.loss)
        self.view.step(record, smoothed, self.num_steps, self.remaining.seconds(record.step))

    def on_eval(self, record: EvalRecord) -> None:
        if self.view is None:
            return
        self.remaining.evals.append(record.seconds)
        values = "  ".join(f"{display.metric_name(name)} {display.metric(name, v)}" for name, v in record.metrics.items())
        best = "  (best so far)" if record.is_best else ""
        self.view.say(f"step {record.step}/{self.num_steps}  evaluation: {values}{best}", "cyan")

    def on_save(self, step: int, path: Path) -> None:
        if self.view is not None:
            place = display.one_line(os.path.relpath(path, self.folder))
            self.view.say(f"step {step}/{self.num_steps}  saved {place}", "dim")

    def on_event(self, step: int, message: str) -> None:
        if self.view is not None:
            self.view.say(display.one_line(message), "yellow")

    def on_end(self, outcome: Outcome) -> None:
        if self.view is None:
            return
        self.view.end()
        self.view.say(ending(outcome), "bold")
        rows = display.before_after(outcome.metrics_before, outcome.metrics_after)
        if rows:
            self.view.table(rows)
        self.close()

    def close(self) -> None:
        """Give the terminal back as it was. Also called at exit, should the run end by an exception."""
        if self.view is not None:
            self.view.end()
            self.view = None


def title(info: RunInfo) -> str:
    version = info.description.get("versions", {}).get("deltune", "")
    return f"Deltune {version}".rstrip() + f": {display.one_line(info.name)}"


def head(info: RunInfo) -> list[tuple[str, str]]:
    """(label, text) of what is about to be trained; a line whose facts are not known is left out."""
    share = 100 * info.num_trainable / info.num_parameters if info.num_parameters else 0.0
    steps = f"{info.num_steps:,}" + (f", going on after {info.start_step:,}" if info.start_step else "")
    lines = [
        ("model", _model(info.description.get("model", {}))),
        ("parameters", f"{display.count(info.num_trainable)} trainable of {display.count(info.num_parameters)} ({share:.2g} %)"),
        ("data", _data(info.description.get("data", {}))),
        ("steps", steps),
        ("device", display.one_line(info.description.get("device", {}).get("name", ""))),
        ("folder", display.one_line(info.folder)),
    ]
    return [(label, text) for label, text in lines if text]


def ending(outcome: Outcome) -> str:
    reasons = {"completed": "done", "early_stop": "stopped early: no improvement", "already_complete": "was complete already"}
    parts = [f"{reasons.get(outcome.stopped_by, outcome.stopped_by)} at step {outcome.step}"]
    if outcome.seconds:
        parts.append(f"in {display.duration(outcome.seconds)}")
    if outcome.best_step is not None:
        parts.append(f"(best at step {outcome.best_step})")
    return " ".join(parts)


def _model(model: dict[str, Any]) -> str:
    details = ", ".join(display.one_line(model[key]) for key in ("architecture", "dtype") if model.get(key))
    path = display.one_line(model.get("path", ""))
    return f"{path} ({details})" if path and details else path or details


def _data(data: dict[str, Any]) -> str:
    parts = []
    if "examples" in data:
        tokens = f"({display.count(data['tokens'])} tokens, {display.count(data['trained_tokens'])} trained)"
        parts.append("read as training goes" if data["streaming"] else f"{display.count(data['examples'])} examples {tokens}")
    if data.get("evaluation"):
        parts.append(f"{display.count(data['evaluation']['examples'])} for evaluation")
    return ", ".join(parts)


def _encodable(text: str, stream: TextIO) -> str:
    """The text with `?` for what the stream's encoding lacks: a sign that cannot be shown must not end a run."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


class _Lines:
    """Plain text, one line a message."""

    def __init__(self, stream: TextIO, every_seconds: float):
        self.stream = stream
        self.every_seconds = every_seconds
        self.last = -float("inf")
        self.first = True

    def head(self, title: str, lines: list[tuple[str, str]]) -> None:
        self.say(title, "")
        for label, text in lines:
            self.say(f"  {label:<10}  {text}", "")

    def begin(self, step: int, num_steps: int) -> None: ...

    def step(self, record: StepRecord, smoothed: float, num_steps: int, seconds_left: float | None) -> None:
        now = time.monotonic()
        if now - self.last < self.every_seconds and not self.first and record.step != num_steps:
            return
        self.last, self.first = now, False
        parts = [
            f"step {record.step}/{num_steps}",
            f"loss {record.loss:.4f}",
            f"lr {record.lr:.1e}",
            f"grad {record.grad_norm:.3g}",
            *_pace(record, seconds_left),
        ]
        self.say("  ".join(parts), "")

    def say(self, text: str, style: str) -> None:
        try:
            self.stream.write(_encodable(text, self.stream) + "\n")
            self.stream.flush()
        except BrokenPipeError:
            # whoever read has left, as `| head` does; the run goes on
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def table(self, rows: list[list[str]]) -> None:
        for line in display.aligned(rows):
            self.say(line, "")

    def end(self) -> None: ...


def _pace(record: StepRecord, seconds_left: float | None) -> list[str]:
    parts = [f"{display.si(record.tokens_per_second)} tok/s"]
    if record.peak_memory_bytes:
        parts.append(display.memory(record.peak_memory_bytes))
    if seconds_left is not None:
        parts.append(f"ETA {display.clock(seconds_left)}")
    return parts


class _Bar:
    """A rich progress bar at the foot of the terminal; messages scroll above it."""

    def __init__(self, stream: TextIO):
        from rich.console import Console as Terminal

        self.stream = stream
        self.terminal = Terminal(file=stream, highlight=False)
        self.progress: Any = None
        self.drawn = 0.0
        self.moved: list[tuple[logging.StreamHandler, TextIO]] = []

    def head(self, title: str, lines: list[tuple[str, str]]) -> None:
        from rich.text import Text

        self.say(title, "bold")
        for label, text in lines:
            self.terminal.print(Text.assemble((f"  {label:<10}  ", "dim"), _encodable(text, self.stream)))

    def begin(self, step: int, num_steps: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        columns = BarColumn(bar_width=None), TextColumn("{task.description}", markup=False)
        self.progress = Progress(
            *columns,
            console=self.terminal,
            auto_refresh=False,
            expand=True,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self.task = self.progress.add_task(f"{step}/{num_steps}", total=num_steps, completed=step)
        streams = {id(sys.stdout): "stdout", id(sys.stderr): "stderr"}
        self.progress.start()
        atexit.register(self.end)
        # the program's own messages hold the stream from before it was redirected
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and id(handler.stream) in streams:
                self.moved.append((handler, handler.stream))
                handler.setStream(getattr(sys, streams[id(handler.stream)]))
        self.progress.refresh()

    def step(self, record: StepRecord, smoothed: float, num_steps: int, seconds_left: float | None) -> None:
        now = time.monotonic()
        if now - self.drawn < REDRAW_SECONDS and record.step != num_steps:
            return
        self.drawn = now
        parts = [f"{record.step}/{num_steps}", f"loss {smoothed:.4f}", *_pace(record, seconds_left)]
        # on a narrow terminal the ETA and the loss stay longest
        while len("  ".join(parts)) > self.terminal.width - 12 and len(parts) > 3:
            parts.pop(-2)
        self.progress.update(self.task, completed=record.step, description="  ".join(parts))
        self.progress.refresh()

    def say(self, text: str, style: str) -> None:
        from rich.text import Text

        self.terminal.print(Text(_encodable(text, self.stream), style=style))

    def table(self, rows: list[list[str]]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for i, heading in enumerate(rows[0]):
            table.add_column(heading, justify="right" if i else "left", style="bold" if heading == "after" else "")
        for row in rows[1:]:
            table.add_row(*(Text(_encodable(cell, self.stream)) for cell in row))
        self.terminal.print(table)

    def end(self) -> None:
        if self.progress is None:
            return
        self.progress.refresh()
        self.progress.stop()
        self.progress = None
        for handler, stream in self.moved:
            handler.setStream(stream)
        self.moved.clear()
        atexit.unregister(self.end)
