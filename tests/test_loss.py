"""The loss without logits, held to the loss with them: in value, in every gradient, for any head, chunk, type and adapter."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from deltune.models import cross_entropy
from deltune.models.cross_entropy import (
    Tail,
    chunk_rows,
    cross_entropy_of,
    linear_cross_entropy,
    linear_scores,
    scores_of,
)

ROWS, WIDTH, VOCAB = 23, 12, 37
PLAIN = Tail()
TAILS = [PLAIN, Tail(0.3), Tail(softcap=2.0), Tail(1.7, 3.0)]
tails = pytest.mark.parametrize("tail", TAILS, ids=str)


def plain(states, weight, bias, targets, tail=PLAIN):
    """By torch alone, in the type of its arguments up to the logits."""
    z = F.linear(states, weight, bias)
    logits = z * tail.scale if tail.softcap is None else torch.tanh(z * tail.scale / tail.softcap) * tail.softcap
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="sum")


def given(dtype=torch.float32, *, rows=ROWS, vocab=VOCAB, bias=True, trained=True, seed=0):
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, WIDTH, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(vocab, WIDTH, generator=draw).to(dtype).requires_grad_(trained)
    offset = torch.randn(vocab, generator=draw).to(dtype).requires_grad_(trained) if bias else None
    return states, weight, offset, torch.randint(0, vocab, (rows,), generator=draw)


def with_gradients(function, states, weight, bias, *rest, upstream=1.0, **settings):
    """(loss, gradients of the first three as far as they are trained), of fresh copies."""
    leaves = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in (states, weight, bias)]
    loss = function(*leaves, *rest, **settings)
    (loss * upstream).backward()
    return loss.detach(), [t.grad for t in leaves if t is not None and t.requires_grad]


def distance(found, expected):
    """Relative to the size of the whole tensor."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check(found, expected, bound):
    assert distance(found[0], expected[0]) <= bound
    assert len(found[1]) == len(expected[1])
    for one, other in zip(found[1], expected[1], strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert distance(one, other) <= bound


# -- linear and cross-entropy -----------------------------------------------------------------------------------


@tails
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_loss_and_gradients_are_those_of_whole_logits(tail, bias, trained, dtype, bound):
    case = given(dtype, bias=bias, trained=trained)
    for chunk in (1, 2, 7, ROWS - 1, ROWS, 100, None):
        check(with_gradients(linear_cross_entropy, *case, tail, chunk=chunk, upstream=0.37), with_gradients(plain, *case, tail, upstream=0.37), bound)


@tails
def test_blocks_within_a_chunk_change_nothing(tail, monkeypatch):
    case = given(torch.bfloat16)
    whole = with_gradients(linear_cross_entropy, *case, tail, chunk=9)
    monkeypatch.setitem(cross_entropy.BLOCK_BYTES, "cpu", 2 * VOCAB * 4)  # two rows, and one at the end of each chunk
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = with_gradients(linear_cross_entropy, *case, tail, chunk=9)
        assert torch.equal(found[1][0], whole[1][0]) and torch.equal(found[1][1], whole[1][1])
        check(found, whole, 1e-6)  # a bias's columns are added up in another order


@tails
def test_gradients_are_those_of_finite_differences(tail):
    states, weight, bias, targets = case = given(torch.float64, rows=3, vocab=5)
    _, gradients = with_gradients(linear_cross_entropy, *case, tail, chunk=2)
    for tensor, gradient in zip((states, weight, bias), gradients, strict=True):
        flat = tensor.detach().view(-1)
        for place in range(flat.numel()):
            values = []
            for step in (1e-6, -1e-6):
                old = flat[place].item()
                flat[place] = old + step
                values.append(linear_cross_entropy(states.detach(), weight.detach(), bias.detach(), targets, tail).item())
                flat[place] = old
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(gradient.view(-1)[place].item(), rel=1e-6, abs=1e-8)


@tails
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [64, 200])
def test_short_types_are_no_farther_from_float32_than_whole_logits_are(tail, dtype, chunk):
    """As a training step has it: the loss is divided by its tokens, which are no power of two, after the states' gradient
    was rounded. A model's own rounding drowns what this second one adds (tests/test_head.py holds that to 1.1)."""
    totals = {}
    for seed in range(12):
        case = given(dtype, rows=200, vocab=501, seed=seed)
        exact = with_gradients(plain, *(t if t.dtype == torch.int64 else t.detach().float().requires_grad_() for t in case), tail, upstream=1 / 200)
        for name, function, settings in (("plain", plain, {}), ("chunks", linear_cross_entropy, {"chunk": chunk})):
            loss, gradients = with_gradients(function, *case, tail, upstream=1 / 200, **settings)
            for number, (one, other) in enumerate(zip((loss, *gradients), (exact[0], *exact[1]), strict=True)):
                totals[name, number] = totals.get((name, number), 0.0) + distance(one, other)
    for number in range(1, 4):
        assert totals["chunks", number] <= 1.15 * totals["plain", number], number


@tails
def test_losses_in_short_types_are_no_farther_from_float32(tail):
    """Row by row: in a sum, errors of either sign cancel by chance."""
    states, weight, bias, targets = given(torch.bfloat16, rows=400, vocab=501)
    z = F.linear(states, weight, bias).detach()
    exact = F.cross_entropy(tail(F.linear(states.float(), weight.float(), bias.float())), targets, reduction="none").detach()
    rounded = F.cross_entropy(tail(z).float(), targets, reduction="none")
    assert distance(linear_scores(states, weight, bias, targets, tail)[0], exact) <= 1.01 * distance(rounded, exact)


def test_small_probabilities_of_a_sure_model_survive_float16():
    """A gradient is made before the loss scale is known, so the chunk's own factor must hold up what is small."""
    states, weight, _, targets = given(torch.float16, rows=1, vocab=VOCAB, bias=False)
    with torch.no_grad():
        weight.zero_()
        weight[int(targets[0])] = 16.5 / states[0].float().pow(2).sum() * states[0]  # the others' shares are 7e-8
    exact = with_gradients(plain, states.detach().float().requires_grad_(), weight.detach().float().requires_grad_(), None, targets)
    found = with_gradients(linear_cross_entropy, states, weight, None, targets, upstream=1024.0)
    others = torch.arange(VOCAB) != targets[0]
    assert distance(found[1][1][others], 1024 * exact[1][1][others]) < 0.03


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_multiplies_in_its_type_and_gives_gradients_in_the_weights_own(trained):
    case = given(trained=trained)
    exact = with_gradients(plain, *case)
    errors = []
    for function in (plain, linear_cross_entropy):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, gradients = with_gradients(function, *case, **({"chunk": 5} if function is linear_cross_entropy else {}))
        assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in gradients)
        errors.append([distance(a, b) for a, b in zip((loss, *gradients), (exact[0], *exact[1]), strict=True)])
    assert all(1e-4 < found <= 1.1 * other for found, other in zip(errors[1][1:], errors[0][1:], strict=True))


def test_states_need_not_be_contiguous():
    _, weight, bias, targets = given()
    strided = torch.randn(WIDTH, ROWS).T
    check(with_gradients(linear_cross_entropy, strided.requires_grad_(), weight, bias, targets), with_gradients(plain, strided, weight, bias, targets), 1e-6)


def test_no_rows_are_a_loss_of_zero_whose_gradients_arrive():
    for dtype in (torch.float32, torch.bfloat16):
        loss, gradients = with_gradients(linear_cross_entropy, *given(dtype, rows=0))
        assert loss == 0 and [g.numel() for g in gradients] == [0, VOCAB * WIDTH, VOCAB]
        assert not any(g.any() for g in gradients)


def test_a_gradient_is_taken_once_and_none_of_it_is():
    states, *rest = given()
    loss = linear_cross_entropy(states, *rest)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once: compute the loss anew"):
        loss.backward()
    for function in (linear_cross_entropy, lambda s, w, b, t: cross_entropy_of(F.linear(s, w, b), t)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(function(states, *rest), states, create_graph=True)


def test_what_needs_no_gradient_costs_none(monkeypatch):
    products = []
    monkeypatch.setattr(torch, "mm", lambda *args, mm=torch.mm, **kwargs: products.append(1) or mm(*args, **kwargs))
    states, weight, _, targets = given(bias=False)
    with torch.no_grad():
        linear_cross_entropy(states, weight, None, targets, chunk=ROWS)
    assert len(products) == 1
    linear_cross_entropy(states.detach(), weight, None, targets, chunk=ROWS).backward()
    assert len(products) == 2 and weight.grad is not None


class Largest(TorchDispatchMode):
    """The most elements that any tensor has."""

    def __init__(self, least: int = 0):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_iter(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk(dtype):
    states, weight, bias, targets = given(dtype, rows=300, vocab=400, trained=False)
    with Largest() as seen:
        linear_cross_entropy(states, weight, bias, targets, Tail(softcap=3.0), chunk=30).backward()
    assert seen.numel == 30 * 400
    with Largest() as seen, torch.no_grad():
        linear_scores(states, weight, bias, targets, chunk=30)
    assert seen.numel == 30 * 400


def test_chunks_are_even_and_of_a_size_that_caches_and_weights_ask_for():
    states, weight, _, targets = given(rows=100, bias=False, trained=False)
    with Largest() as seen:
        linear_cross_entropy(states, weight, None, targets, chunk=99)
    assert seen.numel == max(50 * VOCAB, 100 * WIDTH)
    head = torch.empty(32000, 768, device="meta")
    assert chunk_rows(head, torch.bfloat16, "cpu") == (28 << 20) // 64000
    assert chunk_rows(head, torch.bfloat16, "cpu", trained=True) == 768
    assert chunk_rows(torch.empty(256000, 2048, device="meta"), torch.bfloat16, "cpu") == 256


@tails
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_are_the_loss_of_each_row_and_whether_it_was_foreseen(tail, dtype):
    states, weight, bias, targets = given(dtype, rows=60)
    z = F.linear(states, weight, bias).detach()
    targets[::3] = z.argmax(-1)[::3]
    expected = F.cross_entropy(tail(z.double()), targets, reduction="none")
    before = z.clone()
    for losses, hits in (linear_scores(states, weight, bias, targets, tail, chunk=7), scores_of(z, targets, tail)):
        assert torch.equal(hits, z.argmax(-1) == targets) and 20 <= hits.sum() < 60
        assert torch.allclose(losses.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(z, before)
    assert [len(t) for t in linear_scores(states[:0], weight, bias, targets[:0], tail)] == [0, 0]


def test_of_equal_logits_the_first_is_the_answer():
    z = torch.zeros(2, 5)
    assert scores_of(z, torch.tensor([0, 3]))[1].tolist() == [True, False]


@tails
def test_the_loss_of_given_logits_has_their_gradient(tail):
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        states, weight, bias, targets = given(dtype)

        def by_module(states, weight, bias, targets, tail):
            return cross_entropy_of(F.linear(states, weight, bias), targets, tail)

        check(with_gradients(by_module, states, weight, bias, targets, tail, upstream=0.3), with_gradients(plain, states, weight, bias, targets, tail, upstream=0.3), bound)
        z = F.linear(states, weight, bias)
        before = z.detach().clone()
        cross_entropy_of(z, targets, tail).backward()
        assert torch.equal(z, before)  # a layer may have saved it


def test_without_numbers_it_gives_shapes_and_types():
    states, weight, bias, targets = (t.detach().to("meta") for t in given(torch.bfloat16, rows=1000))
    loss = linear_cross_entropy(states.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), targets, Tail(softcap=2.0), chunk=100, device="cuda")
    loss.backward()
    assert loss.dtype == torch.float32 and states.grad.shape == states.shape and weight.grad.dtype == bias.grad.dtype == torch.bfloat16


def test_ligers_kernel_is_called_on_cuda_where_it_can_serve(monkeypatch):
    """With a double in its place, on the CPU."""

    class Double(nn.Module):
        def __init__(self, **settings):
            super().__init__()
            assert settings.pop("accum_dtype") == torch.float32 and settings.pop("reduction") == "sum"
            self.settings = settings

        def forward(self, lin_weight, _input, target, bias=None):
            calls.append(self.settings)
            return plain(_input, lin_weight, bias, target, Tail(**self.settings))

    calls = []
    package, leaf = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers.fused_linear_cross_entropy")
    package.__spec__ = sys.__spec__
    leaf.LigerFusedLinearCrossEntropyLoss = Double
    for name, module in (("liger_kernel", package), ("liger_kernel.transformers", ModuleType("t")), (leaf.__name__, leaf)):
        monkeypatch.setitem(sys.modules, name, module)
    for tail in TAILS:
        for bias in (False, True):
            case = given(bias=bias)
            with on_cuda(monkeypatch):
                found = with_gradients(linear_cross_entropy, *case, tail)
            check(found, with_gradients(plain, *case, tail), 1e-6)
            assert calls == ([] if bias and tail.scale != 1.0 else [{"softcap": tail.softcap}])
            calls.clear()
    linear_cross_entropy(*given())
    with on_cuda(monkeypatch), torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(*given())
    assert calls == []


@contextmanager
def on_cuda(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        yield
