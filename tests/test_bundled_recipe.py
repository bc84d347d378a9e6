"""The corpus and the demo task are what their generators write, and no evaluation word was met in demo training."""

from __future__ import annotations

import ast
import json
import re

import pytest

from deltune.data.sources import BUNDLED as TASK
from deltune.models.folder import BUNDLED as MODEL
from recipes.base_model import corpus, demo_task, skills, words
from recipes.base_model.words import Draw


def shipped(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (TASK / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def said_words(texts) -> set[str]:
    return {word for text in texts for word in re.findall("[a-z]+", text.lower())}


def test_the_models_page_names_the_corpus_that_the_generator_writes():
    stated = re.search(r"`([0-9a-f]{64})`", (MODEL / "README.md").read_text(encoding="utf-8"))
    assert stated and stated[1] == corpus.digest(corpus.SEED, corpus.DIGEST_ROWS)


def test_a_row_depends_on_seed_and_index_only():
    there = [corpus.row(3, index) for index in (40, 2, 17)]
    run = list(corpus.rows(3, 41))
    assert there == [run[40], run[2], run[17]]
    assert corpus.row(4, 2) != run[2]


def test_files_hold_the_rows_in_order(tmp_path):
    texts, chats = corpus.write(tmp_path, 5, 60)
    read = [json.loads(line) for file in (texts, chats) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = list(corpus.rows(5, 60))
    assert read == [row for row in rows if "text" in row] + [row for row in rows if "messages" in row]


@pytest.mark.parametrize("task", [skills.add, skills.subtract, skills.multiply, skills.divide])
def test_sums_are_right(task):
    symbols = {"add": "+", "subtract": "-", "multiply": "*", "divide": "//"}
    for index in range(100):
        question, answer = task(Draw(f"{index}"))
        a, b = re.findall(r"\d+", question)
        value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "//": int.__floordiv__}[symbols[task.__name__]]
        assert value(int(a), int(b)) == int(answer), question


def test_chats_alternate_and_end_in_an_answer():
    for row in corpus.rows(6, 200):
        roles = [message["role"] for message in row.get("messages", ()) if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_a_noun_stands_in_one_category_only():
    assert len(words.NOUNS) == len(set(words.NOUNS))


def test_a_draw_with_focus_keeps_to_few_words():
    draw = Draw("x", focus=5)
    assert len({draw.pick(words.NOUNS) for _ in range(200)}) <= 5
    assert len({Draw(str(i)).pick(words.NOUNS) for i in range(200)}) > 100


def fields(completion: str) -> dict[str, str]:
    """`action: turn_on, room: hall` as a mapping."""
    return dict(part.split(": ") for part in completion.split(", "))


@pytest.mark.parametrize("name", ["train", "eval"])
def test_the_shipped_task_is_what_the_generator_writes(name):
    assert shipped(name) == demo_task.build()[name]


def test_no_word_of_an_evaluation_device_or_room_is_in_a_training_row():
    answers = [fields(row["completion"]) for row in shipped("eval")]
    held_out = {word for answer in answers for field in ("device", "room") for word in answer[field].split()}
    assert len(held_out) > 20
    trained = said_words(text for row in shipped("train") for text in row.values())
    assert not held_out & trained


def test_actions_of_the_evaluation_are_all_trained():
    trained, evaluated = ({fields(row["completion"])["action"] for row in shipped(name)} for name in ("train", "eval"))
    assert evaluated <= trained


def test_answers_say_what_the_request_says():
    for row in shipped("train") + shipped("eval"):
        answer, prompt = fields(row["completion"]), row["prompt"].lower()
        assert f"the {answer['device']}" in prompt and f"the {answer['room']}" in prompt
        assert ("number" in answer) == bool(re.search(r"\d", prompt))
        assert set(answer["action"].split("_")) <= said_words([prompt]) | {"turn", "close"}


def test_the_corpus_holds_the_words_of_the_task_and_not_its_answers():
    rows = [json.dumps(row, ensure_ascii=False) for row in corpus.rows(corpus.SEED, 3000)]
    met = said_words(rows)
    assert {word for name in demo_task.EVAL_DEVICES + demo_task.EVAL_ROOMS for word in name.split()} <= met
    assert not [row for row in rows if re.search(r"\b(action|device)(: |=|\\\":)", row)]


def test_every_token_of_the_task_was_met_in_the_corpus():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = corpus.rows(corpus.SEED, 1500)
    said = [text for row in rows for text in ([row["text"]] if "text" in row else [m["content"] for m in row["messages"]])]
    met = {i for ids in tokenizer(said, add_special_tokens=False)["input_ids"] for i in ids}
    task = {i for name in ("train", "eval") for row in shipped(name) for text in row.values() for i in tokenizer.encode(text, add_special_tokens=False)}
    assert not tokenizer.convert_ids_to_tokens(sorted(task - met))


def test_the_recipe_imports_no_text_from_elsewhere():
    for file in sorted(MODEL.parents[2].glob("recipes/base_model/*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        assert not imported & {"urllib", "requests", "httpx", "datasets", "huggingface_hub", "socket"}, file
