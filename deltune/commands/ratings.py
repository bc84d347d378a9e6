"""deltune ratings files=FOLDER [baseline=SYSTEM] [questions=FILE] [out=FOLDER]

What a judge's reviews of pairs of answers say of the systems that gave them: percentages of a baseline's score, wins,
ties and losses, Elo and Bradley-Terry ratings, each with its 95 % interval over questions, and what the judge gave to
the place. `out` gets ratings.json and a picture of the ratings.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltune.commands.text_scores import columns

if TYPE_CHECKING:
    from deltune.evaluation.ratings import Match
    from deltune.settings import RatingsSettings


def main(words: list[str], file: Path | None = None) -> int:
    from deltune import log
    from deltune.settings import RatingsSettings, load

    settings = load(RatingsSettings, words, file)
    log.set_up()
    result = summed_up(settings)
    print(report(result))
    if settings.out is not None:
        print("\n" + write(Path(settings.out), result))
    return 0


def summed_up(settings: RatingsSettings) -> dict[str, Any]:
    """All numbers of the report as plain values; scores are {value, low, high, n}."""
    from deltune.evaluation import ratings

    paths = files_of(settings.files)
    protocol, found = ratings.matches(paths, {name: ids_of(text) for name, text in settings.names.items()})
    baseline = baseline_of(settings, found)
    warn(found)
    result: dict[str, Any] = {
        "protocol": protocol,
        "files": [str(path) for path in paths],
        "num_reviews": len(found),
        "num_unread": sum(match.points is None for match in found),
        "num_questions": len({match.question for match in found}),
        "baseline": baseline,
        "seed": settings.seed,
    }
    result |= numbers(found, baseline, settings)
    bias = ratings.place_bias(found, resamples=settings.resamples, seed=settings.seed)
    result["place_bias"] = None if bias is None else asdict(bias)
    if settings.questions is not None:
        parts = ratings.by_category(found, ratings.categories(Path(settings.questions)))
        result["categories"] = {name: scores(part, baseline, settings) for name, part in parts.items()}
    return result


def files_of(names: Sequence[str]) -> list[Path]:
    """Files of reviews, sorted within a folder or glob. ConfigError for a name that stands for none."""
    from deltune.errors import ConfigError

    paths: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        below = sorted(path.glob("*.jsonl")) if path.is_dir() else sorted(map(Path, glob.glob(str(path))))
        if not below:
            raise ConfigError(f"files={name}: {'no .jsonl file in this folder' if path.is_dir() else 'no such file'}")
        paths += [one for one in below if one not in paths]
    return paths


def ids_of(text: str) -> list[str]:
    """Answer ids that a value of `names` stands for: those in a file, or itself."""
    from deltune.evaluation.ratings import answer_ids

    return answer_ids(Path(text)) if Path(text).is_file() else [text]


def baseline_of(settings: RatingsSettings, found: Sequence[Match]) -> str | None:
    from deltune.config.suggest import closest
    from deltune.errors import ConfigError
    from deltune.evaluation.ratings import common_opponent, short, systems

    names = systems(found)
    if settings.baseline is None:
        return common_opponent(found)
    for name in (settings.baseline, short(settings.baseline)):
        if name in names:
            return name
    raise ConfigError(f"baseline={settings.baseline}: there are {', '.join(names)}{closest(settings.baseline, names)}")


def warn(found: Sequence[Match]) -> None:
    from deltune.evaluation.ratings import one_sided
    from deltune.log import logger

    lone = one_sided(found)
    if lone:
        shown = "; ".join(f"{first} before {second}" for first, second in lone[:5]) + (" ..." if len(lone) > 5 else "")
        logger.warning("%d pairs of systems were shown in one order only, so the place is part of their numbers: %s", len(lone), shown)


def numbers(found: Sequence[Match], baseline: str | None, settings: RatingsSettings) -> dict[str, Any]:
    """Scores of each system, every pair's record, and ratings."""
    from deltune.evaluation.elo import bradley_terry, elo, played
    from deltune.evaluation.ratings import record, systems

    names = systems(found)
    games = played(found)
    made = {"resamples": settings.resamples, "seed": settings.seed}
    pairs = []
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            against = record(found, one, other, **made)
            if against is not None:
                pairs.append({"system": one, "against": other} | asdict(against))
    strengths = bradley_terry(games, **made)
    rated = elo(games, orders=settings.orders, seed=settings.seed) if settings.orders else None
    return {
        "systems": scores(found, baseline, settings),
        "pairs": pairs,
        "elo": None if rated is None else {name: score.as_dict() for name, score in rated.items()},
        "bradley_terry": None if strengths is None else {name: score.as_dict() for name, score in strengths.items()},
    }


def scores(found: Sequence[Match], baseline: str | None, settings: RatingsSettings) -> dict[str, Any]:
    """Percentage and record of each system, against the baseline where there is one, else against all."""
    from deltune.evaluation.ratings import percentage, record, systems

    made = {"resamples": settings.resamples, "seed": settings.seed}
    result = {}
    for name in systems(found):
        if name == baseline:
            continue
        percent = percentage(found, name, baseline, **made) if baseline is not None else None
        against = record(found, name, baseline, **made)
        if against is not None:
            result[name] = {"percent": None if percent is None else percent.as_dict()} | asdict(against)
    return result


# -- what is printed --------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    parts = [
        f"{result['num_reviews']:,} {result['protocol']} reviews of {result['num_questions']:,} questions in {len(result['files'])} files; "
        f"{result['num_unread']:,} verdicts could not be read and are in no number",
        table(result["systems"], result["baseline"]),
    ]
    if result["elo"] or result["bradley_terry"]:
        parts.append(strengths_table(result))
    if not result["bradley_terry"]:
        parts.append("No Bradley-Terry ratings: some systems took every point from the others.")
    for name, found in result.get("categories", {}).items():
        parts.append(f"{name}\n{table(found, result['baseline'])}")
    if result["place_bias"]:
        parts.append(place_text(result["place_bias"]))
    return "\n\n".join(parts)


def table(systems: dict[str, Any], baseline: str | None) -> str:
    """A line for each system, the best first."""
    percents = any(found["percent"] for found in systems.values())
    head = [f"against {baseline or 'all others'}", *(["of its score", "95 % interval"] if percents else [])]
    rows = [[*head, "wins", "ties", "losses", "unread", "points", "95 % interval", "questions"]]
    for name, found in ranked(systems, lambda one: (one["percent"] or one["points"])["value"]):
        percent, points = found["percent"], found["points"]
        cells = [name]
        if percents:
            cells += [f"{percent['value']:.2f} %", f"{percent['low']:.2f} to {percent['high']:.2f}"] if percent else ["", ""]
        cells += [f"{found[key]:,}" for key in ("wins", "ties", "losses", "unread")]
        rows.append([*cells, f"{points['value']:.1%}", f"{points['low']:.1%} to {points['high']:.1%}", f"{points['n']:,}"])
    return columns(rows)


def strengths_table(result: dict[str, Any]) -> str:
    kinds = [(key, title) for key, title in (("elo", "Elo"), ("bradley_terry", "Bradley-Terry")) if result[key]]
    rows = [["", *(cell for _, title in kinds for cell in (title, "95 % interval")), "matches"]]
    for name, best in ranked(result[kinds[-1][0]], lambda one: one["value"]):
        cells = [name]
        for key, _ in kinds:
            one = result[key][name]
            cells += [f"{one['value']:.0f}", f"{one['low']:.0f} to {one['high']:.0f}"]
        rows.append([*cells, f"{best['n']:,}"])
    return columns(rows)


def ranked(found: dict[str, Any], value: Any) -> list[tuple[str, Any]]:
    return sorted(found.items(), key=lambda item: -value(item[1]))


def place_text(bias: dict[str, Any]) -> str:
    first, gap, same = bias["first"], bias["gap"], bias["same"]
    scored = f"; its score was higher than the other's by {gap['value']:.2f} ({gap['low']:.2f} to {gap['high']:.2f})" if gap else ""
    return (
        f"The answer shown first took {first['value']:.1%} of the points ({first['low']:.1%} to {first['high']:.1%}){scored}; "
        f"{same['value']:.1%} of {bias['pairs']:,} pairs had the same verdict in both orders ({same['low']:.1%} to {same['high']:.1%})."
    )


# -- files ------------------------------------------------------------------------------------------------------


def write(out: Path, result: dict[str, Any]) -> str:
    from deltune.errors import ConfigError
    from deltune.weights import replacing

    files = {out / "ratings.json": (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode("utf-8"), out / "ratings.png": picture(result)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, data in files.items():
            with replacing(file, len(data)) as temporary:
                temporary.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written: {error.strerror}") from None
    return "\n".join(f"wrote {file}" for file in files)


def picture(result: dict[str, Any]) -> bytes:
    """A point with its interval for each system: percentages where there are some, else ratings, else points."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from deltune.training.plots import BLUE, GRID, INK, MUTED

    shown = {name: found["percent"] for name, found in result["systems"].items() if found["percent"]}
    title = f"percent of {result['baseline']}'s score"
    if not shown:
        shown, title = result["bradley_terry"] or result["elo"] or {}, "rating"
    if not shown:
        shown, title = {name: found["points"] for name, found in result["systems"].items()}, "share of points"
    rows = ranked(shown, lambda one: one["value"])[::-1]
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(rows)), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    values = [one["value"] for _, one in rows]
    ends = [[one["value"] - one["low"] for _, one in rows], [one["high"] - one["value"] for _, one in rows]]
    axes.errorbar(values, range(len(rows)), xerr=ends, fmt="o", color=BLUE, ecolor=BLUE, elinewidth=1.5, capsize=3)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], color=INK, parse_math=False)
    axes.set_xlabel(f"{title}, with 95 % interval", color=MUTED)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, which="both", length=0, labelcolor=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": "Deltune"})
    return drawn.getvalue()
