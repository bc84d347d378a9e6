"""engine.precision: what auto becomes is told by the device's instructions and the weights' type alone, never by this machine."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from deltune.adapters.attach import attach
from deltune.commands.arithmetic import meant, of_run
from deltune.engines.precision import Precision, settle
from deltune.models.config import ModelConfig
from deltune.models.load import empty, load
from deltune.settings import run_from
from deltune.weights import store_as
from tests.tiny import tiny_model

CPU = torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def fast(monkeypatch):
    """A machine with bfloat16 instructions."""
    monkeypatch.setattr("deltune.engines.precision.multiplies_bfloat16", lambda device: True)


@pytest.mark.parametrize(
    ("fast", "stored", "frozen", "keep", "expected"),
    [
        (True, F32, True, False, ("fp32", BF16)), (True, F32, True, True, ("bf16", None)), (True, F32, False, False, ("bf16", None)),
        (True, BF16, True, False, ("fp32", None)), (True, BF16, False, False, ("fp32", None)), (True, F16, True, False, ("fp32", None)),
        (False, F32, True, False, ("fp32", None)), (False, F32, False, False, ("fp32", None)), (False, BF16, True, False, ("fp32", F32)),
        (False, BF16, False, False, ("fp32", F32)), (False, BF16, True, True, ("fp32", None)),
    ],
)  # fmt: skip
def test_auto_is_settled_by_device_and_weights(monkeypatch, fast, stored, frozen, keep, expected):
    monkeypatch.setattr("deltune.engines.precision.multiplies_bfloat16", lambda device: fast)
    found = settle("auto", device=CPU, stored=stored, frozen=frozen, keep=keep)
    assert (found.name, found.storage) == expected and found.why
    if found.storage is not None:  # settled again, on what is stored now, it stays
        again = settle("auto", device=CPU, stored=found.storage, frozen=frozen, keep=keep)
        assert (again.name, again.storage) == (found.name, None)
    for asked in ("fp32", "bf16", "fp16"):
        assert settle(asked, device=CPU, stored=stored, frozen=frozen, keep=keep) == Precision(asked)


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_frozen_base_is_stored_in_bfloat16_under_float32_adapters(fast, tiny_folder, place):
    run = run_from({"model.path": str(tiny_folder), "data.train": ["x.jsonl"], "adapter": "lora"})
    config = ModelConfig(path=str(tiny_folder))
    model = load(config) if place == "cpu" else empty(config)
    whole = {name: b.dtype for name, b in model.named_buffers()}
    assert of_run(run, model, CPU).storage == BF16
    attach(model, run.adapter)
    assert {p.dtype for name, p in model.named_parameters() if "lora" not in name} == {BF16}
    assert {p.dtype for name, p in model.named_parameters() if "lora" in name} == {F32}
    assert {name: b.dtype for name, b in model.named_buffers()} == whole  # rotary frequencies stay float32
    assert meant(run, model, CPU) == Precision("fp32", None, meant(run, model, CPU).why)


@pytest.mark.parametrize("change", [{"adapter": None}, {"adapter.modules_to_save": ["lm_head"]}, {"adapter.schedule": "relora"}, {"model.dtype": "float32"}])
def test_weights_that_move_or_were_asked_for_stay_float32(fast, tiny_folder, change):
    run = run_from({"model.path": str(tiny_folder), "data.train": ["x.jsonl"], "adapter": "lora", **change})
    model = load(ModelConfig(path=str(tiny_folder)))
    assert of_run(run, model, CPU).name == "bf16" and {p.dtype for p in model.parameters()} == {F32}


def test_ties_and_named_parameters_outlast_another_type():
    model = tiny_model(tie_word_embeddings=True)
    store_as(model, BF16, but=("norm",))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == BF16
    assert model.model.norm.weight.dtype == F32 and model.model.layers[0].input_layernorm.weight.dtype == BF16


def test_a_run_says_what_it_settled_on_and_learns(fast, tiny_folder, tmp_path, caplog):
    import deltune

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {i}", "response": str(i)}) + "\n" for i in range(8)))
    run = {"model.path": str(tiny_folder), "data.train": [str(data)], "adapter": "lora", "output": str(tmp_path), "name": "r", "train.steps": 8, "train.micro_batch": 8, "optim.lr": 1e-2, "log.progress": "off", "log.report": False}
    with caplog.at_level(logging.INFO, logger="deltune"):
        outcome = deltune.train(run)
    assert "stored and multiplied in bfloat16" in caplog.text
    assert outcome.model.dtype == BF16
    steps = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in steps if line["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.05


def test_kernels_of_shapes_that_do_not_come_back_are_let_go(monkeypatch):
    import os

    from deltune.engines.config import Single
    from deltune.engines.engine import KERNELS_KEPT, Engine

    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    os.environ.pop("LRU_CACHE_CAPACITY", None)
    Engine(Single(device="cpu")).close()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(KERNELS_KEPT)
    assert os.environ["LRU_CACHE_CAPACITY"] == "1", "torch keeps the same kernels a second time, with their scratch memory"
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "7"
    Engine(Single(device="cpu")).close()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
