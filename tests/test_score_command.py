"""`deltune score`: answers that are there already, of three kinds, alone and beside others to the same items."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltune.commands.score import main
from deltune.errors import ConfigError, DataError
from deltune.evaluation.answered import read
from deltune.evaluation.statistics import macro_mean, mean, paired
from deltune.evaluation.text_metrics import measured, recall_at_k

ROWS = [
    {"id": "q1", "prediction": "The red cat sat.", "reference": "a red cat sat"},
    {"id": "q2", "prediction": "blue", "references": ["green", "blue"]},
    {"id": "q3", "prediction": None, "reference": "seven of them"},
]
OTHERS = [ROWS[2] | {"prediction": "seven of us"}, ROWS[0], ROWS[1] | {"prediction": "grey"}]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_are_scored_and_compared_by_id(tmp_path, capsys):
    first, second = write(tmp_path / "one.jsonl", ROWS), write(tmp_path / "two.jsonl", OTHERS)
    out = tmp_path / "new" / "scores.json"
    assert main([f"predictions={first}", f"against={second}", "metrics=[normalised_match,f1,bleu]", f"out={out}"]) == 0
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    wanted = [["a red cat sat"], ["green", "blue"], ["seven of them"]]
    ours = measured(["normalised_match", "f1", "bleu"], ["The red cat sat.", "blue", ""], wanted)
    theirs = measured(["normalised_match", "f1", "bleu"], ["The red cat sat.", "grey", "seven of us"], wanted)
    assert found["scores"] == {name: one.score.as_dict() for name, one in ours.items()}
    assert {name: found["against"][name] for name in ours} == {name: one.against(theirs[name]).as_dict() for name, one in ours.items()}
    assert "66.67%" in printed and "mcnemar" in printed and f"{found['against']['f1']['difference']:+.2%}" in printed


def test_the_metrics_of_texts_without_being_asked(tmp_path):
    assert list(read(write(tmp_path / "one.jsonl", ROWS)).scores([], "auto")) == ["exact_match", "normalised_match", "f1"]


def test_what_a_task_left_is_compared_by_groups(tmp_path, capsys):
    def rows(correct: str, order=range(6)) -> list[dict]:
        return [{"id": f"t:{i}", "group": "xxxxyy"[i], "prediction": 1, "answer": 1, "correct": correct[i] == "1"} for i in order]

    first, second = write(tmp_path / "a" / "predictions.jsonl", rows("111000")), write(tmp_path / "b" / "predictions.jsonl", rows("100010", range(5, -1, -1)))
    assert main([f"predictions={first.parent}", f"against={second.parent}"]) == 0
    assert "macro_accuracy" in capsys.readouterr().out
    scores, differences = read(first).scores([], "auto"), read(first).against(read(second), [], "auto")
    assert scores == {"accuracy": mean([1, 1, 1, 0, 0, 0]), "macro_accuracy": macro_mean([[1, 1, 1, 0], [0, 0]])}
    values = ([1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0])
    assert differences == {"accuracy": paired(*values), "macro_accuracy": paired(*values, groups=list("xxxxyy"))}


def test_ranked_lists_are_recalled(tmp_path):
    rows = [{"ranked": ["a", "b"], "gold": ["b"]}, {"ranked": ["c"], "gold": ["d", "c"]}]
    found = read(write(tmp_path / "r.jsonl", rows)).scores([], "auto")
    assert found == {f"recall@{k}": one.score for k, one in recall_at_k([["a", "b"], ["c"]], [["b"], ["d", "c"]]).items()}


def test_what_eval_wrote_is_scored_again(tiny_folder, tmp_path):
    from deltune.commands.eval import main as evaluate

    data = write(tmp_path / "rows.jsonl", [{"prompt": "1+1", "completion": "2"}, {"prompt": "q", "completion": "?"}])
    assert evaluate([f"model={tiny_folder}", f"data={data}", "metrics=[exact_match,f1]", "max_new_tokens=4", f"out={tmp_path / 'out'}"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())["all"]
    found = read(tmp_path / "out").scores([], "auto")
    assert found["f1"].as_dict() == metrics["f1"] and found["exact_match"].value == metrics["exact_match"]["exact_match"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROWS[0], ROWS[0]], "one.jsonl:2: item q1 is there a second time; the first is .*:1"), ([{"prediction": "x"}], "one.jsonl:1: has neither"), ([{"prediction": "x", "references": []}], "one.jsonl:1: has neither"),
        ([ROWS[0], {"correct": True}], r"one.jsonl:1 holds texts and .*one.jsonl:2 holds correct"), ([], "no items in it"), ([[]], "one.jsonl:1: a list"),
    ],
)  # fmt: skip
def test_lines_that_cannot_be_used_are_named(tmp_path, rows, said):
    with pytest.raises(DataError, match=said):
        read(write(tmp_path / "one.jsonl", rows))


def test_sides_that_do_not_fit_are_named(tmp_path):
    first = write(tmp_path / "one.jsonl", ROWS)
    with pytest.raises(DataError, match=r"1 only in the first \(such as q3\)"):
        main([f"predictions={first}", f"against={write(tmp_path / 'two.jsonl', ROWS[:2])}"])
    with pytest.raises(DataError, match="item q1 has another right answer"):
        main([f"predictions={first}", f"against={write(tmp_path / 'two.jsonl', [ROWS[0] | {'reference': 'x'}, *ROWS[1:]])}"])
    with pytest.raises(DataError, match=r"holds texts.*correct: they cannot"):
        main([f"predictions={first}", f"against={write(tmp_path / 'two.jsonl', [{'id': row['id'], 'correct': True} for row in ROWS])}"])
    with pytest.raises(ConfigError, match="metrics have no effect"):
        main([f"predictions={tmp_path / 'two.jsonl'}", "metrics=[f1]"])
    with pytest.raises(DataError, match="cannot be read"):
        main([f"predictions={tmp_path / 'none.jsonl'}"])
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"bad.jsonl:1: not JSON"):
        main([f"predictions={tmp_path / 'bad.jsonl'}"])
    with pytest.raises(ConfigError, match="out="):
        main([f"predictions={first}", f"out={first / 'x.json'}"])
