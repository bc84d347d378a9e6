"""The main job on real files: thirty steps and more on each, and what came out is what was asked for."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest

import deltune
from deltune.models.folder import BUNDLED

STEPS = 32

RUNS = {
    "gsm8k": {"data.train": ["gsm8k/train.jsonl"], "data.eval": ["gsm8k/test.jsonl"], "data.read_nums": 300},
    "alpaca_en": {"data.train": ["alpaca/alpaca_en_demo.json"], "data.eval_size": 24, "data.read_nums": 300},
    "alpaca_zh": {"data.train": ["alpaca/alpaca_zh_demo.json"], "data.eval_size": 24, "data.read_nums": 300},
    "messages": {"data.train": ["chat/v1_sft_demo.jsonl"], "data.eval_size": 0.05, "data.read_nums": 300},
    "wiki": {"data.train": ["corpus/wiki_demo.txt"], "data.eval_size": 2, "data.mode": "pretrain", "adapter": None, "optim.lr": 3e-3, "data.read_nums": 8, "data.max_length": 128},
    "mixed": {
        "data.train": [{"path": "gsm8k/train.jsonl", "weight": 0.02}, {"path": "alpaca/alpaca_tiny.json", "weight": 2.0}],
        "data.eval": ["alpaca/alpaca_tiny.json"],
    },
    "streamed": {
        "data.train": ["gsm8k/train.jsonl", "alpaca/alpaca_en_demo.json"], "data.streaming": True, "data.stream_block": 64,
        "data.eval": ["alpaca/alpaca_tiny.json"],
    },
}  # fmt: skip


def settings_of(name, real_data, tmp_path):
    def placed(source):
        if isinstance(source, dict):
            return source | {"path": str(real_data / source["path"])}
        return str(real_data / source)

    settings = {
        "name": name, "output": str(tmp_path), "model": "bundled", "train.steps": STEPS, "train.micro_batch": 4,
        "data.max_length": 192, "data.eval_read_nums": 24, "optim.lr": 5e-3, "checkpoint.every": 16, "eval.every": 16,
        "eval.samples": 1, "eval.max_new_tokens": 4, "log.progress": "off", "data.cache": None,
    }  # fmt: skip
    settings |= RUNS[name]
    if settings.get("adapter", 1) is None:
        settings = {k: v for k, v in settings.items() if not k.startswith("adapter.")}
    return settings | {key: [placed(s) for s in settings[key]] for key in ("data.train", "data.eval") if key in settings}


@pytest.mark.parametrize("name", RUNS)
def test_thirty_steps_on_real_data(name, real_data, tmp_path):
    outcome = deltune.train(settings_of(name, real_data, tmp_path))
    folder = tmp_path / name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    first, last = (sum(line["loss"] for line in part) / 6 for part in (steps[:6], steps[-6:]))
    assert last < first - 0.1
    assert outcome.metrics_after["loss"] < outcome.metrics_before["loss"]
    assert outcome.metrics_after["perplexity"] == pytest.approx(math.exp(outcome.metrics_after["loss"]))
    for line in steps:
        assert 0 < line["num_trained_tokens"] <= line["num_tokens"] <= 4 * 192
        assert line["grad_norm"] > 0
    if name == "wiki":  # pretraining trains every token but each document's first
        assert all(line["num_trained_tokens"] == line["num_tokens"] - 4 for line in steps)
    else:
        assert any(line["num_trained_tokens"] < line["num_tokens"] - 4 for line in steps)
    assert all(b["seconds"] > 0 and a["lr"] >= b["lr"] for a, b in pairwise(steps[2:]))  # cosine after warm-up
    assert {p.name for p in (folder / "checkpoints").iterdir()} >= {"step-00000016", "step-00000032"}
    for file in ("config.yaml", "report.html", "loss.png", "README.md", "samples.json", "completed.json"):
        assert (folder / file).stat().st_size > 0
    assert (folder / ("model" if name == "wiki" else "adapter")).is_dir()


def test_the_adapter_of_a_real_run_answers_alike_in_peft(real_data, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    outcome = deltune.train(settings_of("alpaca_en", real_data, tmp_path))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BUNDLED), outcome.adapter).eval()
    ids = torch.arange(5, 60).reshape(1, -1)
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, outcome.model.eval()(ids).logits, atol=1e-5)
        assert not torch.allclose(theirs(ids).logits, theirs.get_base_model()(ids).logits * 0 + theirs(ids).logits.mean(), atol=1e-2)


def test_a_saved_config_reruns_the_run_bit_for_bit(real_data, tmp_path):
    settings = settings_of("gsm8k", real_data, tmp_path) | {"train.steps": 6, "adapter.dropout": 0.1}
    deltune.train(settings)
    again = tmp_path / "again.yaml"
    again.write_text((tmp_path / "gsm8k" / "config.yaml").read_text().replace(f"output: {tmp_path}", f"output: {tmp_path / 'two'}"))
    deltune.train(again)
    chains = [json.loads((folder / "gsm8k" / "completed.json").read_text())["loss_chain"] for folder in (tmp_path, tmp_path / "two")]
    assert chains[0] == chains[1]
