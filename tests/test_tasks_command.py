"""`deltune eval task=...` and `eval.tasks`: what is measured, kept, gone on with, compared and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import deltune
from deltune.commands import tasks
from deltune.commands.eval import main
from deltune.errors import ConfigError, DataError, Interrupted
from deltune.settings import EvalSettings, load, load_run
from tests.test_train_command import StopAt
from tests.tiny import save_tiny

SUBJECTS = ("law", "physics", "art")


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory) -> Path:
    """Thirty questions in the form of QLoRA's files."""
    path = tmp_path_factory.mktemp("mmlu") / "val.json"
    lines = []
    for i in range(30):
        head = f"The following are multiple choice questions (with answers) about  {SUBJECTS[i // 10]}.\n\n"
        text = head + f"Question {i}: {'word ' * (i % 7)}?\nA. one {i}\nB. two\nC. three {i * i}\nD. four\nAnswer:"
        lines.append(json.dumps({"subject": SUBJECTS[i // 10], "input": text, "output": "ABCD"[i % 4]}) + "\n")
    path.write_text("".join(lines))
    return path


def words(folder, mmlu, *more) -> list[str]:
    return [f"model={folder}", "task=mmlu", f"task_data={mmlu}", "engine.device=cpu", *more]


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_files_and_table(tiny_folder, mmlu, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(words(tiny_folder, mmlu, f"out={out}")) == 0
    found, lines = json.loads((out / "metrics.json").read_text()), lines_of(out)
    right = {subject: [line["correct"] for line in lines if line["group"] == subject] for subject in SUBJECTS}
    assert [len(values) for values in right.values()] == [10, 10, 10]
    assert {name: score["value"] for name, score in found["groups"].items()} == {name: sum(values) / 10 for name, values in right.items()}
    assert found["accuracy"]["value"] == pytest.approx(sum(sum(values) / 10 for values in right.values()) / 3)
    assert found["accuracy"]["n"] == found["n"] == 30 and found["chance"] == 0.25
    assert len(found["made_by"]["model"]["sha256"]["config.json"]) == 64 and found["versions"] and found["settings"]["shots"] == 0
    assert found["tokens"]["computed"] < found["tokens"]["asked"] / 3
    printed = capsys.readouterr().out
    assert f"{found['accuracy']['value']:.2%}" in printed and "macro mean" in printed and "physics" in printed and str(out / "metrics.json") in printed


def test_an_interrupted_evaluation_goes_on_and_other_settings_do_not(tiny_folder, mmlu, tmp_path, capsys):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    main(words(tiny_folder, mmlu, f"out={whole}"))
    main(words(tiny_folder, mmlu, f"out={torn}", "limit=12"))
    assert len(lines_of(torn)) == 12 and {line["group"] for line in lines_of(torn)} == set(SUBJECTS)
    file = torn / "predictions.jsonl"
    kept = file.read_bytes().split(b"\n")[:7]
    file.write_bytes(b"\n".join(kept) + b'\n{"id": "val:')
    main(words(tiny_folder, mmlu, f"out={torn}"))
    assert file.read_bytes().split(b"\n")[:7] == kept
    found = json.loads((torn / "metrics.json").read_text())
    assert found["num_answered_before"] == 7 and found["accuracy"] == json.loads((whole / "metrics.json").read_text())["accuracy"]
    one, two = ({line["id"]: line for line in lines_of(out)} for out in (whole, torn))
    assert one.keys() == two.keys() and all(one[id]["prediction"] == two[id]["prediction"] for id in one)
    before = file.read_bytes()
    for change in ("protocol=likelihood", "shots=2", "template=plain", "engine.precision=bf16"):
        with pytest.raises(ConfigError, match="never mixed"):
            main(words(tiny_folder, mmlu, f"out={torn}", change, *([f"shots_data={mmlu}"] if change == "shots=2" else [])))
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"model\.weights"):
        main(words(other, mmlu, f"out={torn}"))
    assert file.read_bytes() == before


def test_only_one_process_writes(tiny_folder, mmlu, tmp_path):
    from deltune.evaluation.tasks.store import Store

    store = Store(tmp_path, {})
    with pytest.raises(ConfigError, match="another evaluation"):
        main(words(tiny_folder, mmlu, f"out={tmp_path}"))
    store.close()
    main(words(tiny_folder, mmlu, f"out={tmp_path}"))


def test_two_tasks_and_a_comparison(tiny_folder, mmlu, tmp_path, capsys):
    sums = tmp_path / "test.jsonl"
    sums.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}"}) + "\n" for i in range(3)))
    other = save_tiny(tmp_path / "other", seed=1)
    for model, out, more in ((tiny_folder, "one", []), (other, "two", [f"against={tmp_path / 'one'}"])):
        both = ["task=[mmlu,gsm8k]", f"task_data=[{mmlu},{sums}]", "max_new_tokens=4"]
        main([f"model={model}", *both, "engine.device=cpu", f"out={tmp_path / out}", *more])
    found = json.loads((tmp_path / "two" / "mmlu" / "metrics.json").read_text())
    ours, theirs = ({line["id"]: line for line in lines_of(tmp_path / out / "mmlu")} for out in ("two", "one"))
    means = [sum(sum(line["correct"] for line in side.values() if line["group"] == s) / 10 for s in SUBJECTS) / 3 for side in (ours, theirs)]
    assert found["against"]["difference"] == pytest.approx(means[0] - means[1])
    assert found["against"]["better"] == sum(ours[id]["correct"] and not theirs[id]["correct"] for id in ours)
    assert f"{means[0] - means[1]:+.2%} against" in capsys.readouterr().out
    assert {line["protocol"] for line in lines_of(tmp_path / "two" / "gsm8k")} == {"generation"}
    with pytest.raises(ConfigError, match="against="):
        main(words(tiny_folder, mmlu, f"against={tmp_path / 'nowhere'}"))


def test_exemplars_and_fast_forms(tiny_folder, mmlu, tmp_path):
    found = {}
    for name, more in {"fast": ["fast=auto"], "plain": ["fast=off"]}.items():
        main(words(tiny_folder, mmlu, "shots=2", f"shots_data={mmlu}", "limit=6", f"out={tmp_path / name}", *more))
        found[name] = {line["id"]: line["scores"] for line in lines_of(tmp_path / name)}
    assert found["fast"].keys() == found["plain"].keys()
    for id, scores in found["fast"].items():
        assert scores == pytest.approx(found["plain"][id], abs=1e-5)
    with pytest.raises(ConfigError, match="shots_data"):
        main(words(tiny_folder, mmlu, "shots=2"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["task=mmul", "task_data=x"], "did you mean mmlu"), (["task=mmlu"], "task_data"), (["task=mmlu", "task_data=[x,y]"], "task_data"),
        (["task=mmlu", "task_data=x", "data=y"], "data.eval.*no effect"), (["data=x", "shots=3"], "shots.*no effect without task"),
        (["task=mmlu", "task_data=x", "likelihood=bytes"], "likelihood.*no effect with protocol=letters"), (["task=gsm8k", "task_data=x", "protocol=letters"], "generation does"),
        (["task=mmlu", "task_data=x", "max_new_tokens=3"], "nothing is generated"), (["task=mmlu", "task_data=x", "shots_data=3"], "shots_data.*no effect"),
        (["task=mmlu", "task_data=x", "exact_match=true"], "exact_match.*no effect with task"), (["task=mmlu", "task_data=x", "out=m.json"], "folder"),
        (["task=mmlu", "task_data=x", "seed=3"], "seed.*no effect"), (["data=x", "against=y"], "against.*without task"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused(more, said):
    with pytest.raises(ConfigError, match=said):
        load(EvalSettings, more)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["eval.tasks=[{task: mmlux, data: x}]"], "eval.tasks.*did you mean mmlu"), (["eval.tasks=[{task: mmlu, data: x}]", "eval.metric=loss"], "eval.metric.*mmlu_accuracy"),
        (["eval.tasks=[{task: mmlu, data: x, shot: 3}]"], "nearest: shots"), (["eval.tasks=[{task: mmlu, data: x},{task: mmlu, data: y}]", "eval.metric=mmlu_loss"], "of one name"),
        (["eval.tasks=[{task: mmlu, data: x}]", "eval.metric=c3_d_accuracy"], "direction"), (["eval.tasks=[{task: mmlu, data: x}]", "eval.metric=mmlu_loss", "eval.exact_match=true"], "exact_match"),
        (["eval.every=3"], "eval.tasks"),
    ],
)  # fmt: skip
def test_rules_of_a_run(more, said):
    with pytest.raises(ConfigError, match=said):
        load_run(more)


# -- during training --------------------------------------------------------------------------------------------


def test_a_run_measures_tasks_and_goes_on_exactly(tiny_folder, mmlu, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": str(i)}) + "\n" for i in range(8)))
    shared = {
        "output": str(tmp_path), "model": str(tiny_folder), "data.train": [str(data)], "train.steps": 6, "train.micro_batch": 2, "checkpoint.every": 2,
        "eval.tasks": [{"task": "mmlu", "data": str(mmlu)}, {"task": "mmlu", "data": str(mmlu), "name": "chosen", "protocol": "likelihood", "limit": 5}],
        "eval.every": 2, "eval.metric": "mmlu_loss", "log.progress": "off", "log.report": False, "log.sinks": [], "optim.lr": 3e-2, "engine.device": "cpu",
    }  # fmt: skip
    straight = deltune.train(shared | {"name": "straight"})
    with pytest.raises(Interrupted):
        deltune.train(shared | {"name": "stopped"}, callbacks=[StopAt(3)])
    deltune.train(shared | {"name": "stopped"})

    def evaluations(name):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["metrics"], line["is_best"]) for line in lines if line["kind"] == "eval"]

    assert evaluations("straight") == evaluations("stopped")
    steps = evaluations("straight")
    assert [step for step, _, _ in steps] == [0, 2, 4, 6]
    assert steps[0][1].keys() == {"mmlu_accuracy", "mmlu_loss", "chosen_accuracy", "chosen_loss"}
    losses = {step: metrics["mmlu_loss"] for step, metrics, _ in steps[1:]}
    assert len(set(losses.values())) == 3 and straight.best_step == min(losses, key=losses.get)
    # the same by the verb, of what the run left
    main([f"run={tmp_path / 'straight'}", "task=mmlu", f"task_data={mmlu}", "engine.device=cpu", f"out={tmp_path / 'out'}"])
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["accuracy"]["value"] == straight.metrics_after["mmlu_accuracy"]
    assert found["loss"]["value"] == pytest.approx(straight.metrics_after["mmlu_loss"], rel=1e-6) == pytest.approx(losses[straight.best_step], rel=1e-6)


def test_with_tasks_alone_the_first_ones_accuracy_decides(tiny_folder, mmlu, tmp_path):
    outcome = deltune.train({
        "output": str(tmp_path), "name": "r", "model": str(tiny_folder), "data.train": [str(mmlu)], "data.fields": {"input": "input", "output": "output"},
        "train.steps": 1, "eval.tasks": [{"task": "mmlu", "data": str(mmlu)}], "log.progress": "off", "log.report": False, "log.sinks": [], "engine.device": "cpu",
    })  # fmt: skip
    assert outcome.best_metric == outcome.metrics_after["mmlu_accuracy"]


def test_a_missing_file_is_told_before_the_model_is_loaded(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("deltune.models.load.load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(DataError, match="nowhere"):
        main([f"model={tiny_folder}", "task=mmlu", f"task_data={tmp_path / 'nowhere.json'}"])


def test_another_training_changes_the_hash_of_weights(tmp_path, tiny_folder):
    settings = load(EvalSettings, [f"model={tiny_folder}", "task=mmlu", "task_data=x"])
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(tiny_folder).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    moved = load(EvalSettings, [f"model={copy}", "task=mmlu", "task_data=x"])
    assert tasks.weights_of(moved) == tasks.weights_of(settings)
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert tasks.weights_of(moved) != tasks.weights_of(settings)
