"""What `deltune plan` foretells is what training then does; and where it cannot know, it says so."""

from __future__ import annotations

import gzip
import json
import random
import re

import numpy as np
import pytest
import torch

import deltune
from deltune.cli import main
from deltune.commands import estimate, init, plan, survey
from deltune.config.fields import walk
from deltune.data.config import DataConfig, Source
from deltune.data.loader import Loader
from deltune.data.prepare import prepare
from deltune.data.read import File
from deltune.errors import ConfigError, DataError, ModelError
from deltune.models.cost import Speed
from deltune.settings import Run, load_run, run_from
from tests.conftest import ROOT
from tests.encoded import write_rows
from tests.tiny import refuse_weight_files, tiny_config, tiny_tokenizer


def rows(number, seed=0):
    draw = random.Random(seed)
    return [{"prompt": "p" * draw.randint(1, 40), "completion": "a" * draw.randint(1, 60)} for _ in range(number)]


@pytest.fixture(autouse=True)
def known_speed(monkeypatch):
    """No measuring in tests that are not about it."""
    flops = {torch.float32: 1e11, torch.bfloat16: 1e11}
    monkeypatch.setattr(estimate, "device_speed", lambda device, dtypes: Speed(flops, 1e10, 1e-5, False, "given by the test"))


@pytest.fixture
def stated(tiny_folder, tmp_path):
    """Settings of a small run, dotted keys."""
    return {
        "name": "r", "output": str(tmp_path / "runs"), "model.path": str(tiny_folder),
        "data.train": [write_rows(tmp_path / "rows.jsonl", rows(37))], "data.eval_size": 5, "data.max_length": 64,
        "train.epochs": 2.0, "train.micro_batch": 3, "train.accumulate": 2, "adapter.method": "lora", "adapter.rank": 4,
        "eval.samples": 0, "checkpoint.every": 4, "log.progress": "off", "log.report": False, "log.sinks": [],
    }  # fmt: skip


def text_of(found):
    return "\n".join(plan.page(found))


def without_weights(folder, **changes):
    tiny_config(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


# -- foretold and done ------------------------------------------------------------------------------------------


def test_training_does_what_the_plan_says(stated, tmp_path):
    found = plan.make(run_from(stated))
    outcome = deltune.train(stated)
    folder = tmp_path / "runs" / "r"
    info = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert found.num_steps == outcome.step == info["num_steps"]
    assert sum(p.numel() for p in found.model.parameters() if p.requires_grad) == info["num_trainable"]
    assert info["num_trainable"] < sum(p.numel() for p in found.model.parameters()) == info["num_parameters"]
    checkpoints = list((folder / "checkpoints").glob("step-*"))
    bytes_of_one = sum(f.stat().st_size for n in ("trainable", "optimizer") for f in checkpoints[0].glob(f"{n}.safetensors"))
    headers = 0.35  # of tensors this small
    assert found.disk["checkpoints, 3 of 3"] == pytest.approx(len(checkpoints) * bytes_of_one, rel=headers)
    assert found.disk["adapter"] == pytest.approx((folder / "adapter" / "adapter_model.safetensors").stat().st_size, rel=headers)


def test_the_page_tells_what_an_optimizers_name_comes_to_here(stated):
    whole = {key: value for key, value in stated.items() if not key.startswith("adapter.")} | {"adapter": None}
    plain, found = plan.make(run_from(whole)), plan.make(run_from(whole | {"optim": "paged_adamw_8bit"}))
    assert "optimizer: paged_adamw_8bit: moments in 8 bits by blocks of 256" in text_of(found)
    assert "not paged, so they lie in the memory of cpu" in text_of(found)
    assert "optimizer:" not in text_of(plain)
    assert plain.memory.parts["optimizer state"] > 1.5 * found.memory.parts["optimizer state"]


def test_no_weight_is_opened(stated, tmp_path, monkeypatch):
    refuse_weight_files(monkeypatch)
    with_weights = text_of(plan.make(run_from(stated)))
    folder = without_weights(tmp_path / "shapes")
    without = text_of(plan.make(run_from(stated | {"model.path": folder})))
    section = with_weights[with_weights.index("Parameters") : with_weights.index("Data")]
    assert section in without and "attention" in section


@pytest.mark.parametrize(("epochs", "micro_batch", "accumulate", "weight"), [(1, 4, 1, 1.0), (2.5, 3, 2, 1.0), (0.3, 8, 1, 2.5), (1, 64, 1, 0.5)])
def test_epochs_make_as_many_steps_as_the_loader_counts(stated, tmp_path, epochs, micro_batch, accumulate, weight):
    run = run_from(stated | {
        "data.train": [{"path": stated["data.train"][0], "weight": weight}], "train.epochs": epochs,
        "train.micro_batch": micro_batch, "train.accumulate": accumulate,
    })  # fmt: skip
    tokenizer = tiny_tokenizer()
    data = prepare(run.data, tokenizer).train
    loader = Loader(data, micro_batch=micro_batch, accumulate=accumulate, pad_id=0)
    found = survey.survey(run.data, tokenizer)
    assert plan.steps_of(run, found, estimate.shapes_for(run, found, "padded")) == loader.num_steps(epochs)


@pytest.mark.parametrize("sampled", [False, True])
def test_steps_of_bins_are_those_that_the_loader_makes_and_about_so_many_where_data_is_sampled(stated, tmp_path, monkeypatch, sampled):
    run = run_from(stated | {
        "data.train": [write_rows(tmp_path / "many.jsonl", rows(300))], "train.epochs": 2.5, "train.micro_batch": 8,
        "train.micro_batch_tokens": 256, "train.accumulate": 2,
    })  # fmt: skip
    data = prepare(run.data, tiny_tokenizer()).train
    loader = Loader(data, micro_batch=8, micro_batch_tokens=256, batching="packed", accumulate=2, seed=run.data.seed, pad_id=0)
    if sampled:
        monkeypatch.setattr(survey, "QUICK_BYTES", 0)
        monkeypatch.setattr(survey, "SAMPLE_ROWS", 100)
    found = plan.make(run)
    assert found.num_steps == (pytest.approx(loader.num_steps(2.5), rel=0.05) if sampled else loader.num_steps(2.5))
    assert "256 tokens x 2" in text_of(found) and "none of them padding" in text_of(found)


def test_the_page_opens_with_a_config_that_makes_the_same_run(stated, tmp_path):
    found = plan.make(run_from(stated))
    file = tmp_path / "copy.yaml"
    file.write_text(text_of(found).partition("\n\n")[0])
    assert load_run([], file) == found.run


def test_the_verb_prints_every_part(stated, tmp_path, capsys):
    assert main(["plan", *(f"{key}={json.dumps(value)}" for key, value in stated.items())]) == 0
    out = capsys.readouterr().out
    titles = [line for line in out.splitlines() if line and not line.startswith(" ") and ":" not in line]
    assert titles[1:] == ["Parameters", "Data", "Steps", "Computed", "Memory (cpu)", "Time", "Disk"] or "Look at" in titles
    assert "11 steps of 6 examples (3 x 2)" in out and "5 examples for evaluation" in out
    assert "the whole model with random weights" in out  # the one test that starts a trial's process
    told = json.loads((tmp_path / "runs" / "r" / "plan.json").read_text())
    assert told["seconds_per_step"] > 0 and told["settings"]["train.micro_batch"] == 3


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"optim.lr_scales": {"*lora_C*": 2.0}}, ConfigError, r"lora_C.*lora_"),
    ({"schedule.warmup": 40}, ConfigError, "warmup=40: the run has 11 steps"),
    ({"data.train": ["nowhere.jsonl"]}, DataError, "nowhere"),
    ({"adapter": None, "model.enable": ["*layer.1*"]}, ModelError, "matches no parameter"),
])  # fmt: skip
def test_what_training_would_refuse_is_refused_now(stated, changes, error, message):
    settings = {k: v for k, v in stated.items() if not (k.startswith("adapter.") and "adapter" in changes)}
    with pytest.raises(error, match=message):
        plan.make(run_from(settings | changes))


# -- data that is not read whole --------------------------------------------------------------------------------


@pytest.fixture
def sampling(monkeypatch):
    monkeypatch.setattr(survey, "QUICK_BYTES", 0)
    monkeypatch.setattr(survey, "SAMPLE_ROWS", 100)


def test_a_sample_tells_of_the_whole(sampling, tmp_path):
    file = write_rows(tmp_path / "many.jsonl", rows(1000))
    config = DataConfig(train=[file], eval_size=0.1, max_length=80, cache=None)
    found = survey.survey(config, tiny_tokenizer())
    whole = prepare(config, tiny_tokenizer())
    assert found.sampled and len(found.lengths) == 100
    assert found.num_rows == pytest.approx(1000, rel=0.1)
    assert found.examples_per_epoch == pytest.approx(len(whole.train), rel=0.1)
    assert found.num_evaluation == pytest.approx(100, rel=0.1)
    assert found.mean_length == pytest.approx(whole.train.lengths.mean(), rel=0.1)
    assert found.mean_trained == pytest.approx(whole.train.num_trained.mean(), rel=0.15)


def test_sources_count_by_their_size_and_weight(sampling, tmp_path):
    short = write_rows(tmp_path / "short.jsonl", [{"prompt": "p", "completion": "a"}] * 600)
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "p", "completion": "a" * 30}] * 200)
    config = DataConfig(train=[short, Source(path=long, weight=2.0)], cache=None)
    found = survey.survey(config, tiny_tokenizer())
    assert found.num_rows == pytest.approx(800, abs=2) and found.examples_per_epoch == pytest.approx(1000, abs=4)
    lengths = np.unique(found.lengths)
    assert found.mean_length == pytest.approx(0.6 * lengths[0] + 0.4 * lengths[1], rel=0.01)
    limited = survey.survey(DataConfig(train=[short, long], read_nums=650, cache=None), tiny_tokenizer())
    assert limited.num_rows == 650


def test_rows_are_counted_in_every_kind_of_file(sampling, tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = [{"prompt": "p", "completion": f"{i:05}"} for i in range(350)]
    text = "".join(json.dumps(row) + "\n" for row in table)
    (tmp_path / "a.jsonl").write_text(text)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(text)
    (tmp_path / "a.json").write_text(json.dumps(table))
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "".join(f"p,{i:05}\n" for i in range(350)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "a.parquet")
    kinds = {"a.jsonl": "jsonl", "a.jsonl.gz": "jsonl", "a.json": "json", "a.csv": "csv", "a.parquet": "parquet"}
    for name, kind in kinds.items():
        found = survey.count_rows(File(str(tmp_path / name), kind, gzipped=name.endswith("gz")))
        assert found == pytest.approx(350, rel=0.02), name
        (few := tmp_path / f"few-{name}").write_bytes((tmp_path / name).read_bytes())
        if kind == "jsonl" and not name.endswith("gz"):
            few.write_text("".join(text.splitlines(keepends=True)[:7]))
            assert survey.count_rows(File(str(few), kind)) == 7


def test_the_page_says_what_is_about(sampling, stated, tmp_path):
    out = text_of(plan.make(run_from(stated | {"data.train": [write_rows(tmp_path / "many.jsonl", rows(300))]})))
    assert "about" in out[out.index("Steps") : out.index("Memory")] and "first 100 rows" in out


# -- micro-batches ----------------------------------------------------------------------------------------------


def of_lengths(*lengths, chance=None):
    lengths = np.array(lengths)
    chance = np.full(len(lengths), 1 / len(lengths)) if chance is None else np.array(chance)
    return survey.Survey(lengths, lengths // 2, chance, len(lengths), len(lengths), 0, 0.0, 1, [], None)


def test_micro_batches_are_as_long_as_their_longest_example():
    even = survey.micro_batches(of_lengths(10, 10, 10), 4)
    assert (even.seq, even.padding, even.longest, even.trained, even.most_trained) == (10, 0, 10, 20, 20)
    alone = survey.micro_batches(of_lengths(10, 30), 1, number=4000)
    assert alone.padding == 0 and alone.seq == pytest.approx(20, rel=0.05)
    pair = survey.micro_batches(of_lengths(10, 30), 2, number=4000)  # both short in one of four
    assert pair.seq == pytest.approx(25, rel=0.05) and pair.padding == pytest.approx(1 - 20 / 25, rel=0.1)


def test_the_longest_example_is_among_them_and_length_groups_pad_less():
    found = of_lengths(*range(1, 2000), 9000)
    plain, grouped = (survey.micro_batches(found, 8, batching=name) for name in ("padded", "grouped"))
    assert plain.longest == grouped.longest == 9000
    assert grouped.padding < 0.2 * plain.padding


def test_packed_micro_batches_are_one_row_of_all_tokens():
    by_number = survey.micro_batches(of_lengths(10, 30), 4, batching="packed", number=4000)
    assert (by_number.size, by_number.padding, by_number.unfilled, by_number.examples) == (1, 0, 0, 4)
    assert by_number.seq == pytest.approx(80, rel=0.05) and by_number.longest == sum(by_number.largest) == 120
    assert abs(sum(by_number.typical) - by_number.seq) < 20
    by_tokens = survey.micro_batches(of_lengths(10, 30), 8, batching="packed", capacity=95)
    assert by_tokens.longest == sum(by_tokens.largest) == 90 and by_tokens.padding == 0
    assert by_tokens.examples == pytest.approx(90 / 20, rel=0.05) and by_tokens.unfilled == pytest.approx(5 / 95, abs=0.01)


# -- warnings ---------------------------------------------------------------------------------------------------


def test_every_remedy_for_too_little_memory_fits(tmp_path, monkeypatch):
    """Applied as words to the same command, it brings the need below what is free."""
    folder = without_weights(tmp_path / "model", hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    words = [
        f"model={folder}", f"data={write_rows(tmp_path / 'rows.jsonl', [{'prompt': 'p' * 200, 'completion': 'a' * 200}] * 50)}",
        "train.micro_batch=16", "model.gradient_checkpointing=none",
    ]  # fmt: skip
    monkeypatch.setattr(estimate, "held_now", lambda: 0.0)
    free = 0.35 * plan.make(load_run(words)).memory.most
    monkeypatch.setattr(estimate, "free_memory", lambda device: free)
    found = plan.make(load_run(words))
    remedies = dict(estimate.fitting(found.run, found.found, "packed", found.device, free))
    assert len(remedies) >= 3 and any("gradient_checkpointing" in w for w in remedies) and any("accumulate" in w for w in remedies)
    for remedy, memory in remedies.items():
        keys = [word.partition("=")[0] for word in remedy.split()]
        after = plan.make(load_run([*(word for word in words if word.partition("=")[0] not in keys), *remedy.split()]))
        assert after.memory.most <= free, remedy
        assert 0.9 * memory.least < after.memory.least <= memory.least * 1.001  # a shorter example may train fewer tokens
    out = text_of(found)
    shown = out[out.index("What fits:") :].splitlines()[1:4]
    assert sum(any(remedy in line for remedy in remedies) for line in shown) >= 2


def test_where_nothing_fits_it_says_so(stated, monkeypatch):
    monkeypatch.setattr(estimate, "free_memory", lambda device: 1000.0)
    assert "nothing that leaves model and data as they are" in text_of(plan.make(run_from(stated)))


def test_a_full_disk_padding_and_cut_rows_are_pointed_out(stated, tmp_path, monkeypatch):
    mixed = write_rows(tmp_path / "m.jsonl", [{"prompt": "p", "completion": "a" * (3 if i % 8 else 200)} for i in range(80)])
    monkeypatch.setattr(estimate, "free_disk", lambda folder: 10.0)

    def said(**changes):
        return "\n".join(plan.warnings(plan.make(run_from(stated | {"data.train": [mixed], "train.micro_batch": 8} | changes))))

    assert "save_total_limit" in said() and "13% of the rows are cut to data.max_length=64" in said()
    assert "padding" not in said() and "are cut" not in said(**{"data.max_length": 512})
    assert "data.batching=auto" in said(**{"data.max_length": 512, "data.batching": "padded"})
    assert "data.batching=grouped" in said(**{"data.max_length": 512, "fast": "off"})
    assert "padding" not in said(**{"data.max_length": 512, "data.batching": "grouped"})
    monkeypatch.setattr(estimate, "free_disk", lambda folder: 1e12)
    assert "disk" not in said()


def test_a_model_whose_cost_depends_on_its_numbers_is_planned_all_the_same(stated, tmp_path):
    """Experts in float32: which of them work, the numbers decide."""
    from transformers import Qwen3MoeConfig

    folder = without_weights(tmp_path / "experts")
    Qwen3MoeConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2, dtype="float32", bos_token_id=256, eos_token_id=257,
    ).save_pretrained(folder)  # fmt: skip
    out = text_of(plan.make(run_from(stated | {"model.path": folder})))
    assert "Qwen3MoeForCausalLM: its cost cannot be told without its weights" in out and "11 steps" in out and "\nTime" not in out
    seen = init.look(folder, stated["data.train"][0])
    text = "\n".join(init.starter(seen, init.choose(seen)))
    assert "cannot be told beforehand" in text and "BEWARE" not in text


def test_time_grows_with_steps_and_work(stated):
    def seconds(**changes):
        found = plan.make(run_from(stated | changes))
        return found.time.total(found.num_steps)

    base = seconds()
    assert seconds(**{"train.epochs": 4.0}) == pytest.approx(2 * base, rel=0.15)
    assert seconds(**{"model.gradient_checkpointing": True}) > 1.1 * base
    assert seconds(**{"eval.every": 1}) > base


# -- docs/plan.md -----------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")


def test_the_commands_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    for line in block.splitlines():
        program, *words = line.split()
        assert program == "deltune" and main(words) == 0, line
    assert (tmp_path / "my.yaml").is_file() and "Memory" in capsys.readouterr().out


def test_the_page_states_the_rules_as_they_are():
    for rate, size in ((2e-4, "1 G"), (5e-4, "100 M"), (1e-3, "10 M"), (3e-3, "below")):
        assert rate in dict((r, s) for s, r in init.RATES)
        assert re.search(rf"{rate:g}|{rate:.0e}".replace("e-0", "e-"), PAGE) and size in PAGE
    assert f"{init.MEMORY_SHARE:.0%}".replace("%", " %") in PAGE and f"at most {init.HELD_OUT}" in PAGE
    assert f"{survey.QUICK_BYTES / 1e6:.0f} MB" in PAGE and f"first {survey.SAMPLE_ROWS:,} rows" in PAGE
    assert plan.HEAP_REMEDY.split()[0] in PAGE and f"{init.MUCH_PADDING:.0%}".replace("%", " %") in PAGE
    keys = re.findall(r"^\| `([a-z_]+\.[a-z_]+)`", PAGE, re.M)
    assert len(keys) == 10 and all(key in {k.dotted for k in walk(Run)} for key in keys)
