"""The released files of the other tasks: all real rows are read and agree with a count made from the raw file; rows in
the exact schema stand for files that are not at hand; what is malformed is named with its line."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltune.errors import DataError
from deltune.evaluation.tasks.catalogue import TASKS
from deltune.evaluation.tasks.item import PROTOCOLS
from deltune.evaluation.tasks.reading import unlabelled
from deltune.evaluation.tasks.templates import TEMPLATES


def put(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1), "utf-8")
    return path


@pytest.mark.parametrize(("task", "count"), [("c3-d", 1825), ("c3-m", 1991)])
def test_every_real_question_of_c3_is_read(real_data, task, count):
    raw = json.loads((real_data / f"c3/{task}-dev.json").read_text("utf-8"))
    questions = [(turns, asked) for turns, asked_of, _ in raw for asked in asked_of]
    items = TASKS[task].read(real_data / "c3")
    assert len(items) == len(questions) == count and len({item.id for item in items}) == count
    for item, (turns, asked) in zip(items, questions, strict=True):
        assert item.context.split("\n") == [line for turn in turns for line in turn.split("\n")]
        assert (item.question, list(item.choices), item.choices[item.answer]) == (asked["question"], asked["choice"], asked["answer"])
    assert items[0].id == f"{task}-dev:1" and TASKS[task].exemplars(real_data / "c3") == []


LOGIQA2 = {"logiqa2": ("dev.txt", {0: 364, 1: 379, 2: 407, 3: 419}), "logiqa2-zh": ("dev_zh.txt", {0: 377, 1: 360, 2: 401, 3: 455})}


@pytest.mark.parametrize("task", LOGIQA2)
def test_every_real_row_of_logiqa2_is_read(real_data, task):
    name, answers = LOGIQA2[task]
    rows = [json.loads(line) for line in (real_data / "logiqa2" / name).read_text("utf-8").splitlines()]
    items = TASKS[task].read(real_data / "logiqa2")
    assert len(items) == len(rows) and Counter(item.answer for item in items) == answers
    for item, row in zip(items, rows, strict=True):
        assert (item.context, item.question, item.answer) == (row["text"], row["question"], row["answer"])
        for text, option in zip(item.choices, row["options"], strict=True):
            assert option.strip().endswith(text) and len("".join(option.split())) - len("".join(text.split())) in (0, 1, 2)
    marked = [all(re.match(rf"{letter}\.", text) for letter, text in zip("ABCD", row["options"], strict=True)) for row in rows]
    assert sum(marked) == (866 if task == "logiqa2-zh" else 0)
    assert not any(item.choices[0].startswith("A.") for item, one in zip(items, marked, strict=True) if one)


@pytest.mark.parametrize(("name", "count"), [("test.jsonl", 1319), ("train.jsonl", 7473)])
def test_every_real_sum_is_read(real_data, name, count):
    rows = [json.loads(line) for line in (real_data / "gsm8k" / name).read_text("utf-8").splitlines()]
    items = TASKS["gsm8k"].read(real_data / "gsm8k" / name)
    assert len(items) == len(rows) == count
    for item, row in zip(items, rows, strict=True):
        final = row["answer"].split("#### ")[1]
        assert item.answer == (str(int(final.replace(",", ""))),)
        assert "<<" not in item.solution and "####" not in item.solution and item.solution
        assert len(row["answer"]) - len(item.solution) == len("\n#### " + final) + sum(map(len, re.findall("<<[^>]*>>", row["answer"]))) + (
            len(row["answer"].split("\n####")[0]) - len(row["answer"].split("\n####")[0].strip()))  # fmt: skip
    assert len(TASKS["gsm8k"].exemplars(real_data / "gsm8k/test.jsonl")) == 7473
    assert TASKS["gsm8k"].exemplars(real_data / "gsm8k/train.jsonl") == []


DREAM = [[["W: Hi.", "M: Bye."], [{"question": "Who left?", "choice": ["W.", "M.", "No one."], "answer": "M."}] * 2, "5-51"]]
LOGIQA = "\nc\nThe text.\nThe question?\nA.one\nB.two\nC.three\nD.four\n\na\nText.\nWhich?\nA. 1\nB. 2\nC. 3\nD. 4\n"
RECLOR = [{"context": "c", "question": "q", "answers": ["1", "2", "3", "4"], "label": 3, "id_string": "val_0"}]
LSAT = [{"id": "1-G", "passage": "p", "questions": [{"id": "1-G_1", "question": "q", "options": list("vwxyz"), "answer": "E"}]}]
STRATEGY = [{"qid": "1", "term": "t", "description": "d", "question": "q?", "answer": False, "facts": ["One.", "Two."]}]
SCHEMAS = {
    "dream": ("dev.json", DREAM, ("W: Hi.\nM: Bye.", "Who left?", ("W.", "M.", "No one."), 1)),
    "logiqa": ("Test.txt", LOGIQA, ("The text.", "The question?", ("one", "two", "three", "four"), 2)),
    "logiqa-zh": ("zh_eval.txt", LOGIQA, ("The text.", "The question?", ("one", "two", "three", "four"), 2)),
    "reclor": ("val.json", RECLOR, ("c", "q", ("1", "2", "3", "4"), 3)),
    "lsat": ("AR_TestData.json", LSAT, ("p", "q", tuple("vwxyz"), 4)),
    "strategyqa": ("strategyqa_train.json", STRATEGY, ("One. Two.", "q?", ("yes", "no"), 1)),
}


@pytest.mark.parametrize("task", SCHEMAS)
def test_rows_in_a_released_schema_are_read_from_file_and_folder(tmp_path, task):
    name, content, expected = SCHEMAS[task]
    path = put(tmp_path / name, content)
    items = TASKS[task].read(path)
    assert (items[0].context, items[0].question, items[0].choices, items[0].answer) == expected
    assert [item.id for item in items] == [f"{path.stem}:{i}" for i in range(1, len(items) + 1)]
    assert TASKS[task].read(tmp_path) == items


def test_exemplars_are_the_training_split_beside_the_file(tmp_path):
    put(tmp_path / "val.json", RECLOR)
    assert TASKS["reclor"].exemplars(tmp_path) == []
    put(tmp_path / "train.json", RECLOR * 3)
    assert [item.id for item in TASKS["reclor"].exemplars(tmp_path)] == ["train:1", "train:2", "train:3"]
    assert TASKS["reclor"].exemplars(tmp_path / "val.json") == TASKS["reclor"].exemplars(tmp_path)


def changed(rows, **values):
    return [{**rows[0], **values}]


def gsm8k(answer):
    return json.dumps({"question": "q", "answer": answer}) + "\n"


TWO_LINES = '{"answer": 1, "text": "t", "question": "q", "options": ["1", "2"]}\n'
MALFORMED = {  # task, content, line, fault
    "an answer that is no choice": ("dream", [*DREAM, [["W: Hi."], [{"question": "q", "choice": ["1", "2"], "answer": "3"}], "x"]], 29, "none of the choices"),
    "not a dialogue": ("c3-d", [*DREAM, 5], 29, "not a dialogue"),
    "a turn that is a number": ("c3-m", [[[1], [], "x"]], 2, "a turn that is no text"),
    "one choice": ("dream", [[["W"], [{"question": "q", "choice": ["1"], "answer": "1"}], "x"]], 2, "choice=['1']"),
    "no list": ("dream", '{"a": 1}', 1, "begins with"),
    "JSON that breaks off": ("reclor", '[\n{"context": "c",\n', 3, "not JSON"),
    "a list without commas": ("reclor", json.dumps(RECLOR)[:-1] + "\n7]", 2, "does not go on"),
    "a test file without labels": ("reclor", [{key: value for key, value in RECLOR[0].items() if key != "label"}], 2, "no key 'label'"),
    "a label too far": ("reclor", changed(RECLOR, label=4), 2, "label=4"),
    "a label of -1": ("reclor", changed(RECLOR, label=-1), 2, "label=-1"),
    "a truth value for a label": ("reclor", changed(RECLOR, label=True), 2, "label=True"),
    "a letter too far": ("lsat", [{"passage": "p", "questions": [{"question": "q", "options": ["1", "2"], "answer": "C"}]}], 2, "a letter from A to B"),
    "a word for an answer": ("strategyqa", changed(STRATEGY, answer="yes"), 2, "answer='yes'"),
    "facts in one text": ("strategyqa", changed(STRATEGY, facts="One."), 2, "facts='One.'"),
    "seven lines": ("logiqa", LOGIQA[: LOGIQA.index("\nD. 4")] + "\n", 9, "7 lines"),
    "no empty line": ("logiqa", LOGIQA.replace("\n\na\n", "\nx\na\n"), 9, "an empty line before each question"),
    "no letter": ("logiqa", LOGIQA.replace("\n\na\n", "\n\ne\n"), 10, "a letter from A to D"),
    "no question": ("logiqa", LOGIQA.replace("Which?", ""), 12, "a context and a question"),
    "an empty line is no row": ("logiqa2", TWO_LINES + "\n" + '{"answer": 2, "text": "t", "question": "q", "options": ["1", "2"]}', 3, "answer=2"),
    "no JSON": ("logiqa2-zh", TWO_LINES + "{oops}\n", 2, "not JSON"),
    "no final number": ("gsm8k", gsm8k("It is 5.\n#### five"), 1, "'five' after '####'"),
    "no mark": ("gsm8k", gsm8k("x\n#### 1") + gsm8k("It is 5."), 2, "no '####'"),
    "half a character": ("logiqa2", TWO_LINES.replace('"t"', '"\\ud800"'), 1, "text='"),
    "half a character in a choice": ("reclor", '[{"context": "c", "question": "q", "answers": ["\\ud83d", "2"], "label": 0}]', 1, "answers="),
    "a number without end": ("logiqa2", TWO_LINES.replace("1,", "1" * 5000 + ","), 1, "too many digits"),
    "brackets without end": ("reclor", "[" + "[" * 200_000, 1, "nested too deep"),
    "a sum without end": ("gsm8k", gsm8k("<<1+1=2\n#### 2"), 1, "without its partner"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_row_is_named_with_its_line(tmp_path, case):
    task, content, line, fault = MALFORMED[case]
    path = put(tmp_path / "file.json", content)
    with pytest.raises(DataError) as error:
        TASKS[task].read(path)
    assert f"{path}:{line}: " in str(error.value) and fault in str(error.value) and "What fits" in str(error.value)


LETTERED = {
    ("A.x", "B．y", "C、z", " D: w "): ("x", "y", "z", "w"),
    ("A.x", "B.y", "C只要", "D.w"): ("x", "y", "只要", "w"),  # one lost its mark
    ("A.x", "B.y", "Cat", "D.w"): ("x", "y", "Cat", "w"),
    ("A.x", "B.y", "c", "d"): ("x", "y", "c", "d"),
    ("A. x", " y", "z", "w"): ("A. x", "y", "z", "w"),  # one of four is the choice's own
    ("A国", "B国", "C国", "D国"): ("A国", "B国", "C国", "D国"),
    ("B.x", "A.y", "D.z", "C.w"): ("B.x", "A.y", "D.z", "C.w"),
}


@pytest.mark.parametrize("choices", LETTERED)
def test_letters_that_a_file_puts_before_its_choices_are_taken_off(choices):
    assert unlabelled(list(choices)) == LETTERED[choices]


def test_the_last_mark_of_a_solution_is_the_one(tmp_path):
    (item,) = TASKS["gsm8k"].read(put(tmp_path / "test.jsonl", gsm8k("Write #### 4 first, <<1+2=3>>then\n#### 3")))
    assert item.answer == ("3",) and item.solution == "Write #### 4 first, then"


def test_bytes_that_are_no_text_and_missing_files_are_named(tmp_path):
    (tmp_path / "test.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"test\.txt: byte 0 is not UTF-8"):
        TASKS["logiqa2"].read(tmp_path / "test.txt")
    with pytest.raises(DataError, match="no such file or folder"):
        TASKS["logiqa2"].read(tmp_path / "absent")
    with pytest.raises(DataError, match=r"What fits: AR_TestData\.json, .*it holds test\.txt"):
        TASKS["lsat"].read(tmp_path)


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path):
    (tmp_path / "test.txt").write_bytes(b"\xef\xbb\xbf" + TWO_LINES.replace("\n", "\r\n").encode())
    assert len(TASKS["logiqa2"].read(tmp_path)) == 1
    (tmp_path / "Test.txt").write_bytes(b"\xef\xbb\xbf" + LOGIQA.replace("\n", "\r\n").encode())
    assert len(TASKS["logiqa"].read(tmp_path)) == 2


KEYS = [
    "subject", "input", "output", "context", "question", "answers", "label", "passage", "questions", "options", "answer",
    "facts", "text", "choice",
]  # fmt: skip
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=12,
)


@given(st.lists(PLAIN, max_size=3), st.sampled_from(sorted(TASKS)), st.booleans())
def test_any_json_is_read_or_refused(tmp_path_factory, rows, task, as_list):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    try:
        items = TASKS[task].read(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert all(item.question.encode() is not None and item.id.startswith("any:") for item in items)


@given(st.binary(max_size=200), st.sampled_from(sorted(TASKS)), st.sampled_from([".json", ".csv", ".txt"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, task, ending):
    path = tmp_path_factory.getbasetemp() / f"any{ending}"
    path.write_bytes(content)
    try:
        TASKS[task].read(path)
    except DataError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("name", TASKS)
def test_every_entry_of_the_catalogue_is_whole(name):
    task = TASKS[name]
    assert task.name == name and task.help and task.language in ("en", "zh") and task.mean in ("micro", "macro")
    assert task.template in TEMPLATES and task.protocols and set(task.protocols) <= set(PROTOCOLS)
