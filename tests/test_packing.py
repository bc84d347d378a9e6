"""Training on packed rows is training on padded ones: every example's loss and every gradient, and no document knows another."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import deltune
from deltune.commands.batching import settled
from deltune.data.config import DataConfig
from deltune.data.dataset import Example
from deltune.data.pack import join, pad
from deltune.errors import ConfigError, Interrupted
from deltune.evaluation.lm import evaluate_by_source, token_scores
from deltune.models.attention import register
from deltune.training.loss import causal_lm_step
from tests.synthetic import PAD, Rows, make_loop
from tests.test_train_command import StopAt
from tests.tiny import tiny_model

ATTENTION = ("segment", "sdpa", "eager")


def model_with(attention, **changes):
    register()
    model = tiny_model(**changes)
    model.set_attn_implementation(attention)
    return model


def examples(count=7, seed=0):
    """Of unequal length, one of a single token among them, one that begins with a trained token, one without any."""
    items = [Rows(count=count, seed=seed)[i] for i in range(count)]
    items[1] = Example(items[1].ids, items[1].ids.copy(), "b.jsonl:1")
    items[3] = Example(items[3].ids[:1], items[3].ids[:1], "b.jsonl:2")
    items[5] = Example(items[5].ids, np.full_like(items[5].labels, -100), "b.jsonl:3")
    return items


def losses(model, batch):
    """The summed loss of each example, float64."""
    loss, _, row_of = token_scores(model, batch, None)
    return torch.zeros(len(batch.rows), dtype=torch.float64).index_add_(0, row_of, loss)


def gradients(model, batch):
    model.zero_grad()
    causal_lm_step(model, batch).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("order", ["as they are", "reversed"])
def test_every_example_has_the_loss_and_gradient_of_a_padded_row(attention, order):
    model, items = model_with(attention), examples() if order == "as they are" else examples()[::-1]
    packed, padded = join(items), pad(items, PAD)
    with torch.no_grad():
        one, other = losses(model, packed), losses(model, padded)
        alone = torch.cat([losses(model, pad([item], PAD)) for item in items])
    assert (one > 0).sum() == 5  # two of seven have nothing to predict
    for expected in (other, alone):
        assert torch.allclose(one, expected, rtol=1e-6, atol=0)
    found, expected = gradients(model, packed), gradients(model, padded)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("attention", ATTENTION)
def test_in_bfloat16_packed_rows_are_no_farther_from_float32_than_padded_ones(attention):
    exact, short = model_with(attention), model_with(attention).bfloat16()
    far = {"packed": [], "padded": []}
    for seed in range(4):
        items = examples(12, seed)
        truth = gradients(exact, pad(items, PAD))
        for name, batch in (("packed", join(items)), ("padded", pad(items, PAD))):
            far[name].append((gradients(short, batch) - truth).norm() / truth.norm())
    assert sum(far["packed"]) <= 1.1 * sum(far["padded"])


@pytest.mark.parametrize("attention", ATTENTION)
def test_other_tokens_in_one_document_do_not_move_the_losses_of_the_others_by_a_bit(attention):
    model, items = model_with(attention), examples()
    with torch.no_grad():
        before = losses(model, join(items))
        for i in (0, 2, 6):
            changed = list(items)
            ids = (items[i].ids + 1) % 256
            changed[i] = Example(ids, np.where(items[i].labels == -100, -100, ids).astype(np.int32), items[i].row)
            after = losses(model, join(changed))
            others = [k for k in range(len(items)) if k != i]
            assert after[i] != before[i] and torch.equal(after[others], before[others])


def test_a_step_of_the_loop_moves_the_weights_as_a_padded_one_does():
    ends = []
    for batching in ("packed", "padded"):
        model = model_with("segment")
        make_loop(model, steps=3, micro_batch=4, accumulate=2, batching=batching, shuffle=True, lr=1e-2).run()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]).double())
    start = torch.cat([p.detach().flatten() for p in model_with("segment").parameters()]).double()
    assert (ends[0] - ends[1]).norm() <= 1e-4 * (ends[0] - start).norm()  # AdamW divides tiny gradients by themselves


def test_evaluation_counts_each_document_for_its_own_source():
    model, items = model_with("segment"), examples(20)
    padded = evaluate_by_source(model, [pad(items[:9], PAD), pad(items[9:], PAD)])
    packed = evaluate_by_source(model, [join(items[:13]), join(items[13:])])
    assert set(packed[1]) == set(padded[1]) and len(packed[1]) == 2
    for one, other in ((packed[0], padded[0]), *((packed[1][name], padded[1][name]) for name in packed[1])):
        assert one == pytest.approx(other, rel=1e-6)


# -- what auto is -------------------------------------------------------------------------------------------------


def test_auto_packs_where_documents_are_kept_apart_and_else_says_why():
    model = model_with("sdpa")
    auto = DataConfig()
    assert settled(auto, model) == ("packed", "")
    assert settled(auto, model, fast="off") == ("padded", "fast=off")
    assert settled(auto, model, own_step="forward_step").name == "padded"
    assert "forward_step is your own" in settled(auto, model, own_step="forward_step").why_padded
    by_name = DataConfig(batching="packed")
    for settings in ({"fast": "off"}, {"own_step": "forward_step"}, {"tokens": 64}):
        assert settled(by_name, model, **settings) == ("packed", "")
    assert settled(auto, model, tokens=64, fast="off") == ("packed", "")  # tokens can be counted in packed rows only
    for name in ("grouped", "padded"):
        assert settled(DataConfig(batching=name), model) == (name, "")


def test_a_model_that_mixes_documents_is_padded_or_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=1, state_size=4))
    found = settled(DataConfig(), model)
    assert found.name == "padded" and "Mamba" in found.why_padded
    with pytest.raises(ConfigError, match=r"^data\.batching=packed: .*data\.batching=auto, grouped or padded"):
        settled(DataConfig(batching="packed"), model)
    with pytest.raises(ConfigError, match=r"^train\.micro_batch_tokens: "):
        settled(DataConfig(), model, tokens=64)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_learned_prompt_is_not_packed(method):
    from deltune.adapters.attach import attach
    from deltune.adapters.config import named

    model = model_with("segment")
    attach(model, named(method))
    assert "learned prompt" in settled(DataConfig(), model).why_padded


# -- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tiny_folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": "word" * (1 + i % 5)}) + "\n" for i in range(11)))
    return {
        "name": "r", "output": str(tmp_path / "runs"), "model": str(tiny_folder), "data.train": [str(data)], "data.eval": [str(data)],
        "train.epochs": 2, "train.micro_batch": 3, "eval.samples": 0, "log.progress": "off", "log.report": False, "log.sinks": [],
        "optim.lr": 1e-2, "adapter.dropout": 0.0, "checkpoint.every": 2,
    }  # fmt: skip


def lines(tmp_path, name, kind):
    return [r for r in map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


def test_a_run_packs_by_itself_and_ends_where_a_padded_one_does(settings, tmp_path):
    packed, padded = (deltune.train(settings | {"name": n} | more) for n, more in (("r", {}), ("p", {"data.batching": "padded"})))
    assert packed.metrics_after["loss"] == pytest.approx(padded.metrics_after["loss"], rel=1e-4)
    assert packed.metrics_before["loss"] == pytest.approx(padded.metrics_before["loss"], rel=1e-6)
    for one, other in zip(lines(tmp_path, "r", "step"), lines(tmp_path, "p", "step"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert all(one[key] == other[key] for key in ("num_tokens", "num_trained_tokens", "epoch"))
    batching = [lines(tmp_path, name, "start")[0]["description"]["batching"] for name in ("r", "p")]
    assert batching == ["packed", "padded"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_in_bins_sees_every_row_in_each_epoch_and_resumes_bit_for_bit(settings, tmp_path, streaming):
    words = settings | {"train.micro_batch_tokens": 96, "data.max_length": 96, "data.seed": 5}
    words.pop("train.micro_batch")
    if streaming:
        words |= {"data.streaming": True, "data.stream_block": 4, "train.epochs": None, "train.steps": 9}
    straight = deltune.train(words)
    steps = lines(tmp_path, "r", "step")
    assert all(0 < line["num_tokens"] <= 96 for line in steps)
    if not streaming:
        assert steps[-1]["epoch"] == 2.0 and any(line["epoch"] == 1.0 for line in steps)
        assert sum(line["num_tokens"] for line in steps) == 2 * lines(tmp_path, "r", "start")[0]["description"]["data"]["tokens"]
    again = words | {"name": "again"}
    with pytest.raises(Interrupted):
        deltune.train(again, callbacks=[StopAt(3)])
    resumed = deltune.train(again)
    chain = [json.loads((tmp_path / "runs" / name / "completed.json").read_text())["loss_chain"] for name in ("r", "again")]
    assert chain[0] == chain[1] and resumed.metrics_after == straight.metrics_after


def test_a_step_of_the_callers_own_gets_a_mask_unless_packing_is_asked_for(settings):
    seen = []

    def forward_step(model, batch):
        seen.append((batch.attention_mask is not None, batch.segments is not None))
        return causal_lm_step(model, batch)

    deltune.train(settings, forward_step=forward_step, eval_step=forward_step)
    assert set(seen) == {(True, False)}
    seen.clear()
    deltune.train(settings | {"name": "packed", "data.batching": "packed"}, forward_step=forward_step, eval_step=forward_step)
    assert set(seen) == {(False, True)}
