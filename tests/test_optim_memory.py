"""Optimizers that take less memory: 8-bit codes and formulas against bitsandbytes, state to the bit on one process and two."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from deltune.adapters.schedules import forget
from deltune.errors import CheckpointError, ConfigError
from deltune.optim import blockwise
from deltune.optim.build import (
    KINDS,
    build_optimizer,
    described,
    load_optimizer_state,
    optimizer_state,
    state_bytes,
)
from deltune.optim.config import OPTIMIZERS, AdamW
from deltune.optim.groups import parameter_groups
from deltune.optim.kernels import Kernels
from deltune.optim.moments import CHUNK, Moments, Place
from deltune.settings import run_from
from deltune.weights.codes import dynamic_levels

CPU = torch.device("cpu")
NAMES = sorted(KINDS)


def config_of(name, **settings):
    return OPTIMIZERS.resolve(name)(**{"name": name, "lr": 1e-2, "weight_decay": 0.1, **settings})


def parameters(seed=0, dtype=torch.float32):
    """One whose moments are coded in blocks of which the last is short, one below 4,096 values, one that is no contiguous tensor."""
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randn(61, 71, generator=draw), torch.randn(5, 7, generator=draw), torch.randn(80, 60, generator=draw).T]
    return [torch.nn.Parameter(tensor.to(dtype)) for tensor in made]


def optimizer_of(made, config):
    return build_optimizer(parameter_groups([(f"p{i}", p) for i, p in enumerate(made)], config), config)


def take_steps(made, optimizer, num, seed=1):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(num):
        for p in made:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=draw) + 0.5)  # in the parameter's strides, as backward leaves it
        optimizer.step()


# -- codes


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_values_are_bitsandbytes_dynamic_map(signed):
    from bitsandbytes.functional import create_dynamic_map

    assert torch.equal(dynamic_levels(CPU, signed), create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("num", [1, 256, 257, 5000])
def test_values_and_codes_are_those_of_bitsandbytes(signed, num):
    import bitsandbytes.functional as bnb

    draw = torch.Generator().manual_seed(num)
    values = torch.randn(num, generator=draw) * torch.rand(num, generator=draw) ** 6
    values = values if signed else values**2
    codes, largest = blockwise.quantise(values, signed)
    table = bnb.create_dynamic_map(signed=signed)
    # in float64 its CPU kernel compares with each code value, as its CUDA kernel does; in float32 it looks up 2^16 bins
    nearest, magnitudes = torch.ops.bitsandbytes.quantize_blockwise(values.double(), table, 256)
    assert torch.equal(codes, nearest) and torch.equal(largest, magnitudes.float())
    looked_up, state = bnb.quantize_blockwise(values, code=table, blocksize=256)
    assert torch.equal(largest, state.absmax)
    apart = (table[looked_up.int()] - table[codes.int()]).abs()
    assert apart.max() <= 1.0 and (apart * (apart > 2**-14)).max() <= 2 * (table[1:] - table[:-1]).max()
    for chosen in (codes, looked_up):
        assert torch.equal(blockwise.dequantise(chosen, largest, signed), bnb.dequantize_blockwise(chosen, state))


@pytest.mark.parametrize("signed", [True, False])
def test_zeros_stay_zeros_and_the_largest_of_a_block_is_kept(signed):
    codes, largest = blockwise.quantise(torch.zeros(300), signed)
    assert not blockwise.dequantise(codes, largest, signed).any()
    values = torch.zeros(512)
    values[100], values[300] = 1e-30, 7.0
    back = blockwise.dequantise(*blockwise.quantise(values, signed), signed)
    assert torch.equal(back, values)


@pytest.mark.parametrize("signed", [True, False])
def test_each_border_between_two_levels_is_where_it_should_be(signed):
    levels = dynamic_levels(CPU, signed)
    borders = (levels[1:] + levels[:-1]) / 2
    for shift, code in ((-1.0, 0), (0.0, 0), (1.0, 1)):  # just below, on it, just above
        blocks = torch.zeros(255, blockwise.BLOCK)
        blocks[:, 0] = 1.0
        blocks[:, 1] = borders if not shift else torch.nextafter(borders, torch.tensor(shift * 9))
        codes, _ = blockwise.quantise(blocks.view(-1), signed)
        assert codes.view(255, -1)[:, 1].tolist() == [i + code for i in range(255)]


# -- formulas


def theirs(name, made, config):
    """bitsandbytes' own optimizer; its kernels for the CPU are torch's operations."""
    import bitsandbytes.optim as bnb

    groups = [{"params": [p], "weight_decay": config.weight_decay if p.ndim > 1 else 0.0} for p in made]
    cls = {("adamw", 8): bnb.AdamW8bit, ("adamw", 32): bnb.AdamW32bit, ("lion", 8): bnb.Lion8bit, ("lion", 32): bnb.Lion32bit}
    eps = {"eps": config.eps} if isinstance(config, AdamW) else {}
    return cls[KINDS[name].rule, KINDS[name].bits](groups, lr=config.lr, betas=(config.beta1, config.beta2), **eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["paged_adamw", "lion"])
def test_steps_with_float32_moments_are_bitsandbytes(name, dtype):
    ours, other, config = parameters(dtype=dtype), parameters(dtype=dtype), config_of(name, **({"eps": 1e-2} if "adamw" in name else {}))
    take_steps(ours, optimizer_of(ours, config), 6)
    take_steps(other, theirs(name, other, config), 6)
    for a, b in zip(ours, other, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=2e-6 if dtype == torch.float32 else 2e-2)
        assert ((a - b).abs() > 1e-5).float().mean() < 2e-3  # a sign, or a rounding, may tip over


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit"])
def test_a_step_in_8_bits_is_bitsandbytes_and_many_are_near_those_in_32(name):
    ours, other, config = parameters(), parameters(), config_of(name)
    take_steps(ours, optimizer_of(ours, config), 1)
    take_steps(other, theirs(name, other, config), 1)
    for a, b in zip(ours, other, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    coded, wide = parameters(), parameters()
    take_steps(coded, optimizer_of(coded, config), 20)
    take_steps(wide, optimizer_of(wide, config_of("paged_adamw" if "adamw" in name else "lion")), 20)
    moved = (wide[0] - parameters()[0]).norm()
    assert 0 < (coded[0] - wide[0]).norm() < 0.25 * moved
    assert torch.equal(coded[1], wide[1])  # below 4,096 values nothing is coded


def test_float32_moments_of_adamw_are_torchs():
    ours, other = parameters(), parameters()
    take_steps(ours, optimizer_of(ours, config_of("paged_adamw")), 6)
    take_steps(other, optimizer_of(other, config_of("adamw")), 6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, other, strict=True))


def test_a_parameter_of_several_chunks_is_updated_as_one_by_blocks():
    config, draw = config_of("adamw_8bit"), torch.Generator().manual_seed(3)
    values, gradient = torch.randn(2 * CHUNK + 300, generator=draw), torch.randn(2 * CHUNK + 300, generator=draw)
    whole = torch.nn.Parameter(values.clone())
    cut = CHUNK + 3 * blockwise.BLOCK  # not where a chunk ends
    parts = [torch.nn.Parameter(values[:cut].clone()), torch.nn.Parameter(values[cut:].clone())]
    one, two = optimizer_of([whole], config), optimizer_of(parts, config)
    for _ in range(2):
        whole.grad, parts[0].grad, parts[1].grad = gradient, gradient[:cut], gradient[cut:]
        one.step()
        two.step()
    assert torch.equal(whole.detach(), torch.cat([p.detach() for p in parts]))


# -- bitsandbytes' kernels, by way of those it has for the CPU


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_called_as_bitsandbytes_calls_them(name, monkeypatch):
    config = config_of(name)
    ours, other = parameters(), parameters()
    optimizer = optimizer_of(ours, config)
    optimizer.place = Kernels(paged=False)
    assert isinstance(optimizer, Moments)
    take_steps(ours, optimizer, 4)
    take_steps(other, theirs(name, other, config), 4)
    for a, b in zip(ours, other, strict=True):
        assert torch.equal(a, b)


def test_state_of_the_kernels_goes_on_in_plain_torch():
    config = config_of("adamw_8bit")
    first, second = parameters(), parameters()
    kernels = optimizer_of(first, config)
    kernels.place = Kernels(paged=False)
    take_steps(first, kernels, 2)
    plain = optimizer_of(second, config)
    load_optimizer_state(plain, *optimizer_state(kernels))
    for a, b in zip(first, second, strict=True):
        before, after = kernels.state[a], plain.state[b]
        assert before.keys() == after.keys() and before["step"] == after["step"] == 2
        assert all(torch.equal(before[key], after[key]) for key in before if key != "step")


# -- state


@pytest.mark.parametrize("name", NAMES)
def test_state_comes_back_to_the_bit_and_takes_the_bytes_that_were_foretold(name):
    straight, resumed, config = parameters(), parameters(), config_of(name)
    optimizer = optimizer_of(straight, config)
    take_steps(straight, optimizer, 3)
    tensors, description = optimizer_state(optimizer)
    held = sum(t.nbytes for t in tensors.values())
    assert held == state_bytes(straight, config)
    bits = KINDS[name].bits
    moments = 2 if "adamw" in name else 1
    assert held == moments * (4 * 35 + (4 * (4331 + 4800) if bits == 32 else 4331 + 4800 + 4 * (17 + 19)))
    other = optimizer_of(resumed, config)
    with torch.no_grad():
        for a, b in zip(resumed, straight, strict=True):
            a.copy_(b)
    kept = {key: t.clone() for key, t in tensors.items()}
    load_optimizer_state(other, kept, json.loads(json.dumps(description)))
    take_steps(straight, optimizer, 2, seed=9)
    take_steps(resumed, other, 2, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert not any(torch.equal(kept[key], t) for key, t in optimizer_state(other)[0].items() if "moment" in key)  # no memory in common


@pytest.mark.parametrize(("damage", "message"), [
    (lambda t, d: t.update({"p0|moment1": torch.zeros(61, 71)}), r"float32 for p0\|moment1, this run keeps \(61, 71\) torch.uint8"),
    (lambda t, d: t.update({"p0|largest1": torch.zeros(16)}), r"\(16,\) torch.float32 for p0\|largest1, this run keeps \(17,\)"),
    (lambda t, d: (t.pop("p0|largest2"), d["entries"]["p0"].remove("largest2")), r"remembers largest1, moment1, moment2, step of p0, this run keeps"),
    (lambda t, d: d.update({"optimizer": "adamw, 32 bits"}), "is of adamw, 32 bits, this run uses adamw, 8 bits"),
], ids=["type", "shape", "entries", "optimizer"])  # fmt: skip
def test_state_of_other_blocks_is_refused(damage, message):
    made, config = parameters(), config_of("adamw_8bit")
    optimizer = optimizer_of(made, config)
    take_steps(made, optimizer, 1)
    tensors, description = optimizer_state(optimizer)
    damage(tensors, description)
    other = optimizer_of(made, config)
    with pytest.raises(CheckpointError, match=message):
        load_optimizer_state(other, tensors, description)
    assert not other.state


def test_a_paged_run_goes_on_without_pages():
    made = parameters()
    paged = optimizer_of(made, config_of("paged_adamw_8bit"))
    take_steps(made, paged, 1)
    load_optimizer_state(optimizer_of(made, config_of("adamw_8bit")), *optimizer_state(paged))


def test_a_merge_that_forgets_sets_coded_moments_to_zero():
    made, config = parameters(), run_from(["adapter.schedule=relora", "optim=adamw_8bit"]).adapter.schedule
    optimizer = optimizer_of(made, config_of("adamw_8bit"))
    take_steps(made, optimizer, 2)
    forget(optimizer, made[:1], config, torch.Generator())
    for p, gone in zip(made, (True, False, False), strict=True):
        state = optimizer.state[p]
        for i, signed in ((1, True), (2, False)):
            moment = state[f"moment{i}"].flatten()
            values = blockwise.dequantise(moment, state[f"largest{i}"], signed) if moment.dtype == torch.uint8 else moment
            assert bool(values.any()) is not gone


# -- what is said


def test_what_computes_and_where_is_said_once(caplog):
    with caplog.at_level(logging.INFO, logger="deltune"):
        made = parameters()
        optimizer = optimizer_of(made, config_of("paged_adamw_8bit"))
        take_steps(made, optimizer, 3)
    assert type(optimizer.place) is Place
    (line,) = [r.getMessage() for r in caplog.records if "paged_adamw_8bit" in r.getMessage()]
    assert "computed in plain torch: bitsandbytes' kernels want CUDA, and this is cpu; not paged" in line
    assert described(config_of("adamw"), CPU) == ""


def test_names_of_other_tools_are_answered_with_ours():
    for theirs_, ours in {"paged_adamw_32bit": "paged_adamw", "adamw_bnb_8bit": "adamw_8bit", "adamw_torch_fused": "adamw", "lion_32bit": "lion"}.items():
        with pytest.raises(ConfigError, match=f"optim.name={theirs_}.*{theirs_} of other tools is {ours} here"):
            run_from([f"optim={theirs_}"])


@pytest.mark.parametrize("moments", ["random", "magnitude"])
def test_a_share_of_coded_moments_cannot_be_forgotten(moments):
    words = ["adapter.schedule=relora", f"adapter.schedule.moments={moments}"]
    run_from([*words, "optim=paged_adamw"])
    with pytest.raises(ConfigError, match=rf"adapter.schedule.moments={moments}.*optim.name=adamw_8bit holds moments in codes"):
        run_from([*words, "optim=adamw_8bit"])
