"""A model that was told the answers gets all of them right, and one that guesses is right as often as chance has it: on every
row of MMLU's validation set, C3 and LogiQA 2, by each protocol, through the runner that scores real models."""

from __future__ import annotations

import random

import pytest

from deltune.evaluation.statistics import wilson_interval
from deltune.evaluation.tasks.catalogue import TASKS
from deltune.evaluation.tasks.item import PROTOCOLS
from deltune.evaluation.tasks.run import Way, answer, questions
from deltune.evaluation.tasks.summary import chance, summary
from deltune.evaluation.tasks.templates import TEMPLATES, label_of
from deltune.models.head import describe
from tests.planted import Planted, PlantedConfig
from tests.tiny import tiny_tokenizer

ROWS = {"mmlu": ("mmlu/zero_shot_mmlu_val.json", 1531), "c3-d": ("c3/c3-d-dev.json", 1825), "logiqa2": ("logiqa2/dev.txt", 1569)}


@pytest.fixture(scope="module")
def read(real_data):
    found: dict[str, list] = {}

    def items(name):
        if name not in found:
            found[name] = TASKS[name].read(real_data / ROWS[name][0])
        return found[name]

    return items


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ROWS)
def test_told_and_guessing(name, protocol, read):
    items, task, tokenizer = read(name), TASKS[name], tiny_tokenizer()
    assert len(items) == ROWS[name][1]
    # among choices that one another begin with, a sum always prefers the shorter: it is compared by its length
    way = Way(TEMPLATES[task.template], protocol, likelihood="tokens" if protocol == "likelihood" else "sum", max_new_tokens=4)
    asked = questions(items, way, [], tokenizer, None)
    guess = random.Random(0)
    told = right(asked, way, [question.item.answer for question in asked], tokenizer)
    assert told == [True] * len(items)
    guessed = right(asked, way, [guess.randrange(len(question.item.choices)) for question in asked], tokenizer)
    low, high = wilson_interval(sum(guessed), len(items), z=3.29)  # 99.9 %: nine intervals are held to it
    assert low < chance(items, "micro") < high


def right(asked, way, answers, tokenizer) -> list[bool]:
    """Of each question, whether a model that would say these answers has it right."""
    model = Planted(PlantedConfig()).eval()
    model.plant([(question.prompt, said(question, way, place, tokenizer)) for question, place in zip(asked, answers, strict=True)])
    texts = {question.item.id: question.item.choices for question in asked}
    return [
        one.correct or (way.protocol == "likelihood" and texts[one.id][one.prediction] == texts[one.id][one.answer])  # LogiQA has one choice twice
        for part in answer(model, tokenizer, asked, way, head=describe(model), batch=64)
        for one in part
    ]


def said(question, way, place, tokenizer):
    """The option, or a sentence with its letter."""
    if way.protocol != "generation":
        return question.options[place]
    return [*tokenizer(way.template.space + label_of(question.item, way.template, place))["input_ids"], tokenizer.eos_token_id]


def test_letters_of_a_model_that_knows_nothing_are_drawn_evenly(read):
    items, tokenizer = read("mmlu"), tiny_tokenizer()
    model, way = Planted(PlantedConfig()).eval(), Way(TEMPLATES["mmlu"], "letters")
    rounds = answer(model, tokenizer, questions(items, way, [], tokenizer, None), way, head=describe(model), batch=64)
    found = summary([one for part in rounds for one in part], "macro")
    assert found["accuracy"]["low"] < 0.25 < found["accuracy"]["high"] and found["accuracy"]["n"] == 1531
