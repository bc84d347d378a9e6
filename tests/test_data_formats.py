"""Formats: what each is turned into, token by token, how it is recognised, and what is said of rows that are none."""

from __future__ import annotations

import json

import pytest

from deltune.data.config import Source
from deltune.data.conversation import BadRow
from deltune.data.detect import detect
from deltune.data.formats import ROLES, Schema
from deltune.errors import DataError
from tests.encoded import all_marked, prepared, write_rows
from tests.tiny import tiny_tokenizer

CHAT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}

# a row of each format, and what the tiny tokenizer's chat template makes of it; the trained part between guillemets
CHAT_MASKS = {
    "alpaca": ({"instruction": "Add", "input": "1 2", "output": "3"}, "<s><|user|>\nAdd\n1 2\n<|assistant|>\n«3</s>»"),
    "alpaca, no input": ({"instruction": "Say a", "output": "a"}, "<s><|user|>\nSay a\n<|assistant|>\n«a</s>»"),
    "alpaca, all roles": (
        {"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b"]]},
        "<s><|system|>\ns\n<|user|>\na\n<|assistant|>\n«b</s>»<|user|>\nc\n<|assistant|>\n«d</s>»",
    ),
    "prompt_completion": ({"prompt": "p", "completion": " c"}, "<s><|user|>\np\n<|assistant|>\n« c</s>»"),
    "input_output": ({"input": "漢", "output": "字"}, "<s><|user|>\n漢\n<|assistant|>\n«字</s>»"),
    "question and answer": ({"question": "q", "answer": "a"}, "<s><|user|>\nq\n<|assistant|>\n«a</s>»"),
    "sharegpt": (
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]},
        "<s><|system|>\ns\n<|user|>\nh\n<|assistant|>\n«g</s>»",
    ),
    "messages": ({"messages": [*CHAT, *CHAT]}, "<s>" + "<|user|>\nhi\n<|assistant|>\n«yo</s>»" * 2),
    "messages in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "value": "i"}]}, CHAT[1]]},
        "<s><|user|>\nhi\n<|assistant|>\n«yo</s>»",
    ),
    "messages as text": ({"messages": json.dumps(CHAT)}, "<s><|user|>\nhi\n<|assistant|>\n«yo</s>»"),
    "weights": (
        {"messages": [*CHAT, {"role": "user", "content": "b", "loss_weight": 0.0}, {"role": "assistant", "content": "c", "loss_weight": 0}, *CHAT]},
        "<s><|user|>\nhi\n<|assistant|>\n«yo</s>»<|user|>\nb\n<|assistant|>\nc</s><|user|>\nhi\n<|assistant|>\n«yo</s>»",
    ),
    "a prompt at the end": ({"messages": [*CHAT, CHAT[0]]}, "<s><|user|>\nhi\n<|assistant|>\n«yo</s>»<|user|>\nhi\n"),
}


@pytest.mark.parametrize("name", CHAT_MASKS)
def test_the_answers_of_every_format_are_trained_with_their_eos(tmp_path, name):
    row, expected = CHAT_MASKS[name]
    tokenizer = tiny_tokenizer()
    data = prepared(write_rows(tmp_path / "a.jsonl", [row]), tokenizer).train
    assert all_marked(data, tokenizer) == [expected]


PLAIN_MASKS = {
    "alpaca": (
        {"instruction": "Add", "input": "1 2", "output": "3"},
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n«3</s>»",
    ),
    "alpaca, no input": (
        {"instruction": "Say a", "output": "a"},
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay a\n\n### Response:\n«a</s>»",
    ),
    "plain": ({"prompt": "2+2=", "completion": "4"}, "2+2=«4</s>»"),
    "plain, system": ({"prompt": "2+2=", "completion": "4", "system": "Be right."}, "Be right.\n\n2+2=«4</s>»"),
    "plain, two turns": ({"messages": [*CHAT, *CHAT]}, "hi«yo</s>»hi«yo</s>»"),
    "plain, untrained turn": ({"messages": [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT]}, "hiyo</s>hi«yo</s>»"),
    # nothing stands before the first token, so it cannot be predicted
    "no prompt": ({"input": "", "output": "abc"}, "a«bc</s>»"),
    "EOS in the data is not doubled": ({"prompt": "a", "completion": "b</s>"}, "a«b</s>»"),
}


@pytest.mark.parametrize("name", PLAIN_MASKS)
def test_without_a_chat_template_instructions_take_the_alpaca_frame_and_others_none(tmp_path, name):
    row, expected = PLAIN_MASKS[name]
    tokenizer = tiny_tokenizer(chat_template=None)
    data = prepared(write_rows(tmp_path / "a.jsonl", [row]), tokenizer).train
    assert all_marked(data, tokenizer) == [expected]


def test_alpaca_frame_of_a_conversation(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = [{"messages": [{"role": "system", "content": "S"}, *CHAT, *CHAT]}]
    data = prepared(write_rows(tmp_path / "a.jsonl", rows), tokenizer, template="alpaca").train
    turn = "### Instruction:\nhi\n\n### Response:\n«yo</s>»"
    assert all_marked(data, tokenizer) == [f"S\n\n{turn}\n\n{turn}"]


def test_prompt_parts_stand_where_they_are_named(tmp_path):
    tokenizer = tiny_tokenizer()
    file = write_rows(tmp_path / "a.jsonl", [{"messages": [*CHAT, *CHAT]}])
    parts = {"meta_prompt": "M:", "prefix": "<", "postfix": ">"}
    assert all_marked(prepared(file, tokenizer, template="plain", **parts).train, tokenizer) == ["M:<hi>«yo</s>»<hi>«yo</s>»"]
    chat = "<s><|user|>\nM:<hi>\n<|assistant|>\n«yo</s>»<|user|>\n<hi>\n<|assistant|>\n«yo</s>»"
    assert all_marked(prepared(file, tokenizer, **parts).train, tokenizer) == [chat]


def test_a_system_setting_fills_only_what_is_missing(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = [{"messages": [*CHAT]}, {"messages": [{"role": "system", "content": "own"}, *CHAT]}]
    marked = all_marked(prepared(write_rows(tmp_path / "a.jsonl", rows), tokenizer, system="default").train, tokenizer)
    assert [m.split("\n")[1] for m in marked] == ["default", "own"]


def test_training_on_the_source_trains_all_but_the_first_token(tmp_path):
    tokenizer = tiny_tokenizer()
    data = prepared(write_rows(tmp_path / "a.jsonl", [CHAT_MASKS["alpaca"][0]]), tokenizer, train_on_source=True).train
    assert all_marked(data, tokenizer) == ["<s>«<|user|>\nAdd\n1 2\n<|assistant|>\n3</s>»"]


def test_pretraining_trains_whole_documents_with_eos(tmp_path):
    tokenizer = tiny_tokenizer()
    text = prepared(write_rows(tmp_path / "a.jsonl", [{"text": "a document"}]), tokenizer, mode="pretrain").train
    assert all_marked(text, tokenizer) == ["a« document</s>»"]
    chat = prepared(write_rows(tmp_path / "b.jsonl", [CHAT_MASKS["prompt_completion"][0]]), tokenizer, mode="pretrain").train
    assert all_marked(chat, tokenizer) == ["<s>«<|user|>\np\n<|assistant|>\n c</s>»"]


# ---- recognition

SHAPES = [
    ({"messages": [*CHAT]}, "messages"),
    ({"conversations": [*CHAT]}, "messages (messages=conversations)"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt"),
    ({"messages": [{"from": "human", "value": "a"}]}, "sharegpt (conversations=messages)"),
    ({"instruction": "a", "input": "b", "output": "c", "text": "d"}, "alpaca"),
    ({"instruction": "a", "context": "b", "response": "c"}, "alpaca (output=response, input=context)"),
    ({"prompt": "a", "completion": "b"}, "prompt_completion"),
    ({"prompt": "a", "response": "b"}, "prompt_completion (completion=response)"),
    ({"input": "a", "output": "b"}, "input_output"),
    ({"question": "a", "answer": "b"}, "input_output (input=question, output=answer)"),
    ({"inputs": "a", "targets": "b"}, "input_output (input=inputs, output=targets)"),
    ({"text": "a"}, "text"),
]


@pytest.mark.parametrize(("row", "expected"), SHAPES)
def test_formats_are_recognised_and_named(row, expected):
    assert detect([row], format="auto", fields={}, mode="sft", name="x").describe() == expected


def test_pretraining_prefers_the_text_column():
    row = {"instruction": "a", "output": "b", "text": "c"}
    assert detect([row], format="auto", fields={}, mode="pretrain", name="x").format == "text"


def test_columns_are_mapped_by_role(tmp_path):
    rows = [{"q": "a", "reply": "b", "sys": "s"}]
    tokenizer = tiny_tokenizer()
    file = write_rows(tmp_path / "a.jsonl", rows)
    fields = {"input": "q", "output": "reply", "system": "sys"}
    expected = ["<s><|system|>\ns\n<|user|>\na\n<|assistant|>\n«b</s>»"]
    assert all_marked(prepared(file, tokenizer, fields=fields).train, tokenizer) == expected
    own = Source(path=file, format="input_output", fields={"output": "reply"})
    assert all_marked(prepared(file, tokenizer, train=[own], fields={"input": "q", "system": "sys"}).train, tokenizer) == expected


UNKNOWN = [
    ([{"instruction": "a", "outptu": "b"}], {}, "lacks 'output' (is it 'outptu'?)"),
    ([{"foo": 1, "bar": 2}], {}, "the rows have no known format; keys found: foo, bar"),
    ([{"messages": "hello"}], {}, "'messages' must be a list of objects with role and content"),
    ([{"prompt": "a", "completion": "b"}, {"question": "a", "answer": "b"}], {}, "different formats: prompt_completion first in row 1"),
    ([{"a": "x", "b": "y"}], {"fields": {"outptu": "b"}}, "has a role 'outptu'; nearest: output"),
    ([{"prompt": "x", "completion": "y"}], {"fields": {"system": "sys"}}, "maps 'system' to column 'sys', which no row has"),
    ([{"prompt": "x", "completion": "y"}], {"fields": {"history": "x", "completion": "y"}}, "no one format has all the roles"),
    ([{"prompt": "x", "completion": "y"}], {"format": "alpaca"}, "lacks 'instruction', 'output'"),
    ([{"chosen": "a", "rejected": "b", "prompt": "c"}], {}, "preference pairs"),
    ([{"messages": [*CHAT], "label": True}], {}, "KTO"),
    ([{"instruction": "a", "instances": []}], {}, "a.jsonl:1: instances holds no instance"),
    ([{"input_ids": [1, 2], "text": "a"}], {}, "tokenised already"),
    ([{"question": "a", "options": ["x"], "answer": "A"}], {}, "multiple-choice"),
    ([["a", "b"], 3], {}, "no row is an object with named values"),
    ([{"text": "a"}], {}, "data.mode=pretrain"),
]


@pytest.mark.parametrize(("rows", "settings", "reason"), UNKNOWN)
def test_unknown_rows_are_told_what_is_there_and_what_is_needed(tmp_path, rows, settings, reason):
    file = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as error:
        prepared(file, tiny_tokenizer(), **settings)
    assert reason in str(error.value)
    assert file in str(error.value) or "data.fields" in str(error.value)


def test_preferred_answers_can_be_mapped(tmp_path):
    tokenizer = tiny_tokenizer()
    file = write_rows(tmp_path / "a.jsonl", [{"chosen": [*CHAT], "rejected": [*CHAT]}])
    data = prepared(file, tokenizer, fields={"messages": "chosen"}).train
    assert all_marked(data, tokenizer) == ["<s><|user|>\nhi\n<|assistant|>\n«yo</s>»"]


# ---- single rows that do not fit


def turns(*pairs, **extra):
    return {"messages": [{"role": r, "content": c} for r, c in pairs]} | extra


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_ROWS = [
    ("alpaca", {"instruction": "a"}, "no key 'output'; keys found: instruction; alpaca needs: instruction, output"),
    ("alpaca", {"instruction": "a", "output": None}, "no key 'output' (or it is null)"),
    ("alpaca", {"instruction": "a", "output": " \n"}, "output is empty"),
    ("alpaca", {"instruction": "a", "output": 3}, "output must be text, but is a number"),
    ("alpaca", {"instruction": [], "output": "b"}, "instruction must be text, but is a list"),
    ("alpaca", {"instruction": [1], "output": "b"}, "instruction must be text, but is a number"),
    ("alpaca", {"instruction": " ", "input": "", "output": "b"}, "instruction and input are both empty"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["a"]]}, "history must be a list of [prompt, answer] pairs"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["a", ""]]}, "an answer in history is empty"),
    ("alpaca", ["a"], "the row is a list, not an object with the keys instruction, output"),
    ("alpaca", {"instruction": "a", "output": "b", "images": ["x.png"]}, "the row has images; only text is read"),
    ("input_output", {"input": "a", "output": True}, "output must be text, but is true/false"),
    ("text", {"text": ""}, "text is empty"),
    ("messages", turns(("user", "a")), "there is no assistant message"),
    ("messages", {"messages": []}, "there is no assistant message"),
    ("messages", {"messages": [*CHAT, 3]}, "message 3 is a number"),
    ("messages", {"messages": {"role": "user"}}, "messages must be a list, but is an object"),
    ("messages", turns(("user", "a"), ("assistant", " ")), "message 2 (assistant) is empty"),
    ("messages", turns(("robot", "a"), ("assistant", "b")), "message 1 has role 'robot'; known are human, user"),
    ("messages", {"messages": [{"content": "a"}]}, "message 1 has no role (keys found: content)"),
    ("messages", turns(("user", "a"), ("system", "s"), ("assistant", "b")), "message 2 is a system message"),
    ("messages", turns(("system", "s"), ("user", "a"), ("assistant", "b"), system="t"), "a system column and a system message"),
    ("messages", turns(("user", "a"), ("tool", "b"), ("assistant", "c")), "message 2 is a tool's answer, but no call"),
    ("messages", {"messages": [CHAT[0], CHAT[1] | {"loss_weight": 0.5}]}, "message 2 (assistant): loss_weight is 0.5"),
    ("messages", {"messages": [CHAT[0], CHAT[1] | {"train": "yes"}]}, "train is 'yes'"),
    ("messages", {"messages": [CHAT[0], CHAT[1] | {"weight": 0}]}, "no assistant message is trained"),
    ("messages", {"messages": [CHAT[0] | {"weight": 1}, CHAT[1]]}, "message 1 (user) asks to be trained"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, CHAT[1]]}, "a part of type 'image_url'"),
    ("messages", {"messages": [CHAT[0] | {"tool_calls": [CALL]}, CHAT[1]]}, "only the assistant calls tools"),
    ("messages", {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"name": "f"}]}]}, "an object with name and arguments"),
    ("messages", {"messages": [CHAT[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1"}]}]}, "the arguments of the call of f"),
    ("messages", {"messages": [*CHAT], "tools": "[{}]"}, "every tool must be an object with a name"),
    ("messages", {"messages": [*CHAT], "tools": "[{"}, "tools is text that is not valid JSON"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(x)"}]}, "message 2 (function_call): the call is not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "reason"), BAD_ROWS)
def test_a_row_that_does_not_fit_says_why(format, row, reason):
    needed, optional = ROLES[format]
    with pytest.raises(BadRow) as error:
        Schema(format, {role: role for role in (*needed, *optional)}).conversations(row)
    assert reason in str(error.value)


def test_reasons_are_one_line_of_printable_text(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "x\n\x1b[2J": "b"}]
    with pytest.raises(DataError) as error:
        prepared(write_rows(tmp_path / "a.jsonl", rows), tiny_tokenizer())
    assert "keys found: prompt, x\\n\\x1b[2J;" in str(error.value) and "\x1b" not in str(error.value)


def test_bad_rows_stop_with_the_first_five(tmp_path):
    rows = [{"prompt": "a", "completion": "b" if i % 3 else ""} for i in range(30)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as error:
        prepared(file, tiny_tokenizer())
    named = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert named == [f"{file}:{n}: completion is empty, so there is nothing to learn" for n in (1, 4, 7, 10, 13)]
    assert "data.on_bad=skip" in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_skipped_rows_are_counted_and_written_down(tmp_path, streaming):
    bad = {0: {"prompt": "a"}, 3: {"prompt": "漢", "completion": ""}, 5: {"prompt": "a", "completion": "b" * 300}}
    rows = [bad.get(i, {"prompt": "a", "completion": f"b{i}"}) for i in range(9)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    with open(file, "a") as stream:
        stream.write('{"prompt": "cut')
    result = prepared(file, tiny_tokenizer(), folder=tmp_path / "run", on_bad="skip", overlong="skip", max_length=100, streaming=streaming)
    if streaming:
        result.train.take(20)
    counts = result.report.counts
    assert (counts.rows, counts.used, counts.rejected, counts.overlong, counts.examples) == (10, 6, 3, 1, 6)
    written = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text("utf-8").splitlines()]
    assert [w["line"] for w in written] == [1, 4, 6, 10] and {w["file"] for w in written} == {file}
    assert [w["row"] for w in written] == [*bad.values(), '{"prompt": "cut']
    assert "no key 'completion'" in written[0]["reason"] and "data.max_length is 100" in written[2]["reason"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("on_bad", ["skip", "stop"])
def test_nothing_to_train_is_refused_whatever_the_policy(tmp_path, on_bad, streaming):
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}] * 3)
    with pytest.raises(DataError, match=r"no token would be trained|nothing to learn"):
        result = prepared(file, tiny_tokenizer(), on_bad=on_bad, streaming=streaming)
        result.train.take(1)


def test_a_source_without_rows_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no rows"):
        prepared(tmp_path / "a.jsonl", tiny_tokenizer())


def test_settings_without_effect_are_refused(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"text": "a document"}])
    with pytest.raises(DataError, match=r"data\.prefix has no effect"):
        prepared(file, tiny_tokenizer(), mode="pretrain", prefix="x")
    with pytest.raises(DataError, match="no chat template"):
        prepared(write_rows(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}]), tiny_tokenizer(None), template="chat")
