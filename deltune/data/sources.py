"""From what the user names to the files that are read, in an order that does not depend on the machine.

A name is a file, a folder, a glob, `bundled`, a public data set (see named.py) or `hf:owner/name`. What a file is, its content decides where the name
is wrong; a file that cannot be read as rows is an error, never passed over, except in a folder, where it is named.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deltune.data.config import Source
from deltune.data.named import NAMED, named
from deltune.data.read import File, open_hub, parse_line
from deltune.errors import DataError
from deltune.log import logger

BUNDLED = Path(__file__).parent / "bundled"
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".txt": "txt"}
_HEAD_BYTES = 2**20


@dataclass(frozen=True)
class SourceFiles:
    """One entry of data.train or data.eval with the files it stands for."""

    name: str
    source: Source
    files: tuple[File, ...]
    shape: str = ""  # the format that is meant where none is given: the name of a public data set

    @property
    def size(self) -> int:
        """How much is in it, for mixing streams: bytes on disk, or as many thousand as a hub data set has rows."""
        return sum(len(open_hub(f)) * 1000 if f.kind == "hub" else Path(f.path).stat().st_size for f in self.files)


def resolve(sources: Sequence[str | Source], key: str) -> list[SourceFiles]:
    """The files of data.train or data.eval; `key` names the setting in errors and chooses the bundled split."""
    found = []
    for entry in sources:
        source = Source(path=entry) if isinstance(entry, str) else entry
        if named(source.path) is None:
            files = tuple(_files(source, key))
            # a set of files of several formats: each is a source
            several = source.format in NAMED and len(NAMED[source.format].files) > 1
            parts = [(file,) for file in files] if several else [files]
            found += [SourceFiles(part[0].path if several else source.path, source, part) for part in parts]
        else:
            found += _public(source, key)
    return found


def _public(source: Source, key: str) -> Iterator[SourceFiles]:
    """A public data set by its name: a source for each of its files, where these have formats of their own."""
    name, data = source.path.lower(), NAMED[source.path.lower()]
    if os.path.exists(source.path):
        other = f"hf:{data.hub}" if data.hub else "its name in another folder"
        raise DataError(f"{key}: {source.path!r} is a file or folder here and the name of a public data set; say ./{source.path} for the first, {other} for the second")
    if data.hub is None:
        raise DataError(f"{key}: {source.path!r} cannot be had from the hub: {data.note}, with format: {name}")
    patterns = (source.files,) if source.files else data.files
    for pattern in patterns:
        subset, revision = source.subset or data.subset, source.revision or data.revision
        file = File(f"hf:{data.hub}", "hub", split=source.split, subset=subset, pattern=pattern, revision=revision)
        yield SourceFiles(f"{source.path}/{pattern}" if len(patterns) > 1 else source.path, source, (file,), shape=name)


def _files(source: Source, key: str) -> Iterator[File]:
    if source.path == "bundled":
        yield File(str(BUNDLED / ("eval.jsonl" if key == "data.eval" else "train.jsonl")), "jsonl")
        return
    if source.path.startswith("hf:"):
        subset, pattern, revision = source.subset or "", source.files or "", source.revision or ""
        yield File(source.path, "hub", split=source.split, subset=subset, pattern=pattern, revision=revision)
        return
    for setting, unset in (("split", "train"), ("subset", None), ("files", None), ("revision", None)):
        if getattr(source, setting) != unset:
            raise DataError(f"{key}: {setting} has no effect on {source.path!r}, which is no hub data set")
    path = Path(source.path).expanduser()
    if path.is_file():
        yield identify(path, source.format)
    elif path.is_dir():
        yield from _folder(path, source.format, key)
    elif glob.has_magic(str(path)):
        matches = sorted(p for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not matches:
            raise DataError(f"{key}: nothing matches {source.path!r}{_nearby(path)}")
        for match in matches:
            yield identify(Path(match), source.format)
    else:
        close = difflib.get_close_matches(source.path.lower(), NAMED, n=1)
        public = f"; the public data set {close[0]!r}?" if close else ""
        raise DataError(f"{key}: no file or folder {source.path!r}{_nearby(path)}{public}")


def _folder(folder: Path, format: str | None, key: str) -> Iterator[File]:
    """All data files below a folder, sorted by their path inside it; hidden ones and others are left out and named."""
    below = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.relative_to(folder).as_posix())
    data, other = [], []
    for path in below:
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        (other if hidden or _extension(path) not in KINDS else data).append(path)
    if not data:
        raise DataError(f"{key}: no data files below {folder}; data files end in {', '.join(KINDS)} (or these with .gz)")
    if other:
        logger.info("%s: %d files below %s are no data files: %s", key, len(other), folder, _some([p.name for p in other]))
    for path in data:
        yield identify(path, format)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _nearby(path: Path) -> str:
    """The names in the nearest folder that exists, closest first."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    missing = path.relative_to(folder).parts[0] if path.is_relative_to(folder) and path != folder else path.name
    close = difflib.get_close_matches(missing, names, n=3, cutoff=0.5)
    shown = close or names
    return f"; {folder} holds {_some(shown)}" if shown else ""


def _extension(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] == ".gz" else (suffixes[-1] if suffixes else "")


def identify(path: Path, format: str | None = None) -> File:
    """How a file is read: by its content where that is beyond doubt, else by its name."""
    raw = _head(path, gzipped=False)
    gzipped = raw[:2] == b"\x1f\x8b"
    head = _head(path, gzipped=True) if gzipped else raw
    extension = _extension(path)
    if head[:4] == b"PAR1":
        if gzipped:
            raise DataError(f"{path}: a Parquet file inside gzip; unpack it")
        return _said(path, "parquet", extension)
    if extension == ".pt":
        raise DataError(
            f"{path}: this is a pickle, which can run code when it is opened. Write its rows as JSON lines, in a place that you "
            f"trust: python -c \"import json, torch; print(*map(json.dumps, torch.load('{path.name}', weights_only=True)), sep='\\n')\" > {path.stem}.jsonl"
        )
    if head[:4] == b"PK\x03\x04":
        raise DataError(f"{path} is a zip archive or spreadsheet; unpack it, or save it as CSV or JSONL")
    kind = KINDS.get(extension)
    if kind == "parquet":
        raise DataError(f"{path} is named .parquet but is none (it does not start with PAR1)")
    if kind in (None, "json", "jsonl", "txt"):
        kind = _json_kind(head, kind, text_wanted=format == "text") or kind
    if kind is None:
        raise DataError(f"{path}: cannot tell what this file is; data files end in {', '.join(KINDS)} (or these with .gz)")
    return File(str(path), kind, gzipped) if extension in KINDS and KINDS[extension] == kind else _said(path, kind, extension, gzipped)


def _said(path: Path, kind: str, extension: str, gzipped: bool = False) -> File:
    if KINDS.get(extension) != kind:
        logger.info("%s is read as %s, which it holds", path, kind.upper())
    return File(str(path), kind, gzipped)


def _head(path: Path, *, gzipped: bool) -> bytes:
    """The beginning of a file, at least its first line if that is below 1 MiB."""
    try:
        with gzip.open(path) if gzipped else open(path, "rb") as stream:
            return stream.read(_HEAD_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{path}: the gzip archive is damaged or cut short ({e})") from e
    except OSError as e:
        raise DataError(f"cannot open {path}: {e.strerror or e}") from e


def _json_kind(head: bytes, kind: str | None, text_wanted: bool) -> str | None:
    """Tell a JSON array from JSON lines by the first line: whole and followed by another, it is a line."""
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    line, _, rest = text.partition("\n")
    if kind == "txt":
        return "jsonl" if not text_wanted and line.startswith("{") and not parse_line(line)[1] else None
    whole = bool(line) and not parse_line(line)[1]
    if line.startswith("{"):
        return "jsonl" if whole and (rest.strip() or kind != "json") else (kind or "json")
    if line.startswith("["):
        array = line.rstrip() == "[" or line.startswith("[{")
        return "json" if kind != "jsonl" or (array and not (whole and rest.strip())) else "jsonl"
    return None


def digest(file: File) -> str:
    """sha256 of a file's bytes; of a hub data set, its library's fingerprint of the content."""
    if file.kind == "hub":
        return f"hub {open_hub(file)._fingerprint}"
    try:
        with open(file.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as e:
        raise DataError(f"cannot read {file.path}: {e.strerror or e}") from e
