"""Files of prompts: several answers a row, samples that keep shares, adapters row by row, tables, references."""

from __future__ import annotations

import csv
import json
from collections import Counter

import pytest
import torch

from deltune import LoraConfig, attach, save_adapter
from deltune.commands import generate as command
from deltune.commands.prompts import parse, read_prompts, reference_of, sampled
from deltune.errors import ConfigError, DataError
from deltune.models.config import ModelConfig
from deltune.models.load import load as load_model
from deltune.settings import GenerateSettings, load
from tests.test_generate_command import QUESTIONS, expected, folder, lines_of, prompts_file  # noqa: F401 - a fixture

ROWS = [{"prompt": q, "task": "ab"[i % 3 == 0]} for i, q in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):  # noqa: F811
    """Two adapters whose answers differ from the base model's and from each other's."""
    found = {}
    for seed, name in enumerate(("first", "second"), 1):
        model = attach(load_model(ModelConfig(path=str(folder))), LoraConfig(rank=4))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(seed))
        found[name] = tmp_path_factory.mktemp(name)
        save_adapter(model, found[name])
    return found


def answers(folder, file, out, *words):  # noqa: F811
    command.main([f"model={folder}", f"file={file}", f"out={out}", "max_new_tokens=6", *words])
    return lines_of(out.with_suffix(".jsonl"))


def test_several_answers_a_row_are_drawn_each_anew_and_go_on(folder, tmp_path):  # noqa: F811
    file = prompts_file(tmp_path, ROWS[:3])
    words = ("temperature=2", "repeat=3")
    lines = answers(folder, file, tmp_path / "a.jsonl", *words)
    assert [(line["row"].rsplit(":")[-1], line["turn"]) for line in lines] == [(str(i), k) for i in (1, 2, 3) for k in range(3)]
    assert len({line["prediction"] for line in lines[:3]}) == 3
    once = answers(folder, file, tmp_path / "once.jsonl", "temperature=2")
    assert [line["prediction"] for line in once] == [line["prediction"] for line in lines[::3]]  # more answers leave the first as it was
    whole = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    answers(folder, file, tmp_path / "a.jsonl", *words)
    assert (tmp_path / "a.jsonl").read_bytes() == whole


@pytest.mark.parametrize("count", [1, 4, 6, 9])
def test_a_sample_keeps_each_values_share(tmp_path, count):
    _, prompts = read_prompts(str(prompts_file(tmp_path, ROWS)))
    places = sampled(prompts, count, "task", seed=1)
    assert places == sorted(set(places)) and len(places) == count
    whole, found = Counter(row["task"] for row in ROWS), Counter(ROWS[i]["task"] for i in places)
    for value, number in whole.items():
        assert abs(found[value] - count * number / len(ROWS)) < 1
    assert len({tuple(sampled(prompts, 4, "task", seed)) for seed in range(20)}) > 5
    assert sampled(prompts, None, None, 0) == list(range(9)) and len(sampled(prompts, 5, None, 0)) == 5


def test_a_sample_that_cannot_be_is_named(tmp_path):
    _, prompts = read_prompts(str(prompts_file(tmp_path, ROWS)))
    with pytest.raises(DataError, match="sample=10: there are 9 rows"):
        sampled(prompts, 10, None, 0)
    with pytest.raises(DataError, match=r"prompts.jsonl:1: no column kind, which stratify names; keys found: prompt, task"):
        sampled(prompts, 2, "kind", 0)


def test_a_sampled_file_answers_its_rows_as_the_whole_file_does(folder, tmp_path):  # noqa: F811
    file = prompts_file(tmp_path, ROWS)
    whole = {line["row"]: line["prediction"] for line in answers(folder, file, tmp_path / "whole.jsonl", "temperature=1")}
    some = answers(folder, file, tmp_path / "some.jsonl", "temperature=1", "sample=4", "stratify=task")
    assert len(some) == 4 and all(whole[line["row"]] == line["prediction"] for line in some)


def test_each_row_is_answered_by_the_adapter_that_it_names(folder, adapters, tmp_path):  # noqa: F811
    names = ["second", None, "first", "first", None, "second"]
    file = prompts_file(tmp_path, [{"prompt": q, "adapter": name} for q, name in zip(QUESTIONS, names, strict=False)])
    words = [f"adapters.{name}={place}" for name, place in adapters.items()]
    lines = {line["row"].rsplit(":")[-1]: line for line in answers(folder, file, tmp_path / "a.jsonl", *words, "batch=2")}
    for number, (question, name) in enumerate(zip(QUESTIONS, names, strict=False), 1):
        alone = tmp_path / f"{number}.jsonl"
        given = [] if name is None else [f"adapter={adapters[name]}"]
        (one,) = answers(folder, prompts_file(tmp_path, [{"prompt": question}]), alone, *given)
        assert lines[str(number)]["prediction"] == one["prediction"] and lines[str(number)]["adapter"] == name
    assert len({lines[str(i)]["prediction"] for i in range(1, 7)}) > 3


def test_rows_without_a_name_take_the_adapter_of_all(folder, adapters, tmp_path):  # noqa: F811
    file = prompts_file(tmp_path, [{"prompt": QUESTIONS[0]}, {"prompt": QUESTIONS[0], "adapter": "other"}, {"prompt": QUESTIONS[0], "adapter": None}])
    lines = answers(folder, file, tmp_path / "a.jsonl", f"adapter={adapters['first']}", f"adapters.other={adapters['second']}")
    by_name = {line["adapter"]: line["prediction"] for line in lines}
    assert by_name.keys() == {"default", "other", None} and len(set(by_name.values())) == 3
    assert by_name[None] == expected([QUESTIONS[0]], max_new_tokens=6)[0]


def test_an_adapter_that_is_not_there_is_named_with_its_row(folder, adapters, tmp_path):  # noqa: F811
    file = prompts_file(tmp_path, [{"prompt": "a"}, {"prompt": "b", "adapter": "frist"}])
    with pytest.raises(DataError, match=r"prompts.jsonl:2: adapter 'frist' is none of first"):
        answers(folder, file, tmp_path / "a.jsonl", f"adapters.first={adapters['first']}")


@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_answers_become_a_table_once_all_are_there(folder, tmp_path, ending):  # noqa: F811
    rows = [{"prompt": q, "row": i, "tags": ["x", "y"]} for i, q in enumerate(QUESTIONS[:3])]
    out = tmp_path / f"answers.{ending}"
    lines = answers(folder, prompts_file(tmp_path, rows), out)
    if ending == "json":
        found = json.loads(out.read_text())
    elif ending == "csv":
        found = [row | {"tags": json.loads(row["tags"]), "input.row": int(row["input.row"]), "num_new_tokens": int(row["num_new_tokens"])} for row in csv.DictReader(out.open(newline=""))]
    else:
        import pyarrow.parquet

        found = pyarrow.parquet.read_table(out).to_pylist()
    for row, line, entry in zip(rows, lines, found, strict=True):
        assert entry["prediction"] == line["prediction"] and entry["num_new_tokens"] == line["num_new_tokens"]
        assert entry["input.row"] == row["row"] and entry["row"] == line["row"] and entry["tags"] == row["tags"] and entry["prompt"] == row["prompt"]


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_tables_are_read_as_lines_are(folder, tmp_path, ending):  # noqa: F811
    file = tmp_path / f"prompts.{ending}"
    if ending == "csv":
        with file.open("w", newline="") as opened:
            csv.writer(opened).writerows([["prompt"], *([q] for q in QUESTIONS[:3])])
    elif ending == "json":
        file.write_text(json.dumps([{"prompt": q} for q in QUESTIONS[:3]]))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": q} for q in QUESTIONS[:3]]), file)
    found = answers(folder, file, tmp_path / "a.jsonl")
    assert [line["prediction"] for line in found] == expected(QUESTIONS[:3], max_new_tokens=6)


def test_a_reference_is_kept_and_counted(folder, tmp_path, capfd):  # noqa: F811
    right = expected([QUESTIONS[0]], max_new_tokens=6)[0]
    file = prompts_file(tmp_path, [{"prompt": QUESTIONS[0], "completion": right}, {"prompt": QUESTIONS[1], "completion": "never this"}])
    lines = answers(folder, file, tmp_path / "a.jsonl")
    assert [line["reference"] for line in lines] == [right, "never this"]
    assert "1 of them are the reference: 50.0% (95 % interval 9.5% to 90.5%)" in capfd.readouterr().err


def test_references_of_every_shape():
    assert reference_of({"instruction": "a", "output": "b"}) == "b" and reference_of({"instruction": "a"}) is None
    assert reference_of({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) == "b"
    assert reference_of({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}) == "b"
    assert reference_of({"messages": [{"role": "user", "content": "a"}]}) is None
    assert parse({"messages": [{"role": "user", "content": "a"}]})[1] == "messages"


def test_only_listed_texts_come_from_a_file_of_them(folder, tmp_path):  # noqa: F811
    (tmp_path / "labels.txt").write_text("good\nbad\n\ngood\n")
    lines = answers(folder, prompts_file(tmp_path, ROWS), tmp_path / "a.jsonl", f"choices_file={tmp_path / 'labels.txt'}")
    assert {line["prediction"] for line in lines} <= {"good", "bad"}
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ConfigError, match="holds no text"):
        answers(folder, prompts_file(tmp_path, ROWS), tmp_path / "b.jsonl", f"choices_file={tmp_path / 'empty.txt'}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["repeat=2"], "repeat.*has no effect while temperature is 0"),
        (["stratify=task"], "stratify.*has no effect without sample"),
        (["decoding.typical_p=0.5"], "decoding.typical_p.*has no effect while temperature is 0"),
        (["decoding.length_penalty=2"], "decoding.length_penalty.*has no effect without beams"),
        (["decoding.num_beam=2"], "decoding.num_beams"),
        (["choices=[a]", "choices_file=b"], "cannot be given together"),
        (["out=answers.txt"], "must end in .jsonl, .json, .csv, .parquet"),
    ],
)
def test_settings_without_effect_are_refused(words, says):
    with pytest.raises(ConfigError, match=says):
        load(GenerateSettings, ["file=prompts.jsonl", *words])
    for key in ("repeat=2", "sample=3", "adapters.a=b"):
        with pytest.raises(ConfigError, match="has no effect without file"):
            load(GenerateSettings, ["prompt=hello", key])
