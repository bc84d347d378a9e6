"""Over time: a merge leaves the function as it is, the base moves as the papers say, and a resumed run is the same run."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

import deltune
from deltune.adapters.attach import attach, detach, merge_in_place
from deltune.adapters.config import METHODS, OverTime, name_of, named
from deltune.adapters.methods.lora import LoraConfig
from deltune.adapters.schedules import over_time, rates
from deltune.commands.eval import measure
from deltune.errors import AdapterError, ConfigError, Interrupted
from deltune.optim.config import Constant, Cosine
from deltune.optim.schedules import schedule
from deltune.settings import EvalSettings, load, load_run
from tests.test_adapters_methods import (
    IDS,
    bits,
    config_of,
    deltas_of,
    far,
    mergeable,
    model_of,
    same,
    shaken,
)
from tests.test_train_command import StopAt, chain, settings  # noqa: F401
from tests.tiny import tiny_model


def relora(**changes):
    return OverTime(**({"name": "relora", "every": 2} | changes))


def lora(time, **changes):
    return LoraConfig(**({"rank": 2, "targets": ["linear", "conv"], "schedule": time} | changes))


def base_of(model, place="linear"):
    return getattr(model, place).base_layer.weight


@mergeable
def test_a_merge_leaves_the_function_and_begins_every_mergeable_change_anew(method):
    config = dataclasses.replace(config_of(method, dtype="auto"), schedule=relora())
    model = attach(model_of(torch.float64), config)
    started = {place: {n: p.clone() for n, p in delta.named_parameters()} for place, delta in deltas_of(model).items()}
    shaken(model, size=0.1)  # some starts refuse a base that is small beside them
    time = over_time(model, seed=3)
    before = model(IDS)
    still = bits(model)
    time.after_step(1)
    assert torch.equal(model(IDS), before)
    time.after_step(2)
    moved = {name for name, tensor in model.named_parameters() if not tensor.requires_grad and not torch.equal(tensor, still[name])}
    assert moved and moved <= time.tensors().keys()  # whatever has moved is in the checkpoints
    if not METHODS[method].start:
        assert far(model(IDS), before) <= 1e-11
        with deltune.disabled(model):
            assert far(model(IDS), before) <= 1e-11
    for place, delta in deltas_of(model).items():
        assert {n: p.shape for n, p in delta.named_parameters()} == {n: p.shape for n, p in started[place].items()}


def test_the_new_start_is_drawn_from_seed_layer_and_step_alone():
    def factors(seed, step, noise=0):
        with torch.random.fork_rng():
            torch.manual_seed(noise)
            model = attach(model_of(), lora(relora()))
            over_time(model, seed=seed).after_step(step)
            return [delta.lora_A.clone() for delta in deltas_of(model).values()]

    first, again = factors(1, 2), factors(1, 2, noise=9)
    assert all(map(torch.equal, first, again))
    for other in (factors(2, 2), factors(1, 4)):
        assert not any(map(torch.equal, first, other))
    assert not torch.equal(*(A[:, :8] for A in first))


def trained(model, steps=3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for _ in range(steps):
        model(IDS).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("moments", ["zero", "forget", "random", "magnitude"])
def test_moments_of_exactly_the_adapters_parameters_are_reset(moments):
    prune = {"prune": 0.75} if moments in ("random", "magnitude") else {}
    model = attach(model_of(), lora(relora(moments=moments, **prune), modules_to_save=["lm_head"]))
    optimizer = trained(model)
    own = {id(p) for place, delta in deltas_of(model).items() for p in delta.parameters() if place != "lm_head"}
    before = {id(p): {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    over_time(model, optimizer).after_step(2)
    others = [p for p in optimizer.state if id(p) not in own]
    assert len(others) == 1
    assert all(torch.equal(v, before[id(p)][k]) for p in others for k, v in optimizer.state[p].items())
    for p in (p for group in optimizer.param_groups for p in group["params"] if id(p) in own):
        if moments == "forget":
            assert p not in optimizer.state
            continue
        state, old = optimizer.state[p], before[id(p)]
        assert state["step"] == old["step"] == 3
        gone = state["exp_avg"] == 0
        assert torch.equal(gone, state["exp_avg_sq"] == 0)  # no mean over an emptied square
        assert int(gone.sum()) == (p.numel() if moments == "zero" else int(0.75 * p.numel()))
        assert torch.equal(state["exp_avg"][~gone], old["exp_avg"][~gone])
        if moments == "magnitude":
            assert old["exp_avg"][gone].abs().max() <= old["exp_avg"][~gone].abs().min()


def test_momentum_keeps_a_share_of_the_change_in_the_adapter():
    model = shaken(attach(model_of(torch.float64), lora(OverTime(name="plora", every=2, momentum=0.3), dtype="auto")))
    delta, W = model.linear.adapters["default"], base_of(model).clone()
    A, B, before = delta.lora_A.clone(), delta.lora_B.clone(), model(IDS)
    over_time(model).after_step(2)
    assert torch.equal(delta.lora_A, A) and torch.allclose(delta.lora_B, 0.3 * B)
    assert torch.allclose(base_of(model), W + 0.7 * delta.scale * B @ A, atol=1e-12)
    assert far(model(IDS), before) <= 1e-12


def test_momentum_is_refused_where_no_factor_scales_the_change():
    with pytest.raises(AdapterError, match=r"schedule\.momentum needs a change in proportion to a factor B"):
        attach(model_of(), named("dora", rank=2, targets=["linear"], schedule=OverTime(name="plora", momentum=0.5)))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_base_follows_the_change_after_its_first_steps(method):
    config = named(method, rank=2, targets=["linear"], dtype="auto", schedule=OverTime(name="delta_lora", begin=2, ratio=1.5))
    model = shaken(attach(model_of(torch.float64), config))
    delta, W = model.linear.adapters["default"], base_of(model).clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    time, changes = over_time(model, optimizer), []
    for step in range(1, 7):
        model(IDS).square().sum().backward()
        with torch.no_grad():
            W_t, old = base_of(model).clone(), delta.delta(base_of(model)).clone()
        time.before_update(step)
        optimizer.step()
        optimizer.zero_grad()
        time.after_step(step)
        with torch.no_grad():
            changes.append(delta.delta(W_t) - old)
            expected = W_t + 1.5 * changes[-1] if step > 2 else W_t
        assert torch.allclose(base_of(model), expected, atol=1e-12)
        time.after_step(step)  # a skipped step has no update before it
        assert torch.allclose(base_of(model), expected, atol=1e-12)
    if method == "lora":  # which does not read W: the steps add up
        assert torch.allclose(base_of(model), W + 1.5 * sum(changes[2:]), atol=1e-12)
    assert (base_of(model) - W).abs().max() > 1e-3


def test_a_bfloat16_base_follows_steps_that_it_would_round_away():
    model = attach(model_of(torch.bfloat16), lora(OverTime(name="delta_lora", begin=0), targets=["linear"]))
    delta, W = model.linear.adapters["default"], base_of(model).clone()
    time, B = over_time(model), torch.randn(delta.lora_B.shape, generator=torch.Generator().manual_seed(0))
    for step in range(1, 101):
        time.before_update(step)
        with torch.no_grad():
            delta.lora_B.add_(2e-6 * B)  # far below the weights' last bit
        time.after_step(step)
    expected = W.float() + 2.0 * delta.delta(None).detach()
    assert not torch.equal(base_of(model), W)
    assert (base_of(model).float() - expected).abs().max() <= 0.5 * 2**-7 * expected.abs().max()
    assert {name.rpartition("|")[2] for name in time.tensors()} == {"linear.base_layer.weight", "carried"}


def test_the_rate_begins_anew_after_a_merge():
    def constant(steps):
        return schedule(Constant(warmup=0.0), steps)

    def cosine(steps):
        return schedule(Cosine(warmup=2, floor=0.0), steps)

    factor = rates(relora(every=10, rewarm=0.4), constant, 25)
    assert [factor(step) for step in (1, 10, 11, 12, 13, 14, 15, 20, 21)] == [1, 1, 0.25, 0.5, 0.75, 1, 1, 1, 0.25]
    assert [rates(relora(every=10, rewarm=3), constant, 25)(step) for step in (11, 12, 13)] == [1 / 3, 2 / 3, 1]
    assert rates(relora(every=10, rewarm=0), constant, 25)(11) == 1
    whole, stage = rates(relora(every=10, restart=True), cosine, 25), cosine(10)
    assert [whole(step) for step in range(1, 26)] == [stage((step - 1) % 10 + 1) for step in range(1, 26)]
    assert rates(relora(every=30, restart=True), cosine, 25)(25) == 0
    assert rates(OverTime(name="delta_lora"), cosine, 25)(25) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "none", "every": 5}, r"schedule\.every has no effect"),
        ({"name": "relora", "ratio": 3.0}, r"schedule\.ratio has no effect"),
        ({"name": "relora", "momentum": 0.5}, r"schedule\.momentum has no effect"),
        ({"name": "relora", "prune": 0.5}, r"schedule\.prune has no effect"),
        ({"name": "plora", "restart": True, "rewarm": 0.5}, r"schedule\.rewarm has no effect"),
        ({"name": "relora", "every": 5, "rewarm": 6}, r"schedule\.rewarm .* at most schedule\.every=5"),
        ({"name": "delta_lora", "moments": "forget"}, r"schedule\.moments has no effect"),
        ({"name": "relora", "every": 0}, r"schedule\.every is 0"),
    ],
)
def test_settings_without_effect_are_refused(given, message):
    with pytest.raises(AdapterError, match=message):
        attach(model_of(), lora(OverTime(**given)))
    if given["name"] != "none":
        with pytest.raises(ConfigError, match=message.partition(" ")[0]):
            load_run([f"adapter={given['name']}", *(f"adapter.schedule.{k}={v}" for k, v in given.items() if k != "name")])


def test_what_cannot_move_the_base_is_refused_with_the_reason():
    with pytest.raises(AdapterError, match="dropout cannot go with"):
        attach(model_of(), lora(OverTime(name="delta_lora"), dropout=0.1))
    for method in sorted(METHODS):
        if not named(method).delta_class().mergeable:
            with pytest.raises(AdapterError, match=r"schedule\.name cannot be relora with"):
                attach(model_of(), dataclasses.replace(config_of(method), schedule=relora()))
    model = attach(tiny_model(tie_word_embeddings=True), LoraConfig(targets=["embed_tokens"], schedule=relora()))
    with pytest.raises(AdapterError, match=r"embed_tokens: its weight is tied to another layer.*exclude"):
        over_time(model)
    model = attach(attach(model_of(), lora(relora())), lora(OverTime()), name="other")
    with pytest.raises(AdapterError, match="under adapter other too"):
        over_time(model)
    detach(model, "other")
    merge_in_place(model)
    with pytest.raises(AdapterError, match="is merged in place"):
        over_time(model)
    assert over_time(attach(model_of(), lora(OverTime()))) is None
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        over_time(model, name="x")


def test_the_moved_base_is_what_detaching_leaves():
    model = shaken(attach(model_of(), lora(relora())))
    base, before = bits(model_of()), model(IDS)
    over_time(model).after_step(2)
    detach(model)
    assert far(model(IDS), before) < 1e-6 and not same(bits(model), base)


def test_named_methods_are_settings_of_the_schedule_that_go_with_any_change():
    assert (named("relora").schedule.name, named("relora").schedule.restart) == ("relora", False)
    assert (named("plora").schedule.moments, named("plora").schedule.restart) == ("forget", True)
    run = load_run(["adapter=relora", "adapter.delta=dora", "adapter.schedule.every=20"])
    assert (run.adapter.delta, run.adapter.schedule) == ("dora", OverTime(name="relora", every=20))
    assert run.result == "model" and load_run(["adapter=lora"]).result == "adapter"
    assert name_of(load_run(["adapter=relora", "adapter.schedule.every=20"]).adapter) == "relora"
    assert load_run(["adapter.schedule.name=delta_lora"]).adapter == named("delta_lora")


CASES = {
    "relora": {"adapter": "relora", "adapter.schedule.every": 2},
    "relora dora": {"adapter": "relora", "adapter.delta": "dora", "adapter.schedule.every": 2, "adapter.schedule.moments": "random"},
    "plora": {"adapter": "plora", "adapter.schedule.every": 2, "adapter.schedule.momentum": 0.5},
    "delta_lora": {"adapter": "delta_lora", "adapter.schedule.begin": 1},
    "delta_lora bf16": {"adapter": "delta_lora", "adapter.schedule.begin": 1, "model.dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumes_bit_for_bit_and_leaves_the_whole_model(settings, tmp_path, case):  # noqa: F811
    settings = settings | CASES[case]
    straight = deltune.train(settings | {"name": "straight"})
    with pytest.raises(Interrupted):
        deltune.train(settings, callbacks=[StopAt(5 if "delta" in case else 3)])  # a merge lies before and after it
    outcome = deltune.train(settings)
    assert chain(tmp_path) == chain(tmp_path, "straight")
    for a, b in zip(straight.model.parameters(), outcome.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert outcome.adapter == tmp_path / "runs" / "r" / "model" and not (tmp_path / "runs" / "r" / "adapter").exists()
    assert deltune.train(settings).adapter == outcome.adapter  # complete already
    evaluated, _ = measure(load(EvalSettings, [f"run={outcome.folder}"]))
    assert evaluated["all"]["loss"] == pytest.approx(outcome.metrics_after["loss"], rel=1e-2 if "bf16" in case else 1e-5)


def test_the_best_steps_base_is_exported_with_its_adapter(settings, tmp_path):  # noqa: F811
    changes = {"eval.direction": "max", "train.steps": 6, "eval.every": 1, "adapter": "relora", "adapter.schedule.every": 2}
    outcome = deltune.train(settings | changes)
    lines = [json.loads(line) for line in (tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["metrics"]["loss"] for line in lines if line["kind"] == "eval" and line["step"] > 0}
    assert outcome.best_step == max(losses, key=losses.get) < 6
    assert outcome.metrics_after["loss"] == pytest.approx(losses[outcome.best_step], rel=1e-6)
    assert isinstance(outcome.model.model.layers[0].self_attn.q_proj, nn.Linear)
