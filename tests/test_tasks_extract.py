"""Answers in generated text: what counts as a label, what never does, numbers in their plain form."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltune.evaluation.tasks.catalogue import TASKS
from deltune.evaluation.tasks.extract import extract, number
from deltune.evaluation.tasks.item import Item
from deltune.evaluation.tasks.templates import LETTERS, TEMPLATES, prompt

ITEM = Item("t:1", "", "", "Which?", ("a cat", "a black cat", "snow", "7"), 0)
SUM = Item("g:1", "", "", "2 + 2?", (), ("4",))
PLAIN, REVERSE = TEMPLATES["plain"], dataclasses.replace(TEMPLATES["plain"], reverse=True)
TRIGGER = dataclasses.replace(PLAIN, trigger="The answer is")

LABELS = {
    "A": 0, " B": 1, "(C)": 2, "**D**": 3, "B.": 1, "B)": 1, "B: a black cat": 1, "Answer:B": 1, "option C, since": 2,
    "答案是C。": 2, "选A": 0, "（Ｂ）": 1, "Ｄ": 3, "「C」正确": 2, "A项": 0, "C、雪": 2, "本题选：D．": 3,
    "A is right": 0, "A because it is": 0, "A, a cat": 0, "A.The cat": 0, "A\nB": 0, "A 是": 0, "A and not B": 0,
    # words
    "A dog barked, so B": 1, "A Dog barked": None, "ABCD": None, "Alice": None, "CAT": None, "b": None, "Ask Bob": None,
    "I think A": 0, "U.S.A.": None, "U.S.A. but C": 2, "B.C. 300": None, "D-Day": None, "vitamin-D": None, "C3": None,
    "D's": None, "D’s": None, "2B": None, "x_A": None, "E": None, "": None, "...": None,
    # no label: the one choice that is named
    "It is snow.": 2, "a black cat": 1, "A black cat!": 1, "a cat, then snow": None, "snowfall": None, "It says 7": 3, "77": None,
}  # fmt: skip


@pytest.mark.parametrize("text", LABELS)
def test_a_label_is_one_that_stands_by_itself(text):
    assert extract(text, ITEM, PLAIN) == LABELS[text]


def test_a_choice_inside_a_longer_one_that_is_named_does_not_count():
    nested = Item("t:6", "", "", "Which?", ("cat", "black cat", "dog", "sheep"), 0)
    assert extract("Surely the black cat", nested, PLAIN) == 1
    assert extract("Surely the cat", nested, PLAIN) == 0
    assert extract("The black cat and the other cat", nested, PLAIN) is None


def test_the_last_label_counts_in_reverse():
    assert extract("Not A, not B: C. Surely", ITEM, PLAIN) == 0
    assert extract("Not A, not B: C. Surely", ITEM, REVERSE) == 2
    assert extract("It could be B. A dog would say so.", ITEM, REVERSE) == 1


def test_only_labels_that_the_item_has_are_found():
    assert extract("E or C", ITEM, PLAIN) == 2
    assert extract("C or B", Item("t:2", "", "", "?", ("x", "y"), 0), PLAIN) == 1
    five = Item("t:3", "", "", "?", tuple("vwxyz"), 0)
    assert extract("(E)", five, PLAIN) == 4
    nine = Item("t:4", "", "", "?", tuple("qrstuvwxy"), 0)
    assert extract("I think so. H", nine, PLAIN) == 7 and extract("I.", nine, PLAIN) == 8


def test_a_text_that_is_a_choice_is_that_choice_whatever_letters_it_speaks_of():
    item = Item("t:7", "", "", "Which?", ("one", "two", "both A and B", "A"), 0)
    assert extract(" Both A and B.", item, PLAIN) == 2
    assert extract("both A and B, I think", item, PLAIN) == 0
    assert extract("A", item, PLAIN) == 0  # the label, not the choice


REAL = {"mmlu": ("mmlu", 0), "c3-d": ("c3", 0), "c3-m": ("c3", 0), "logiqa2": ("logiqa2", 1), "logiqa2-zh": ("logiqa2", 5)}


@pytest.mark.parametrize("task", REAL)
def test_right_answers_to_all_real_questions_are_found(real_data, task):
    """Written as a label, as label and choice, and as the choice alone; of the last, rows with choices that are equal,
    empty or letters cannot be told."""
    folder, untold = REAL[task]
    items, template, missed = TASKS[task].read(real_data / folder), TEMPLATES[TASKS[task].template], 0
    for item in items:
        label, choice = LETTERS[item.answer], item.choices[item.answer]
        assert extract(f" {label}.", item, template) == extract(f" {label}. {choice}", item, template) == item.answer
        assert extract(f"（{label}）{choice}", item, template) == item.answer
        missed += extract(choice, item, template) != item.answer
    assert missed == untold


# what PandaLLM's predictor got wrong


def test_a_missing_trigger_is_no_answer_and_no_error():
    assert extract("It must be B.", ITEM, TRIGGER) is None
    assert extract("", ITEM, TRIGGER) is None
    assert extract("B, so the answer is", ITEM, TRIGGER) is None


def test_what_follows_the_first_trigger_counts_up_to_the_next():
    assert extract("A? The answer is C. The answer is B.", ITEM, TRIGGER) == 2
    assert extract("The answer is unclear. The answer is B.", ITEM, TRIGGER) is None
    assert extract("So the ANSWER is: C", ITEM, TRIGGER) == 2
    chinese = dataclasses.replace(PLAIN, trigger="答案是：")
    assert extract("A错。答案是:B", ITEM, chinese) == 1 and extract("答案是：Ｃ", ITEM, chinese) == 2


def test_letters_inside_words_are_never_matched():
    """A pattern of bare letters finds A in "Answer" and D in "Dogs"; here only the real one is found."""
    assert extract("Answer: Dogs and Cats Bark, hence C", ITEM, PLAIN) == 2


def test_exemplars_and_options_of_the_prompt_are_never_an_answer():
    """The prompt holds "The answer is A" and the letters of all options; none of it is looked at."""
    template = dataclasses.replace(TEMPLATES["reclor"], trigger="The answer is")
    shot = Item("t:5", "", "", "Other?", ("x", "y"), 0)
    assert "The answer is A" in prompt(ITEM, template, [shot], "generation")
    assert extract(" no idea", ITEM, template) is None


def test_no_answer_is_not_the_first_choice():
    assert extract("I do not know.", ITEM, PLAIN) is None


# a cleaner of the user's


def test_a_cleaner_says_where_to_look():
    boxed = dataclasses.replace(PLAIN, cleaner=r"\\boxed\{([^}]*)\}")
    assert extract("A, then \\boxed{C}, no: \\boxed{B}", ITEM, boxed) == 2
    assert extract("A, then \\boxed{C}, no: \\boxed{B}", ITEM, dataclasses.replace(boxed, reverse=True)) == 1
    assert extract("It is A", ITEM, boxed) is None and extract("\\boxed{}", ITEM, boxed) is None
    assert extract("7 \\boxed{$8}", SUM, boxed) == "8"


# words and stems as labels

YES = Item("s:1", "", "", "?", ("yes", "no"), 0)


@pytest.mark.parametrize(
    ("text", "place"),
    [("Yes", 0), (" no.", 1), ("NO!", 1), ("Yes, it does not", 0), ("nothing known", None), ("yesterday", None), ("I know", None), ("", None)],
)
def test_yes_and_no_are_words(text, place):
    assert extract(text, YES, TEMPLATES["yes-no"]) == place


def test_small_letters_as_labels_are_no_articles():
    small = dataclasses.replace(PLAIN, labels=list("abcd"))
    assert extract("It is a dog, hence (b)", ITEM, small) == 1
    assert extract("a) since", ITEM, small) == 0 and extract("a is right", ITEM, small) == 0
    assert extract("It is a dog", ITEM, small) is None and extract("B", ITEM, small) is None


def test_chinese_stems_are_found():
    assert extract("应选乙。", ITEM, TEMPLATES["zh-stems"]) == 1
    assert extract("没有", ITEM, TEMPLATES["zh-stems"]) is None


# numbers

NUMBERS = {
    "18": "18", "$1,234.50.": "1234.5", "-3": "-3", "-$5": "-5", "(-4)": "-4", "−7": "-7", "3.": "3", "10.0": "10", "-0": "0",
    "1/2": "0.5", "0.50": "0.5", "4/2": "2", "1/3": "1/3", "-2/6": "-1/3", "2,000,000": "2000000", "１８": "18", "007": "7",
    "18 dollars": "18", "50%": "50", "5²": "5", "答案是18。": "18", "\\boxed{18}": "18", "0.125": "0.125", "1/0": "1",
    "x2": None, "no number": None, "": None, "A4": None, "16-3": "16", "1,2": "1",
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_is_given_in_its_plain_form(text):
    assert extract(f"#### {text}", SUM, TEMPLATES["gsm8k"]) == NUMBERS[text]


def test_the_number_after_the_mark_or_the_last_one_counts():
    text = "16 - 3 - 4 = 9 eggs.\n9 * 2 = $18.\n#### 18"
    assert extract(text, SUM, TEMPLATES["gsm8k"]) == "18"
    assert extract("9 eggs, $18 a day.", SUM, TEMPLATES["gsm8k"]) is None
    assert extract("9 eggs, $18 a day.", SUM, TEMPLATES["gsm8k-last"]) == "18"
    assert extract("16 - 3 = 13, 13 - 4", SUM, TEMPLATES["gsm8k-last"]) == "4"


def test_real_solutions_give_their_own_answers(real_data):
    """The whole released answer as if it had been generated, marks and all."""
    import json

    path = real_data / "gsm8k/test.jsonl"
    for item, line in zip(TASKS["gsm8k"].read(path), path.read_text("utf-8").splitlines(), strict=True):
        text = json.loads(line)["answer"]
        assert extract(text, item, TEMPLATES["gsm8k"]) in item.answer
        assert extract(text, item, TEMPLATES["gsm8k-last"]) in item.answer


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6))
def test_equal_numbers_have_equal_texts(above, below):
    value = Fraction(above, below)
    text = number(f"{above}/{below}")
    assert Fraction(text) == value and number(text) == text
    assert number(f"{above:,}") == str(above)


@given(st.integers(-(10**9), 10**9), st.integers(0, 6))
def test_decimals_are_exact(digits, places):
    value = Fraction(digits, 10**places)
    text = f"{'-' if digits < 0 else ''}{abs(digits) // 10**places}" + (f".{abs(digits) % 10**places:0{places}}" if places else "")
    assert Fraction(number(text)) == value and "/" not in number(text)


@given(st.text(), st.sampled_from(sorted(TEMPLATES)))
def test_no_text_is_an_error(text, name):
    for item in (ITEM, SUM):
        found = extract(text, item, TEMPLATES[name])
        assert found is None or isinstance(found, str) or 0 <= found < len(item.choices)


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz ,'"), st.integers(0, 3))
def test_lower_case_prose_around_a_marked_letter_changes_nothing(prose, place):
    item = dataclasses.replace(ITEM, choices=("1", "2", "3", "4"))
    assert extract(f"{prose}. ({LETTERS[place]}) {prose}", item, PLAIN) == place
    assert extract(prose, item, PLAIN) is None
