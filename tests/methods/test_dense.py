"""A change that is formed anyway goes with the weight in one node: what that gives is what the two apart give."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltune.adapters import dense
from deltune.adapters.attach import attach, trainable
from deltune.adapters.config import named
from deltune.adapters.entries import Entries, permuted
from deltune.adapters.methods.frequency import Cosines, folded
from deltune.adapters.methods.tiles import Circulant
from deltune.adapters.wrapper import wrappers
from tests.methods.test_products import adapted, layer


def test_a_change_that_is_formed_anyway_goes_into_one_product_with_the_weight():
    """But for a layer with a hook, which must be called, and for autocast, which would round the sum."""
    x = torch.randn(4, 6, dtype=torch.float64)
    model, delta = adapted("hira", rank=2)
    calls = []
    answer = model(x)
    assert delta.goes_in_one(x) and not delta.goes_in_one(x.bfloat16())  # another type than the weight's
    handle = model[0].base_layer.register_forward_hook(lambda *_: calls.append(1))
    assert (model(x) - answer).abs().max() < 1e-12 and calls == [1]
    handle.remove()
    model(x)
    assert calls == [1]
    model, delta = adapted("hira", rank=2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not delta.goes_in_one(x.float())


FORMED = {
    "hira": {"rank": 2}, "miss_bat": {"rank": 2}, "sinelora": {"rank": 2}, "loran": {"rank": 2}, "glora": {"rank": 2}, "loha": {"rank": 9},
    "svft": {}, "svft_random": {"off_diagonals": 2}, "frod": {"sparse_rate": 0.1}, "randlora": {"rank": 8}, "osf": {"kept": 1},
    "shira": {"rank": 1}, "supertuning": {"sparsity": 0.95}, "waveft": {"n_frequency": 4}, "fourierft": {"n_frequency": 30, "init": "zero"},
    "c3a": {"block_size": 8, "init": "zero"},
}  # fmt: skip


@pytest.mark.parametrize("method", FORMED)
def test_one_product_gives_what_the_factors_give(method):
    """Value and gradients, of the input too, with as many tokens as it takes; a hook on the layer makes it take the factors."""
    x = torch.randn(4, 4000, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model, delta = adapted(method, n_in=24, n_out=16, shake=0.1, **FORMED[method])
    assert delta.goes_in_one(x)
    weights = torch.randn(4, 4000, 16, dtype=torch.float64)

    def answers():
        y = model(x)
        return y, *torch.autograd.grad((y * weights).sum(), [x, *trainable(model).values()])

    one = answers()
    model[0].base_layer.register_forward_hook(lambda *_: None)
    for mine, theirs in zip(one, answers(), strict=True):
        assert (mine - theirs).abs().max() <= 1e-10 * theirs.abs().max()


@pytest.mark.parametrize("method", FORMED)
def test_one_product_starts_at_the_weight_itself(method):
    x = torch.randn(16000, 24)
    model, delta = adapted(method, n_in=24, n_out=16, shake=0.0, dtype=torch.float32, **FORMED[method])
    assert delta.goes_in_one(x) and torch.equal(model(x), layer(24, 16, dtype=torch.float32)(x))


@pytest.mark.parametrize("method", ["svft", "svft_random", "frod", "osf"])
def test_one_token_goes_through_the_factors(method):
    _, delta = adapted(method, n_in=24, n_out=16, **FORMED[method])
    assert not delta.goes_in_one(torch.randn(1, 1, 24, dtype=torch.float64))


def test_a_small_change_is_not_lost_in_a_short_weight():
    """Steps far below the weight's own resolution act in bfloat16, as they would not if they were added to it."""
    model = attach(layer(dtype=torch.bfloat16), named("hira", targets=["0"], rank=1))
    delta = wrappers(model)[0][1].adapters["default"]
    with torch.no_grad():
        delta.hira_A.fill_(1.0)
        delta.hira_B.fill_(2.0**-12)
        W = model[0].base_layer.weight
        assert torch.equal((W + delta.delta(W.float())).bfloat16(), W)
        x = torch.ones(1, 6, dtype=torch.bfloat16)
        assert (delta.out(x, W.float()) != 0).all()


def answers(method, dtype, stored, *, apart=False):
    """Output and gradients, of the input and of all parameters together, in float64, of a layer of whole bfloat16 numbers, in this type."""
    fields = FORMED[method]
    exact, _ = adapted(method, n_in=24, n_out=16, shake=0.1, dtype=torch.bfloat16, **fields)
    model = attach(layer(24, 16, dtype=torch.bfloat16).to(dtype), named(method, targets=["0"], **{**fields, "dtype": stored}))
    with torch.no_grad():
        model.load_state_dict(exact.state_dict())
    if apart:
        model[0].base_layer.register_forward_hook(lambda *_: None)
    generator = torch.Generator().manual_seed(0)
    x, back = (torch.randn(16000, width, generator=generator).bfloat16().to(dtype) for width in (24, 16))
    assert apart or wrappers(model)[0][1].adapters["default"].goes_in_one(x)
    y = model(x.requires_grad_())
    to_x, *others = torch.autograd.grad(y, [x, *trainable(model).values()], back)
    return [t.detach().double() for t in (y, to_x, torch.cat([other.flatten() for other in others]))]


@pytest.mark.parametrize("method", [method for method in FORMED if method != "randlora"])  # which then is never formed
def test_in_a_short_type_it_is_no_farther_from_the_exact_one_than_the_two_apart(method):
    together, apart = answers(method, torch.bfloat16, "auto"), answers(method, torch.bfloat16, "auto", apart=True)
    for one, other, exact in zip(together, apart, answers(method, torch.float64, "auto"), strict=True):
        assert (one - exact).norm() <= 1.1 * (other - exact).norm() + 1e-4 * exact.norm()


def test_the_gradient_of_a_bias_that_depends_on_parameters_goes_through():
    generator = torch.Generator().manual_seed(0)
    x, W, b, D = (torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in ((2, 3, 5), (4, 5), (4,), (4, 5)))
    W.requires_grad_(False)
    assert torch.autograd.gradcheck(dense.plus, (x, W, b, D))


class FloatMatrices(TorchDispatchMode):
    """Records the float32 tensors of the weight's size that operations make."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.found += [str(function) for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.dtype == torch.float32 and t.numel() == 24 * 16]
        return result


@pytest.mark.parametrize("method", ["hira", "miss_bat", "glora", "loha"])
def test_on_a_short_base_nothing_of_the_weights_size_is_made_in_float32(method):
    model, delta = adapted(method, n_in=24, n_out=16, shake=0.1, dtype=torch.bfloat16, **FORMED[method])
    assert next(delta.parameters()).dtype == torch.float32
    x = torch.randn(16000, 24, dtype=torch.bfloat16, requires_grad=True)
    assert delta.goes_in_one(x)
    with FloatMatrices() as made:
        model(x).sum().backward()
    assert not made.found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_change_below_the_weights_rounding_acts(dtype):
    """1 + 2⁻¹² is 1 in bfloat16 and float16; where W x is zero the change is all that is left."""
    x, W, D = torch.tensor([[1.0, -1.0]], dtype=dtype), torch.ones(1, 2, dtype=dtype), torch.tensor([[2.0**-12, 0.0]], dtype=dtype)
    assert dense.plus(x, W, None, D).item() == 2.0**-12


@pytest.mark.parametrize("shape", [(5, 7), (6, 8), (1, 4), (4, 1), (5, 8)])
def test_formed_waves_and_their_gradient_are_those_of_the_sum(shape):
    n_out, n_in = shape
    c = torch.randn(3, dtype=torch.float64, requires_grad=True)
    at = folded(*shape, 3, 0, torch.device("cpu"))

    def formed(c):
        return Cosines.apply(c, at, *shape, torch.float64)

    places = permuted(n_out * n_in, 3, 0)
    p, q = places // n_in, places % n_in
    turns = p * torch.arange(n_out)[:, None, None].double() / n_out + q * torch.arange(n_in)[None, :, None].double() / n_in
    assert torch.allclose(formed(c), (torch.cos(2 * torch.pi * turns) * c).sum(-1))
    assert torch.autograd.gradcheck(formed, c)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 5), (3, 2, 1)])
def test_the_gradient_of_circulant_blocks_is_that_of_their_numbers(shape):
    assert torch.autograd.gradcheck(Circulant.apply, torch.randn(shape, dtype=torch.float64, requires_grad=True))


def test_few_entries_take_their_own_gradients_alone_and_many_a_dense_one():
    """Both are the dense product's, in float32 on a CPU, and a short type takes dense ones."""
    x, W, back = torch.randn(50, 24), torch.randn(16, 24), torch.randn(50, 16)
    for count in (5, 200):
        entries = Entries.at(torch.randperm(16 * 24)[:count], 16, 24, torch.device("cpu"))
        values = torch.randn(count, requires_grad=True)
        assert entries.by_entry(x) == (count == 5) and not entries.by_entry(x.bfloat16())
        plain, plus = x @ (W + entries.dense(values)).T, entries.plus(x, W, None, values)
        assert torch.allclose(plus, plain, atol=1e-5)
        one, other = (torch.autograd.grad((y * back).sum(), values)[0] for y in (plus, plain))
        assert torch.allclose(one, other, atol=1e-4)
