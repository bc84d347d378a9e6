"""`deltune init` writes a config that runs as it is, from what it saw; and never over a file without being told to."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

import deltune
from deltune.cli import main
from deltune.commands import estimate, init
from deltune.commands.survey import limit_for
from deltune.errors import ConfigError, DataError, ModelError
from deltune.settings import InitSettings, load_run, run_from
from tests.encoded import write_rows
from tests.tiny import tiny_config, tiny_tokenizer


def rows(number, seed=0, **more):
    draw = random.Random(seed)
    return [{"prompt": "p" * draw.randint(1, 40), "completion": "a" * draw.randint(1, 60)} | more for _ in range(number)]


@pytest.fixture
def write(tiny_folder, tmp_path, capsys):
    """Runs the verb over a data file; gives the written text and the run it makes."""

    def write(data, *words, model=tiny_folder):
        out = tmp_path / "my.yaml"
        assert main(["init", f"model={model}", f"data={json.dumps(str(data))}", f"out={out}", "overwrite=true", *words]) == 0
        write.shown = capsys.readouterr().out
        return out.read_text(encoding="utf-8"), load_run([], out)

    return write


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", rows(60))


# -- the file ---------------------------------------------------------------------------------------------------


def test_the_file_trains_as_it_is(write, data, tiny_folder, tmp_path):
    _, run = write(data)
    assert run.model.path == str(tiny_folder) and run.data.train == [data] and run.data.mode == "sft"
    words = [f"output={tmp_path / 'runs'}", "epochs=null", "steps=2", "log.report=false", "eval.samples=0"]
    outcome = deltune.train(load_run(words, tmp_path / "my.yaml"))
    assert outcome.step == 2 and set(outcome.metrics_after) >= {"loss"}


def test_what_is_commented_out_would_run_too(write, data):
    text, _ = write(data)
    others = re.findall(r"^  # ([a-z_]+: [^#]+?)(?: +#.*)?$", text, re.M)
    assert len(others) >= 2
    for line in others:
        changed = re.sub(rf"^  # {re.escape(line)}", f"  {line}", text, flags=re.M)
        assert changed != text
        (path := Path(data).with_name("changed.yaml")).write_text(changed)
        load_run([], path)
    (path := Path(data).with_name("full.yaml")).write_text(re.sub(r"(?ms)^adapter:.*?\n\n", "adapter: null\n\n", text))
    assert load_run([], path).adapter is None


def test_every_line_with_a_value_is_a_known_key_with_its_reason(write, data):
    text, _ = write(data)
    body = text[text.index("\nmodel:") :]
    keys = re.findall(r"^  ([a-z_]+):", body, re.M)
    told = re.findall(r"^  ([a-z_]+):[^#\n]*#", body, re.M)
    assert set(keys) - set(told) == {"path", "train", "method"}  # which speak for themselves


@pytest.mark.parametrize("name", ["a, b.jsonl", "[c] {d}.jsonl", "${model.path}.jsonl", "#e: f.jsonl", "ü 'g' \"h\".jsonl", "- i.jsonl", "two\nlines.jsonl"])
def test_a_path_means_itself_whatever_is_in_it(tmp_path, tiny_folder, name):
    file = write_rows(tmp_path / name, rows(30))
    seen = init.look(str(tiny_folder), file)
    out = tmp_path / "my.yaml"
    out.write_text("\n".join(init.starter(seen, init.choose(seen))), encoding="utf-8")
    assert load_run([], out).data.train == [file]


# -- choices ----------------------------------------------------------------------------------------------------


def test_the_limit_leaves_99_of_100_examples_whole(write, tmp_path):
    lengths = [20] * 985 + [200] * 15
    file = write_rows(tmp_path / "r.jsonl", [{"prompt": "p", "completion": "a" * n} for n in lengths])
    _, run = write(file)
    found = init.look(run.model.path, file).found.lengths
    assert (found <= run.data.max_length).mean() >= 0.99
    for length in (33, 100, 1000, 5000, 20_000):
        limit = limit_for(np.full(10, length))
        assert length <= limit <= 1.5 * length + 32


def test_text_is_pretrained_on_in_pieces(write, tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("\n".join("word " * 300 for _ in range(12)))
    text, run = write(file)
    assert run.data.mode == "pretrain" and run.train.epochs == 1
    assert run.data.max_length == min(1024, 512)  # the tiny model's context
    assert "system" not in text and "exact_match" not in text
    tall = write_rows(tmp_path / "t.jsonl", [{"prompt": "p", "completion": "a" * 900}] * 30)
    assert write(tall)[1].data.max_length == 512


def test_steps_are_enough_whether_rows_are_few_or_many(write, tmp_path):
    few, many = (write(write_rows(tmp_path / f"{n}.jsonl", rows(n)))[1] for n in (12, 1500))
    assert few.train.micro_batch * few.train.accumulate == 1 and few.train.epochs == 5 and few.data.eval_size == 0
    assert many.train.micro_batch * many.train.accumulate == 16 and many.train.epochs == 3
    assert many.data.eval_size == 75 and many.eval.every == many.checkpoint.every
    assert [init.wanted_batch(n) for n in (1, 99, 100, 399, 400, 800, 10**6)] == [1, 1, 2, 4, 8, 16, 16]


def test_less_memory_means_smaller_batches_then_recomputing_then_a_warning(write, tmp_path, monkeypatch):
    shape = tmp_path / "model"
    tiny_config(intermediate_size=256).save_pretrained(shape)
    tiny_tokenizer().save_pretrained(shape)
    file = write_rows(tmp_path / "r.jsonl", [{"prompt": "p" * 100, "completion": "a" * 100}] * 800)
    monkeypatch.setattr(estimate, "held_now", lambda: 0.0)
    _, plenty = write(file, model=shape)
    seen = init.look(str(shape), file)

    def need(size, recompute):
        run = run_from(init.values_of(seen, 256, size, 16 // size, recompute))
        return estimate.memory_of(run, estimate.shapes_of(run), estimate.shapes_for(run, seen.found, "packed"), seen.device).most

    found = []
    for free in (need(4, False), 0.5 * (need(1, False) + need(1, True)), 1e4):
        monkeypatch.setattr(estimate, "free_memory", lambda device, free=free: 1.001 * free / init.MEMORY_SHARE)
        text, run = write(file, model=shape)
        assert run.train.micro_batch * run.train.accumulate == 16
        found.append((run.train.micro_batch, run.model.recompute == "full", "BEWARE" in text))
    assert (plenty.train.micro_batch, plenty.model.gradient_checkpointing) == (16, "auto")
    assert found[0] == (4, False, False) and found[1][1:] == (True, False) and found[2] == (1, True, True)


def test_rows_that_cannot_be_used_are_told_and_skipped(write, tmp_path):
    file = write_rows(tmp_path / "r.jsonl", [*rows(40), {"prompt": "p", "completion": ""}])
    text, run = write(file)
    assert run.data.on_bad == "skip" and "1 rows cannot be used" in text and "1 rows cannot be used" in write.shown


def test_uneven_examples_are_packed_and_where_that_cannot_be_grouped_by_length(write, tmp_path, monkeypatch):
    file = write_rows(tmp_path / "r.jsonl", [{"prompt": "p", "completion": "a" * (200 if i % 8 == 0 else 5)} for i in range(900)])
    even = write_rows(tmp_path / "s.jsonl", [{"prompt": "p", "completion": "a" * (50 + i % 8)} for i in range(900)])
    assert write(file)[1].data.batching == "auto"
    monkeypatch.setattr("deltune.commands.batching.cannot_pack", lambda model: "its layers are no attention")
    assert [write(which)[1].data.batching for which in (file, even)] == ["grouped", "auto"]


@pytest.mark.parametrize(("file", "mode"), [
    ("gsm8k/test.jsonl", "sft"), ("alpaca/alpaca_zh_demo.json", "sft"), ("chat/v1_sft_demo.jsonl", "sft"), ("corpus/wiki_demo.txt", "pretrain"),
])  # fmt: skip
def test_real_files_are_recognised(write, real_data, file, mode):
    _, run = write(real_data / file)
    assert run.data.mode == mode and run.data.on_bad == "stop"
    assert 32 <= run.data.max_length <= 512  # the tiny model's context, of one token a byte


# -- what is shown and asked ------------------------------------------------------------------------------------


def test_what_was_seen_is_shown(write, data):
    write(data)
    assert "LlamaForCausalLM" in write.shown and "context of 512 tokens" in write.shown and "with a chat template" in write.shown
    assert "prompt_completion, template chat; 60 rows" in write.shown
    assert re.search(r"First example.*\n.*<\|user\|>\npp*\n<\|assistant\|>\n\[\[aa*\{</s>\}", write.shown)


def test_it_asks_for_what_is_missing(tiny_folder, data, tmp_path, monkeypatch):
    asked = []

    def answer(question, answers=iter([str(tiny_folder), data])):  # noqa: B008 - the answers in turn
        asked.append(question)
        return next(answers)

    monkeypatch.setattr("builtins.input", answer)
    out = tmp_path / "asked.yaml"
    assert main(["init", f"out={out}"]) == 0
    assert [q.split()[0] for q in asked] == ["Model", "Training"] and load_run([], out).data.train == [data]


def test_nobody_to_answer_is_a_message(monkeypatch, capsys):
    def nobody(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", nobody)
    with pytest.raises(ConfigError, match=r"say it on the command line: data=\.\.\."):
        init.asked(InitSettings(model="bundled"))


def test_a_file_is_never_replaced_unless_told(write, data, tiny_folder, tmp_path, monkeypatch):
    out = tmp_path / "mine.yaml"
    out.write_text("seed: 7\n")
    words = ["init", f"model={tiny_folder}", f"data={data}", f"out={out}"]
    assert main(words) == 2 and out.read_text() == "seed: 7\n"
    monkeypatch.setattr("builtins.input", lambda question: "no" if "Replace" in question else data)
    assert main([words[0], words[1], words[3]]) == 2 and out.read_text() == "seed: 7\n"
    monkeypatch.setattr("builtins.input", lambda question: "yes" if "Replace" in question else data)
    assert main([words[0], words[1], words[3]]) == 0 and load_run([], out).data.train == [data]
    out.write_text("seed: 7\n")
    assert main([*words, "overwrite=true"]) == 0 and load_run([], out).seed == 42


@pytest.mark.parametrize(("model", "content", "error", "message"), [
    ("nowhere", None, ModelError, "nowhere"),
    (None, "missing", DataError, "missing"),
    (None, [{"foo": "a", "bar": "b"}], DataError, "keys found: foo, bar"),
    (None, ["{broken"], DataError, "no row of the first"),
])  # fmt: skip
def test_what_cannot_be_read_is_a_message(tiny_folder, tmp_path, model, content, error, message):
    file = tmp_path / "missing.jsonl"
    if isinstance(content, list):
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content))
    with pytest.raises(error, match=message):
        init.look(str(model or tiny_folder), str(file))
