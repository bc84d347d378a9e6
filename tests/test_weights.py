"""Stored weights: files that are whole or absent, and sums that are rounded once."""

from __future__ import annotations

import resource

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deltune import weights
from deltune.errors import DeltuneError


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_what_is_written_is_read(tmp_path):
    base = random(4, 6)
    tensors = {
        "plain": base,
        "same": base,  # shares all its memory
        "part": base[1:3],  # shares some
        "transposed": base.T,
        "bf16": base.to(torch.bfloat16),
        "whole_number": torch.arange(3),
        "empty": torch.empty(0, 2),
        "none": torch.empty(0, 2),
    }
    weights.write_tensors(tmp_path / "x.safetensors", tensors, {"note": "n"})
    read = weights.read_tensors(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert load_file(tmp_path / "x.safetensors").keys() == tensors.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("ending", weights.PICKLE_ENDINGS)
def test_a_pickle_is_refused_with_the_way_out(tmp_path, ending):
    path = tmp_path / f"model{ending}"
    torch.save({"w": torch.ones(1)}, path)
    with pytest.raises(DeltuneError, match="pickle") as caught:
        weights.read_tensors(path)
    assert "model.safetensors" in str(caught.value)
    assert "weights_only=True" in str(caught.value)


def test_a_file_that_is_not_whole_is_refused_with_its_name(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(DeltuneError, match="no such file"):
        weights.read_tensors(path)
    weights.write_tensors(path, {"w": random(64, 64)})
    whole = path.read_bytes()
    for size in (0, 4, 30, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DeltuneError, match=r"x\.safetensors: not a whole"):
            weights.read_tensors(path)


def test_a_full_disk_keeps_the_old_file_and_says_what_was_needed(tmp_path):
    path = tmp_path / "x.safetensors"
    weights.write_tensors(path, {"w": random(2, 2)})
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(DeltuneError, match=r"x\.safetensors: no space left to write 40,000 bytes \([\d,]+ bytes free\)"):
            weights.write_tensors(path, {"w": random(100, 100)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_error_that_is_no_full_disk_is_not_hidden(tmp_path):
    with pytest.raises(OSError, match=r"gone"), weights.replacing(tmp_path / "gone" / "x", 1) as temporary:
        temporary.write_text("x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_added_with_one_rounding(monkeypatch, dtype, transposed):
    monkeypatch.setattr(weights.arithmetic, "BLOCK_ELEMENTS_CPU", 20)  # several blocks, the last one short
    weight = random(7, 9, dtype=dtype)
    left, right = random(7, 2, seed=1), random(2, 9, seed=2)
    expected = weight.double() + 0.3 * left.double() @ right.double()
    stored = weight.clone().T.contiguous().T if transposed else weight.clone()
    weights.add_product_to_weight(stored, left, right, 0.3)
    once = expected.to(dtype)
    if dtype == torch.float32:
        assert torch.allclose(stored, once, rtol=1e-6, atol=1e-7)
    else:
        assert (stored != once).float().mean() < 0.05  # only where float32 and float64 round to different sides
    dense = weight.clone()
    weights.add_to_weight(dense, 0.3 * left @ right)
    assert torch.allclose(dense.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (7, 9), (300, 200), (256, 1024)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_added_in_one_pass_is_rounded_as_in_blocks(monkeypatch, shape, transposed):
    stored = random(*shape, dtype=torch.bfloat16)
    left, right = random(shape[0], 5, seed=1), random(5, shape[1], seed=2)
    results = []
    for in_one_pass in (weights.arithmetic._sums_bfloat16_in_float32, lambda weight: False):
        monkeypatch.setattr(weights.arithmetic, "_sums_bfloat16_in_float32", in_one_pass)
        weight = stored.T.contiguous().T if transposed else stored.clone()
        weights.add_product_to_weight(weight, left, right, 0.3)
        results.append(weight)
    # only where two orders of one float32 sum round to different sides; factors in bfloat16 would move a quarter of them
    assert (results[0] != results[1]).sum() <= 0.0005 * stored.numel()


def test_float64_sums_are_float64():
    weight, left, right = random(5, 4, dtype=torch.float64), random(5, 2, dtype=torch.float64), random(2, 4, dtype=torch.float64)
    expected = weight + left @ right
    weights.add_product_to_weight(weight, left, right, 1.0)
    assert (weight - expected).abs().max() < 1e-14


def test_small_changes_are_not_lost_to_the_order_of_rounding():
    # in bfloat16 1 + 2^-8 + 2^-8 is 1 + 2^-7 when summed first, and 1 when every term is rounded
    weight = torch.ones(1, 1, dtype=torch.bfloat16)
    weights.add_product_to_weight(weight, torch.full((1, 2), 2.0**-8), torch.ones(2, 1), 1.0)
    assert weight.item() == 1 + 2.0**-7


def test_a_restored_layer_is_bit_for_bit_the_old_one_and_ties_stay():
    layer, other = nn.Linear(3, 4), nn.Linear(3, 4)
    other.weight = layer.weight
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    before, bits = layer.weight, layer.weight.detach().view(torch.int32).clone()
    saved = weights.snapshot(layer)
    with torch.no_grad():
        layer.weight.add_(1)
        layer.bias.zero_()
    assert torch.equal(other.weight.view(torch.int32), bits)
    weights.restore(layer, saved)
    assert layer.weight is before and other.weight is before
    assert torch.equal(layer.weight.view(torch.int32), bits)
    assert layer.bias.abs().sum() > 0


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 3), r"w: shape \[2, 3\] found, \[2, 2\] expected"),
        (torch.zeros(2, 2, dtype=torch.int64), "w: torch.int64 found, a floating type"),
        (torch.tensor([[0, float("nan")], [float("inf"), 1]]), "w: 2 of 4 values are not finite"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tensor, message):
    with pytest.raises(DeltuneError, match=message):
        weights.check_tensor("w", tensor, (2, 2))
    weights.check_tensor("w", torch.zeros(2, 2, dtype=torch.bfloat16), (2, 2))


def test_float_view_is_the_weight_itself_where_it_can_be():
    weight = nn.Parameter(random(2, 2))
    view = weights.float_view(weight)
    assert view.data_ptr() == weight.data_ptr() and not view.requires_grad
    assert weights.float_view(weight.to(torch.bfloat16)).dtype == torch.float32
    assert weights.float_view(weight.double()).dtype == torch.float64
