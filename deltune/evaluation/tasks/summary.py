"""What a task's predictions come to: every share with its 95 % interval and the count of items behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from deltune.errors import DataError
from deltune.evaluation.statistics import Paired, bootstrap, macro_mean, paired_by_id, proportion
from deltune.evaluation.tasks.item import Item
from deltune.evaluation.tasks.run import LIKELIHOODS, Prediction, place_of_best


def summary(predictions: Sequence[Prediction], mean: str) -> dict[str, Any]:
    """`accuracy` is the task's own mean (of item.MEANS), `micro`, `macro` and `groups` are all there is of them.

    Options that were scored add `loss` (mean −log of the right one's share among them), options of several lengths the
    accuracy `by` each way to compare them, and generated texts the count of those in which no answer was found.
    DataError without predictions.
    """
    groups: dict[str, list[float]] = {}
    for one in predictions:
        groups.setdefault(one.group, []).append(float(one.correct))
    micro = proportion(sum(one.correct for one in predictions), len(predictions))
    several = len(groups) > 1
    macro = macro_mean(list(groups.values())) if several else micro
    found: dict[str, Any] = {"accuracy": (macro if mean == "macro" else micro).as_dict(), "mean": mean if several else "micro"}
    if several:
        found |= {"micro": micro.as_dict(), "macro": macro.as_dict()}
        found["groups"] = {name: proportion(int(sum(values)), len(values)).as_dict() for name, values in sorted(groups.items())}
    if all(one.scores is not None for one in predictions):
        found["loss"] = bootstrap([loss_of(one) for one in predictions]).as_dict()
    if all(one.num_tokens is not None for one in predictions):
        found["by"] = {name: _by(predictions, name).as_dict() for name in LIKELIHOODS}
    if any(one.text is not None for one in predictions):
        found["num_without_answer"] = sum(one.prediction is None for one in predictions)
    return found


def loss_of(one: Prediction) -> float:
    """−log of the right option's share among all options, by their log-probabilities as they are."""
    top = max(one.scores)
    return top + math.log(sum(math.exp(value - top) for value in one.scores)) - one.scores[one.answer]


def _by(predictions: Sequence[Prediction], likelihood: str) -> Any:
    right = [place_of_best(one.scores, one.num_tokens, one.num_bytes, likelihood) == one.answer for one in predictions]
    return proportion(sum(right), len(right))


def chance(items: Sequence[Item], mean: str) -> float | None:
    """The accuracy of guessing; None where answers are open."""
    if not all(item.choices for item in items):
        return None
    groups: dict[str, list[float]] = {}
    for item in items:
        groups.setdefault(item.group if mean == "macro" else "", []).append(1 / len(item.choices))
    return sum(sum(values) / len(values) for values in groups.values()) / len(groups)


def against(ours: Sequence[Prediction], theirs: Mapping[str, Prediction], mean: str) -> Paired:
    """Ours minus theirs on the same items. DataError where ids or right answers differ."""
    other = [one.id for one in ours if one.id in theirs and theirs[one.id].answer != one.answer]
    if other:
        raise DataError(f"{len(other)} items have another right answer there, first {other[0]}: these are not the same questions.")
    groups = {one.id: one.group for one in ours} if mean == "macro" and len({one.group for one in ours}) > 1 else None
    values = ({one.id: float(one.correct) for one in side} for side in (ours, theirs.values()))
    return paired_by_id(*values, groups=groups)
