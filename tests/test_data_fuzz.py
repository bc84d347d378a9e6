"""Malformed input, 1,000 lines of every format: never another exception than DataError, and every row is accounted for."""

from __future__ import annotations

import json
import random
from copy import deepcopy

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from deltune.data.formats import DOCUMENTS, ROLES
from deltune.errors import DataError
from tests.encoded import prepared
from tests.test_data_templates import TOOLS, tokenizer_with

TOKENIZER = tokenizer_with(TOOLS)
LINES, BATCHES = 200, 5

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
GOOD = {
    "alpaca": {"instruction": "Add", "input": "1 2", "output": "3", "system": "s", "history": [["a", "b"]]},
    "prompt_completion": {"prompt": "p", "completion": "c"},
    "input_output": {"input": "i", "output": "漢"},
    "messages": {
        "messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "r"}, {"role": "assistant", "content": "a", "loss_weight": 1.0},
        ],
        "tools": [TOOL],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "h"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "o"}, {"from": "gpt", "value": "g"},
        ],
        "tools": "[]",
    },
    "text": {"text": "some text"},
    "dialogue": {"text": "### Human: h### Assistant: a"},
    "tree": {"prompt": {"role": "prompter", "text": "p", "replies": [
        {"role": "assistant", "text": "a", "rank": 1, "replies": []}, {"role": "assistant", "text": "b", "rank": 0, "deleted": False, "replies": []},
    ]}},
    "instances": {"instruction": "i", "instances": [{"input": "x", "output": "o"}], "reformulations": [{"instruction_with_input": "y", "output": "o"}]},
    "task": {"definition": ["d"], "input": "i", "output": ["o", "p"]},
    "exam": {"instruction": "i", "question": "q", "answer": "a", "context": "c", "analysis": "b"},
    "rounds": {"round_0": {"response": '{"Q": "q", "A": "a"}'}, "round_1": {"response": {"Q": "q", "A": "a"}}},
    "titled": {"title": "t", "content": "c"},
}  # fmt: skip

VALUES = [
    None, True, False, 0, -1, 3.5, 10**30, "", " ", "\n", "x", "</s>", "<|assistant|>", "{{ 7 }}", "\x00", "\ud800", "\U0001f600", "é" * 50,
    [], {}, [[]], [None], {"role": "user"}, [{"from": "gpt"}], {"a": {"b": [1]}}, ["text"], "[{", '[{"role": "user", "content": "x"}]',
]  # fmt: skip
TEXT = ["", "\x00", '"', "\\", "{", "}", "[", "]", ",", ":", "NaN", "1e999", "-Infinity", "\\ud800", "\\u0000", "\ufeff", "\r", "\n", "\u2028", " ", "'", "\t"]
BYTES = [b"\x80", b"\xff", b"\xed\xa0\x80", b"\xc3", b"\x00", b"\xf5\x80\x80\x80"]


def places(value, found=None):
    """Every (container, key) inside a value."""
    found = [] if found is None else found
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        places(inner, found)
    return found


def mutate(good, rng: random.Random) -> bytes:
    """A line that is probably no good any more."""
    row = deepcopy(good)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        if not (spots := places(row)):
            break
        container, key = rng.choice(spots)
        action = rng.randrange(5)
        if action == 0:
            container[key] = deepcopy(rng.choice(VALUES))
        elif action == 1:
            del container[key]
        elif action == 2 and isinstance(container, dict):
            container[f"{key}x"] = container.pop(key)
        elif action == 3 and isinstance(container, list):
            container.insert(key, deepcopy(container[key]))
            rng.shuffle(container)
        else:
            other, name = rng.choice(spots)
            container[key] = deepcopy(other.get(name)) if isinstance(other, dict) else None
    if rng.random() < 0.05:
        row = deepcopy(rng.choice(VALUES))
    text = json.dumps(row, ensure_ascii=rng.random() < 0.5)
    action = rng.randrange(8)
    at = rng.randrange(len(text) + 1)
    if action == 0:
        text = text[:at]
    elif action == 1:
        text = text[:at] + rng.choice(TEXT) + text[at:]
    elif action == 2:
        text = text[:at] + rng.choice(TEXT) + text[at + rng.randrange(4) :]
    elif action == 3 and text.startswith('{"'):
        text = text[:-1] + ", " + text[1:]  # every key twice
    elif action == 4 and rng.random() < 0.2:
        text = text.replace("null", "[" * 500 + "]" * 500).replace('"s"', "[" * 3000)
    body = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        cut = rng.randrange(len(body) + 1)
        body = body[:cut] + rng.choice(BYTES) + body[cut:]
    return body + rng.choice([b"\n", b"\n", b"\n", b"\r\n"])


def is_row(line: bytes) -> bool:
    try:
        return bool(line.decode().strip())
    except UnicodeDecodeError:
        return True


# a batch cannot be made smaller by choosing another seed
fuzzed = settings(
    max_examples=BATCHES, deadline=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def lines_of(path) -> list[dict]:
    """JSON lines; str.splitlines would also cut at U+2028 inside them."""
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]] if path.exists() else []


@pytest.mark.parametrize("format", GOOD)
@fuzzed
@given(seed=st.integers(0, 2**32))
def test_every_malformed_line_is_used_or_rejected_with_a_reason(tmp_path, format, seed):
    rng = random.Random(seed)
    good = json.dumps(GOOD[format], ensure_ascii=False).encode() + b"\n"
    body = good + b"".join(mutate(GOOD[format], rng) for _ in range(LINES))
    path = tmp_path / "a.jsonl"
    path.write_bytes(body)
    lines = {number for number, line in enumerate(body.split(b"\n"), 1) if is_row(line)}
    fields = {role: role for role in ROLES[format][0]}  # so that a lost letter makes no other known column name
    chosen = {"format": format, "fields": fields, "mode": "pretrain" if format in DOCUMENTS else "sft"}
    result = prepared(path, TOKENIZER, folder=tmp_path, on_bad="skip", **chosen)
    used = {int(result.train[i].row.rpartition(":")[2]) for i in range(len(result.train))}
    rejects = lines_of(tmp_path / "rejects.jsonl")
    rejected = [r["line"] for r in rejects]
    counts = result.report.counts
    assert counts.rows == len(lines) == counts.used + counts.rejected + counts.overlong
    assert used | set(rejected) == lines and not used & set(rejected) and len(set(rejected)) == len(rejected)
    assert counts.rejected == len(rejected) > 20
    assert all(r["reason"] and "Traceback" not in r["reason"] for r in rejects)
    streamed = prepared(path, TOKENIZER, on_bad="skip", streaming=True, shuffle=False, **chosen).train
    assert [e.row for e in streamed.take(len(result.train))] == [result.train[i].row for i in range(len(result.train))]
    with pytest.raises(DataError) as error:
        prepared(path, TOKENIZER, **chosen)
    assert [int(line.split(": ")[0].rpartition(":")[2]) for line in str(error.value).splitlines()[1:6]] == rejected[:5]


@fuzzed
@given(seed=st.integers(0, 2**32))
def test_malformed_messages_of_trees_are_used_or_rejected(tmp_path, seed):
    rng = random.Random(seed)
    body = b""
    for i in range(LINES // 4):
        rows = [
            {"message_id": f"{i}{name}", "parent_id": parent and f"{i}{parent}", "message_tree_id": str(i), "role": role, "text": "x", "rank": None}
            for name, parent, role in (("a", None, "prompter"), ("b", "a", "assistant"), ("c", "a", "assistant"))
        ]
        body += b"".join(mutate(row, rng) if i and rng.random() < 0.3 else json.dumps(row).encode() + b"\n" for row in rows)
    (tmp_path / "a.jsonl").write_bytes(body)
    counts = prepared(tmp_path / "a.jsonl", TOKENIZER, on_bad="skip", format="tree_rows").report.counts
    assert counts.used and counts.rejected and counts.rows == counts.used + counts.rejected + counts.overlong


@fuzzed
@given(seed=st.integers(0, 2**32))
def test_detection_of_malformed_rows_is_an_answer_or_a_data_error(tmp_path, seed):
    rng = random.Random(seed)
    for _ in range(LINES // 4):
        names = rng.sample(sorted(GOOD), rng.choice([1, 1, 1, 2]))
        (tmp_path / "a.jsonl").write_bytes(b"".join(mutate(GOOD[rng.choice(names)], rng) for _ in range(4)))
        try:
            prepared(tmp_path / "a.jsonl", TOKENIZER, on_bad="skip", mode=rng.choice(["sft", "pretrain"]))
        except DataError as error:
            assert str(error)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "txt"])
@fuzzed
@given(seed=st.integers(0, 2**32))
def test_malformed_tables_arrays_and_texts_add_up_or_name_their_fault(tmp_path, kind, seed):
    rng = random.Random(seed)
    for _ in range(LINES // 10):
        rows = [f"p{i},{'c' * i}" for i in range(1, 11)]
        body = {
            "csv": "prompt,completion\n" + "".join(f'{r}\n' if rng.random() < 0.5 else '"a\nb","c""d"\r\n' for r in rows),
            "tsv": "prompt\tcompletion\n" + "".join(r.replace(",", "\t") + "\n" for r in rows),
            "json": json.dumps([{"prompt": "p", "completion": "c"}] * 10, indent=rng.choice([None, 1])),
            "txt": "\n".join(rows),
        }[kind]
        for _ in range(rng.choice([1, 2, 4])):
            at = rng.randrange(len(body))
            body = body[:at] + rng.choice([*TEXT, '"', '""', ",", "\t"]) + body[at + rng.randrange(3) :]
        data = body.encode("utf-8", "surrogatepass")
        if rng.random() < 0.2:
            data = data[: rng.randrange(len(data))] + rng.choice(BYTES) + data[rng.randrange(len(data)) :]
        (tmp_path / f"a.{kind}").write_bytes(data)
        (tmp_path / "rejects.jsonl").unlink(missing_ok=True)
        try:
            report = prepared(tmp_path / f"a.{kind}", TOKENIZER, folder=tmp_path, on_bad="skip", mode="pretrain" if kind == "txt" else "sft").report
        except DataError as error:
            assert f"a.{kind}" in str(error) or "data.train" in str(error)
            continue
        assert report.rows == report.used + report.rejected
        assert report.rejected == len(lines_of(tmp_path / "rejects.jsonl"))


def test_parquet_of_changing_shape_and_cut_files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rng = random.Random(0)
    good = [{"prompt": "p", "completion": "c"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(good), tmp_path / "0.parquet")
    for n, column in enumerate([[1, 2], [b"\xff", None], [[1], []], [{"a": 1}, None], [True, None], ["x", " "], [1.5, float("nan")]], 1):
        table = pyarrow.table({"prompt": ["p"] * 2, rng.choice(["completion", "other"]): column})
        pyarrow.parquet.write_table(table, tmp_path / f"{n}.parquet")
    counts = prepared(tmp_path, TOKENIZER, on_bad="skip", folder=tmp_path / "run").report.counts
    assert counts.rows == 15 == counts.used + counts.rejected and counts.used in (1, 2)
    assert len(lines_of(tmp_path / "run/rejects.jsonl")) == counts.rejected
    whole = (tmp_path / "0.parquet").read_bytes()
    for size in range(4, len(whole), max(1, len(whole) // 40)):
        (tmp_path / "cut.parquet").write_bytes(whole[:size])
        with pytest.raises(DataError, match="not a readable Parquet file"):
            prepared(tmp_path / "cut.parquet", TOKENIZER)
