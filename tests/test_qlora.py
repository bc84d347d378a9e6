"""QLoRA end to end by its preset: NF4 with quantised scales, a paged optimizer, recomputed blocks, on alpaca's rows."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import deltune
from deltune.config.compose import options
from deltune.models.folder import BUNDLED
from deltune.settings import load_run
from tests.conftest import ROOT

STEPS, KILL_AFTER = 12, 6
QLORA = {"quant.name": "nf4", "quant.double": True, "quant.block_size": 64, "adapter.rank": 64, "adapter.alpha": 16, "adapter.targets": "all-linear", "optim.name": "paged_adamw", "optim.max_grad_norm": 0.3, "model.gradient_checkpointing": "full"}
GUANACO = QLORA | {"schedule.name": "constant", "schedule.warmup": 0, "optim.beta2": 0.999, "train.steps": 1875, "eval.every": 187, "seed": 0, "data.train_on_source": True}
PANDA = {"adapter": None, "optim.beta2": 0.99, "optim.eps": 1e-6, "data.max_length": 2048, "quant.name": "none", "schedule.name": "linear"}

# what the papers' and projects' own scripts say
STATED = {
    "qlora": QLORA | {"optim.lr": 2e-4, "schedule.name": "constant", "schedule.warmup": 0, "data.max_source_length": 1024, "data.max_target_length": 256, "checkpoint.every": 250, "adapter.dropout": 0.1, "steps of": 16},
    "guanaco_7b": GUANACO | {"optim.lr": 2e-4, "adapter.dropout": 0.1, "steps of": 16},
    "guanaco_13b": GUANACO | {"optim.lr": 2e-4, "adapter.dropout": 0.05, "steps of": 16},
    "guanaco_33b": GUANACO | {"optim.lr": 1e-4, "adapter.dropout": 0.05, "steps of": 16},
    "guanaco_65b": GUANACO | {"optim.lr": 1e-4, "adapter.dropout": 0.05, "steps of": 16},
    "guanaco_llama2_7b": GUANACO | {"optim.lr": 2e-4, "adapter.dropout": 0.1, "steps of": 16, "model.path": "meta-llama/Llama-2-7b-hf"},
    "panda_pretrain": PANDA | {"optim.lr": 1e-5, "schedule.warmup": 500, "data.mode": "pretrain", "steps of": 128},
    "panda_pretrain_embeddings": PANDA | {"optim.lr": 1e-4, "data.mode": "pretrain", "model.enable": ["*embed_tokens*", "*lm_head*"], "steps of": 128},
    "panda_sft_7b": PANDA | {"optim.lr": 3e-5, "schedule.warmup": 0.01, "train.epochs": 5, "data.turns": "each"},
    "panda_sft_13b": PANDA | {"optim.lr": 1e-5, "schedule.warmup": 0.01, "train.epochs": 5},
    "panda_flan_7b": PANDA | {"optim.lr": 5e-5, "schedule.warmup": 100, "train.steps": 4882, "data.mode": "sft", "steps of": 512},
    "panda_qlora_65b": QLORA | {"optim.lr": 1e-3, "adapter.dropout": 0.05, "schedule.warmup": 50, "data.max_length": 2048, "steps of": 64},
}


def test_every_preset_of_a_paper_is_checked():
    assert set(STATED) == set(options("preset")) - {"demo"}


@pytest.mark.parametrize("name", STATED)
def test_a_preset_says_what_its_source_says(name):
    run = load_run([f"preset={name}"])
    for key, wanted in STATED[name].items():
        found = run.train.micro_batch * run.train.accumulate if key == "steps of" else run
        for part in key.split(".") if key != "steps of" else ():
            found = getattr(found, part)
        assert found == wanted, key


def test_the_page_names_every_preset_and_its_command_is_understood():
    page = (ROOT / "docs" / "qlora.md").read_text(encoding="utf-8")
    table = page[page.index("| preset |") : page.index("Three things")]
    named = set(re.findall(r"`([a-z0-9_]+)`", table))
    assert set(STATED) <= named | {f"guanaco{size}" for size in named if size.startswith("_")}
    (command,) = re.findall(r"^deltune train (.*)$", page, re.M)
    run = load_run(shlex.split(command))
    assert run.quant.name == "nf4" and run.data.train == ["rows.json"]


# -- the run ----------------------------------------------------------------------------------------------------


def words(real_data, output, name):
    return [
        "preset=qlora", "model=bundled", f"data={real_data / 'alpaca' / 'alpaca_en_demo.json'}", f"output={output}", f"name={name}",
        "data.read_nums=64", "data.eval_size=8", "data.max_length=96", "data.max_source_length=64", "data.max_target_length=48",
        f"train.steps={STEPS}", "train.micro_batch=4", "train.accumulate=1", "checkpoint.every=2", "optim.lr=1e-2", "eval.samples=0",
        "engine.precision=fp32", "engine.threads=1", "log.progress=off", "log.report=false", "log.sinks=[]",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def straight(real_data, tmp_path_factory):
    """The run without interruption."""
    return deltune.train(words(real_data, tmp_path_factory.mktemp("qlora"), "straight"))


def started(stated: list[str]) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "deltune.cli", "train", *stated], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps_in(folder: Path) -> list[int]:
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return [line["step"] for line in lines if line["kind"] == "step"]


def completed(folder: Path) -> dict:
    return json.loads((folder / "completed.json").read_text())


def test_the_loss_falls(straight):
    assert straight.step == STEPS and straight.metrics_after["loss"] < straight.metrics_before["loss"] - 0.1
    start = json.loads((straight.folder / "metrics.jsonl").read_text().splitlines()[0])
    linear = {"q": (192, 192), "k": (64, 192), "v": (64, 192), "o": (192, 192), "gate": (512, 192), "up": (512, 192), "down": (192, 512)}
    assert start["num_trainable"] == 4 * 64 * sum(a + b for a, b in linear.values())
    table = {row["module"]: row["total"] - row["trainable"] for row in start["parameter_table"]}
    assert table["attention"] + table["mlp"] == 4 * sum(a * b for a, b in linear.values())
    assert any("28 linear layers in nf4" in line for line in start["description"]["quantised"])


def test_killed_by_the_system_it_goes_on_to_the_same_bits(straight, real_data, tmp_path):
    stated, folder = words(real_data, tmp_path, "killed"), tmp_path / "killed"
    process = started(stated)
    deadline = time.monotonic() + 150
    while len(steps_in(folder)) < KILL_AFTER and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    assert not (folder / "completed.json").exists()
    process = started(stated)
    said, _ = process.communicate(timeout=150)
    assert process.returncode == 0, said
    assert "bitsandbytes' kernels want CUDA" in said  # the plain optimizer says so
    assert steps_in(folder) == list(range(1, STEPS + 1))
    assert completed(folder)["loss_chain"] == completed(straight.folder)["loss_chain"]
    ours, theirs = (path / "adapter" / "adapter_model.safetensors" for path in (folder, straight.folder))
    assert ours.read_bytes() == theirs.read_bytes()
    assert deltune.train(stated).stopped_by == "already_complete"  # resume=auto, and the mark of completion


def test_the_adapter_answers_alike_in_peft_on_a_bitsandbytes_base(straight):
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(BUNDLED, quantization_config=config, dtype=torch.float32, device_map="cpu")
    theirs = PeftModel.from_pretrained(base, straight.adapter).eval()
    for module in theirs.modules():
        if isinstance(module, Linear4bit):
            module.training = True  # else a CPU with bfloat16 instructions rounds the values to that type, whatever compute_dtype is
    ids = torch.arange(5, 60).reshape(1, -1)
    with torch.no_grad():
        found, ours = theirs(ids).logits, straight.model.eval()(ids).logits
        with theirs.disable_adapter():
            plain = theirs(ids).logits
    assert torch.allclose(found, ours, atol=1e-4)
    assert (found - plain).abs().max() > 0.1  # the adapter does something
