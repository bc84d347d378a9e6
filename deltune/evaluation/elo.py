"""Strengths of systems from their matches: Elo ratings over random orders of play, and the Bradley-Terry model's maximum
likelihood, which knows no order.

Both are on the scale where 400 points are odds of ten to one; a tie is half a win. Elo depends on the order in which
matches are played, so it is played many times over in random orders and averaged, as in QLoRA (arXiv:2305.14314,
section 5). Intervals resample questions, with all matches that belong to one. m matches, s systems, o orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deltune.evaluation.ratings import Match
from deltune.evaluation.statistics import Z95, Score, percentiles

START, K = 1000.0, 32.0
SCALE = 400 / np.log(10)
CHUNK = 16_000_000  # matches laid out at once: 64 MB
ELO_RESAMPLES, ORDERS_OF_RESAMPLE = 200, 20
NEWTON_STEPS, CONVERGED = 100, 1e-10


@dataclass(frozen=True)
class Played:
    """Matches that could be read, as arrays [m]: systems and questions by number, points of the first."""

    names: list[str]
    first: np.ndarray
    second: np.ndarray
    points: np.ndarray
    question: np.ndarray

    @property
    def num_questions(self) -> int:
        return int(self.question.max()) + 1 if len(self.question) else 0


def played(found: Sequence[Match]) -> Played:
    """What `elo` and `bradley_terry` read; systems in the order in which they appear."""
    read = [match for match in found if match.points is not None]
    names = list(dict.fromkeys(name for match in read for name in (match.first, match.second)))
    number = {name: place for place, name in enumerate(names)}
    questions = {question: place for place, question in enumerate(dict.fromkeys(match.question for match in read))}
    return Played(
        names,
        np.array([number[match.first] for match in read], dtype=np.int32),
        np.array([number[match.second] for match in read], dtype=np.int32),
        np.array([match.points for match in read], dtype=np.float64),
        np.array([questions[match.question] for match in read], dtype=np.int32),
    )


def elo(games: Played, *, orders: int, seed: int, k: float = K, start: float = START) -> dict[str, Score]:
    """The mean final rating over `orders` random orders of all matches; n counts a system's matches.

    The interval is normal, from the spread over resampled questions of the mean of 20 orders. What is left in such a
    mean of the luck of the order makes it a little wide; Bradley-Terry's has none of it.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(len(games.names))
    for count in _chunks(orders, len(games.first)):
        schedule = rng.permuted(np.broadcast_to(np.arange(len(games.first), dtype=np.int32), (count, len(games.first))), axis=1)
        total += _play(games, schedule, k, start).sum(axis=0)
    value = total / orders
    of_question = [np.flatnonzero(games.question == number).astype(np.int32) for number in range(games.num_questions)]
    means = []
    for count in _chunks(ELO_RESAMPLES, ORDERS_OF_RESAMPLE * len(games.first)):
        schedules = []
        for row in rng.integers(0, len(of_question), (count, len(of_question))):
            drawn = np.concatenate([of_question[number] for number in row])
            schedules += [rng.permutation(drawn) for _ in range(ORDERS_OF_RESAMPLE)]
        # shorter ones end in matches of no consequence
        schedule = np.full((len(schedules), max(map(len, schedules))), -1, dtype=np.int32)
        for row, drawn in zip(schedule, schedules, strict=True):
            row[: len(drawn)] = drawn
        means.append(_play(games, schedule, k, start).reshape(count, ORDERS_OF_RESAMPLE, -1).mean(axis=1))
    half = Z95 * np.concatenate(means).std(axis=0, ddof=1)
    matches = _num_matches(games)
    return {name: Score(float(value[i]), float(value[i] - half[i]), float(value[i] + half[i]), matches[i]) for i, name in enumerate(games.names)}


def _play(games: Played, schedule: np.ndarray, k: float, start: float) -> np.ndarray:
    """Final ratings [o, s] after the matches of each row of `schedule` [o, steps], one after another; -1 is no match."""
    count = len(games.names)
    ratings = np.full(len(schedule) * count, start)
    base = np.arange(len(schedule)) * count
    for matches in schedule.T:
        one, two = base + games.first[matches], base + games.second[matches]
        expected = 1 / (1 + 10 ** ((ratings[two] - ratings[one]) / 400))
        change = k * (games.points[matches] - expected) * (matches >= 0)
        ratings[one] += change
        ratings[two] -= change
    return ratings.reshape(len(schedule), count)


def bradley_terry(games: Played, *, resamples: int, seed: int, center: float = START) -> dict[str, Score] | None:
    """Maximum-likelihood strengths, with mean `center` over the systems; None where they do not exist.

    They exist where no group of systems took every point from the rest (Ford, 1957). Resamples in which they do not are
    left out of the interval.
    """
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(games.num_questions, np.full(games.num_questions, 1 / games.num_questions), size=resamples)
    of_question = np.stack([_points_table(games, games.question == number) for number in range(games.num_questions)])
    tables = np.concatenate([of_question.sum(axis=0)[None], np.einsum("rq,qij->rij", counts.astype(np.float64), of_question)])
    connected = np.array([_connected(table) for table in tables])
    if not connected[0]:
        return None
    strengths = np.full((len(tables), len(games.names)), np.nan)
    strengths[connected] = center + SCALE * _newton(tables[connected])
    matches = _num_matches(games)
    return {name: Score(float(strengths[0, i]), *percentiles(strengths[1:, i]), matches[i]) for i, name in enumerate(games.names)}


def _points_table(games: Played, chosen: np.ndarray) -> np.ndarray:
    """[s, s]: points that the row's system took from the column's."""
    table = np.zeros((len(games.names), len(games.names)))
    np.add.at(table, (games.first[chosen], games.second[chosen]), games.points[chosen])
    np.add.at(table, (games.second[chosen], games.first[chosen]), 1 - games.points[chosen])
    return table


def _connected(table: np.ndarray) -> bool:
    """Whether points lead from every system to every other."""
    reach = (table > 0) | np.eye(len(table), dtype=bool)
    for _ in range(len(table).bit_length()):
        reach = reach @ reach
    return bool(reach.all())


def _newton(points: np.ndarray) -> np.ndarray:
    """Log-strengths [r, s] with mean 0 from tables of points [r, s, s], by Newton's method on the log-likelihood."""
    games = points + points.transpose(0, 2, 1)
    theta = np.zeros(points.shape[:2])
    for _ in range(NEWTON_STEPS):
        chance = 1 / (1 + np.exp(theta[:, None, :] - theta[:, :, None]))  # of the row's system
        slope = points.sum(axis=2) - (games * chance).sum(axis=2)
        curve = games * chance * (1 - chance)
        # the constant direction changes nothing; a one on it makes the matrix regular
        hessian = np.eye(points.shape[1]) * curve.sum(axis=2)[:, :, None] - curve + 1
        step = np.linalg.solve(hessian, slope[:, :, None])[:, :, 0]
        theta += step / np.maximum(1, np.abs(step).max(axis=1, keepdims=True))
        if np.abs(step).max() < CONVERGED:
            break
    return theta - theta.mean(axis=1, keepdims=True)


def _num_matches(games: Played) -> list[int]:
    return (np.bincount(games.first, minlength=len(games.names)) + np.bincount(games.second, minlength=len(games.names))).tolist()


def _chunks(count: int, width: int) -> list[int]:
    rows = max(1, CHUNK // max(1, width))
    return [min(rows, count - start) for start in range(0, count, rows)]
