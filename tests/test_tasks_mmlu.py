"""MMLU's files: every row of the real one is read, and its prompt can be built again to the byte."""

from __future__ import annotations

import json
from collections import Counter

from deltune.evaluation.tasks.catalogue import TASKS
from deltune.evaluation.tasks.templates import TEMPLATES, options, prompt


def test_every_real_row_is_read_and_its_prompt_built_again(real_data):
    path = real_data / "mmlu/zero_shot_mmlu_val.json"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    items = TASKS["mmlu"].read(path)
    assert len(items) == len(rows) == 1531 and len({item.id for item in items}) == 1531
    assert len({item.group for item in items}) == 57
    for item, row in zip(items, rows, strict=True):
        assert prompt(item, TEMPLATES["mmlu"], [], "letters") == row["input"]
        assert options(item, TEMPLATES["mmlu"], "letters")[item.answer] == " " + row["output"]
        assert item.group == row["subject"] and len(item.choices) == 4
    assert Counter("ABCD"[item.answer] for item in items) == Counter(row["output"] for row in rows)
