"""Quantised weights: codes, scales and values are bitsandbytes' bit for bit, and a layer that holds them is a layer."""

from __future__ import annotations

import copy
import itertools
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deltune import weights
from deltune.errors import DeltuneError
from deltune.models.config import ModelConfig
from deltune.models.load import load
from deltune.weights import bnb, quantised
from deltune.weights import codes as coding

TYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((64, 64), (96, 200), (33, 77), (130, 1024), (1, 3), (256, 512), (7, 4096), (48, 320))
FORMS = [(kind, block, double) for kind in ("nf4", "fp4") for block, double in ((64, True), (64, False), (128, True))] + [("int8", 64, False)]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values as weights have them, with some rows of zeros, some outliers, and a tie between two levels."""
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    W[: shape[0] // 8] = 0
    W.view(-1)[:: max(1, W.numel() // 5)] *= 30
    if W.numel() > 200:
        table = coding.levels("nf4")
        W.view(-1)[-128:-64] = torch.cat([torch.ones(1), (table[1:] + table[:-1]) / 2]).repeat(4)
    return W.to(dtype)


@cache
def fifty() -> list[tuple[str, torch.Tensor]]:
    """Random weights of every type and many shapes, and the bundled model's own."""
    random = [(f"{list(shape)} {dtype}", drawn(*shape, seed=i, dtype=dtype)) for i, (shape, dtype) in enumerate(itertools.product(SHAPES, TYPES))]
    model = load(ModelConfig())
    real = [(name, module.weight.detach()) for name, module in model.named_modules() if type(module) is nn.Linear]
    return random + [(name, W.to(TYPES[i % 3])) for i, (name, W) in enumerate(real)]


def unpacked(codes: torch.Tensor, n: int) -> torch.Tensor:
    return torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten()[:n].long()


@pytest.fixture(scope="module")
def functional():
    return pytest.importorskip("bitsandbytes").functional


@pytest.mark.parametrize("block", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(functional, kind, block):
    found = fifty()
    assert len(found) >= 50
    assert torch.equal(coding.levels(kind), functional.get_4bit_type(kind, device="cpu"))
    for name, W in found:
        theirs, state = functional.quantize_4bit(W, blocksize=block, quant_type=kind)
        codes, scales = coding.quantise_4bit(W, kind, block)
        assert torch.equal(codes, theirs.view(-1)) and torch.equal(scales, state.absmax), name
        n = W.numel()
        values = (functional.get_4bit_type(kind, device="cpu")[unpacked(theirs, n)] * state.absmax.repeat_interleave(block)[:n]).to(W.dtype).view(W.shape)
        ours = coding.dequantise_4bit(codes, scales, kind, block, torch.empty(n, dtype=W.dtype)).view(W.shape)
        assert torch.equal(ours, values), name
        assert torch.equal(weights.dequantised(weights.quantise(W, kind, block_size=block, double=False)), values), name
        if W.shape[1] % block == 0 and block < 2048:  # elsewhere its kernel takes the scales of other blocks, or calls a compiler
            assert torch.equal(functional.dequantize_4bit(theirs, state), values), name


@pytest.mark.parametrize("block", [64, 4096])
def test_double_quantisation_is_that_of_bitsandbytes(functional, block):
    for name, W in [*fifty(), ("large", drawn(1024, 1024)), ("all alike", torch.ones(64, 64))]:
        _, state = functional.quantize_4bit(W, blocksize=block, quant_type="nf4", compress_statistics=True)
        tensor = weights.quantise(W, "nf4", block_size=block)
        assert torch.equal(tensor.scales, state.absmax) and torch.equal(tensor.scales_of_scales, state.state2.absmax) and torch.equal(tensor.mean, state.offset), name
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(quantised._scales(tensor), scales), name
        n = W.numel()
        values = (coding.levels("nf4")[unpacked(tensor.codes, n)] * scales.repeat_interleave(block)[:n]).to(W.dtype).view(W.shape)
        assert torch.equal(weights.dequantised(tensor), values), name


def test_int8_is_that_of_bitsandbytes(functional):
    for name, W in fifty():
        W = W + (W.abs().amax(1, keepdim=True) == 0)  # theirs divides by zero
        theirs, largest, _ = functional.int8_vectorwise_quant(W)
        tensor = weights.quantise(W, "int8")
        assert torch.equal(tensor.codes, theirs) and torch.equal(tensor.scales, largest), name
        assert torch.equal(weights.dequantised(tensor, torch.float32), functional.int8_vectorwise_dequant(theirs, largest)), name
    assert not weights.dequantised(weights.quantise(torch.zeros(3, 8), "int8")).any()


def test_without_bitsandbytes_values_are_the_same(monkeypatch):
    tensors = [weights.quantise(drawn(256, 512, dtype=dtype), kind, block_size=block) for kind, block, dtype in itertools.product(("nf4", "fp4"), (64, 256), TYPES)]
    before = [weights.dequantised(tensor) for tensor in tensors]
    monkeypatch.setattr(bnb, "dequantise_4bit", lambda *_: False)
    assert all(torch.equal(weights.dequantised(tensor), values) for tensor, values in zip(tensors, before, strict=True))


def test_another_release_of_bitsandbytes_gives_the_same_by_its_operator(functional, monkeypatch):
    tensors = [weights.quantise(drawn(256, 512, dtype=dtype), "nf4") for dtype in TYPES]
    before = [weights.dequantised(tensor) for tensor in tensors]
    monkeypatch.setattr(bnb, "_function", lambda *_: None)
    assert all(torch.equal(weights.dequantised(tensor), values) for tensor, values in zip(tensors, before, strict=True))


def test_values_of_a_product_lie_in_memory_that_is_kept():
    tensors = [weights.quantise(drawn(256, 512), "nf4") for _ in range(2)]
    places = {quantised._values(tensor, torch.bfloat16, for_now=True).data_ptr() for tensor in tensors}
    assert len(places) == 1
    kept = [weights.dequantised(tensor, torch.bfloat16) for tensor in tensors]
    assert kept[0].data_ptr() != kept[1].data_ptr() and not places & {values.data_ptr() for values in kept}


@pytest.fixture(params=FORMS, ids=lambda form: "-".join(map(str, form)))
def tensor(request):
    kind, block, double = request.param
    return weights.quantise(drawn(33, 76), kind, block_size=block, double=double)


def test_bytes_a_value():
    W = torch.empty(2048, 2048, device="meta")
    per_value = {
        form: weights.stored_bytes(weights.quantise(W, form[0], block_size=form[1], double=form[2])) / W.numel()
        for form in (("nf4", 64, True), ("nf4", 64, False), ("fp4", 256, True), ("int8", 64, False))
    }
    assert per_value["nf4", 64, True] == pytest.approx(0.5 + 1 / 64 + 4 / 64 / 256, rel=1e-5) and per_value["nf4", 64, True] <= 0.53
    assert per_value["nf4", 64, False] == 0.5 + 4 / 64
    assert per_value["fp4", 256, True] == pytest.approx(0.5 + 1 / 256 + 4 / 256 / 256, rel=1e-5)
    assert per_value["int8", 64, False] == 1 + 4 / 2048


def test_rows_are_those_of_all_values(tensor):
    whole = weights.dequantised(tensor)
    assert type(whole) is torch.Tensor and whole.shape == tensor.shape and whole.dtype == tensor.dtype
    for start, stop in itertools.combinations(range(0, 34, 3), 2):
        assert torch.equal(tensor[start:stop], whole[start:stop])
    for index in (3, -1, slice(None), slice(0, 33), slice(30, 99), slice(0, 9, 2), (slice(None), slice(3, 5)), torch.tensor([1, 5])):
        assert torch.equal(tensor[index], whole[index]) and not weights.is_quantised(tensor[index])
    assert torch.equal(tensor.T[2:5], whole.T[2:5])


def noted(kept: list[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    kept.append(tensor)
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_a_layer_computes_with_the_values_and_keeps_the_codes(tensor, dtype, biased):
    layer, plain = nn.Linear(76, 33, bias=biased).to(dtype), nn.Linear(76, 33, bias=biased).to(dtype)
    layer.weight = nn.Parameter(tensor.to(dtype), requires_grad=False)
    plain.weight = nn.Parameter(weights.dequantised(tensor, dtype), requires_grad=False)
    plain.bias = layer.bias
    assert type(layer) is nn.Linear and isinstance(layer.weight, nn.Parameter) and weights.is_quantised(layer.weight)
    for autocast in (False, True):
        x, kept = torch.randn(2, 5, 76, dtype=dtype, requires_grad=True), []
        same = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            with torch.autograd.graph.saved_tensors_hooks(partial(noted, kept), lambda t: t):
                out = layer(x)
            expected = F.linear(same, weights.dequantised(tensor, torch.bfloat16 if autocast else dtype), plain.bias)
        assert torch.equal(out, expected)
        assert any(weights.is_quantised(t) for t in kept)
        assert not any(t.numel() == tensor.numel() and not weights.is_quantised(t) for t in kept)
        out.sum().backward(), expected.sum().backward()
        assert torch.equal(x.grad, same.grad)
    with torch.inference_mode():
        assert torch.equal(layer(x), plain(x))


def test_a_layer_may_compute_in_another_type_than_its_input(tensor):
    x = torch.randn(4, 76, requires_grad=True)
    out = F.linear(x, tensor.to(torch.bfloat16))
    out.sum().backward()
    values = weights.dequantised(tensor, torch.bfloat16)
    assert out.dtype == x.grad.dtype == torch.float32
    assert torch.equal(out, (x.to(torch.bfloat16) @ values.T).float())


def test_everything_else_takes_the_values(tensor):
    W = weights.dequantised(tensor)
    x = torch.randn(33, 33)
    for f in (
        lambda w: w * 2, lambda w: w.T.contiguous(), lambda w: w.flatten(), lambda w: w.norm(dim=1), lambda w: torch.cat([w, w]), lambda w: w.split(4)[1],
        lambda w: w @ w.T, lambda w: x @ w, lambda w: torch.addmm(x, w, w.mT), lambda w: torch.linalg.matrix_norm(w.mT), lambda w: w.unflatten(1, (4, 19)),
        lambda w: torch.zeros(33, 76).copy_(w), lambda w: F.embedding(torch.tensor([1, 2]), w), lambda w: w.double(),
    ):  # fmt: skip
        assert torch.equal(f(tensor) + 0, f(W))


def test_it_stays_quantised_where_nothing_is_computed(tensor):
    layer = nn.Linear(76, 33)
    layer.weight = nn.Parameter(tensor, requires_grad=False)
    for moved in (tensor.detach(), tensor.clone(), tensor.T, tensor.T.T, tensor.to(torch.bfloat16), copy.deepcopy(layer).weight, copy.deepcopy(layer).to("meta").weight, copy.deepcopy(layer).half().weight):
        assert weights.is_quantised(moved)
    assert tensor.T.shape == (76, 33) and torch.equal(weights.dequantised(tensor.T), weights.dequantised(tensor).T)
    assert copy.deepcopy(layer).half().weight.dtype == torch.float16
    assert tensor.clone().codes.data_ptr() != tensor.codes.data_ptr() == tensor.detach().codes.data_ptr()
    assert weights.dequantised(tensor, torch.float64).dtype == torch.float64


def test_nothing_writes_to_it(tensor):
    before = weights.dequantised(tensor)
    for write in (
        lambda w: w.add_(1), lambda w: w.copy_(before), lambda w: w.zero_(), lambda w: w.__setitem__(0, 1.0), lambda w: torch.add(before, before, out=w),
        lambda w: w.T.mul_(2), lambda w: w.addmm_(torch.ones(33, 1), torch.ones(1, 76)), lambda w: weights.add_to_weight(w, before),
    ):  # fmt: skip
        with pytest.raises(DeltuneError, match="quantised_like"):
            write(tensor)
    assert torch.equal(weights.dequantised(tensor), before)


def test_new_values_are_stored_in_the_same_way(tensor):
    values = drawn(33, 76, seed=1)
    new = weights.quantised_like(tensor, values)
    assert (new.kind, new.block_size, new.nested, new.dtype) == (tensor.kind, tensor.block_size, tensor.nested, tensor.dtype)
    again = weights.quantise(values, tensor.kind, block_size=tensor.block_size, double=tensor.nested)
    assert all(torch.equal(new.parts()[name], part) for name, part in again.parts().items())
    turned = weights.quantised_like(tensor.T, values.T)
    assert turned.transposed and torch.equal(weights.dequantised(turned), weights.dequantised(new).T)
    assert torch.equal(weights.quantised_like(torch.zeros(33, 76, dtype=torch.bfloat16), values), values.to(torch.bfloat16))
    with pytest.raises(DeltuneError, match="shape"):
        weights.quantised_like(tensor, values[1:])


def test_sums_over_rows_need_no_more_than_some_rows(tensor):
    W = weights.dequantised(tensor, torch.float32)
    left, right = torch.randn(33, 4), torch.randn(4, 76)
    assert torch.equal(weights.float_view(tensor), W)
    assert torch.allclose(weights.row_squares(tensor), W.square().sum(1), rtol=1e-4)
    assert torch.allclose(weights.row_products(tensor, left, right), (W * (left @ right)).sum(1), atol=1e-4)


@pytest.mark.parametrize("kind", weights.KINDS)
def test_what_cannot_be_quantised_is_refused(kind):
    for value in (float("nan"), float("inf")):
        W = drawn(8, 64)
        W[3, 5] = value
        with pytest.raises(DeltuneError, match="not finite"):
            weights.quantise(W, kind)
    with pytest.raises(DeltuneError, match="only matrices"):
        weights.quantise(torch.ones(8), kind)
    with pytest.raises(DeltuneError, match="nf4, fp4, int8"):
        weights.quantise(torch.ones(8, 8), "nf5")
    if kind != "int8":
        with pytest.raises(DeltuneError, match="no block size"):
            weights.quantise(torch.ones(8, 8), kind, block_size=48)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", weights.KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_codes_and_values_are_those_of_the_cpu(functional, kind, dtype):
    W = drawn(256, 512, dtype=dtype)
    there, here = weights.quantise(W.cuda(), kind, double=False), weights.quantise(W, kind, double=False)
    assert all(torch.equal(part.cpu(), here.parts()[name]) for name, part in there.parts().items())
    assert torch.equal(weights.dequantised(here.to("cuda")).cpu(), weights.dequantised(here))
    x = torch.randn(8, 512, dtype=dtype, device="cuda", requires_grad=True)
    out = F.linear(x, here.to("cuda"))
    expected = F.linear(x.detach().cpu(), weights.dequantised(here))
    assert torch.allclose(out.cpu(), expected, rtol=2e-2, atol=2e-2)
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_on_a_gpu_bitsandbytes_reads_the_same_values(functional, kind):
    W = drawn(256, 512, dtype=torch.bfloat16).cuda()
    theirs, state = functional.quantize_4bit(W, blocksize=64, quant_type=kind)
    ours = weights.QuantisedTensor({"codes": theirs.view(-1), "scales": state.absmax}, kind, 64, (256, 512), torch.bfloat16)
    assert torch.equal(weights.dequantised(ours), functional.dequantize_4bit(theirs, state))
