"""predictions.jsonl: one answered item a line, on disk as answers come, gone on with after a kill, never mixed.

Beside it made_by.json says what produced the answers; whatever differs from it may not add a line.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from deltune import weights
from deltune.errors import ConfigError, DataError
from deltune.evaluation.tasks.item import Item
from deltune.evaluation.tasks.run import Prediction

FILE, MADE_BY = "predictions.jsonl", "made_by.json"
_NAMES = tuple(field.name for field in fields(Prediction))


class Store:
    """The answers of one evaluation in a folder. Only one process may have it open."""

    def __init__(self, folder: Path, made_by: Mapping[str, Any]):
        """Opens the folder, or makes it. ConfigError where it holds answers of another model, task or setting, where another
        process has it open, or where it cannot be written; DataError where its file is damaged before its end."""
        self.path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"out={folder}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            made_by = json.loads(json.dumps(made_by))
            if os.fstat(self._handle).st_size:
                _require_same(folder, made_by)
            self.found = repaired(self.path)
            _replace(folder / MADE_BY, made_by)
            weights.sync(folder)
        except BlockingIOError:
            os.close(self._handle)
            raise ConfigError(f"out={folder}: another evaluation is writing there. What fits: another out=..., or wait for it") from None
        except BaseException:
            os.close(self._handle)
            raise

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Append lines, on disk when this returns; on a full disk none of them stays."""
        data = "".join(json.dumps(_plain(one), ensure_ascii=False) + "\n" for one in predictions).encode("utf-8", "replace")
        size = os.fstat(self._handle).st_size
        try:
            written = 0
            while written < len(data):
                written += os.write(self._handle, data[written:])
            os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, size)
            if not weights.says_disk_full(error):
                raise
            raise weights.disk_full(self.path, len(data)) from None
        self.found |= {one.id: one for one in predictions}

    def close(self) -> None:
        os.close(self._handle)


def _plain(one: Prediction) -> dict[str, Any]:
    return {name: value for name, value in asdict(one).items() if value is not None or name == "prediction"}


def write_metrics(folder: Path, found: Mapping[str, Any]) -> Path:
    """metrics.json, whole or as it was before."""
    _replace(folder / "metrics.json", found)
    return folder / "metrics.json"


def _replace(file: Path, value: Mapping[str, Any]) -> None:
    data = (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    with weights.replacing(file, len(data)) as temporary:
        temporary.write_bytes(data)


def repaired(path: Path) -> dict[str, Prediction]:
    """The answers of a file by id, after what a kill or a power cut left of its last lines was cut off."""
    found, whole = _parsed(path)
    if whole != path.stat().st_size:
        os.truncate(path, whole)
        weights.sync(path)
    return found


def read(folder: Path) -> dict[str, Prediction]:
    """The answers in a folder by id, for a comparison; nothing is written. ConfigError where there are none."""
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"against={folder}: no {FILE} there. What fits: the `out` of another evaluation of this task")
    return _parsed(path)[0]


def _parsed(path: Path) -> tuple[dict[str, Prediction], int]:
    """(answers by id, bytes up to the end of the last whole line)."""
    found: dict[str, Prediction] = {}
    whole = place = 0
    bad = ""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        place += len(line) + 1
        if not line:
            continue
        one = _prediction(line)
        if one is None:
            bad = bad or f"{path}:{number}"
        elif bad:
            raise DataError(f"{bad}: not a line of predictions, with whole lines after it. What fits: remove the line, or take another out=...")
        else:
            found[one.id], whole = one, place
    return found, min(whole, path.stat().st_size)


def _prediction(line: bytes) -> Prediction | None:
    try:
        values = json.loads(line)
        return Prediction(**{name: values.get(name) for name in _NAMES}) if values["id"] and "correct" in values else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _require_same(folder: Path, made_by: Mapping[str, Any]) -> None:
    try:
        old = json.loads((folder / MADE_BY).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        raise ConfigError(f"out={folder}: holds {FILE} without a whole {MADE_BY}, so what made it is not known. What fits: another out=...") from None
    one, two = _flat(old), _flat(made_by)
    changed = [key for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key)]
    if changed:
        lines = [f"  {key}: {one.get(key)!r:.100} there, {two.get(key)!r:.100} now" for key in changed[:8]]
        raise ConfigError(
            f"out={folder}: holds answers that were made otherwise, and the two are never mixed:\n" + "\n".join(lines)
            + "\nWhat fits: another out=..., or the same settings, which go on from there."
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix.removesuffix("."): tree}
    return {key: value for name, part in tree.items() for key, value in _flat(part, f"{prefix}{name}.").items()}


def fingerprint(items: Sequence[Item]) -> str:
    """A hash of all that is asked."""
    text = json.dumps([asdict(item) for item in items], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
