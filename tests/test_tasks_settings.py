"""What a task's settings change: the order of choices (`permute`), by the verb and in a run, and how long an answer may be."""

from __future__ import annotations

import json

import pytest

from deltune.commands import tasks
from deltune.commands.eval import main
from deltune.errors import ConfigError
from deltune.evaluation.tasks.catalogue import TASKS
from deltune.evaluation.tasks.item import permuted
from deltune.settings import EvalSettings, load, load_run


@pytest.fixture
def rows(tmp_path):
    row = {"context": "c", "answers": ["red", "green", "blue", "grey"]}
    path = tmp_path / "val.json"
    path.write_text(json.dumps([{**row, "question": f"Question {i}?", "label": i % 4} for i in range(12)]))
    return path


def answers(out):
    return {line["id"]: line["answer"] for line in map(json.loads, (out / "predictions.jsonl").read_text().splitlines())}


def test_answers_move_with_their_choices_and_orders_are_not_mixed(tiny_folder, rows, tmp_path):
    words = [f"model={tiny_folder}", "engine.device=cpu", "task=reclor", f"task_data={rows}", "template=plain"]
    items = TASKS["reclor"].read(rows)
    main([*words, f"out={tmp_path / 'plain'}"])
    main([*words, f"out={tmp_path / 'moved'}", "permute=3"])
    assert answers(tmp_path / "plain") == {item.id: item.answer for item in items}
    assert answers(tmp_path / "moved") == {item.id: permuted(item, 3).answer for item in items} != answers(tmp_path / "plain")
    with pytest.raises(ConfigError, match="never mixed"):
        main([*words, f"out={tmp_path / 'plain'}", "permute=3"])


@pytest.mark.parametrize(("more", "length"), [([], 400), (["template=plain"], 64), (["max_new_tokens=5"], 5)])
def test_how_long_an_answer_may_be_is_the_templates_to_say(tmp_path, more, length):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    settings = load(EvalSettings, ["task=gsm8k", f"task_data={tmp_path}", *more])
    exam = tasks.read(settings.tasks[0], "gsm8k", 0)
    assert exam.way.max_new_tokens == exam.made_of["max_new_tokens"] == length


def test_an_order_of_no_choices_is_refused():
    with pytest.raises(ConfigError, match=r"permute.*has no effect on gsm8k"):
        load(EvalSettings, ["task=gsm8k", "task_data=x", "permute=1"])
    with pytest.raises(ConfigError, match=r"permute.*has no effect without task"):
        load(EvalSettings, ["data=x", "permute=1"])
    assert load_run(["eval.tasks=[{task: mmlu, data: x, permute: 1}]", "eval.metric=mmlu_accuracy"]).eval.tasks[0].permute == 1
