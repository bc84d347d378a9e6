"""A run as read back from its folder: what report, card and pictures are made of. Reads only, and only files of the folder.

A run that still goes on, or was killed, reads as well as a finished one: what is not there yet is empty.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltune.errors import CheckpointError
from deltune.training import metrics

# of what data.prepare's report tells of each set and of each of its sources
DATA_COUNTS = ("rows", "examples", "tokens", "trained_tokens", "rejected", "overlong", "truncated", "held_out")
DATA_SOURCE = ("name", "format", "template", "weight", "num_files", "unused_columns")


@dataclass(frozen=True)
class Totals:
    """Sums over the logged steps."""

    num_tokens: int
    num_trained_tokens: int
    seconds: float
    data_share: float | None  # of those seconds, spent waiting for batches; None in records from before it was measured
    tokens_per_second: float  # all tokens over all seconds
    peak_memory_bytes: int
    flops: float
    mfu: float | None  # of all processes' peak; None where the peak is not known


@dataclass(frozen=True)
class Records:
    folder: Path
    start: dict[str, Any]  # the start line; {} in a file without one
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    saves: list[dict[str, Any]]
    events: list[dict[str, Any]]
    outcome: dict[str, Any]  # completed.json over the end line; {} while a run goes on
    samples: list[dict[str, Any]]
    config: dict[str, Any]
    config_text: str

    @property
    def name(self) -> str:
        return self.start.get("name") or self.folder.resolve().name

    @property
    def description(self) -> dict[str, Any]:
        return self.start.get("description", {})

    @property
    def last_step(self) -> int:
        return self.outcome.get("step", self.steps[-1]["step"] if self.steps else 0)

    @property
    def metrics_before(self) -> dict[str, float]:
        """Metrics at step 0: as the outcome says, or while there is none the evaluation at step 0."""
        at_start = {} if not self.evals or self.evals[0]["step"] else self.evals[0]["metrics"]
        return self.outcome.get("metrics_before") or at_start

    @property
    def metrics_after(self) -> dict[str, float]:
        """Metrics of what the run leaves; while there is none, of the last evaluation."""
        latest = self.evals[-1]["metrics"] if self.evals and self.evals[-1]["step"] else {}
        return self.outcome.get("metrics_after") or latest

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and one value of every logged step."""
        return [line["step"] for line in self.steps], [line[key] for line in self.steps]

    def eval_curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and one metric of every evaluation that has it."""
        found = [(line["step"], line["metrics"][name]) for line in self.evals if name in line["metrics"]]
        return [step for step, _ in found], [value for _, value in found]

    def data_table(self) -> list[list[Any]]:
        """What became of the rows: one row for each data set, header first; [] where that is not known."""
        sets = [(name, facts) for name, facts in self._data_sets() if "examples" in facts]
        columns = [name for name in DATA_COUNTS if any(facts.get(name) for _, facts in sets)]
        head = ["set", *(name.replace("_", " ") for name in columns)]
        return [head, *([name, *(facts.get(column, 0) for column in columns)] for name, facts in sets)] if sets else []

    def source_table(self) -> list[list[Any]]:
        """Where the rows came from and how they were read, header first; [] where that is not known."""
        rows = [
            [name, *(source.get(column, "") for column in DATA_SOURCE)]
            for name, facts in self._data_sets()
            for source in facts.get("sources", [])
        ]
        return [["set", *(column.removeprefix("num_").replace("_", " ") for column in DATA_SOURCE)], *rows] if rows else []

    def data_notes(self) -> list[str]:
        """What the preparation of the data had to say, with the number of rows that it holds for."""
        return [f"{note}: {count:,}" for _, facts in self._data_sets() for note, count in facts.get("notes", {}).items()]

    def _data_sets(self) -> list[tuple[str, dict[str, Any]]]:
        data = self.description.get("data") or {}
        return [("training", data), ("evaluation", data.get("evaluation") or {})]

    def totals(self) -> Totals:
        seconds = sum(line["seconds"] for line in self.steps)
        tokens = sum(line["num_tokens"] for line in self.steps)
        measured = [line for line in self.steps if "data_seconds" in line]
        time_of_measured = sum(line["seconds"] for line in measured)
        timed = [line for line in self.steps if line["mfu"] > 0 and math.isfinite(line["mfu"])]
        time_of_timed = sum(line["seconds"] for line in timed)
        return Totals(
            num_tokens=tokens,
            num_trained_tokens=sum(line["num_trained_tokens"] for line in self.steps),
            seconds=seconds,
            data_share=sum(line["data_seconds"] for line in measured) / time_of_measured if time_of_measured else None,
            tokens_per_second=tokens / seconds if seconds else 0.0,
            peak_memory_bytes=max((line["peak_memory_bytes"] for line in self.steps), default=0),
            flops=sum(line["flops"] for line in self.steps),
            # mfu is FLOPs over seconds and peak, so the whole run's is the mean weighted by seconds
            mfu=sum(line["mfu"] * line["seconds"] for line in timed) / time_of_timed if time_of_timed else None,
        )


def read(folder: Path) -> Records:
    """The records of a run folder; CheckpointError if it has no metrics.jsonl or a file is damaged."""
    lines = metrics.read(folder / metrics.FILE)
    by_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in ("start", "step", "eval", "save", "event", "end")}
    for line in lines:
        if line["kind"] in ("step", "eval"):
            _take_back(by_kind, line)
        if line["kind"] in by_kind:
            by_kind[line["kind"]].append(line)
    text = _text(folder / "config.yaml")
    return Records(
        folder=folder,
        start=by_kind["start"][-1] if by_kind["start"] else {},
        steps=by_kind["step"],
        evals=by_kind["eval"],
        saves=by_kind["save"],
        events=by_kind["event"],
        outcome=(by_kind["end"][-1] if by_kind["end"] else {}) | (_json(folder / "completed.json") or {}),
        samples=_json(folder / "samples.json") or [],
        config=_mapping(folder / "config.yaml", text),
        config_text=text,
    )


def _take_back(by_kind: dict[str, list[dict[str, Any]]], line: dict[str, Any]) -> None:
    """After a rollback the same steps come again; the first try of them is no part of the curve."""
    same = by_kind[line["kind"]]
    while same and same[-1]["step"] >= line["step"]:
        same.pop()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); it can be removed, the run's other files do not need it") from None


def _mapping(path: Path, text: str) -> dict[str, Any]:
    from deltune.config.yaml_file import parse

    return parse(text, str(path))[0]
