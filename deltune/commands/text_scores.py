"""Metrics of generated answers, of each source and of all: what `eval` adds to its result where `metrics` asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def add(names: Sequence[str], metrics: dict[str, Any], sources: dict[str, dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    """Each score as value, low, high and n under its name, in `metrics` and in its source; each item's values in its answer.

    exact_match is left out: the answers were matched when they were made.
    """
    from deltune.evaluation.lm import source_of
    from deltune.evaluation.text_metrics import measured

    wanted = [name for name in names if name != "exact_match"]
    if not wanted:
        return
    places = [(metrics, list(range(len(answers))))]
    for source, found in sources.items():
        places.append((found, [i for i, answer in enumerate(answers) if source_of(answer["row"]) == source]))
    for into, chosen in places:
        scores = measured(wanted, [answers[i]["prediction"] for i in chosen], [[answers[i]["reference"]] for i in chosen])
        for name, one in scores.items():
            into[name] = one.score.as_dict()
            if into is metrics:
                for answer, value in zip(answers, one.values, strict=True):
                    answer[name] = value


def table(result: dict[str, Any]) -> str:
    """A line for each metric of generated answers, of each source if there are several, and of all."""
    rows = list(result["sources"].items()) if len(result["sources"]) > 1 else []
    lines = []
    for source, metrics in [*rows, ("all", result["all"])]:
        for name, score in metrics.items():
            if isinstance(score, dict):
                lines.append((source, name, score.get("value", score.get(name)), score["low"], score["high"], score["n"]))
    return score_table(lines)


def score_table(lines: Sequence[tuple[str, str, float, float, float, int]]) -> str:
    """(source, metric, value, low, high, n) in columns."""
    cells = [("", "metric", "score", "95 % interval", "n")]
    for source, name, value, low, high, count in lines:
        cells.append((source, name, number(name, value), f"{number(name, low)} to {number(name, high)}", f"{count:,}"))
    return columns(cells, left=2)


def number(name: str, value: float, *, signed: bool = False) -> str:
    """Shares in percent; BLEU is on a scale of 100 already."""
    sign = "+" if signed else ""
    return f"{value:{sign}.2f}" if name == "bleu" else f"{value:{sign}.2%}"


def columns(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows in columns, the first `left` of them ranged left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    )
