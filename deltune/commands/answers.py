"""The files of `deltune generate`: an output that goes on where it was interrupted, and the tables made of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltune.data.read import File
    from deltune.settings import GenerateSettings

# settings that do not change what is answered; of the engine, the precision does
FREE = ("run", "out", "batch", "engine")

def begin(out: Path, settings: GenerateSettings, files: Sequence[File], wanted: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """(row, turn) of the answers that `out` holds, made with these settings; what made them is written beside it.

    A last line that was cut short is taken off. Raises ConfigError or DataError if `out` belongs to something else.
    """
    from deltune.errors import ConfigError
    from deltune.weights import replacing

    record = out.with_suffix(".settings.json")
    identity = json.loads(json.dumps(_identity(settings, files)))
    try:
        if out.exists() and out.stat().st_size:
            _check_same(out, record, identity)
            return _answered(out, wanted)
        out.parent.mkdir(parents=True, exist_ok=True)
        text = (json.dumps(identity, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
        with replacing(record, len(text)) as temporary:
            temporary.write_bytes(text)
    except OSError as error:
        raise ConfigError(f"out={out}: {error.strerror}") from None
    return set()


def _identity(settings: GenerateSettings, files: Sequence[File]) -> dict[str, Any]:
    from deltune.commands.open_model import provenance
    from deltune.data.sources import digest
    from deltune.weights import sha256_of

    adapters = {name: {file.name: sha256_of(file) for file in sorted(Path(folder).rglob("adapter_*"))} for name, folder in settings.adapters.items()}
    return provenance(settings) | {"files": {file.path: digest(file) for file in files}, "adapters": adapters}


def _check_same(out: Path, record: Path, identity: dict[str, Any]) -> None:
    from deltune.errors import ConfigError

    remedy = "What fits: another out, or that file removed."
    if not record.exists():
        raise ConfigError(
            f"out={out}: holds something already, and nothing says what made it ({record.name} is missing). {remedy}"
        )
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"out={out}: {record.name} is not JSON. {remedy}") from None
    old, new = (_deciding(one.get("settings", {})) for one in (before, identity))
    changed = [f"{key} was {old.get(key)!r} and is {value!r}" for key, value in new.items() if old.get(key) != value]
    changed += [f"other {part}" for part in ("model", "adapter", "adapters", "files") if before.get(part, {}) != identity[part]]
    if changed:
        raise ConfigError(f"out={out}: holds answers that were made otherwise: {'; '.join(changed)}. {remedy}")


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in FREE}
    return kept | {"engine.precision": settings.get("engine", {}).get("precision")}


def _answered(out: Path, wanted: set[tuple[str, int]]) -> set[tuple[str, int]]:
    from deltune.errors import DataError
    from deltune.log import logger

    with out.open("rb+") as opened:
        content = opened.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logger.warning("%s: the last line was cut short and is answered again", out)
            opened.truncate(whole)
    done = set()
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        try:
            answer = json.loads(line)
            row = answer["row"], answer.get("turn", 0)
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{out}:{number}: not an answer that deltune generate wrote. "
                "What fits: another out, or that file removed."
            ) from None
        if row not in wanted or row in done:
            raise DataError(
                f"{out}:{number}: an answer to {row[0]}, which "
                f"{'stands there twice' if row in done else 'is no row of the file'}. "
                "What fits: another out, or that file removed."
            )
        done.add(row)
    return done


# -- tables --------------------------------------------------------------------------------------------------------


def write_table(lines: Path, out: Path) -> None:
    """The answers of a JSONL file as JSON, CSV or Parquet, by out's ending; a row's own columns come first.

    Raises ConfigError where a Parquet column would hold values of several kinds.
    """
    from deltune.errors import ConfigError
    from deltune.weights import replacing

    answers = [_flat(json.loads(line)) for line in lines.read_text(encoding="utf-8").splitlines()]
    with replacing(out, lines.stat().st_size) as temporary:
        if out.suffix == ".json":
            temporary.write_text(json.dumps(answers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        elif out.suffix == ".csv":
            columns = list(dict.fromkeys(name for answer in answers for name in answer))
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows({name: _cell(value) for name, value in answer.items()} for answer in answers)
        else:
            import pyarrow
            import pyarrow.parquet

            try:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(answers), temporary)
            except pyarrow.ArrowInvalid as error:
                raise ConfigError(f"out={out}: a column holds values of several kinds ({error}). What fits: out={lines}, where the answers are") from None


def _flat(answer: dict[str, Any]) -> dict[str, Any]:
    """The row's columns and ours side by side; ours win, and the row's of such a name is kept as input.<name>."""
    given = answer.pop("input")
    return {f"input.{name}" if name in answer else name: value for name, value in given.items()} | answer


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
