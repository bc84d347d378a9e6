"""Evaluation: the same numbers as a plain loop and as transformers' own loss, for any batch size; nothing disturbed."""

from __future__ import annotations

import math

import pytest
import torch

from deltune.data.pack import Batch
from deltune.errors import DataError
from deltune.evaluation.lm import evaluate, evaluate_by_source, source_of
from tests.tiny import tiny_model


def examples(count: int = 13, seed: int = 0):
    """(ids, labels) of unequal length; the first part of each is not trained, the last example not at all."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = int(torch.randint(4, 30, (1,), generator=draw))
        ids = torch.randint(0, 264, (length,), generator=draw)
        labels = ids.clone()
        labels[: int(torch.randint(0, length - 1, (1,), generator=draw))] = -100
        if number == count - 1:
            labels[:] = -100
        found.append((ids, labels))
    return found


def batches(found, size: int):
    for start in range(0, len(found), size):
        chosen = found[start : start + size]
        width = max(len(ids) for ids, _ in chosen)
        ids, labels, mask = (torch.full((len(chosen), width), fill) for fill in (258, -100, 0))
        for row, (one, wanted) in enumerate(chosen):
            ids[row, : len(one)], labels[row, : len(one)], mask[row, : len(one)] = one, wanted, 1
        names = [f"part{(start + i) % 3}.jsonl:{start + i + 1}" for i in range(len(chosen))]
        yield Batch(ids, labels, mask, names, int(mask.sum()), int((labels[:, 1:] != -100).sum()))


def by_hand(model, found) -> dict[str, float]:
    """One example at a time, log-softmax written out."""
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for ids, labels in found:
            scores = model(ids[None]).logits[0].double()
            for position in range(len(ids) - 1):
                if labels[position + 1] != -100:
                    target = labels[position + 1]
                    loss += (scores[position].logsumexp(-1) - scores[position, target]).item()
                    correct += int(scores[position].argmax() == target)
                    count += 1
    return {"loss": loss / count, "perplexity": math.exp(loss / count), "token_accuracy": correct / count, "num_tokens": count, "num_examples": len(found)}


@pytest.mark.parametrize("size", [1, 4, 13])
def test_numbers_are_those_of_a_plain_loop_for_any_batch_size(size):
    model, found = tiny_model(), examples()
    with torch.no_grad():  # a model that is right now and then
        for ids, labels in found:
            scores = model(ids[None]).logits[0]
            for position in range(0, len(ids) - 1, 3):
                if labels[position + 1] != -100:
                    labels[position + 1] = scores[position].argmax()
    measured, expected = evaluate(model, batches(found, size)), by_hand(model, found)
    assert set(measured) == set(expected)
    for name in expected:
        assert measured[name] == pytest.approx(expected[name], rel=1e-6), name
    assert 0.2 < measured["token_accuracy"] < 0.5
    assert measured["perplexity"] == math.exp(measured["loss"])


def test_loss_is_transformers_own_mean_on_a_single_batch():
    model, found = tiny_model(), examples()
    (batch,) = batches(found, 13)
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert evaluate(model, [batch])["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_models_that_give_all_logits_are_measured_alike():
    """Some architectures have no logits_to_keep."""

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model()

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    found = examples()
    assert evaluate(Plain(), batches(found, 4)) == pytest.approx(evaluate(tiny_model(), batches(found, 4)), rel=1e-6)


def test_own_forward_replaces_the_loss_and_names_its_numbers():
    model, found = tiny_model(), examples()

    def forward(model, batch):
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
        return loss, {"mean_loss": loss.item() / max(1, batch.num_trained_tokens)}

    own, usual = evaluate(model, batches(found, 4), forward=forward), evaluate(model, batches(found, 4))
    assert own.pop("mean_loss") == pytest.approx(usual["loss"], rel=1e-6)
    del usual["token_accuracy"]
    assert own == pytest.approx(usual, rel=1e-6)


def test_sources_add_up_to_the_whole():
    model, found = tiny_model(), examples()
    total, sources = evaluate_by_source(model, batches(found, 5))
    assert total == pytest.approx(evaluate(model, batches(found, 5)), rel=1e-12)
    assert list(sources) == ["part0.jsonl", "part1.jsonl", "part2.jsonl"]
    for number in range(3):
        assert sources[f"part{number}.jsonl"] == pytest.approx(by_hand(model, found[number::3]), rel=1e-6)


@pytest.mark.parametrize(("row", "source"), [("a/b.jsonl:12", "a/b.jsonl"), ("c:d.json[3]", "c:d.json"), ("x:1.txt:7", "x:1.txt")])
def test_source_of_a_row(row, source):
    assert source_of(row) == source


def test_training_goes_on_as_if_nothing_had_happened():
    losses = []
    for disturb in (False, True):
        torch.manual_seed(3)
        model = tiny_model(attention_dropout=0.3).train()
        model.model.layers[1].eval()
        modes = [module.training for module in model.modules()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ids = torch.arange(40).view(2, 20)
        for _ in range(3):
            if disturb:
                evaluate(model, batches(examples(), 4))
                evaluate(model, batches(examples(), 4), forward=lambda m, b: torch.rand(()))  # one that draws
                assert [module.training for module in model.modules()] == modes
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item().hex())
    assert losses[:3] == losses[3:]


def test_dropout_is_off():
    model = tiny_model(attention_dropout=0.9).train()
    assert evaluate(model, batches(examples(), 4)) == evaluate(tiny_model(), batches(examples(), 4))


def test_nothing_to_measure_is_an_error():
    nothing = [(ids, torch.full_like(labels, -100)) for ids, labels in examples(3)]
    for given in (nothing, []):
        with pytest.raises(DataError, match="no trained token"):
            evaluate(tiny_model(), batches(given, 2))
        with pytest.raises(DataError, match="no trained token"):
            evaluate_by_source(tiny_model(), batches(given, 2))


def test_a_broken_model_gives_nan_and_a_bad_one_infinity():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    assert math.isnan(evaluate(model, batches(examples(), 4))["perplexity"])
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert evaluate(model, batches(examples(), 4))["perplexity"] == math.inf
