"""Rows out of files: each comes with its line (or index) or with the reason why it cannot be read.

A fault inside one row is that row's. A fault that hides how many rows follow (an array cut short, a quote never
closed, a damaged archive) is the file's, and raises DataError whatever `on_bad` says: what cannot be counted must
not be skipped. The standard library's json is used rather than a faster one because it lets us refuse repeated keys,
NaN and numbers beyond a float, which would otherwise be taken in silence.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import unicodedata
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from deltune.errors import DataError

MAX_ROW_BYTES = 32 * 2**20
MAX_DEPTH = 100
_BLANK = re.compile(r"[ \t\n\r]*")
_SHOWN = 2000  # characters kept of a line that is no row


@dataclass(frozen=True)
class File:
    """A file and how it is read. `where(n)` names its row n: a line, or an index from 0 in arrays and tables."""

    path: str
    kind: str  # jsonl, json, csv, tsv, parquet, txt, hub
    gzipped: bool = False
    split: str = ""  # of a hub data set, as all below
    subset: str = ""
    pattern: str = ""  # files inside the repository; "" is what it declares
    revision: str = ""

    def where(self, number: int) -> str:
        return f"{self.path}[{number}]" if self.kind in ("json", "parquet", "hub") else f"{self.path}:{number}"

    def open(self) -> BinaryIO:
        try:
            return gzip.open(self.path, "rb") if self.gzipped else open(self.path, "rb")  # type: ignore[return-value]
        except OSError as e:
            raise DataError(f"cannot open {self.path}: {e.strerror or e}") from e


class Cursor(NamedTuple):
    """Where reading goes on: a byte offset (of the unpacked text) and how many lines or rows lie before it."""

    offset: int = 0
    number: int = 0


class Record(NamedTuple):
    """One row: its value, or the fault and the text that has it. Reading after it starts at `after`."""

    number: int
    value: Any
    fault: str
    after: Cursor


def read(file: File, start: Cursor = Cursor()) -> Iterator[Record]:  # noqa: B008 - a constant
    """The rows of a file from a cursor on. Blank lines are no rows. Raises DataError if the file itself is broken."""
    try:
        yield from _READERS[file.kind](file, start)
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{file.path}: the gzip archive is damaged or cut short ({e})") from e
    except OSError as e:
        raise DataError(f"cannot read {file.path}: {e.strerror or e}") from e


# ---- strict JSON


class _Strict:
    """A JSON decoder that notes what must not pass in silence instead of raising, so that the end of the value is
    known all the same and the next one can be read."""

    def __init__(self) -> None:
        self.flaws: list[str] = []
        self.decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [k for k, _ in pairs]
            self.flaws.append(f"key {next(k for k in keys if keys.count(k) > 1)!r} appears twice")
        return found

    def _constant(self, name: str) -> None:
        self.flaws.append(f"{name} is no JSON value")

    def _float(self, text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            self.flaws.append(f"the number {text[:40]} is too large")
        return value

    def at(self, text: str, position: int) -> tuple[Any, int, str]:
        """(value, end, flaw) of the value that starts at a position; ValueError or RecursionError if there is none."""
        self.flaws.clear()
        value, end = self.decoder.raw_decode(text, position)
        flaw = self.flaws[0] if self.flaws else _flaw_inside(value, text, position, end)
        return value, end, flaw


def _flaw_inside(value: Any, text: str, start: int, end: int) -> str:
    """Nesting that later code could not follow, and characters that are no text. Only looked for where possible."""
    deep = text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH
    if not deep and text.find("\\u", start, end) < 0:
        return ""
    layer, depth = [value], 0
    while layer:
        if depth > MAX_DEPTH:
            return f"nested more than {MAX_DEPTH} deep"
        inner: list[Any] = []
        for item in layer:
            if isinstance(item, dict):
                inner.extend(item)
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif isinstance(item, str) and (flaw := text_flaw(item)):
                return flaw
        layer, depth = inner, depth + 1
    return ""


def printable(text: str, keep: str = "") -> str:
    """Text for a terminal: control and direction characters, and line ends not in `keep`, are written out as escapes,
    so that data cannot steer the terminal or forge lines of a message."""
    if text.isascii() and text.isprintable():
        return text
    hidden = {c for c in set(text) if c not in keep and (unicodedata.category(c)[0] == "C" or unicodedata.category(c) in ("Zl", "Zp"))}
    return text.translate({ord(c): c.encode("unicode_escape").decode() for c in hidden}) if hidden else text


def text_flaw(text: str) -> str:
    """Why a string is no text: half of a surrogate pair, or a NUL."""
    if "\x00" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return f"half of a surrogate pair (\\u{ord(text[e.start]):04x}), which is no character"
    return ""


def parse_line(line: str, strict: _Strict | None = None) -> tuple[Any, str]:
    """(value, fault) of a line of JSON."""
    strict = strict or _Strict()
    try:
        value, end, flaw = strict.at(line, _BLANK.match(line).end())  # type: ignore[union-attr]
    except json.JSONDecodeError as e:
        if "\x00" in line:
            return None, "a NUL byte: the file is binary, UTF-16 or damaged"
        cut = " (the line ends early)" if e.pos >= len(line.rstrip()) or e.msg.startswith("Unterminated") else ""
        return None, f"not valid JSON: {e.msg} at column {e.pos + 1}{cut}"
    except RecursionError:
        return None, f"nested more than {MAX_DEPTH} deep"
    except ValueError as e:  # an integer of more digits than Python converts
        return None, f"not valid JSON: {e}"
    rest = _BLANK.match(line, end).end()  # type: ignore[union-attr]
    if rest < len(line):
        return None, f"not valid JSON: more text after the value, at column {rest + 1}"
    return value, flaw


# ---- lines


def _lines(file: File, start: Cursor) -> Iterator[tuple[int, bytes, Cursor]]:
    """(line number from 1, the bytes without line end, cursor after it). An overlong line comes cut at the limit + 1."""
    with file.open() as stream:
        if start.offset:
            stream.seek(start.offset)
        offset, number = start
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            offset += len(line)
            kept = line
            while len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):  # pass over the rest of a huge line
                line = stream.readline(MAX_ROW_BYTES + 1)
                offset += len(line)
            if number == 1:
                if kept[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise DataError(f"{file.path} is UTF-16 text; save it as UTF-8")
                kept = kept.removeprefix(b"\xef\xbb\xbf")
            yield number, kept, Cursor(offset, number)


def _decode(line: bytes) -> tuple[str, str]:
    """(text, fault)."""
    if len(line) > MAX_ROW_BYTES:
        return line[:_SHOWN].decode(errors="replace"), f"the line is longer than {MAX_ROW_BYTES // 2**20} MiB"
    try:
        return line.decode().rstrip("\r\n"), ""
    except UnicodeDecodeError as e:
        return line[:_SHOWN].decode(errors="replace"), f"not UTF-8: byte 0x{line[e.start]:02x} at column {e.start + 1}"


def _read_jsonl(file: File, start: Cursor) -> Iterator[Record]:
    strict = _Strict()
    for number, line, after in _lines(file, start):
        text, fault = _decode(line)
        if not fault and not text.strip():
            continue
        value = None
        if not fault:
            value, fault = parse_line(text, strict)
        yield Record(number, text[:_SHOWN] if fault else value, fault, after)


def _read_txt(file: File, start: Cursor) -> Iterator[Record]:
    """Every line that is not blank is a document."""
    for number, line, after in _lines(file, start):
        text, fault = _decode(line)
        if not fault and not text.strip():
            continue
        fault = fault or text_flaw(text)
        yield Record(number, text[:_SHOWN] if fault else {"text": text}, fault, after)


# ---- arrays


def _line_of(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _read_json(file: File, start: Cursor) -> Iterator[Record]:
    """A list of rows, or an object that holds one under `data`, `rows` or `Instances`. Read whole: JSON arrays cannot be entered
    in the middle."""
    with file.open() as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{file.path} is not UTF-8: byte 0x{data[e.start]:02x} at offset {e.start}") from e
    position = _BLANK.match(text).end()  # type: ignore[union-attr]
    if text[position : position + 1] == "[":
        yield from _elements(file, text, position + 1, start.number)
        return
    value, flaw = parse_line(text)
    if flaw:
        raise DataError(f"{file.path}: {flaw}")
    lists = [k for k in ("data", "rows", "Instances") if isinstance(value, dict) and isinstance(value.get(k), list)]
    if len(lists) != 1:
        found = f"an object with keys {', '.join(map(repr, list(value)[:8]))}" if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{file.path} holds {found}; expected a list of rows, or an object with the list under `data` or `rows`")
    # a task of natural-instructions: its rows share its definition, and its name is that of the file
    shared = {"task": Path(file.path).name.partition(".")[0], "Definition": value.get("Definition")} if lists == ["Instances"] else {}
    for index, row in enumerate(value[lists[0]][start.number :], start.number):
        yield Record(index, {**shared, **row} if shared and isinstance(row, dict) else row, "", Cursor(0, index + 1))


def _elements(file: File, text: str, position: int, first: int) -> Iterator[Record]:
    strict, index = _Strict(), 0
    position = _BLANK.match(text, position).end()  # type: ignore[union-attr]
    if text[position : position + 1] == "]":
        return
    while True:
        try:
            value, end, flaw = strict.at(text, position)
        except (ValueError, RecursionError) as e:
            at = e.pos if isinstance(e, json.JSONDecodeError) else position
            reason = "nested too deep" if isinstance(e, RecursionError) else getattr(e, "msg", e)
            raise DataError(
                f"{file.path}: not valid JSON in row {index}, line {_line_of(text, at)}: {reason}; the rows after it "
                "cannot be told apart. Mend the file (one row a line, JSONL, would lose only the bad row)"
            ) from e
        if index >= first:
            yield Record(index, text[position:end][:_SHOWN] if flaw else value, flaw, Cursor(0, index + 1))
        index += 1
        position = _BLANK.match(text, end).end()  # type: ignore[union-attr]
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            found = "the file ends" if not mark else f"{mark!r} stands"
            raise DataError(f"{file.path}: after row {index - 1}, line {_line_of(text, position)}, {found} where ',' or ']' must be")
        position = _BLANK.match(text, position + 1).end()  # type: ignore[union-attr]
        if mark == "]":
            if position < len(text):
                raise DataError(f"{file.path}: more text after the list ends, line {_line_of(text, position)}")
            return


# ---- tables


def _read_csv(file: File, start: Cursor) -> Iterator[Record]:
    """Strict CSV: a header, then rows with as many cells. Bytes that are not UTF-8 travel as surrogates up to the row
    they belong to, so that they are that row's fault and no other's."""
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    delimiter = "\t" if file.kind == "tsv" else ","
    position = Cursor()

    def text_lines(first: Cursor) -> Iterator[str]:
        nonlocal position
        for _, line, position in _lines(file, first):  # noqa: B007 - read by the loop below
            yield line.decode("utf-8", errors="surrogateescape")

    reader = csv.reader(text_lines(Cursor()), delimiter=delimiter, strict=True)
    header = _header(file, reader)
    if start.offset > position.offset:
        position = start
        reader = csv.reader(text_lines(start), delimiter=delimiter, strict=True)
    while True:
        number = position.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            if "unexpected end" in str(e) or "field limit" in str(e):
                raise DataError(f"{file.path}:{number}: a quote opened in this row is never closed") from e
            yield Record(number, f"(line {number})", f"not valid {file.kind.upper()}: {e}", position)
            continue
        if not cells:
            continue
        fault = _flaw_of_cells(cells, header)
        value: Any = delimiter.join(cells)[:_SHOWN] if fault else dict(zip(header, cells, strict=True))
        yield Record(number, value, fault, position)


def _header(file: File, reader: Any) -> list[str]:
    try:
        header = next(reader)
    except StopIteration:
        return []
    except csv.Error as e:
        raise DataError(f"{file.path}:1: the header is not valid {file.kind.upper()}: {e}") from e
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{file.path}:1: column {twice[0]!r} appears twice in the header")
    if len(header) == 1 and (other := [c for c in ";\t,|" if c in header[0]]):
        raise DataError(
            f"{file.path}:1: the header is one column, {header[0]!r}, but holds {other[0]!r}; "
            ".csv files are separated by commas, .tsv files by tabs"
        )
    return header


def _flaw_of_cells(cells: list[str], header: list[str]) -> str:
    if len(cells) != len(header):
        return f"{len(cells)} cells, but the header has {len(header)} columns"
    for name, cell in zip(header, cells, strict=True):
        if flaw := text_flaw(cell):
            return f"column {name!r} is not UTF-8" if "surrogate" in flaw else f"column {name!r} holds {flaw}"
    return ""


def _read_parquet(file: File, start: Cursor) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        index = 0
        for group in range(table.num_row_groups):
            num_rows = table.metadata.row_group(group).num_rows
            if index + num_rows <= start.number:
                index += num_rows
                continue
            for batch in table.iter_batches(batch_size=512, row_groups=[group]):
                for row in batch.to_pylist():
                    if index >= start.number:
                        yield Record(index, row, "", Cursor(0, index + 1))
                    index += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as e:
        raise DataError(f"{file.path} is not a readable Parquet file: {e}") from e


def open_hub(file: File) -> Any:
    """A split of a hub data set, through the optional `datasets` library."""
    try:
        import datasets
    except ImportError as e:
        raise DataError(f"{file.path} needs the `datasets` library: pip install 'deltune[hub]'") from e
    try:
        return datasets.load_dataset(**_hub_arguments(file))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as e:  # not found, no network, unknown split
        raise DataError(f"cannot load {file.path} (split {file.split}): {e}") from e


_BUILDERS = {"jsonl": "json", "json": "json", "ndjson": "json", "csv": "csv", "parquet": "parquet", "txt": "text"}


def _hub_arguments(file: File) -> dict[str, Any]:
    """What load_dataset is called with. Single files are read by a builder for their kind, so that nothing of the
    repository but these files is looked at: some hold a loading script, which the library refuses to run."""
    name = file.path.removeprefix("hf:")
    if not file.pattern:
        given = {"name": file.subset, "revision": file.revision}
        return {"path": name, "split": file.split} | {key: value for key, value in given.items() if value}
    ending = file.pattern.removesuffix(".gz").rpartition(".")[2]
    if ending not in _BUILDERS:
        raise DataError(f"{file.path}: files={file.pattern} must end in {', '.join('.' + kind for kind in _BUILDERS)} (or these with .gz)")
    revision = f"@{file.revision.replace('/', '%2F')}" if file.revision else ""
    place = f"hf://datasets/{name}{revision}/{file.pattern}"
    return {"path": _BUILDERS[ending], "data_files": {file.split: place}, "split": file.split}


def _read_hub(file: File, start: Cursor) -> Iterator[Record]:
    rows = open_hub(file)
    for index in range(start.number, len(rows)):
        yield Record(index, rows[index], "", Cursor(0, index + 1))


_READERS = {
    "jsonl": _read_jsonl,
    "txt": _read_txt,
    "json": _read_json,
    "csv": _read_csv,
    "tsv": _read_csv,
    "parquet": _read_parquet,
    "hub": _read_hub,
}
