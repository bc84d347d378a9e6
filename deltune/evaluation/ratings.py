"""Ratings by a judge who saw two answers to a question: read, joined by the ids of the answers, and summed up.

A review shows the answers of two systems in an order, and either scores both (relative: `s1 s2`) or names the better
one (pairwise: 1, 2, or 3 for a tie). Judges favour a place, so each pair should be shown in both orders. Which column
of a file is which system is told by answer ids alone: names of files need not follow the order of the answers. A review
whose verdict could not be read is counted, and enters no number. Questions are what intervals resample.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltune.errors import DataError
from deltune.evaluation.statistics import RESAMPLES, Score, bootstrap, wilson_interval
from deltune.evaluation.tasks.reading import json_rows
from deltune.log import logger

_PAIR = re.compile(r"\s*(-?\d+(?:\.\d+)?)(?:\s*,\s*|\s+)(-?\d+(?:\.\d+)?)\s*")
_JUDGE = re.compile(r"-[^-]*(?:-4)?-reviewer(?:-threeclass)?$")
_FLAVOUR = re.compile(r"(-(vicuna|oa))?-generations.*$")
POINTS = {1: 1.0, 2: 0.0, 3: 0.5}  # of the first answer


@dataclass(frozen=True)
class Review:
    """A row of a file. `points` is 1 where the first answer is better, 0.5 for a tie; None where nothing could be read."""

    where: str
    question: str
    answers: tuple[str, str]  # ids, in the order shown
    scores: tuple[float, float] | None
    points: float | None


@dataclass(frozen=True)
class Match:
    """A review between systems whose names are known."""

    where: str
    question: str
    first: str
    second: str
    scores: tuple[float, float] | None
    points: float | None


# -- files ------------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[str, list[Review]]:
    """(protocol, reviews) of a file of JSON lines: "relative" or "pairwise". DataError names file and line."""
    reviews, kinds, seen = [], {}, {}
    for _, where, row in json_rows(path):
        review, kind = _review(row, where)
        if kind is not None:
            kinds.setdefault(kind, where)
        if review.question in seen:
            raise DataError(f"{where}: question {review.question} is reviewed a second time; the first is {seen[review.question]}")
        seen[review.question] = where
        reviews.append(review)
    if not reviews:
        raise DataError(f"{path}: no reviews in it")
    if len(kinds) > 1:
        raise DataError(f"{path}: mixed protocols: {' and '.join(f'{where} is {kind}' for kind, where in kinds.items())}. What fits: a file for each")
    if not kinds:
        raise DataError(f"{path}: not one of its {len(reviews)} verdicts can be read")
    return next(iter(kinds)), reviews


def _review(row: dict[str, Any], where: str) -> tuple[Review, str | None]:
    """The review, and its protocol where that can be told."""
    question = row.get("question_id", row.get("message_id"))
    if question is None:
        raise DataError(f"{where}: neither question_id nor message_id, so it is not known which question was answered")
    answers = row.get("answer1_id"), row.get("answer2_id")
    if not all(isinstance(answer, str) and answer for answer in answers):
        missing = "answer1_id" if not answers[0] else "answer2_id"
        raise DataError(f"{where}: no {missing}; without ids it is not known whose answer was shown first")
    points, scores, kind = _verdict(row, where)
    return Review(where, str(question), answers, scores, points), kind


def _verdict(row: dict[str, Any], where: str) -> tuple[float | None, tuple[float, float] | None, str | None]:
    """(points of the first, both scores, protocol): from `score`, or from the judge's `text` where there is none."""
    score, text = row.get("score"), row.get("text")
    if score is None:
        if not isinstance(text, str):
            raise DataError(f"{where}: neither score nor text, so there is no verdict")
        lines = text.strip().split("\n")
        pair = _PAIR.fullmatch(lines[0])
        if pair:
            score = [float(pair[1]), float(pair[2])]
        elif lines[-1].strip() in ("1", "2", "3"):
            score = int(lines[-1])
        else:
            return None, None, None
    if isinstance(score, list):
        if len(score) != 2 or not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in score):
            raise DataError(f"{where}: score={json.dumps(score)}: two numbers or one of 1, 2, 3 are expected")
        if min(score) < 0 or not np.isfinite(score).all():
            return None, None, "relative"
        first, second = float(score[0]), float(score[1])
        return 0.5 if first == second else float(first > second), (first, second), "relative"
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise DataError(f"{where}: score={json.dumps(score)}: two numbers or one of 1, 2, 3 are expected")
    return POINTS.get(int(score)) if score == int(score) else None, None, "pairwise"


# -- systems ----------------------------------------------------------------------------------------------------


def matches(paths: Sequence[Path], named: Mapping[str, Iterable[str]] | None = None) -> tuple[str, list[Match]]:
    """(protocol, matches) of several files. `named` gives answer ids of systems by name, where names of files do not tell.

    Columns are one system where more than half of the questions that both have show the same answer id (ids are made
    from the text, so that two systems may share a few). A system bears the name that all its files have in common.
    """
    files = {path: read(path) for path in paths}
    protocols = {kind: path for path, (kind, _) in files.items()}
    if len(protocols) > 1:
        raise DataError(f"mixed protocols: {' and '.join(f'{path} is {kind}' for kind, path in protocols.items())}. What fits: one at a time")
    columns = {(path, side): {r.question: r.answers[side] for r in reviews} for path, (_, reviews) in files.items() for side in (0, 1)}
    system_of = _systems(columns)
    for path in paths:
        if system_of[path, 0] == system_of[path, 1]:
            raise DataError(f"{path}: both sides show the same answers, so nothing is compared")
    names = _names(system_of, columns, named or {})
    found, seen = [], {}
    for path, (_, reviews) in files.items():
        first, second = names[system_of[path, 0]], names[system_of[path, 1]]
        for review in reviews:
            key = (review.question, first, second)
            if key in seen:
                raise DataError(f"{review.where}: reviewed twice in this order ({first}, then {second}); the other is {seen[key]}")
            seen[key] = review.where
            found.append(Match(review.where, review.question, first, second, review.scores, review.points))
    return next(iter(protocols)), found


def _systems(columns: Mapping[tuple[Path, int], Mapping[str, str]]) -> dict[tuple[Path, int], int]:
    """The number of each column's system."""
    known: list[dict[str, set[str]]] = []  # of each system, the ids that answer a question
    system_of = {}
    for column, answers in columns.items():
        number = next((place for place, ids in enumerate(known) if _alike(answers, ids)), len(known))
        if number == len(known):
            known.append(defaultdict(set))
        for question, answer in answers.items():
            known[number][question].add(answer)
        system_of[column] = number
    return system_of


def _alike(answers: Mapping[str, str], ids: Mapping[str, set[str]]) -> bool:
    common = [question for question in answers if question in ids]
    return 2 * sum(answers[question] in ids[question] for question in common) > len(common) > 0


def _names(
    system_of: Mapping[tuple[Path, int], int], columns: Mapping[tuple[Path, int], Mapping[str, str]], named: Mapping[str, Iterable[str]]
) -> dict[int, str]:
    """The name of each system: a stated one, else what its files' names leave.

    A system is one of the two that each of its files names; where one side of a file is known, the other is the other.
    """
    ids: dict[int, Counter[str]] = defaultdict(Counter)
    candidates: dict[int, set[str]] = {}
    for (path, side), number in system_of.items():
        ids[number].update(columns[path, side].values())
        candidates[number] = candidates.get(number, set(names_of(path))) & set(names_of(path))
    names: dict[int, str] = {}
    for name, known in named.items():
        shown = set(known)
        found = max(ids, key=lambda number: sum(count for answer, count in ids[number].items() if answer in shown))
        if not shown & ids[found].keys():
            raise DataError(f"names: {name}: none of its answer ids is in the ratings")
        if found in names:
            raise DataError(f"names: {names[found]} and {name} are said of the same answers")
        names[found] = name
    while True:
        names |= {number: next(iter(parts)) for number, parts in candidates.items() if number not in names and len(parts) == 1}
        known_before = len(names), sum(map(len, candidates.values()))
        for (path, side), number in system_of.items():
            other, both = system_of[path, 1 - side], set(names_of(path))
            if other in names:
                left = {name for name in both if names[other] not in (name, short(name))}
                candidates[number] &= left
        if (len(names), sum(map(len, candidates.values()))) == known_before:
            break
    open_ = {number: parts for number, parts in candidates.items() if number not in names}
    for number, parts in open_.items():
        told = f"names of files leave {' or '.join(sorted(parts))}" if parts else "names of files have nothing in common"
        raise DataError(
            f"whose answer is {next(iter(ids[number]))}? {told}, and their order need not be that of the answers. "
            "What fits: names={SYSTEM: ANSWER_ID or FILE of its answers}, or more files of the same systems"
        )
    return _apart({number: short(name) for number, name in names.items()}, names)


def _apart(shortened: dict[int, str], names: dict[int, str]) -> dict[int, str]:
    """Short names where these are all different; of systems with one name the later ones are numbered."""
    if len(set(shortened.values())) < len(set(names.values())):
        shortened = dict(names)
    found: dict[int, str] = {}
    for number, name in shortened.items():
        times = sum(other == name or other.startswith(f"{name} (") for other in found.values())
        if times:
            logger.warning("%s: its files hold different answers under one name; they are taken as different systems", name)
        found[number] = f"{name} ({times + 1})" if times else name
    return found


def names_of(path: Path) -> list[str]:
    """The two systems that a file's name speaks of, A-vs-B-JUDGE-reviewer.jsonl, in no certain order."""
    parts = _JUDGE.sub("", path.name.removesuffix(".jsonl")).split("-vs-")
    return parts if len(parts) == 2 else []


def short(name: str) -> str:
    """Without what says how answers were drawn: 65b-guanaco-vicuna-generations-topp0.9-temp0.7 is 65b-guanaco."""
    return _FLAVOUR.sub("", name).removeprefix("answer-") or name


def systems(found: Iterable[Match]) -> list[str]:
    """Their names, in the order in which they appear."""
    return list(dict.fromkeys(name for match in found for name in (match.first, match.second)))


def common_opponent(found: Sequence[Match]) -> str | None:
    """The one system that is in every match, if there is one."""
    everywhere = set.intersection(*({match.first, match.second} for match in found))
    return next(iter(everywhere)) if len(everywhere) == 1 else None


def answer_ids(path: Path) -> list[str]:
    """The ids in a file of one system's answers."""
    ids = [str(row["answer_id"]) for _, _, row in json_rows(path) if "answer_id" in row]
    if not ids:
        raise DataError(f"{path}: no answer_id in it, so it names no answers")
    return ids


def categories(path: Path) -> dict[str, str]:
    """The category of each question, from a file of questions."""
    found = {}
    for _, where, row in json_rows(path):
        question = row.get("question_id", row.get("message_id"))
        if question is None or "category" not in row:
            raise DataError(f"{where}: a question needs question_id and category")
        found[str(question)] = str(row["category"])
    return found


# -- numbers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """How a system did against another, over both orders. `points` counts a tie as half a win."""

    wins: int
    ties: int
    losses: int
    unread: int
    points: Score


def percentage(found: Iterable[Match], system: str, baseline: str, *, resamples: int = RESAMPLES, seed: int = 0) -> Score | None:
    """The system's summed scores in percent of the baseline's, for each order by itself, then the mean of the orders.

    n counts questions. None where no relative review of the two can be read.
    """
    orders: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)
    for match in found:
        if match.scores is not None and {match.first, match.second} == {system, baseline}:
            ours, theirs = match.scores if match.first == system else match.scores[::-1]
            place = 0 if match.first == system else 2
            row = orders[match.question]
            row[place], row[place + 1] = ours, theirs
    table = np.array(list(orders.values()))
    places = [place for place in (0, 2) if len(table) and table[:, place + 1].any()]
    if not places:
        return None

    def percent(means: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return 100 * np.mean([means[:, place] / means[:, place + 1] for place in places], axis=0)

    return bootstrap(table, percent, resamples=resamples, seed=seed)


def record(found: Iterable[Match], system: str, other: str | None = None, *, resamples: int = RESAMPLES, seed: int = 0) -> Record | None:
    """Wins, ties and losses of a system against another, or against all. None where no review can be read."""
    tally, unread = Counter(), 0
    rows: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for match in found:
        pair = (match.first, match.second)
        if system not in pair or (other is not None and other not in pair):
            continue
        if match.points is None:
            unread += 1
            continue
        points = match.points if match.first == system else 1 - match.points
        tally[points] += 1
        rows[match.question][0] += points
        rows[match.question][1] += 1
    if not rows:
        return None
    return Record(tally[1.0], tally[0.5], tally[0.0], unread, _share(np.array(list(rows.values())), resamples, seed))


@dataclass(frozen=True)
class PlaceBias:
    """What the place is worth, over pairs of reviews that differ in the order alone.

    `first` is the share of points (a tie is half) that went to the answer shown first: 0.5 for a judge without favour.
    `gap` is the mean score of the first less that of the second (relative only). `same` is the share of pairs whose two
    verdicts agree.
    """

    pairs: int
    first: Score
    gap: Score | None
    same: Score


def place_bias(found: Iterable[Match], *, resamples: int = RESAMPLES, seed: int = 0) -> PlaceBias | None:
    """None where no pair of systems was shown in both orders."""
    known = {(m.question, m.first, m.second): m for m in found if m.points is not None}
    rows: dict[str, list[float]] = defaultdict(lambda: [0.0] * 4)  # points of the first, gap, same verdicts, pairs
    scored = True
    for (question, first, second), one in known.items():
        two = known.get((question, second, first))
        if two is None or first > second:  # each pair once
            continue
        row = rows[question]
        row[0] += (one.points + two.points) / 2
        row[2] += one.points == 1 - two.points
        row[3] += 1
        if one.scores is None or two.scores is None:
            scored = False
        else:
            row[1] += (one.scores[0] - one.scores[1] + two.scores[0] - two.scores[1]) / 2
    if not rows:
        return None
    table = np.array(list(rows.values()))

    gap = bootstrap(table[:, [1, 3]], _ratio, resamples=resamples, seed=seed) if scored else None
    first, same = (_share(table[:, [column, 3]], resamples, seed) for column in (0, 2))
    return PlaceBias(int(table[:, 3].sum()), first, gap, same)


def by_category(found: Iterable[Match], category_of: Mapping[str, str]) -> dict[str, list[Match]]:
    """Matches of each category, in alphabetical order. DataError for a question without one."""
    parts: dict[str, list[Match]] = defaultdict(list)
    for match in found:
        if match.question not in category_of:
            raise DataError(f"{match.where}: question {match.question} is not among the questions, so it has no category")
        parts[category_of[match.question]].append(match)
    return dict(sorted(parts.items()))


def one_sided(found: Iterable[Match]) -> list[tuple[str, str]]:
    """Pairs of systems that were shown in one order only."""
    orders = {(match.first, match.second) for match in found}
    return sorted(pair for pair in orders if pair[::-1] not in orders)


def _share(table: np.ndarray, resamples: int, seed: int) -> Score:
    """Column 0 over column 1 [questions, 2]; Wilson's interval where all questions gave the same, which has no spread."""
    score = bootstrap(table, _ratio, resamples=resamples, seed=seed)
    if score.low < score.high:
        return score
    return Score(score.value, *wilson_interval(score.value * score.n, score.n), score.n)


def _ratio(means: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return means[:, 0] / means[:, 1]
