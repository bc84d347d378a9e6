"""Exact match: what is asked, what is compared, and how sure the number is."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
import pytest

from deltune.errors import DataError
from deltune.evaluation.exact import exact_match, split
from deltune.evaluation.statistics import wilson_interval
from deltune.models.generation import GenerateOptions, generate
from tests.test_generate_model import chatty
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class Example(NamedTuple):
    ids: np.ndarray
    labels: np.ndarray
    row: str


def example(parts: list[tuple[str, bool]], row: str = "d.jsonl:1") -> Example:
    """From (text, trained) parts."""
    ids: list[int] = []
    labels: list[int] = []
    for text, trained in parts:
        new = TOKENIZER(text)["input_ids"]
        ids += new
        labels += new if trained else [-100] * len(new)
    return Example(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), row)


def test_prompt_is_everything_before_the_last_answer():
    prompt, answer = split(example([("<s>Q1 ", False), ("A1</s>", True), (" Q2 ", False), ("A2</s>", True), ("\n", False)]))
    assert TOKENIZER.decode(prompt) == "<s>Q1 A1</s> Q2 "
    assert TOKENIZER.decode(answer) == "A2</s>"
    prompt, answer = split(example([("Q", False), ("A", True)]))
    assert (TOKENIZER.decode(prompt), TOKENIZER.decode(answer)) == ("Q", "A")


def test_examples_without_prompt_or_answer_are_named():
    with pytest.raises(DataError, match=r"d.jsonl:7.*no token is trained"):
        split(example([("Q", False)], "d.jsonl:7"))
    with pytest.raises(DataError, match=r"d.jsonl:8.*first token"):
        split(example([("text", True)], "d.jsonl:8"))


def known_dataset(model, count: int = 9) -> tuple[list[Example], list[bool]]:
    """References that are the model's own answers for every third row, with other white space around."""
    prompts = [f"<s>question {n * 'x'}" for n in range(count)]
    own = generate(model, TOKENIZER, [TOKENIZER(p)["input_ids"] for p in prompts], GenerateOptions(max_new_tokens=12))
    rows, matches = [], []
    for number, (prompt, answer) in enumerate(zip(prompts, own, strict=True)):
        ids = answer.ids if number % 3 == 0 else TOKENIZER("wrong</s>")["input_ids"]
        question = TOKENIZER(prompt)["input_ids"]
        labels = [-100] * len(question) + ids
        rows.append(Example(np.array(question + ids), np.array(labels), f"d.jsonl:{number + 1}"))
        matches.append(number % 3 == 0)
    return rows, matches


@pytest.mark.parametrize("batch", [1, 4])
def test_matches_are_counted_in_the_order_of_the_data(batch):
    model = chatty()
    rows, matches = known_dataset(model)
    score, answers = exact_match(model, TOKENIZER, rows, GenerateOptions(max_new_tokens=12), batch=batch)
    assert [answer["match"] for answer in answers] == matches
    assert [answer["row"] for answer in answers] == [row.row for row in rows]
    assert answers[1]["reference"] == "wrong" and answers[1]["prompt"] == "<s>question x"
    assert (score["exact_match"], score["n"], score["num_too_long"]) == (3 / 9, 9, 0)
    assert (score["low"], score["high"]) == wilson_interval(3, 9)
    assert json.loads(json.dumps(answers)) == answers


def test_a_prompt_that_fills_the_window_is_named_by_its_row():
    model = chatty(max_position_embeddings=16)
    with pytest.raises(DataError, match=r"d.jsonl:4.*16"):
        exact_match(model, TOKENIZER, [example([("q" * 16, False), ("a", True)], "d.jsonl:4")])


def test_limit_takes_the_first_rows_and_too_long_references_are_counted():
    model = chatty()
    rows, _ = known_dataset(model)
    score, answers = exact_match(model, TOKENIZER, rows, GenerateOptions(max_new_tokens=5), limit=4)
    assert [answer["row"] for answer in answers] == [f"d.jsonl:{n}" for n in range(1, 5)]
    assert score["n"] == 4 and score["num_too_long"] == sum(len(split(row)[1]) > 5 for row in rows[:4])
    with pytest.raises(DataError, match="no examples"):
        exact_match(model, TOKENIZER, [], GenerateOptions())


def test_ranks_share_the_rows_without_repeating_one(monkeypatch):
    """Each rank's part as it computes it; gathered as the process group would."""
    model = chatty()
    rows, _ = known_dataset(model, 7)
    options = GenerateOptions(max_new_tokens=12, temperature=0.8)
    whole = exact_match(model, TOKENIZER, rows, options)
    parts = []
    for rank in range(3):
        monkeypatch.setattr("deltune.dist.rank", lambda rank=rank: rank)
        monkeypatch.setattr("deltune.dist.world_size", lambda: 3)
        monkeypatch.setattr("deltune.dist.gather_objects", lambda value: parts.append(value) or [value])
        exact_match(model, TOKENIZER, rows, options)
    assert [len(part) for part in parts] == [3, 2, 2]
    monkeypatch.setattr("deltune.dist.gather_objects", lambda value: parts)
    assert exact_match(model, TOKENIZER, rows, options) == whole
