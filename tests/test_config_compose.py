"""Layers: defaults, preset, file, words. Which wins, what falls away with a warning, and what is refused."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import subprocess
import sys

import pytest

from deltune.config.compose import CONF, compose, options
from deltune.config.fields import walk
from deltune.data.config import Source
from deltune.errors import ConfigError
from deltune.optim.config import WSD, Constant, Linear
from deltune.settings import GenerateSettings, Run, load, load_run, run_from


@pytest.fixture
def file(tmp_path):
    def write(text: str):
        path = tmp_path / "my.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refused(words=(), file=None, **more) -> str:
    with pytest.raises(ConfigError) as caught:
        load(Run, words, file, **more)
    return str(caught.value)


def test_nothing_stated_composes_to_nothing():
    assert compose(Run, []) == ({}, {})
    assert load_run() == Run()


def test_words_lie_over_the_file_and_the_file_over_the_preset(file):
    preset = load_run(["preset=demo"])
    below = load_run(["preset=demo"], file("train: {micro_batch: 3}"))
    above = load_run(["preset=demo", "train.micro_batch=5"], file("train: {micro_batch: 3}"))
    assert (below.train.micro_batch, above.train.micro_batch) == (3, 5)
    assert preset.train.micro_batch not in (3, 5)
    assert below.train.steps == above.train.steps == preset.train.steps


def test_a_preset_named_in_the_file_lies_under_it_and_a_word_replaces_it(file):
    assert load_run([], file("preset: demo\ntrain.steps: 7")).name == "demo"
    assert load_run([], file("preset: demo\ntrain.steps: 7")).train.steps == 7
    assert "there are demo" in refused(["preset=none"], file("preset: demo"))


@pytest.mark.parametrize("name", options("preset"))
def test_every_preset_is_a_run(name):
    run = load_run([f"preset={name}"])
    assert run != Run()
    assert load_run([], None) == Run()


@pytest.mark.parametrize(("group", "name"), [(folder.name, name) for folder in sorted(CONF.iterdir()) if folder.name != "preset" for name in options(folder.name)])
def test_every_group_option_is_understood_and_states_something(group, name):
    stated, origins = compose(Run, [f"{group}={name}"])
    assert list(stated) == [group] and stated[group]
    assert set(origins.values()) == {f"{group}={name}, command line"}
    known = {key.path for key in walk(Run)}
    assert {(group, key) for key in stated[group]} <= known


def test_the_files_of_options_hold_no_defaults():
    """A default lives in its dataclass; a group file that repeats one would be a second truth."""
    for group in ("train", "eval", "checkpoint", "log", "data"):
        for name in options(group):
            if (group, name) == ("data", "bundled"):
                continue
            stated, _ = compose(Run, [f"{group}={name}"])
            same = [key for key, value in stated[group].items() if getattr(getattr(Run(), group), key) == value and value is not None]
            assert not same, f"conf/{group}/{name}.yaml repeats defaults: {same}"


def test_every_table_of_names_has_a_group_option_each():
    from dataclasses import fields

    for field in fields(Run):
        table = field.metadata.get("table")
        if table is not None:
            assert {*options(field.name), *(table.named or {})} >= set(table.options), f"conf/{field.name}/ lacks an option"


def test_a_short_key_means_the_only_section_that_has_it(file):
    assert load_run(["lr=1e-3"]).optim.lr == 1e-3
    assert load_run(["rank=4"]).adapter.rank == 4
    assert load_run([], file("lr: 1e-3\nsteps: 9")).train.steps == 9
    message = refused(["dtype=float16"])
    assert "model.dtype" in message and "adapter.dtype" in message
    assert "data" in refused(["data.seed=-1"]) and load_run(["seed=3"]).seed == 3  # a key at the top is itself


def test_plain_text_for_a_section_is_its_primary_key(file):
    run = load_run(["model=./folder", "data=[a.jsonl,b.jsonl]"])
    assert (run.model.path, run.data.train) == ("./folder", ["a.jsonl", "b.jsonl"])
    run = load_run([], file("model: C:\\models\\x\ndata: {train: chats.jsonl, eval: [b.jsonl]}\nadapter: null\nschedule: linear"))
    assert (run.model.path, run.data.train, run.adapter, run.schedule) == ("C:\\models\\x", ["chats.jsonl"], None, Linear())
    assert load_run(["data.train=[a.jsonl,{path: b.jsonl,weight: 2}]"]).data.train == ["a.jsonl", Source("b.jsonl", 2.0)]
    assert "there are exact_match; did you mean exact_match; or give single keys" in refused(["eval=exactmatch"])


def test_a_group_option_lies_under_single_keys_of_its_layer_and_over_lower_layers(file):
    below = file("log: {progress: bar, every: 5}")
    assert load_run(["log=quiet"], below).log.progress == "off"
    assert load_run(["log=quiet"], below).log.every == 5
    assert load_run(["log=quiet", "log.progress=lines"], below).log.progress == "lines"
    assert load_run([], file("log: quiet\nlog.progress: lines")).log.progress == "lines"


def test_another_option_leaves_keys_of_lower_layers_out_and_says_so(file, caplog):
    below = file("schedule: {name: polynomial, power: 3, warmup: 0.1}")
    with caplog.at_level(logging.WARNING, logger="deltune"):
        assert load_run(["schedule=constant"], below).schedule == Constant(warmup=0.1)
    assert "schedule.power=3" in caplog.text and "my.yaml:1" in caplog.text
    caplog.clear()
    assert load_run(["schedule=wsd", "schedule.decay=0.2"], below).schedule == WSD(warmup=0.1, decay=0.2)
    assert "power" in caplog.text
    # in one layer, or for a key that no option has, nothing is left out
    assert "schedule=constant has no such key" in refused(["schedule=constant", "schedule.power=3"])
    assert "schedule=constant has no such key" in refused(["schedule.power=3"], file("schedule: constant"))
    assert "there is no such key" in refused(["schedule=constant"], file("schedule: {name: polynomial, powr: 3}"))


def test_an_optional_section_can_be_switched_off_and_on(file):
    assert load_run(["adapter=null"], file("adapter: {rank: 4}")).adapter is None
    assert load_run(["adapter=lora"], file("adapter: null")).adapter.delta == "lora"
    assert "adapter is null (" in refused(["adapter.rank=4"], file("adapter: null"))
    assert "adapter is null (command line)" in refused(["adapter=null", "adapter.rank=4"])
    assert "must be text" in refused(["model=null"])


def test_a_key_given_twice_in_one_layer_is_refused(file):
    assert "given twice; first as 0.1 (command line)" in refused(["lr=0.1", "optim.lr=0.2"])
    assert "given twice" in refused([], file("lr: 1\noptim: {lr: 2}"))
    assert "given twice" in refused(["log=quiet", "log=quiet"])
    assert "given twice; first as linear (schedule=linear, command line)" in refused(["schedule=linear", "schedule.name=cosine"])
    assert "given twice" in refused(["adapter=null", "adapter=null"])


def test_mappings_are_replaced_whole_and_single_entries_added(file):
    below = file("optim: {lr_scales: {a: 1, b: 2}}")
    assert load_run(["optim.lr_scales={c: 3}"], below).optim.lr_scales == {"c": 3.0}
    assert load_run(["optim.lr_scales.layers.0.*=3"], below).optim.lr_scales == {"a": 1.0, "b": 2.0, "layers.0.*": 3.0}
    assert load_run(["optim.lr_scales.c=3", "optim.lr_scales={d: 4}"], below).optim.lr_scales == {"d": 4.0, "c": 3.0}


def test_problems_name_the_line_of_the_file(file):
    message = refused(["train.steps=0"], file("optim:\n  lr: fast\n\nlora_r: 8\ntraining:\n  steps: 3\n"))
    assert "my.yaml:2): must be a number" in message
    assert "my.yaml:4): there is no such key; lora_r of other tools is adapter.rank here" in message
    assert "training.steps=3 (" in message and "nearest: train.steps" in message
    assert "train.steps=0 (command line): must be above 0" in message


def test_all_bad_words_are_told_at_once():
    message = refused(["--lr=1", "train.steps=1,2", "lr=1", "lr=2", "eval=x", "preset=x"])
    assert message.startswith("5 problems in the config:")


def test_references_follow_stated_values_and_defaults(file):
    run = load_run(["eval_size=4", "eval.micro_batch=${train.micro_batch}", "name=run-${seed}-${schedule.floor}"])
    assert (run.eval.micro_batch, run.name) == (8, "run-42-0.1")
    run = load_run(["train.micro_batch=3"], file("eval_size: 4\neval:\n  micro_batch: ${train.micro_batch}\n"))
    assert run.eval.micro_batch == 3  # a word below the reference is what it finds
    assert "refers to itself" in refused(["train.micro_batch=${train.accumulate}", "train.accumulate=${train.micro_batch}"])
    assert "nearest: train.steps" in refused(["seed=${train.step}"])
    assert "has no value" in refused(["adapter=null", "seed=${adapter.rank}"])


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${hydra:runtime.cwd}", "${oc.decode:1}"])
def test_no_resolver_is_ever_called(file, text):
    assert "only ${section.key} can be referred to" in refused([f"data.system={text}"])
    assert "only ${section.key} can be referred to" in refused([], file(f"data: {{system: '{text}'}}"))
    assert "only ${section.key} can be referred to" in refused([], file(f"data: {{fields: {{a: '{text}'}}}}"))
    assert load(Run, mapping={"data.system": text}).data.system == text  # in Python text is text


def test_nothing_names_python(file):
    for key in ("_target_", "model._target_", "data.train"):
        words = [f"{key}=os.system"] if key != "data.train" else ["data.train=[{_target_: os.system, path: a}]"]
        assert "cannot name Python" in refused(words)


def test_hydra_leaves_nothing_behind(monkeypatch):
    from hydra.core.global_hydra import GlobalHydra

    argv, folder, handlers = list(sys.argv), os.getcwd(), list(logging.getLogger().handlers)
    load_run(["schedule=linear", "preset=demo"])
    assert not GlobalHydra.instance().is_initialized()
    assert (sys.argv, os.getcwd(), logging.getLogger().handlers) == (argv, folder, handlers)


def test_presets_are_for_runs():
    with pytest.raises(ConfigError, match="training runs only"):
        load(GenerateSettings, ["preset=demo", "prompt=hi"])


@pytest.mark.parametrize("text", ["model", "[1]", "a: {b: {c: {d: 1}}}", "model: {path: {a: 1}}", "1: 2", "data: []", "adapter: []", "adapter: {method: [lora]}", "train: 3", "'': 1", "a..b: 1", "model.path.x: 1", "optim.lr_scales: 3\noptim.lr_scales.a: 1", "seed: {a: 1}", "schedule: {name: {a: 1}}", "engine: {name: null}", "preset: [a]", "log: {sinks: [[a]]}"])
def test_odd_files_are_refused_with_a_message(file, text):
    assert len(refused([], file(text))) > 10


def test_a_config_of_python_values_is_checked_as_a_file_is():
    run = run_from({"model": "bundled", "train.steps": 5, "adapter": {"method": "lora", "rank": 4}, "log": "quiet"})
    assert (run.train.steps, run.adapter.rank, run.log.sinks) == (5, 4, [])
    assert run_from(run) == run
    assert run_from(["train.steps=5"]) == run_from({"train": {"steps": 5}})
    with pytest.raises(ConfigError, match=r"adapter.rank=0 \(Python\): must be above 0"):
        run_from({"adapter": {"rank": 0}})


PIECES = [
    "", "null", "1", "-1", "1e-4", "[", "]", "[a,b]", "{a: b}", "{", "a,b", "${x}", "${optim.lr}", "\\${x}", "'x'", '"', "'", "true", "1e999", "nan",
    "[[1],{a: [1]}]", "x" * 300, "\0", "\ud800", "é", "glob(*)", "range(1,3)", "int(x)", "{path: x}", "[{path: 1}]", "{name: cosine}", "linear", "lora",
    "quiet", "=", "\\", "(", ")", "1:2", "sort(3,1)", "tag(x,1)", "{1: 2, a: [1, {b: 1}]}", "[null]", "&a", "*a", "!!python/name:os.system",
]  # fmt: skip


def test_no_words_end_in_a_crash():
    rng = random.Random(2)
    keys = [key.dotted for key in walk(Run)]
    keys += [part for key in keys for part in key.split(".")] + ["preset", "x", "a.b.c", "data.train.0", "", "_target_", "hydra.run.dir", "m@x", "d/x", "a b"]
    refusals = 0
    for _ in range(250):
        words = [rng.choice(keys) + rng.choice(["=", "=", "=", ".x=", ""]) + rng.choice(PIECES) + rng.choice(["", "", *PIECES]) for _ in range(rng.randint(1, 3))]
        try:
            load(Run, words)
        except ConfigError:
            refusals += 1
    assert refusals > 200


def test_no_values_from_python_end_in_a_crash():
    rng = random.Random(4)
    keys = [key.dotted for key in walk(Run)] + ["model", "data", "adapter", "optim", "log", "preset", "x", "", 1, None]
    odd = [None, 1, -1, 0.5, True, "", "x", "linear", "${x}", "\ud800", float("nan"), 10**400, b"x", object(), {1, 2}, Run(), complex(1, 2), (1, 2), {}, [], [{}]]
    for _ in range(250):
        values = {rng.choice(keys): rng.choice([rng.choice(odd), [rng.choice(odd)], {rng.choice(["path", "name", "a", 1]): rng.choice(odd)}]) for _ in range(2)}
        with contextlib.suppress(ConfigError):
            run_from(values)


def test_composing_needs_neither_model_libraries_nor_files_of_the_user(tmp_path):
    code = (
        "import sys; from deltune.settings import load, GenerateSettings, PreviewSettings\n"
        "load(GenerateSettings, ['prompt=hi', 'model=./x']); load(PreviewSettings, ['data=a.jsonl'])\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'matplotlib', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr
    assert not list(tmp_path.iterdir())
