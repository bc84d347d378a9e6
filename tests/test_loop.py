"""The loop: accumulation and splits give one gradient, numbers that break are named, and nothing else moves."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from deltune.engines.config import Single
from deltune.engines.engine import Engine
from deltune.errors import NumericsError
from deltune.training.callbacks import Callback, RunInfo
from deltune.training.config import CheckpointConfig, EvalConfig, TrainConfig
from deltune.training.loop import Loop, improves
from deltune.training.loss import causal_lm_step
from tests.synthetic import Rows, make_loop
from tests.tiny import tiny_model


class Recorder(Callback):
    def __init__(self):
        self.steps, self.evals, self.events = [], [], []

    def on_step(self, record):
        self.steps.append(record)

    def on_eval(self, record):
        self.evals.append(record)

    def on_event(self, step, message):
        self.events.append(message)


def gradients_after(micro_batch: int, accumulate: int) -> dict[str, torch.Tensor]:
    """The gradient of one step over the same eight rows of unequal length, by a given split."""
    model = tiny_model().double()
    loop = make_loop(model, micro_batch=micro_batch, accumulate=accumulate, steps=1)
    kept = {}
    loop._update = lambda norm: kept.update({n: p.grad.clone() for n, p in model.named_parameters()})
    loop.run()
    return kept


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    whole = gradients_after(8, 1)
    for split in ((1, 8), (2, 4), (4, 2)):
        parts = gradients_after(*split)
        for name, gradient in whole.items():
            assert torch.allclose(parts[name], gradient, rtol=1e-6, atol=1e-12), (split, name)


def test_loss_is_the_mean_over_all_trained_tokens_of_the_step():
    model = tiny_model()
    recorder = Recorder()
    loop = make_loop(model, micro_batch=2, accumulate=4, steps=1, callbacks=[recorder])
    summed, count = 0.0, 0
    for ids, labels in Rows().examples[:8]:  # one row at a time, no padding, by torch alone
        logits = model(torch.tensor([ids])).logits[0, :-1]
        targets = torch.tensor(labels[1:])
        summed += cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
        count += int((targets != -100).sum())
    loop.run()
    assert recorder.steps[0].loss == pytest.approx(summed / count, rel=1e-6)
    assert recorder.steps[0].num_trained_tokens == count


def test_logits_of_untrained_positions_are_left_out_without_changing_the_loss():
    model = tiny_model()
    batch = Rows().batch(range(5))
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    full = cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    assert causal_lm_step(model, batch).item() == pytest.approx(full.item(), rel=1e-6)


def test_gradient_norm_is_torchs_and_clipping_is_applied():
    seen = {}
    for limit in (None, 0.01):
        model = tiny_model()
        recorder = Recorder()
        loop = make_loop(model, steps=1, callbacks=[recorder], max_grad_norm=limit)
        original = loop.engine.step

        def step(optimizer, limit=limit, model=model, original=original):
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            seen[limit] = torch.nn.utils.get_total_norm(grads).item()
            original(optimizer)

        loop.engine.step = step
        loop.run()
        seen["record", limit] = recorder.steps[0].grad_norm
    assert seen["record", None] == pytest.approx(seen[None], rel=1e-6)
    assert seen["record", 0.01] == pytest.approx(seen[None], rel=1e-6)  # reported before clipping
    assert seen[0.01] == pytest.approx(0.01, rel=1e-5)


def test_learning_rates_follow_the_schedule_times_each_groups_own_peak():
    model = tiny_model()
    rates = []
    loop = make_loop(model, steps=4, schedule=lambda step: step / 10)
    loop.optimizer.param_groups[0]["lr"] = loop.peak_rates[0] = 0.5
    original = loop.engine.step
    loop.engine.step = lambda optimizer: (rates.append(optimizer.param_groups[0]["lr"]), original(optimizer))
    loop.run()
    assert rates == pytest.approx([0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("at", [1, 3, 5])
@pytest.mark.parametrize("kind", ["batch", "gradient", "weight"])
def test_a_number_that_breaks_stops_before_the_update_and_is_named(kind, at, tmp_path):
    model = tiny_model()
    loop = make_loop(model, steps=5, folder=tmp_path)
    poison(loop, kind, at)
    before = {}
    original = loop.engine.step

    def remember(optimizer):
        original(optimizer)
        before.update({n: p.detach().clone() for n, p in model.named_parameters()})

    loop.engine.step = remember
    with pytest.raises(NumericsError) as caught:
        loop.run()
    assert f"step {at}:" in str(caught.value)
    if kind == "weight":
        assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)
    else:
        assert "rows.jsonl:" in str(caught.value)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        for name, value in before.items():  # as the last good step left them
            assert torch.equal(dict(model.named_parameters())[name], value)
        assert loop.saver.store.steps() == [at - 1]  # nothing lost: the last good step was saved
    if kind == "batch":
        assert "model.layers.0" in str(caught.value)


def test_skip_leaves_the_bad_steps_update_out_and_goes_on():
    recorder = Recorder()
    model = tiny_model()
    loop = make_loop(model, steps=5, nonfinite="skip", callbacks=[recorder])
    poison(loop, "gradient", 3)
    assert loop.run() == "completed"
    assert [r.skipped for r in recorder.steps] == [False, False, True, False, False]
    assert any("step 3:" in e and "skipped" in e for e in recorder.events)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_rollback_recovers_from_a_broken_weight(tmp_path):
    recorder = Recorder()
    model = tiny_model()
    loop = make_loop(model, steps=6, nonfinite="rollback", folder=tmp_path, every=2, callbacks=[recorder])
    poison(loop, "weight", 4, once=True)
    assert loop.run() == "completed"
    assert any("rolled back to step 2" in e for e in recorder.events)
    assert [r.step for r in recorder.steps] == [1, 2, 3, 3, 4, 5, 6]
    assert recorder.steps[2].loss == recorder.steps[3].loss  # step 3, twice the same to the bit
    assert [r.step for r in recorder.steps if r.skipped] == [4]
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_too_many_bad_steps_stop_even_under_skip():
    loop = make_loop(tiny_model(), steps=50, nonfinite="skip", max_nonfinite=3)
    for at in range(2, 40):
        poison(loop, "gradient", at)
    with pytest.raises(NumericsError):
        loop.run()
    assert loop.progress.num_nonfinite == 3


def test_evaluation_picks_the_best_and_patience_stops(tmp_path):
    values = iter([3.0, 2.0, 2.5, 2.4, 9.0])
    recorder = Recorder()
    loop = make_loop(
        tiny_model(), steps=50, folder=tmp_path, callbacks=[recorder], eval=EvalConfig(every=2, patience=2),
        evaluate=lambda: {"loss": next(values)},
    )
    assert loop.run() == "early_stop"
    assert [e.is_best for e in recorder.evals] == [True, True, False, False]
    assert (loop.progress.best_step, loop.progress.best_metric, loop.progress.step) == (4, 2.0, 8)
    assert 4 in loop.saver.store.steps()
    assert loop.run() == "early_stop"  # a run killed right after its last evaluation ends, it does not go on


@pytest.mark.parametrize(
    "metric, direction, value, best, better",
    [
        ("loss", "auto", 1.0, 2.0, True), ("loss", "auto", 2.0, 1.0, False), ("exact_match", "auto", 0.5, 0.0, True),
        ("exact_match", "auto", 0.0, None, True), ("loss", "max", 2.0, 1.0, True), ("reward", "auto", -1.0, -2.0, True),
        ("loss", "auto", math.nan, None, False), ("loss", "auto", 0.0, 0.0, False),
    ],
)
def test_best_by_any_metric_and_direction(metric, direction, value, best, better):
    assert improves(EvalConfig(metric=metric, direction=direction), value, best) is better


def test_own_forward_step_and_its_scalars_reach_the_records():
    recorder = Recorder()

    def forward_step(model, batch):
        return causal_lm_step(model, batch), {"rows": float(len(batch.rows))}

    make_loop(tiny_model(), steps=2, micro_batch=3, callbacks=[recorder], forward_step=forward_step).run()
    assert [r.extra for r in recorder.steps] == [{"rows": 3.0}] * 2


def test_fp16_overflow_lowers_the_scale_and_is_no_fault():
    recorder = Recorder()
    model = tiny_model()
    loop = make_loop(model, steps=6, precision="fp16", callbacks=[recorder])
    loop.engine.loss_scale.scale = 2.0**140  # far beyond float32 once multiplied by the loss
    loop.run()
    assert any("loss scale lowered" in e for e in recorder.events)
    assert loop.engine.loss_scale.scale < 2.0**140
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_frozen_parameters_do_not_move_and_buffers_are_restored():
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    make_loop(model, steps=3).run()
    after = model.state_dict()
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def poison(loop: Loop, kind: str, at: int, once: bool = False) -> None:
    """Break one number at one step: an input's embedding, a gradient or a weight."""
    inner = loop.forward_step
    spent = []

    def forward_step(model, batch):
        if loop.progress.step + 1 == at and not spent:
            if once:
                spent.append(True)
            if kind == "weight":
                with torch.no_grad():
                    model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
            if kind == "batch":
                def hook(module, inputs, output):
                    return output * math.nan

                handle = model.model.layers[0].mlp.register_forward_hook(hook)
                loss = inner(model, batch)
                handle.remove()
                return loss
            if kind == "gradient":
                return inner(model, batch) + _NanGradient.apply(model.lm_head.weight)
        return inner(model, batch)

    loop.forward_step = forward_step


class _NanGradient(torch.autograd.Function):
    """Zero forward, not-a-number backward."""

    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return torch.zeros(())

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return torch.full_like(weight, math.nan)


def test_engine_and_info_types_are_what_the_loop_documents():
    assert isinstance(make_loop(tiny_model(), steps=1).engine, Engine)
    assert Single().name == "single" and TrainConfig().nonfinite == "stop" and CheckpointConfig().load_best
    assert RunInfo(Path("."), "x", 1, 0, 1, 1, {}).parameter_table == []
