"""One run from Python: what a user may replace, what a second start does, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

import deltune
from deltune.errors import CheckpointError, Interrupted, NumericsError


@pytest.fixture
def settings(tiny_folder, tmp_path):
    rows = [{"prompt": f"say {word}", "completion": word} for word in ("one", "two", "three", "four", "five", "six", "seven")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "r", "output": str(tmp_path / "runs"), "model": str(tiny_folder), "data.train": [str(data)], "data.eval": [str(data)],
        "train.steps": 6, "train.micro_batch": 2, "checkpoint.every": 2, "eval.samples": 2, "eval.max_new_tokens": 4,
        "log.progress": "off", "log.report": False, "log.sinks": [], "optim.lr": 1e-2,
    }  # fmt: skip


def chain(tmp_path, name="r"):
    return json.loads((tmp_path / "runs" / name / "completed.json").read_text())["loss_chain"]


class StopAt(deltune.Callback):
    """Asks to stop as the system would, after a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, record):
        if record.step == self.step:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_run_goes_on_to_the_same_end(settings, tmp_path):
    straight = deltune.train(settings | {"name": "straight"})
    with pytest.raises(Interrupted):
        deltune.train(settings, callbacks=[StopAt(3)])
    outcome = deltune.train(settings)
    assert chain(tmp_path) == chain(tmp_path, "straight")
    for a, b in zip(straight.model.parameters(), outcome.model.parameters(), strict=True):
        assert torch.equal(a, b)
    lines = [json.loads(line) for line in (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert outcome.metrics_before == straight.metrics_before and outcome.samples == straight.samples


def test_a_complete_run_is_not_run_again_but_may_be_extended(settings, tmp_path):
    deltune.train(settings)
    before = chain(tmp_path)
    again = deltune.train(settings)
    assert (again.stopped_by, again.step) == ("already_complete", 6) and chain(tmp_path) == before
    longer = deltune.train(settings | {"train.steps": 8})
    assert (longer.stopped_by, longer.step) == ("completed", 8)


def test_another_run_in_the_same_folder_is_refused_and_nothing_is_lost(settings, tmp_path):
    deltune.train(settings)
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.01 there, 0\.5 now"):
        deltune.train(settings | {"optim.lr": 0.5})
    with pytest.raises(CheckpointError, match="already holds a run"):
        deltune.train(settings | {"resume": "never"})
    with pytest.raises(CheckpointError, match="no checkpoint"):
        deltune.train(settings | {"resume": "must", "name": "new"})
    assert deltune.train(settings).stopped_by == "already_complete"


def test_own_steps_scalars_and_texts_are_used(settings, tmp_path, caplog):
    def forward_step(model, batch):
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        targets = batch.labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        return loss, {"longest": float(batch.input_ids.shape[1])}

    texts = []

    def task_print(record):
        texts.append(f"longest {record.extra['longest']}")
        return texts[-1]

    ours = deltune.train(settings, forward_step=forward_step, eval_step=lambda m, b: forward_step(m, b)[0], task_print=task_print)
    plain = deltune.train(settings | {"name": "plain"})
    assert ours.metrics_after["loss"] == pytest.approx(plain.metrics_after["loss"], rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["extra"]["longest"] > 0 for line in lines if line["kind"] == "step") and len(texts) == 6


def test_the_best_weights_are_exported_not_the_last(settings, tmp_path):
    # asked for the largest loss, the best step is an early one, and its weights must be what is left
    outcome = deltune.train(settings | {"eval.direction": "max", "train.steps": 12, "eval.every": 1})
    lines = [json.loads(line) for line in (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["metrics"]["loss"] for line in lines if line["kind"] == "eval" and line["step"] > 0}
    best = max(losses, key=losses.get)
    assert outcome.best_step == best and outcome.metrics_after["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert best < 12 and losses[12] < losses[best]


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": None}, {"adapter": None, "model.enable": ["*mlp*"]}, {"model.gradient_checkpointing": True},
        {"engine.precision": "bf16"}, {"model.dtype": "bfloat16"}, {"train.accumulate": 3}, {"data.batching": "grouped"},
        {"train.steps": None, "train.epochs": 1.5}, {"optim": "sgd"}, {"schedule": "wsd"}, {"eval.exact_match": True},
        {"adapter.modules_to_save": ["lm_head"]}, {"engine.precision": "fp16"}, {"optim": "paged_lion"},
        {"adapter": None, "optim": "paged_adamw_8bit"}, {"quant": "nf4", "optim": "paged_adamw"},
        {"quant": "int8", "model.dtype": "bfloat16", "optim": "lion_8bit"},
    ],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()),
)
def test_every_way_of_training_finishes_and_resumes_bit_for_bit(settings, tmp_path, change):
    settings = settings | change
    straight = deltune.train(settings | {"name": "straight"})
    with pytest.raises(Interrupted):
        deltune.train(settings, callbacks=[StopAt(3)])
    deltune.train(settings)
    assert chain(tmp_path) == chain(tmp_path, "straight")
    assert straight.step == (5 if "train.epochs" in change else 6)  # ten examples, two at a time
    moved = {n for n, p in straight.model.named_parameters() if p.requires_grad}
    if "model.enable" in change:
        assert moved and all("mlp" in name for name in moved)


def test_the_same_settings_name_the_same_folder_and_others_another(settings):
    settings = {k: v for k, v in settings.items() if k != "name"}
    first = deltune.train(settings)
    assert deltune.train(settings).stopped_by == "already_complete"
    assert deltune.train(settings | {"seed": 7}).folder != first.folder


def test_a_weight_that_is_not_finite_is_named(settings):
    def forward_step(model, batch):
        with torch.no_grad():
            model.model.norm.weight[3] = float("inf")
        from deltune.training.loss import causal_lm_step

        return causal_lm_step(model, batch)

    with pytest.raises(NumericsError, match=r"model\.norm\.weight"):
        deltune.train(settings, forward_step=forward_step)


def test_a_run_computes_its_loss_without_logits_unless_fast_is_off(settings, monkeypatch):
    from deltune.models import cross_entropy

    calls = []
    forward = cross_entropy._LinearCrossEntropy.forward
    monkeypatch.setattr(cross_entropy._LinearCrossEntropy, "forward", staticmethod(lambda *args: calls.append(1) or forward(*args)))
    found = {}
    for fast in ("auto", "off"):
        calls.clear()
        outcome = deltune.train(settings | {"name": fast, "fast": fast, "data.batching": "padded", "train.steps": 3})
        found[fast] = (len(calls), outcome.metrics_after["loss"], outcome.metrics_after["token_accuracy"])
    assert found["auto"][0] >= 3 and found["off"][0] == 0  # a trial step may come before the first
    assert found["auto"][1:] == pytest.approx(found["off"][1:], rel=1e-4)
