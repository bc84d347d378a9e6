"""Recomputed activations change no number, what is chosen is what fits, and the choice stays with the run."""

from __future__ import annotations

import json

import pytest
import torch

import deltune
from deltune.adapters.attach import attach
from deltune.adapters.methods.lora import LoraConfig
from deltune.commands import recompute
from deltune.errors import ConfigError, Interrupted, ModelError
from deltune.models.dry_run import dry_run, peak_bytes_of
from deltune.models.recompute import KINDS, apply, blocks_of, reached_blocks
from deltune.settings import run_from
from deltune.training import randomness
from deltune.training.loss import causal_lm_step
from tests.encoded import write_rows
from tests.synthetic import batch_of
from tests.tiny import tiny_model


def model_with(**config):
    return attach(tiny_model(num_hidden_layers=4), LoraConfig(rank=4, **config)).train()


def some_batch(seed=0):
    ids = torch.randint(0, 200, (3, 40), generator=torch.Generator().manual_seed(seed))
    return batch_of(ids, ids, torch.ones_like(ids))


def recomputing(model):
    return [i for i, block in enumerate(blocks_of(model)) if block.gradient_checkpointing]


def test_losses_and_gradients_are_the_same_bits_however_much_is_recomputed():
    found = []
    for kind in KINDS:
        model = model_with(dropout=0.1)
        apply(model, kind)
        torch.manual_seed(3)
        loss = causal_lm_step(model, some_batch())
        loss.backward()
        found.append((loss.item(), [p.grad for p in model.parameters() if p.requires_grad]))
    for loss, gradients in found[1:]:
        assert loss == found[0][0]
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0][1], strict=True))


def test_selective_takes_the_lower_half_of_the_blocks_that_a_gradient_reaches():
    model = model_with()
    assert apply(model, "selective") == 2 and recomputing(model) == [0, 1]
    assert apply(model, "full") == 4 and recomputing(model) == [0, 1, 2, 3]
    assert apply(model, "none") == 0 and recomputing(model) == []
    upper = attach(tiny_model(num_hidden_layers=4), LoraConfig(rank=4, targets=["layers.2.self_attn.q_proj", "layers.3.self_attn.q_proj"]))
    assert len(reached_blocks(upper)) == 2
    assert apply(upper, "selective") == 1 and recomputing(upper) == [2]
    tiny = tiny_model(num_hidden_layers=1)
    with pytest.raises(ModelError, match="no two blocks"):
        apply(tiny, "selective")
    assert not recomputing(tiny)


def test_recomputing_asks_for_no_gradient_below_the_lowest_adapter():
    model = model_with()
    apply(model, "full")
    assert not model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long)).requires_grad


def test_the_dry_run_and_a_real_step_agree_on_what_each_kind_saves():
    peaks = {}
    for kind in KINDS:
        model = model_with()
        apply(model, kind)
        batch = some_batch()
        real = peak_bytes_of(model, lambda model=model, batch=batch: causal_lm_step(model, batch).backward())
        with torch.device("meta"):
            shapes = attach(tiny_model(num_hidden_layers=4).to("meta"), LoraConfig(rank=4))
        peaks[kind] = real
        assert dry_run(shapes, batch=3, seq=40, padded=False, recompute=kind, fast=False).peak_bytes == pytest.approx(real, rel=0.02)
    saved = peaks["none"] - peaks["full"]
    assert saved > 0
    assert peaks["none"] - peaks["selective"] == pytest.approx(saved / 2, rel=0.35)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dry_run_of_a_packed_row_holds_what_the_row_does(kind):
    from deltune.data.dataset import Example
    from deltune.data.pack import join
    from deltune.models.attention import keeps_documents_apart
    from deltune.models.config import ModelConfig
    from deltune.models.load import load

    model = attach(load(ModelConfig(dtype="bfloat16")), LoraConfig(rank=4)).train()
    assert not keeps_documents_apart(model)
    lengths = (40, 17, 63)
    apply(model, kind)
    batch = join([Example(*(2 * [torch.arange(n).numpy()]), "row") for n in lengths])
    real = peak_bytes_of(model, lambda: causal_lm_step(model, batch).backward())
    shapes = model.to("meta")
    found = dry_run(shapes, batch=1, seq=120, trained=117, padded=False, recompute=kind, fast=False, lengths=lengths)
    assert found.peak_bytes == pytest.approx(real, rel=0.01)


# -- auto -------------------------------------------------------------------------------------------------------


class OneProcess:
    device = torch.device("cpu")

    def autocast(self):
        import contextlib

        return contextlib.nullcontext()


def chosen(model, free, **settings):
    run = run_from({"model.gradient_checkpointing": "auto", **settings})
    return recompute.settle(
        run, model, OneProcess(), forward_step=causal_lm_step, own_step=False, batch=some_batch(), small=some_batch(),
        state_bytes=0.0, free=free,
    )  # fmt: skip


def test_auto_takes_the_first_that_fits_and_says_why():
    needs = {}
    for kind in KINDS:
        model = model_with()
        apply(model, kind)
        needs[kind] = recompute.HEAP * recompute.transient_bytes(model, OneProcess(), causal_lm_step, some_batch()) / recompute.SHARE
    for kind, free in [("none", 1.01 * needs["none"]), ("selective", 0.99 * needs["none"]), ("full", 0.99 * needs["selective"])]:
        model = model_with()
        found = chosen(model, free)
        assert found.kind == kind and "120 tokens" in found.reason
        assert len(recomputing(model)) == {"none": 0, "selective": 2, "full": 4}[kind]
    found = chosen(model_with(), 0.5 * needs["full"])
    assert found.kind == "full" and "may not fit" in found.reason
    assert chosen(model_with(), 0.0, **{"engine.compile": True}).kind == "none"


def test_every_rank_recomputes_as_the_most_careful_one(monkeypatch):
    monkeypatch.setattr(recompute.dist, "gather_objects", lambda mine: [mine, recompute.Chosen("selective", "the other's")])
    model = model_with()
    assert chosen(model, 1e12) == recompute.Chosen("selective", "the other's") and recomputing(model) == [0, 1]


def test_a_trial_leaves_no_trace():
    model = model_with(dropout=0.5).eval()
    model.register_buffer("seen", torch.zeros(1))
    model.model.layers[0].register_forward_pre_hook(lambda *_: model.seen.add_(1) and None)
    randomness.seed_all(5)
    before = randomness.capture()[0]["torch"]
    recompute.transient_bytes(model, OneProcess(), causal_lm_step, some_batch())
    assert torch.equal(randomness.capture()[0]["torch"], before) and model.seen.item() == 0
    assert not model.training and all(p.grad is None for p in model.parameters())


@pytest.fixture
def stated(tiny_folder, tmp_path):
    rows = [{"prompt": "p" * (i % 30 + 1), "completion": "a" * (i % 7 + 1)} for i in range(24)]
    return {
        "name": "r", "output": str(tmp_path / "runs"), "model.path": str(tiny_folder), "data.train": [write_rows(tmp_path / "rows.jsonl", rows)],
        "data.max_length": 64, "train.steps": 4, "train.micro_batch": 3, "adapter.method": "lora", "adapter.rank": 4, "adapter.dropout": 0.1,
        "eval.samples": 0, "log.progress": "off", "log.report": False, "log.sinks": [],
    }  # fmt: skip


def chain(folder):
    return json.loads((folder / "completed.json").read_text())["loss_chain"]


def test_a_run_has_the_same_numbers_whatever_it_recomputes_and_with_or_without_a_trial(stated, tmp_path):
    chains = set()
    for setting in ("auto", *KINDS, True):
        deltune.train(stated | {"name": f"run-{setting}", "model.gradient_checkpointing": setting})
        chains.add(chain(tmp_path / "runs" / f"run-{setting}"))
    assert len(chains) == 1


def test_the_choice_is_recorded_and_kept_on_resume_whatever_is_free_then(stated, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "r"
    monkeypatch.setattr(recompute, "free_for_one", lambda device: 0.0)

    class Stop(deltune.Callback):
        def on_save(self, step, path):
            raise Interrupted("enough", 15)

    with pytest.raises(Interrupted):
        deltune.train(stated | {"checkpoint.every": 2}, callbacks=[Stop()])
    state = json.loads((folder / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["progress"]["recompute"] == "full"
    monkeypatch.setattr(recompute, "free_for_one", lambda device: 1e12)
    outcome = deltune.train(stated | {"checkpoint.every": 2})
    start = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert start["description"]["recompute"] == {"kind": "full", "reason": "as in the checkpoint"}
    assert len(recomputing(outcome.model)) == len(blocks_of(outcome.model))


def test_a_forward_step_of_ones_own_is_not_called_for_a_trial(stated):
    calls = []

    def step(model, batch):
        calls.append(batch)
        return causal_lm_step(model, batch)

    deltune.train(stated, forward_step=step)
    assert len(calls) == 4


def test_other_words_are_refused_with_what_would_fit():
    with pytest.raises(ConfigError, match="auto, none, selective, full"):
        run_from({"model.gradient_checkpointing": "some"})
