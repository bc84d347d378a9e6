"""Values at fixed places of a matrix: every way of multiplying with them is the product with that matrix."""

from __future__ import annotations

import pytest
import torch

from deltune.adapters.attach import attach
from deltune.adapters.config import named
from deltune.adapters.entries import MANY, Entries
from deltune.adapters.wrapper import wrappers
from tests.adapted import shaken

OUT, IN = 24, 40
FEW, TOO_MANY = 30, int(0.5 * OUT * IN)


def made(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    entries = Entries.at(torch.randperm(OUT * IN, generator=generator)[:count], OUT, IN, torch.device("cpu"))
    return entries, torch.randn(count, generator=generator, dtype=torch.float64)


def whole(entries, values):
    """The matrix, entry by entry."""
    found = torch.zeros(OUT, IN, dtype=values.dtype)
    for value, row, column in zip(values, *entries.places.tolist(), strict=True):
        found[row, column] += value
    return found


def close(ours, true):
    return all(torch.allclose(one, other, rtol=1e-12, atol=1e-12) for one, other in zip(ours, true, strict=True))


@pytest.mark.parametrize("count", [FEW, TOO_MANY])
def test_both_ways_to_multiply_give_the_matrix_product_and_its_gradients(count):
    entries, values = made(count)
    x, g = torch.randn(2, 7, IN, dtype=torch.float64, requires_grad=True), torch.randn(2, 7, OUT, dtype=torch.float64)
    assert entries.by_entry(x) == (count < MANY * OUT * IN)
    values.requires_grad_()
    ways = [entries(x, values), x @ whole(entries, values).T]
    assert close(*[(y, *torch.autograd.grad(y, (x, values), g)) for y in ways])


@pytest.mark.parametrize("count", [FEW, TOO_MANY])
def test_joined_to_a_weight_with_a_pair_it_is_the_sum_of_all_three(count):
    entries, values = made(count)
    W, b, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in ((OUT, IN), (OUT,), (3, IN), (OUT, 3)))
    x, g = torch.randn(2, 7, IN, dtype=torch.float64), torch.randn(2, 7, OUT, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, values, A, B)]
    before = W.clone()
    ways = [entries.plus(x, W, b, values, (A, B)), x @ (W + whole(entries, values) + B @ A).T + b]
    assert close(*[(y, *torch.autograd.grad(y, inputs, g)) for y in ways])
    assert torch.equal(W, before)


def test_what_was_found_from_the_places_is_found_anew_when_they_change():
    entries, values = made(FEW)
    x = torch.randn(7, IN, dtype=torch.float64)
    before = entries(x, values)
    entries.put(torch.arange(FEW) * 7 + 1)
    after = entries(x, values)
    assert not torch.allclose(before, after) and torch.allclose(after, x @ whole(entries, values).T)


def test_the_core_of_frod_follows_its_banks_places():
    model = torch.nn.Sequential(torch.nn.Linear(12, 10))
    shaken(attach(model, named("frod", sparse_rate=0.05, targets=["0"])))
    (_, layer), = wrappers(model)
    delta, x = layer.adapters["default"], torch.randn(3, 12)
    assert torch.allclose(delta.out(x, None), x @ delta.delta(None).T, atol=1e-5)
    before = delta.out(x, None)
    with torch.no_grad():
        delta.joint.frod_s_indices.copy_(delta.joint.frod_s_indices.flip(0))
    n, (rows, columns) = 12, delta.joint.frod_s_indices
    core = torch.zeros(n, n).index_put((rows, columns), delta.frod_lambda_s_values.detach()) + torch.diag((delta.frod_lambda_l - delta.lambda_0).detach())
    after = delta.out(x, None)
    assert not torch.allclose(after, before)
    assert torch.allclose(after, x @ (delta.U @ core @ delta.joint.frod_V.T).T, atol=1e-5)
