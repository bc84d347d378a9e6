"""metrics.jsonl, the record that a run leaves: one JSON object a line, each line on disk before the next step begins.

Rules. Every line has a `kind`: start, step, eval, save, event or end. Floats are written with as many digits as read
back to the same bits; what JSON has no number for is written as "nan", "inf" or "-inf". A resumed run continues the
file as if it had never stopped: lines after the checkpoint are dropped, and only TIMING fields tell the two apart.

Keys of `RunInfo.description` are listed in docs/runs.md; the start line carries them as they are.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from deltune import dist, weights
from deltune.errors import CheckpointError
from deltune.log import logger
from deltune.training import storage
from deltune.training.callbacks import Callback, EvalRecord, Outcome, RunInfo, StepRecord

FILE = "metrics.jsonl"
TIMING = ("time", "seconds", "data_seconds", "tokens_per_second", "mfu", "peak_memory_bytes")
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsFile(Callback):
    """Writes `path` on rank 0. What a folder's file holds past the step that the run goes on after is dropped at start."""

    def __init__(self, path: Path):
        self.path = path
        self._handle: int | None = None

    def on_start(self, info: RunInfo) -> None:
        if not dist.is_main():
            return
        start = {"kind": "start", "time": time.time(), **_start_fields(info)}
        changes: list[str] = []
        if self.path.exists():
            changes = _continue(self.path, start, info.start_step)
        else:
            if info.start_step:
                logger.warning("%s is missing; its lines up to step %d cannot be had again", self.path, info.start_step)
            storage.write_text(self.path, _line(start))
        self.close()
        self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        for change in changes:
            self.on_event(info.start_step, change)

    def on_step(self, record: StepRecord) -> None:
        self._write("step", dataclasses.asdict(record) | {"extra": _scalars(record.extra)})

    def on_eval(self, record: EvalRecord) -> None:
        self._write("eval", dataclasses.asdict(record) | {"metrics": _scalars(record.metrics)})

    def before_save(self, step: int) -> None:
        if self._handle is not None:
            os.fsync(self._handle)

    def on_save(self, step: int, path: Path) -> None:
        self._write("save", {"step": step, "path": Path(os.path.relpath(path, self.path.parent)).as_posix()})

    def on_event(self, step: int, message: str) -> None:
        self._write("event", {"step": step, "message": message})

    def on_end(self, outcome: Outcome) -> None:
        names = ("step", "stopped_by", "best_step", "best_metric", "seconds")
        metrics = {"metrics_before": _scalars(outcome.metrics_before), "metrics_after": _scalars(outcome.metrics_after)}
        self._write("end", {name: getattr(outcome, name) for name in names} | metrics)
        self.close()

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        """Append one line with one system call; a line that does not fit on the disk leaves no part of itself."""
        if self._handle is None:
            return
        data = _line({"kind": kind, **fields, "time": time.time()}).encode()
        size = os.fstat(self._handle).st_size
        try:
            written = os.write(self._handle, data)
            while written < len(data):
                written += os.write(self._handle, data[written:])
        except OSError as error:
            os.ftruncate(self._handle, size)
            if not weights.says_disk_full(error):
                raise
            raise weights.disk_full(self.path, len(data)) from None


def read(path: Path) -> list[dict[str, Any]]:
    """All lines, with NaN and infinities as floats again. A last line cut short by a kill is left out; any other fault raises."""
    return [value for _, value in _parsed(path)]


def truncate_after(path: Path, step: int) -> None:
    """Drop every line past `step`, an end line and a last line cut short; the file, if there is one, is replaced in one step."""
    if not path.exists():
        return
    kept = [line for line, value in _parsed(path) if _belongs(value, step)]
    storage.write_text(path, "".join(line + "\n" for line in kept))


def _belongs(value: dict[str, Any], step: int) -> bool:
    return value["kind"] == "start" or (value["kind"] != "end" and value["step"] <= step)


def _parsed(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line as written, its object) for each line."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; is this a run folder?") from None
    last = len(lines)
    found = []
    for number, line in enumerate(lines, 1):
        if not line and number == last:
            continue
        try:
            text = line.decode("utf-8")
            found.append((text, _value(text)))
        except (ValueError, KeyError, TypeError) as error:
            if number == last:
                break
            raise CheckpointError(
                f"{path}:{number}: not a line of a metrics file ({error}); remove the line, or the file to begin it anew"
            ) from None
    return found


def _value(text: str) -> dict[str, Any]:
    value = json.loads(text)
    kind = value["kind"]
    if kind not in ("start", "end"):
        int(value["step"])
    # only these hold measured numbers; a message that reads "nan" stays a message
    return _numbers(value) if kind in ("step", "eval", "end") else value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _line(fields: dict[str, Any]) -> str:
    return json.dumps(_writable(fields), ensure_ascii=False, allow_nan=False).encode(errors="replace").decode() + "\n"


def _writable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _writable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _scalars(values: dict[str, Any]) -> dict[str, float]:
    """Users' scalars may be numpy's or torch's."""
    return {name: value if isinstance(value, int) else float(value) for name, value in values.items()}


def _start_fields(info: RunInfo) -> dict[str, Any]:
    names = ("name", "num_steps", "num_trainable", "num_parameters", "flops_per_token", "peak_flops", "parameter_table", "description")
    return {name: getattr(info, name) for name in names}


def _continue(path: Path, start: dict[str, Any], step: int) -> list[str]:
    """Cut the file back to `step`, put this process's start line first, and say what differs in its surroundings."""
    kept = [(line, value) for line, value in _parsed(path) if _belongs(value, step)]
    old = next((value for _, value in kept if value["kind"] == "start"), None)
    if old is not None:
        start["time"] = old["time"]
    lines = [line + "\n" for line, value in kept if value["kind"] != "start"]
    storage.write_text(path, _line(start) + "".join(lines))
    if old is None:
        return []
    was, now = old["description"], json.loads(_line(start))["description"]
    return [
        f"resumed with other {part}: {_differences(was.get(part), now.get(part))}"
        for part in ("versions", "device")
        if was.get(part) != now.get(part)
    ]


def _differences(was: Any, now: Any) -> str:
    if not (isinstance(was, dict) and isinstance(now, dict)):
        return f"{was} -> {now}"
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return ", ".join(f"{name} {was.get(name)} -> {now.get(name)}" for name in names)
