"""MMLU's files: every row of the real one is read, its prompt can be built again to the byte, and the other layouts
give the same questions."""

from __future__ import annotations

import csv
import json
from collections import Counter

import pytest

from deltune.errors import DataError
from deltune.evaluation.tasks.catalogue import TASKS
from deltune.evaluation.tasks.templates import TEMPLATES, options, prompt, shots_for

MMLU, FORM = TASKS["mmlu"], TEMPLATES["mmlu"]
HEADER = "The following are multiple choice questions (with answers) about  high school biology.\n\n"
SOLVED = [
    "Which one is green?\nA. a leaf\nB. milk\nC. coal\nD. salt\nAnswer: A\n\n",
    "A list:\nA. one line of it\nwhich?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D\n\n",
]
ASKED = "Which one is white?\nA. a leaf\nB. milk\nC. coal\nD. tar\nAnswer:"
INPUT = HEADER + "".join(SOLVED) + ASKED


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def five_shot(subject="high_school_biology", input=INPUT, output="B"):
    return {"subject": subject, "input": input, "output": output}


def test_every_real_row_is_read_and_its_prompt_built_again(real_data):
    path = real_data / "mmlu/zero_shot_mmlu_val.json"
    rows, items = rows_of(path), MMLU.read(path)
    assert len(items) == len(rows) == 1531 and len({item.id for item in items}) == 1531
    assert len({item.group for item in items}) == 57
    for item, row in zip(items, rows, strict=True):
        assert prompt(item, FORM, [], "letters") == row["input"]
        assert options(item, FORM, "letters")[item.answer] == " " + row["output"]
        assert item.group == row["subject"] and len(item.choices) == 4
        assert all(choice in row["input"] for choice in item.choices)
    assert Counter("ABCD"[item.answer] for item in items) == Counter(row["output"] for row in rows)
    assert MMLU.read(path.parent) == items and MMLU.exemplars(path) == []


def test_a_five_shot_prompt_is_taken_apart_and_built_again(tmp_path):
    path = write_rows(tmp_path / "five_shot_mmlu_val.json", five_shot())
    (item,), shots = MMLU.read(path), MMLU.exemplars(path)
    assert (item.id, item.question, item.answer) == ("five_shot_mmlu_val:1", "Which one is white?", 1)
    assert [(s.id, s.answer) for s in shots] == [("five_shot_mmlu_val:1#1", 0), ("five_shot_mmlu_val:1#2", 3)]
    assert shots[1].question == "A list:\nA. one line of it\nwhich?" and shots[1].choices == ("1", "2", "3", "4")
    assert prompt(item, FORM, shots_for(item, shots, 5, seed=3), "letters") == five_shot()["input"]


def test_zero_shot_prompts_find_their_exemplars_in_the_file_beside_them(tmp_path):
    write_rows(tmp_path / "five_shot_mmlu_val.json", five_shot(), five_shot())
    path = write_rows(tmp_path / "zero_shot_mmlu_val.json", five_shot(input=HEADER + ASKED))
    (item,) = MMLU.read(path)
    assert len(MMLU.exemplars(path)) == len(MMLU.exemplars(tmp_path)) == 2  # each once, though two rows have them
    assert prompt(item, FORM, shots_for(item, MMLU.exemplars(path), 5, seed=0), "letters") == five_shot()["input"]
    assert MMLU.read(tmp_path) == [item]


@pytest.fixture
def release(real_data, tmp_path):
    """The CSV release written from the real rows; `dev` holds the first five of each subject, the rest are `val`."""
    groups: dict[str, list] = {}
    for item in MMLU.read(real_data / "mmlu"):
        groups.setdefault(item.group, []).append(item)
    for split, part in (("dev", slice(0, 5)), ("val", slice(5, None))):
        (tmp_path / split).mkdir()
        for group, items in groups.items():
            with (tmp_path / split / f"{group}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([i.question, *i.choices, "ABCD"[i.answer]] for i in items[part])
    return tmp_path


def contents(items):
    return Counter((i.group, i.question, i.choices, i.answer) for i in items)


def test_the_csv_release_gives_the_same_questions(release, real_data):
    known = MMLU.read(real_data / "mmlu")
    asked, dev = MMLU.read(release), MMLU.exemplars(release)
    assert len(dev) == 57 * 5 and contents(asked) + contents(dev) == contents(known)
    assert MMLU.read(release / "val") == asked and MMLU.exemplars(release / "val") == dev
    assert list(dict.fromkeys(item.group for item in asked)) == sorted({item.group for item in known})
    one = release / "val/virology_val.csv"
    assert {item.group for item in MMLU.read(one)} == {"virology"} and MMLU.exemplars(one) == dev
    assert MMLU.read(one)[1].id == "virology_val:2"
    shots = shots_for(MMLU.read(one)[0], dev, 5, seed=1)
    assert [shot.id for shot in shots] == [f"virology_dev:{i}" for i in range(1, 6)]


def test_merged_files_are_read_without_their_subjects(release, real_data):
    """As pandas writes them: a column of row numbers, then inputs and targets."""
    pandas_rows = [(i, "\n".join([it.question, *(f"{c}. {t}" for c, t in zip("ABCD", it.choices, strict=True))]), "ABCD"[it.answer])
                   for i, it in enumerate(MMLU.read(release))]  # fmt: skip
    with (release / "merged.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["", "inputs", "targets"], *pandas_rows])
    items = MMLU.read(release / "merged.csv")
    assert [(i.question, i.choices, i.answer) for i in items] == [(i.question, i.choices, i.answer) for i in MMLU.read(release)]
    assert {item.group for item in items} == {""} and items[0].id == "merged:1"
    assert prompt(items[0], FORM, [], "letters").startswith("The following are multiple choice questions (with answers).\n\n")


BROKEN = {
    "no subject": ({"input": "x", "output": "A"}, "no key 'subject'"),
    "another header": (five_shot(input="Question: " + ASKED), "input begins 'Question: "),
    "another subject": (five_shot(subject="virology"), "about  virology"),
    "no end": (five_shot(input=HEADER + ASKED + " "), "ends"),
    "an answer of two letters": (five_shot(output="AB"), "the answer is 'AB'"),
    "a letter too far": (five_shot(output="E"), "a letter from A to D"),
    "three choices": (five_shot(input=HEADER + ASKED.replace("\nC. coal", "")), "no line 'C.'"),
    "a broken exemplar": (five_shot(input=HEADER + SOLVED[0].replace("D. ", "E. ") + ASKED), "exemplar 1"),
    "no object": ([1], "one JSON object a line"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_malformed_prompt_is_named_with_its_line(tmp_path, case):
    row, fault = BROKEN[case]
    path = write_rows(tmp_path / "mmlu.json", five_shot(), row)
    with pytest.raises(DataError) as error:
        MMLU.read(path)
    assert f"{path}:2" in str(error.value) and fault in str(error.value) and "What fits" in str(error.value)


def test_a_malformed_csv_row_is_named_with_the_line_where_it_begins(tmp_path):
    path = tmp_path / "virology_val.csv"
    path.write_text('"two\nlines",1,2,3,4,A\nq,1,2,3,A\n', "utf-8")
    with pytest.raises(DataError, match=rf"{path}:3: 5 columns"):
        MMLU.read(path)
    path.write_text('q,1,2,3,4,A\n"q,1,2,3,4,A\n', "utf-8")
    with pytest.raises(DataError, match=rf"{path}:2: not CSV"):
        MMLU.read(path)


@pytest.mark.parametrize("name", ["absent", "."])
def test_a_path_without_mmlu_says_what_would_fit(tmp_path, name):
    with pytest.raises(DataError, match=r"dev/, val/ and test/"):
        MMLU.read(tmp_path / name)
