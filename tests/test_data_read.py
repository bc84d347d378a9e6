"""Files of every kind: what a row is, where it stands, and what is said of a broken one."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import types
from itertools import islice

import pytest

from deltune.data.config import Source
from deltune.data.read import MAX_ROW_BYTES, read
from deltune.data.sources import identify, resolve
from deltune.errors import DataError

ROWS = [{"input": f"q{i}", "output": "é\n漢" * (i % 3 + 1)} for i in range(7)]


def rows_of(path, format=None):
    return [(r.number, r.value) for r in read(identify(path, format)) if not r.fault]


def faults_of(path):
    return {r.number: r.fault for r in read(identify(path)) if r.fault}


def write(path, body: bytes | str):
    path.write_bytes(body if isinstance(body, bytes) else body.encode())
    return path


def csv_body(delimiter=",", rows=ROWS):
    quoted = [[f'"{cell}"' for cell in row.values()] for row in rows]
    return "\r\n".join(delimiter.join(r) for r in [["input", "output"], *quoted]) + "\r\n"


def parquet(path, rows=ROWS, row_group_size=3):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def every_kind(folder):
    lines = "".join(json.dumps(r) + "\n" for r in ROWS)
    return [
        write(folder / "a.jsonl", lines),
        write(folder / "b.json", json.dumps(ROWS, indent=1)),
        write(folder / "c.json", json.dumps({"version": 1, "data": ROWS})),
        write(folder / "d.csv", csv_body()),
        write(folder / "e.tsv", csv_body("\t")),
        parquet(folder / "f.parquet"),
        write(folder / "g.jsonl.gz", gzip.compress(lines.encode())),
        write(folder / "h.ndjson", lines),
        write(folder / "i.csv.gz", gzip.compress(csv_body().encode())),
    ]


def test_all_kinds_of_files_give_the_same_rows(tmp_path):
    for path in every_kind(tmp_path):
        assert [value for _, value in rows_of(path)] == ROWS, path.name


def test_reading_goes_on_from_any_row(tmp_path):
    """What a cursor promises: after row k, exactly the rows behind it, with the same numbers."""
    for path in every_kind(tmp_path):
        file = identify(path)
        everything = list(read(file))
        for k, record in enumerate(everything):
            assert list(read(file, record.after)) == everything[k + 1 :], (path.name, k)


def test_rows_carry_their_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"a": 1}\n\n   \r\n{"a": 2}')
    assert rows_of(path) == [(2, {"a": 1}), (5, {"a": 2})]
    assert identify(path).where(5) == f"{path}:5"
    path = write(tmp_path / "a.csv", 'a,b\n1,"two\nlines"\n3,4\n')
    assert [n for n, _ in rows_of(path)] == [2, 4]
    path = write(tmp_path / "a.json", '[{"a": 1},\n{"a": 2}]')
    assert identify(path).where(rows_of(path)[1][0]) == f"{path}[1]"


def test_text_has_a_document_on_each_line(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffone\r\n\n  two\nthree")
    assert rows_of(path) == [(1, {"text": "one"}), (3, {"text": "  two"}), (4, {"text": "three"})]


def test_byte_order_mark_line_ends_and_missing_last_line_end(tmp_path):
    for kind, body in (("jsonl", '{"a": "x"}\r\n{"a": "y"}'), ("csv", "a\r\nx\r\ny"), ("json", '\r\n[{"a": "x"}, {"a": "y"}]')):
        path = write(tmp_path / f"a.{kind}", b"\xef\xbb\xbf" + body.encode())
        assert [value for _, value in rows_of(path)] == [{"a": "x"}, {"a": "y"}]


BAD_LINES = {
    '{"a": 1, "b": {"a": 2, "c": 3, "c": 4}}': "key 'c' appears twice",
    '{"a": NaN}': "NaN is no JSON value",
    '{"a": -Infinity}': "-Infinity is no JSON value",
    '{"a": 1e999}': "the number 1e999 is too large",
    '{"a": ' + "9" * 5000 + "}": "not valid JSON",
    '{"a": "\\ud800"}': "half of a surrogate pair (\\ud800)",
    '{"\\udc00": 1}': "half of a surrogate pair (\\udc00)",
    '{"a": "\\u0000"}': "a NUL character",
    '{"a": "x\x00y"}': "a NUL byte",
    '{"a": ' + "[" * 200 + "]" * 200 + "}": "nested more than 100 deep",
    "[" * 100_000: "nested more than 100 deep",
    '{"a": 1}{"a": 2}': "more text after the value, at column 9",
    '{"a": "x': "the line ends early",
    '{"a": 1,': "the line ends early",
    "{'a': 1}": "Expecting property name",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20])
def test_a_bad_line_is_named_and_its_neighbours_are_read(tmp_path, line):
    path = write(tmp_path / "a.jsonl", '{"a": 0}\n' + line + '\n{"a": 1}\n')
    assert rows_of(path) == [(1, {"a": 0}), (3, {"a": 1})]
    (number, fault) = faults_of(path).popitem()
    assert number == 2 and BAD_LINES[line] in fault


def test_bytes_that_are_not_utf8_are_that_row_s_fault(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"a": 0}\n{"a": "caf\xe9"}\n{"a": 1}\n')
    assert faults_of(path) == {2: "not UTF-8: byte 0xe9 at column 11"}
    path = write(tmp_path / "a.csv", b"a,b\n1,2\n3,\xe9\n5,6\n")
    assert [n for n, _ in rows_of(path)] == [2, 4] and "column 'b' is not UTF-8" in faults_of(path)[3]


def test_a_huge_line_is_refused_without_being_held(tmp_path):
    size = MAX_ROW_BYTES + 10_000_000
    with open(tmp_path / "a.jsonl", "wb") as stream:
        stream.write(b'{"a": "' + b"x" * size + b'"}\n{"a": 1}\n')
    assert faults_of(tmp_path / "a.jsonl") == {1: "the line is longer than 32 MiB"}
    records = list(read(identify(tmp_path / "a.jsonl")))
    assert records[1][:2] == (2, {"a": 1}) and len(records[0].value) <= 2000


def test_rows_of_a_wrong_width_are_refused(tmp_path):
    path = write(tmp_path / "a.csv", "a,b\n1,2\n3\n4,5,6\n7,8\n")
    assert [n for n, _ in rows_of(path)] == [2, 5]
    assert "1 cells, but the header has 2" in faults_of(path)[3] and "3 cells" in faults_of(path)[4]


BROKEN_FILES = {
    "cut.json": (b'[{"a": 1}, {"a": 2', "not valid JSON in row 1, line 1"),
    "cut2.json": (b'[{"a": 1}, {"a": 2}', "after row 1, line 1, the file ends"),
    "comma.json": (b'[{"a": 1}\n {"a": 2}]', "after row 0, line 2, '{' stands"),
    "more.json": (b'[{"a": 1}]\nx', "more text after the list ends, line 2"),
    "deep.json": (b"[" * 100_000, "nested too deep"),
    "latin.json": (b'[{"a": "\xe9"}]', "is not UTF-8: byte 0xe9"),
    "object.json": (b'{"a": 1,\n "b": 2}', "holds an object with keys 'a', 'b'; expected a list of rows"),
    "two.json": (b'{"data": [],\n "rows": []}', "expected a list of rows"),
    "number.json": (b"7", "holds int"),
    "quote.csv": (b'a,b\n1,2\n3,"4\n5,6\n', "quote.csv:3: a quote opened in this row is never closed"),
    "twice.csv": (b"a,b,a\n1,2,3\n", "column 'a' appears twice"),
    "semicolon.csv": (b"a;b\n1;2\n", "but holds ';'"),
    "wide.jsonl": ("{}\n".encode("utf-16"), "is UTF-16"),
    "cut.jsonl.gz": (gzip.compress(b'{"a": 1}\n' * 1000)[:-20], "damaged or cut short"),
    "bad.jsonl.gz": (b"\x1f\x8b\x08\x00garbage....", "damaged or cut short"),
    "bad.parquet": (b"PAR1 garbage PAR1", "not a readable Parquet file"),
    "not.parquet": (b'{"a": 1}\n', "is named .parquet but is none"),
    "sheet.csv": (b"PK\x03\x04 garbage", "zip archive or spreadsheet"),
    "what.xyz": (b"hello", "cannot tell what this file is"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_an_error_with_its_place(tmp_path, name):
    body, reason = BROKEN_FILES[name]
    path = write(tmp_path / name, body)
    with pytest.raises(DataError) as error:
        list(read(identify(path)))
    assert reason in str(error.value) and str(path) in str(error.value)


def test_content_wins_over_a_wrong_name(tmp_path):
    lines = '{"a": 1}\n{"a": 2}\n'
    for name in ("a.json", "a.txt", "a.data", "a"):
        assert identify(write(tmp_path / name, lines)).kind == "jsonl"
    assert identify(write(tmp_path / "b.jsonl", '[\n{"a": 1}\n]')).kind == "json"
    assert identify(write(tmp_path / "b.txt", lines), "text").kind == "txt"
    assert identify(parquet(tmp_path / "c.json")).kind == "parquet"
    assert rows_of(write(tmp_path / "d.jsonl", gzip.compress(lines.encode()))) == [(1, {"a": 1}), (2, {"a": 2})]


def test_folders_globs_and_lists_in_a_fixed_order(tmp_path):
    for name in ("b/2.jsonl", "a/1.csv", "c.txt", "README.md", ".hidden/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "a\n1\n" if name.endswith("csv") else '{"a": 1}\n')
    names = lambda path: [f.path.removeprefix(f"{tmp_path}/") for s in resolve([str(path)], "data.train") for f in s.files]  # noqa: E731
    assert names(tmp_path) == ["a/1.csv", "b/2.jsonl", "c.txt"]
    assert names(tmp_path / "**/*.jsonl") == ["b/2.jsonl"]
    two = resolve([str(tmp_path / "c.txt"), Source(path=str(tmp_path / "b"), weight=2.0)], "data.train")
    assert [s.source.weight for s in two] == [1.0, 2.0]


def test_the_bundled_task_is_in_the_package():
    train, held = (resolve(["bundled"], key)[0].files[0] for key in ("data.train", "data.eval"))
    prompts = [{record.value["prompt"] for record in read(file)} for file in (train, held)]
    assert all(prompts) and not prompts[0] & prompts[1]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("trian.jsonl", "no file or folder .*holds train.jsonl"), ("*.csv", "nothing matches"), ("empty", "no data files below")],
)
def test_a_name_that_leads_nowhere_shows_what_is_there(tmp_path, name, reason):
    write(tmp_path / "train.jsonl", "{}\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=reason):
        resolve([str(tmp_path / name)], "data.train")


def test_pickles_of_torch_are_not_opened_and_the_line_that_rewrites_them_works(tmp_path):
    import torch

    rows = [{"inputs": "a", "targets": "漢"}] * 3
    torch.save(rows, tmp_path / "shard.pt")
    with pytest.raises(DataError, match="this is a pickle") as error:
        identify(tmp_path / "shard.pt")
    line = str(error.value).partition("trust: ")[2].replace("python ", f"{sys.executable} ", 1)
    subprocess.run(line, shell=True, check=True, cwd=tmp_path)
    assert rows_of(tmp_path / "shard.jsonl") == [(i, row) for i, row in enumerate(rows, 1)]


def test_hub_data_sets_come_through_the_optional_library(monkeypatch):
    asked = []

    class Rows(list):
        _fingerprint = "abc"

    class DatasetsError(Exception):
        pass

    def load_dataset(path, split):
        asked.append((path, split))
        if path == "gone":
            raise FileNotFoundError("no such data set")
        if path == "broken":
            raise DatasetsError("cannot be built")
        return Rows(ROWS)

    (source,) = resolve([Source(path="hf:owner/name", split="test")], "data.train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the `datasets` library: pip install 'deltune\[hub\]'"):
        list(read(source.files[0]))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, exceptions=types.SimpleNamespace(DatasetsError=DatasetsError)))
    records = list(read(source.files[0]))
    assert [r.value for r in records] == ROWS and asked[0] == ("owner/name", "test")
    assert source.files[0].where(3) == "hf:owner/name[3]"
    assert [r.number for r in islice(read(source.files[0], records[4].after), 5)] == [5, 6]
    for name in ("hf:gone", "hf:broken"):
        with pytest.raises(DataError, match=f"cannot load {name}"):
            list(read(resolve([name], "data.train")[0].files[0]))
