"""deltune score predictions=FILE|FOLDER [metrics=[f1,bleu]] [against=FILE|FOLDER] [out=FILE.json]

Scores of answers that are there already: texts beside references, what `eval` wrote, or ranked lists; with `against`,
how the same items came out elsewhere, and whether the difference may be chance. Nothing is generated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltune.settings import ScoreSettings


def main(words: list[str], file: Path | None = None) -> int:
    from deltune import log
    from deltune.settings import ScoreSettings, load

    settings = load(ScoreSettings, words, file)
    log.set_up()
    result = measure(settings)
    print(report(result))
    if settings.out is not None:
        print(f"\n{write(Path(settings.out), result)}")
    return 0


def measure(settings: ScoreSettings) -> dict[str, Any]:
    from deltune.evaluation.answered import read

    ours = read(Path(settings.predictions))
    scores = ours.scores(settings.metrics, settings.language)
    result: dict[str, Any] = {"predictions": settings.predictions, "scores": {name: score.as_dict() for name, score in scores.items()}}
    if settings.against is not None:
        found = ours.against(read(Path(settings.against)), settings.metrics, settings.language)
        result["against"] = {"predictions": settings.against} | {name: one.as_dict() for name, one in found.items()}
    return result


def report(result: dict[str, Any]) -> str:
    from deltune.commands.text_scores import columns, number, score_table

    parts = [score_table([("", name, s["value"], s["low"], s["high"], s["n"]) for name, s in result["scores"].items()])]
    if "against" in result:
        other = dict(result["against"])
        rows = [("", f"difference from {other.pop('predictions')}", "95 % interval", "p", "test", "better", "worse")]
        for name, one in other.items():
            low, high = (number(name, one[end], signed=True) for end in ("low", "high"))
            rows.append((name, number(name, one["difference"], signed=True), f"{low} to {high}", f"{one['p']:.2g}", one["test"], f"{one['better']:,}", f"{one['worse']:,}"))
        parts.append(columns(rows))
    return "\n\n".join(parts)


def write(out: Path, result: dict[str, Any]) -> str:
    from deltune.errors import ConfigError
    from deltune.weights import replacing

    data = (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out, len(data)) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written: {error.strerror}") from None
    return f"wrote {out}"
