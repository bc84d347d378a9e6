"""Files of answered items, scored and compared after the fact: no model is asked.

A line is an item: `prediction` with `reference` or `references` (texts), or `correct` (what `eval task=` writes), or
`ranked` with `gold` (ids that were retrieved, ids that are right). Every line counts once, and none is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltune.errors import ConfigError, DataError
from deltune.evaluation.statistics import Paired, Score, macro_mean, mean, paired_by_id, require_same_ids
from deltune.evaluation.tasks.reading import json_rows
from deltune.evaluation.text_metrics import Measured, measured, recall_at_k

FILE = "predictions.jsonl"
OF_TEXTS = ("exact_match", "normalised_match", "f1")  # measured where no metrics are asked for
_IDS = ("id", "row", "question_id")


@dataclass(frozen=True)
class Item:
    where: str
    id: str
    group: str
    answer: Any  # text, whether it is correct, or ranked ids
    wanted: tuple[Any, ...]  # references or gold ids; () where it is only known whether the answer is correct


@dataclass(frozen=True)
class Answers:
    """The items of one file in its order; all are of one kind: "texts", "correct" or "ranked"."""

    kind: str
    items: list[Item]

    def scores(self, metrics: Sequence[str], language: str) -> dict[str, Score]:
        """By name. ConfigError where metrics are asked for that such items have not."""
        if self.kind != "correct":
            return {name: one.score for name, one in self._measured(metrics, language).items()}
        self._measured(metrics, language)
        groups: dict[str, list[float]] = {}
        for item in self.items:
            groups.setdefault(item.group, []).append(float(item.answer))
        found = {"accuracy": mean([float(item.answer) for item in self.items])}
        return found | ({"macro_accuracy": macro_mean(list(groups.values()))} if len(groups) > 1 else {})

    def against(self, other: Answers, metrics: Sequence[str], language: str) -> dict[str, Paired]:
        """These minus the other ones, item by item, joined by id. DataError where items or what is right differ."""
        theirs = {item.id: item for item in other.items}
        require_same_ids({item.id: 0 for item in self.items}, theirs)
        if self.kind != other.kind:
            raise DataError(f"{self.items[0].where} holds {self.kind}, {other.items[0].where} {other.kind}: they cannot be compared")
        for item in self.items:
            if theirs[item.id].wanted != item.wanted:
                raise DataError(f"{item.where} and {theirs[item.id].where}: item {item.id} has another right answer there: these are not the same questions")
        if self.kind == "correct":
            values = ({item.id: float(item.answer) for item in side.items} for side in (self, other))
            first, second = tuple(values)
            groups = {item.id: item.group for item in self.items}
            found = {"accuracy": paired_by_id(first, second)}
            return found | ({"macro_accuracy": paired_by_id(first, second, groups=groups)} if len(set(groups.values())) > 1 else {})
        in_order = Answers(other.kind, [theirs[item.id] for item in self.items])
        ours, others = self._measured(metrics, language), in_order._measured(metrics, language)
        return {name: one.against(others[name]) for name, one in ours.items()}

    def _measured(self, metrics: Sequence[str], language: str) -> dict[str, Measured]:
        answers, wanted = [item.answer for item in self.items], [item.wanted for item in self.items]
        if self.kind == "texts":
            return measured(metrics or OF_TEXTS, answers, wanted, language)
        if metrics:
            raise ConfigError(f"metrics have no effect: the items of {self.items[0].where.rpartition(':')[0]} are no texts")
        return {f"recall@{k}": one for k, one in recall_at_k(answers, wanted).items()} if self.kind == "ranked" else {}


def read(path: Path) -> Answers:
    """A file of items, or the folder that `eval` wrote. DataError names file and line."""
    path = path / FILE if path.is_dir() else path
    items: dict[str, Item] = {}
    kinds: dict[str, str] = {}
    for _, where, row in json_rows(path):
        kind, item = _item(row, where)
        if item.id in items:
            raise DataError(f"{item.where}: item {item.id} is there a second time; the first is {items[item.id].where}")
        items[item.id] = item
        kinds.setdefault(kind, item.where)
    if len(kinds) != 1:
        raise DataError(f"{path}: {' and '.join(f'{where} holds {kind}' for kind, where in kinds.items()) or 'no items in it'}; a file holds one kind")
    return Answers(next(iter(kinds)), list(items.values()))


def _item(row: dict[str, Any], where: str) -> tuple[str, Item]:
    line = where.rpartition(":")[2]
    name = str(next((row[key] for key in _IDS if row.get(key) is not None), line))
    group = str(row.get("group") or "")
    if isinstance(row.get("ranked"), list) and isinstance(row.get("gold"), list):
        return "ranked", Item(where, name, group, row["ranked"], tuple(row["gold"]))
    if isinstance(row.get("correct"), bool):
        wanted = row.get("answer")
        return "correct", Item(where, name, group, row["correct"], () if wanted is None else (json.dumps(wanted),))
    wanted = row.get("references", row.get("reference"))
    wanted = [wanted] if isinstance(wanted, str) else wanted
    text = "" if "prediction" in row and row["prediction"] is None else row.get("prediction")
    if isinstance(text, str) and isinstance(wanted, list) and wanted and all(isinstance(one, str) for one in wanted):
        return "texts", Item(where, name, group, text, tuple(wanted))
    raise DataError(f"{where}: has neither a text in prediction with reference or references, nor correct (true or false), nor ranked with gold")
