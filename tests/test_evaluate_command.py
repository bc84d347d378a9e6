"""`deltune eval`: its numbers are those of a plain loop, source by source, and its files say all that made them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from deltune.commands.eval import main, measure, table
from deltune.errors import ConfigError, DataError
from deltune.settings import EvalSettings, load
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [("1+1", "2"), ("a longer question", "a longer answer"), ("q", "?"), ("x y", "z")]


@pytest.fixture
def files(tmp_path) -> list[Path]:
    found = []
    for name, rows in (("one.jsonl", ROWS[:3]), ("two.jsonl", ROWS[3:])):
        found.append(tmp_path / name)
        found[-1].write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return found


def by_hand(rows) -> tuple[float, int]:
    """(summed loss, trained tokens) of rows, each rendered with the template and scored by itself."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    total, count = 0.0, 0
    for question, answer in rows:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False)
        ids = prompt + tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(len(prompt), len(ids)):
            total -= log_p[position - 1, ids[position]].item()
            count += 1
    return total, count


def words(folder, files, *more) -> list[str]:
    return [f"model={folder}", f"data=[{','.join(map(str, files))}]", *more]


def test_numbers_of_each_source_and_of_all(tiny_folder, files, tmp_path, capsys):
    out = tmp_path / "results"
    assert main(words(tiny_folder, files, "exact_match=true", "max_new_tokens=8", f"out={out}", "micro_batch=2")) == 0
    found = json.loads((out / "metrics.json").read_text())
    for metrics, rows in [(found["all"], ROWS), (found["sources"][str(files[0])], ROWS[:3]), (found["sources"][str(files[1])], ROWS[3:])]:
        total, count = by_hand(rows)
        assert metrics["num_tokens"] == count
        assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)
        assert metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
        assert metrics["exact_match"]["n"] == len(rows)
    answers = [json.loads(line) for line in (out / "predictions.jsonl").read_text().rstrip("\n").split("\n")]
    assert [(Path(a["row"]).name, a["reference"]) for a in answers] == [
        ("one.jsonl:1", "2"), ("one.jsonl:2", "a longer answer"), ("one.jsonl:3", "?"), ("two.jsonl:1", "z"),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert f"{found['all']['loss']:.4f}" in printed and str(files[0]) in printed and "95 %" in printed
    assert found["settings"]["max_new_tokens"] == 8
    assert len(found["model"]["sha256"]["config.json"]) == 64 and found["versions"]["torch"] == torch.__version__


def test_batch_size_changes_nothing(tiny_folder, files):
    results = [measure(load(EvalSettings, words(tiny_folder, files, f"micro_batch={size}")))[0] for size in (1, 4)]
    assert results[0]["all"] == pytest.approx(results[1]["all"], rel=1e-6)
    assert results[0]["data_fingerprint"] == results[1]["data_fingerprint"]


def test_out_may_name_the_json_file(tiny_folder, files, tmp_path):
    main(words(tiny_folder, files[:1], f"out={tmp_path / 'm.json'}"))
    assert json.loads((tmp_path / "m.json").read_text())["all"]["num_examples"] == 3
    assert not (tmp_path / "m.predictions.jsonl").exists(), "nothing was answered"


def test_eval_size_holds_rows_out_of_the_training_data(tiny_folder, files):
    settings = load(EvalSettings, [f"model={tiny_folder}", f"data.train=[{files[0]}]", "data.eval_size=1"])
    assert measure(settings)[0]["all"]["num_examples"] == 1


def test_training_data_is_not_read_without_need(tiny_folder, files):
    settings = load(EvalSettings, words(tiny_folder, files, "data.train=[/nowhere.jsonl]"))
    assert measure(settings)[0]["all"]["num_examples"] == 4


def test_the_bundled_evaluation_rows_are_not_the_training_rows(tiny_folder):
    from deltune.data.sources import BUNDLED

    result = measure(load(EvalSettings, [f"model={tiny_folder}", "data=bundled", "data.eval_read_nums=3"]))[0]
    assert list(result["sources"]) == [str(BUNDLED / "eval.jsonl")]
    assert result["all"]["num_examples"] == 3


def test_missing_files_and_outputs_are_named(tiny_folder, files, tmp_path):
    with pytest.raises(DataError, match=r"data\.eval.*nowhere"):
        main([f"model={tiny_folder}", "data=nowhere.jsonl"])
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match=r"out="):
        main(words(tiny_folder, files, f"out={tmp_path / 'taken'}"))


def test_table_of_one_source_has_one_line():
    metrics = {"num_examples": 2, "num_tokens": 1234, "loss": 0.5, "perplexity": 1.6487, "token_accuracy": 0.75}
    lines = table({"all": metrics, "sources": {"a.jsonl": metrics}}).split("\n")
    assert len(lines) == 2
    assert lines[1].split() == ["all", "2", "1,234", "0.5000", "1.649", "75.00%"]


def test_metrics_of_answers_are_those_of_the_predictions(tiny_folder, files, tmp_path, capsys):
    from deltune.evaluation.text_metrics import measured

    out, names = tmp_path / "results", ["exact_match", "normalised_match", "f1", "bleu", "rouge"]
    assert main(words(tiny_folder, files, f"metrics=[{','.join(names)}]", "max_new_tokens=8", f"out={out}")) == 0
    found = json.loads((out / "metrics.json").read_text())
    answers = [json.loads(line) for line in (out / "predictions.jsonl").read_text().rstrip("\n").split("\n")]
    for metrics, part in [(found["all"], answers), (found["sources"][str(files[0])], answers[:3])]:
        expected = measured(names, [a["prediction"] for a in part], [[a["reference"]] for a in part])
        for name in ("normalised_match", "f1", "bleu", "rouge1", "rouge2", "rougeL"):
            assert metrics[name] == pytest.approx(expected[name].score.as_dict())
            assert [a[name] for a in part] == pytest.approx(expected[name].values)
        assert metrics["exact_match"]["exact_match"] == expected["exact_match"].score.value
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("normalised_match", "bleu", "rougeL"))


def test_the_names_of_metrics_are_those_that_exist():
    from deltune.evaluation.text_metrics import TEXT_METRICS
    from deltune.settings import evaluation

    assert tuple(TEXT_METRICS) == evaluation.TEXT_METRICS
    with pytest.raises(ConfigError, match=r"metrics.*f2.*f1"):
        load(EvalSettings, ["data=x.jsonl", "metrics=[f2]"])
