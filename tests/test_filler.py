"""Numbers of rows rounded up change no loss and no gradient, and give products fewer shapes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltune.data.pack import join
from deltune.models import filler
from deltune.models.cross_entropy import linear_cross_entropy, linear_scores
from deltune.models.head import describe, scores, trained_rows
from deltune.training.loss import LossStep
from tests.synthetic import Rows
from tests.test_packing import model_with


def test_rounding_is_up_and_by_little():
    for rows in range(2000):
        assert 0 <= filler.rounded(rows) - rows <= min(rows / 16, 63)
    assert {filler.rounded(rows) for rows in range(1025, 2049)} == set(range(1088, 2049, 64))
    assert filler.rounded(31) == 31, "of few rows none is worth a kernel's while"


def batch_of(count):
    return join([Rows(count=40, seed=0)[i] for i in range(count)])


@pytest.mark.parametrize("attention", ["segment", "sdpa"])
@pytest.mark.parametrize("count", [5, 12, 40])
def test_a_row_with_filler_has_the_loss_and_gradients_of_the_row_itself(monkeypatch, attention, count):
    model, batch = model_with(attention).double(), batch_of(count)
    step = LossStep(describe(model))
    answers = []
    for on in (False, True):
        monkeypatch.setattr(filler, "makes_kernels", lambda *_, on=on: on)
        model.zero_grad()
        loss = step(model, batch)
        loss.backward()
        per_token, hits = scores(model, step.head, batch.inputs(), *trained_rows(batch.labels))
        answers.append((loss.detach(), *(p.grad.clone() for p in model.parameters()), per_token, hits))
    seq = batch.input_ids.shape[1]
    assert filler.rounded(seq) > seq or filler.rounded(batch.num_trained_tokens) > batch.num_trained_tokens
    for plain, found in zip(*answers, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)


def test_filler_is_a_document_of_its_own():
    batch = batch_of(30)
    given = filler.filled(batch.inputs())
    seq = batch.input_ids.shape[1]
    borders = given["cu_seq_lens_q"]
    assert borders.tolist() == [*batch.segments, filler.rounded(seq)] == list(borders.starts)
    assert given["position_ids"][0, seq:].tolist() == list(range(filler.rounded(seq) - seq))
    assert given["input_ids"].shape == given["position_ids"].shape == (1, filler.rounded(seq))
    padded = {"input_ids": batch.input_ids, "attention_mask": torch.ones_like(batch.input_ids), "use_cache": False}
    assert filler.filled(padded) is padded


@pytest.mark.parametrize("needs", ["states", "weight", "all"])
def test_states_beyond_the_targets_count_for_nothing(needs):
    torch.manual_seed(0)
    states, weight, bias = torch.randn(70, 8).double(), torch.randn(33, 8).double(), torch.randn(33).double()
    targets = torch.randint(0, 33, (57,))
    found = []
    for rows in (57, 70):
        x, W, b = states[:rows].clone(), weight.clone(), bias.clone()
        for name, tensor in (("states", x), ("weight", W), ("bias", b)):
            tensor.requires_grad_(needs in (name, "all"))
        loss = linear_cross_entropy(x, W, b, targets, chunk=20)
        loss.backward()
        found.append((loss.detach(), *(None if t.grad is None else t.grad[:57] for t in (x, W, b)), *linear_scores(x, W, b, targets, chunk=20)))
        if x.grad is not None:
            assert not x.grad[57:].any()
    for plain, filled in zip(*found, strict=True):
        assert (plain is None) == (filled is None)
        if plain is not None:
            torch.testing.assert_close(filled, plain, rtol=1e-12, atol=1e-12)


class Shapes(TorchDispatchMode):
    """Shapes of the products that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.add(tuple(tuple(t.shape) for t in args if isinstance(t, torch.Tensor)))
        return function(*args, **(kwargs or {}))


def test_products_of_a_short_type_have_rounded_numbers_of_rows():
    numbers = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = model_with("segment").to(dtype)
        step = LossStep(describe(model))
        with Shapes() as shapes, torch.no_grad():
            for count in (20, 27, 35, 40):
                step(model, batch_of(count))
        numbers[dtype] = {first[0] for first, *_ in shapes.seen}
    assert {filler.rounded(number) for number in numbers[torch.bfloat16]} == numbers[torch.bfloat16]
    assert {filler.rounded(number) for number in numbers[torch.float32]} != numbers[torch.float32]
