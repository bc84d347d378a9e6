"""SHiRA and Super-Tuning, held to PEFT, and the product of a matrix that is given by its entries."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deltune.adapters.attach import attach, trainable
from deltune.adapters.config import named
from deltune.adapters.entries import Entries, by_magnitude, permuted, scattered
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.methods.sparse import structured
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.peft_twin import held_to_peft, save_peft, with_peft
from tests.test_adapters_methods import shaken
from tests.tiny import tiny_model

LLAMA = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("fields", [{}, {"random_seed": 5}], ids=str)
def test_shira_is_pefts(fields, tmp_path):
    held_to_peft(peft.ShiraConfig(r=4, target_modules=LLAMA, **fields), tmp_path)


@pytest.mark.parametrize("fields", [{}, {"select_top": False, "sparsity": 0.7}, {"r": 3}, {"r": 4, "lora_alpha": 6.0}], ids=str)
def test_super_tuning_is_pefts(fields, tmp_path):
    held_to_peft(peft.SupertuningConfig(target_modules=LLAMA, **({"sparsity": 0.9} | fields)), tmp_path)


def places(model):
    return {place: wrapper.adapters["default"].entries.flat() for place, wrapper in wrappers(model)}


def test_shira_with_a_seed_takes_pefts_entries():
    theirs = with_peft(tiny_model(), peft.ShiraConfig(r=4, target_modules=LLAMA, random_seed=7))
    for place, flat in places(attach(tiny_model(), named("shira", rank=4, targets=LLAMA, mask_seed=7))).items():
        rows, columns = theirs.get_submodule(f"base_model.model.{place}").shira_indices["default"].long()
        assert torch.equal(flat, rows * theirs.get_submodule(f"base_model.model.{place}").in_features + columns)


def test_without_a_seed_every_layer_has_entries_of_its_own():
    found = places(attach(tiny_model(), named("shira", rank=4, targets=["q_proj"])))
    assert not torch.equal(found["model.layers.0.self_attn.q_proj"], found["model.layers.1.self_attn.q_proj"])


@pytest.mark.parametrize("mask", ["random", "magnitude", "struct"])
def test_shira_is_values_at_as_many_entries_as_lora_has(mask, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 14)).double()
    shaken(attach(model, named("shira", targets=["0", "1"], rank=2, mask=mask, dtype="auto")))
    assert sum(p.numel() for p in trainable(model).values()) == 2 * (12 + 9) + 2 * (9 + 14)
    for _place, wrapper in wrappers(model):
        delta, W = wrapper.adapters["default"], wrapper.base_layer.weight
        n_out, n_in = W.shape
        expected = torch.zeros(n_out, n_in, dtype=torch.float64)
        chosen = []
        for value, row, column in zip(delta.values, *delta.entries.places.tolist(), strict=True):
            expected[row, column] = value
            chosen.append((row, column))
        assert len(set(chosen)) == len(chosen) == 2 * (n_out + n_in)
        assert (delta.delta(W) - expected).abs().max() < 1e-12
        x = torch.randn(3, n_in, dtype=torch.float64)
        assert (wrapper(x) - (x @ (W + expected).T + wrapper.base_layer.bias)).abs().max() < 1e-9
        rest = [(i, j) for i in range(n_out) for j in range(n_in) if (i, j) not in chosen]
        if mask == "magnitude":
            assert min(abs(W[i, j]) for i, j in chosen) >= max(abs(W[i, j]) for i, j in rest)
        if mask == "struct":
            assert all((i, i) in chosen for i in range(min(n_out, n_in)))
            off = {i for i, j in chosen if i != j}
            assert len(off) <= -(-(len(chosen) - min(n_out, n_in)) // (n_in - 1))  # whole rows, the last one in part
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["mask_type"] == mask
    torch.manual_seed(0)
    again = load_adapter(nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 14)).double(), tmp_path)
    assert [delta.config.mask for delta in (wrapper.adapters["default"] for _, wrapper in wrappers(again))] == [mask] * 2


@pytest.mark.parametrize(("n_out", "n_in", "count"), [(5, 5, 10), (4, 9, 26), (9, 4, 26), (6, 7, 42), (9, 2, 18), (3, 8, 11)])
def test_struct_gives_exactly_as_many_entries_as_it_should(n_out, n_in, count):
    found = structured(n_out, n_in, count).tolist()
    assert len(set(found)) == count and min(found) >= 0 and max(found) < n_out * n_in


@pytest.mark.parametrize("select", ["top", "bottom"])
def test_super_tuning_trains_the_entries_that_its_share_says(select):
    torch.manual_seed(0)
    model = attach(nn.Sequential(nn.Linear(20, 30)), named("supertuning", targets=["0"], sparsity=0.95, select=select, rank=3))
    layer = model[0].base_layer
    delta = model[0].adapters["default"]
    assert sum(p.numel() for p in trainable(model).values()) == 30 + 3 * (20 + 30)
    order = layer.weight.abs().flatten().argsort(descending=select == "top")
    assert set(delta.entries.flat().tolist()) == set(order[:30].tolist())
    assert delta.scale == 2.0


def test_super_tuning_with_a_pair_is_the_sum_of_both():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    shaken(attach(model, named("supertuning", targets=["0"], sparsity=0.8, rank=2, alpha=3.0, dtype="auto")))
    delta, W = model[0].adapters["default"], model[0].base_layer.weight
    expected = torch.einsum("or,ri->oi", delta.lora_B, delta.lora_A) * 3.0 / 2
    for value, row, column in zip(delta.values, *delta.entries.places.tolist(), strict=True):
        expected = expected.index_put((torch.tensor(row), torch.tensor(column)), value, accumulate=True)
    x = torch.randn(4, 6, dtype=torch.float64)
    assert (model(x) - (x @ (W + expected).T + model[0].base_layer.bias)).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("shira", {"rank": 20}, r"0: rank 20 means 1,000 entries, and this layer has 600; it can be at most 12"),
        ("shira", {"mask": "struct", "mask_seed": 1}, "mask_seed has no effect: mask is not random"),
        ("supertuning", {"sparsity": 0.999}, r"0: sparsity 0.999 leaves none of its 600 entries to train; it must be at most 0.998333"),
        ("supertuning", {"alpha": 2.0}, "alpha has no effect without a rank"),
    ],
)
def test_what_does_not_fit_is_refused(method, changes, message):
    with pytest.raises(AdapterError, match=message):
        attach(nn.Sequential(nn.Linear(20, 30)), named(method, targets=["0"], **changes))


def test_a_file_with_entries_outside_of_the_weight_is_refused(tmp_path):
    for method, leaf in (("shira", "shira_indices"), ("supertuning", "supertuning_indices")):
        model = attach(tiny_model(), named(method, targets=["q_proj"], **({"rank": 2} if method == "shira" else {})))
        save_adapter(model, tmp_path)
        (tmp_path / "deltune.json").unlink()
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        tensors[f"base_model.model.model.layers.0.self_attn.q_proj.{leaf}"].flatten()[0] = 5000
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match="entries outside of the layer's weight of 32×32"):
            load_adapter(tiny_model(), tmp_path)


def test_a_peft_file_without_its_entries_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="save_precomputed_indices"):
        config = peft.SupertuningConfig(target_modules=LLAMA, sparsity=0.9, save_precomputed_indices=False)
    save_peft(with_peft(tiny_model(), config), tmp_path)
    with pytest.raises(AdapterError, match="save_precomputed_indices is false: the file does not hold which entries"):
        load_adapter(tiny_model(), tmp_path)


# ---------------------------------------------------------------- entries


@pytest.mark.parametrize("count", [1, 5, 60])  # few enough for a sparse product, and not
def test_a_product_with_entries_is_the_dense_matrixs_with_all_its_gradients(count):
    entries = Entries(6, 10, count, torch.device("cpu"), persistent=True)
    entries.put(scattered(60, count, torch.Generator().manual_seed(0))[torch.randperm(count)])
    values = torch.randn(count, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    assert (entries(x, values) - x @ entries.dense(values).T).abs().max() < 1e-12
    assert torch.autograd.gradcheck(entries, (x, values))
    assert torch.autograd.gradcheck(entries.dense, (values,))


def test_short_types_and_autocast_take_the_sparse_product_too():
    entries = Entries.at(torch.tensor([3, 70, 99]), 10, 10, torch.device("cpu"))
    x, values = torch.randn(4, 10), torch.randn(3)
    exact = x @ entries.dense(values).T
    short = entries(x.bfloat16(), values)
    assert short.dtype == torch.bfloat16 and torch.allclose(short.float(), exact, atol=0.05)
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        entries(x, values.requires_grad_()).sum().backward()
    assert torch.allclose(x.grad, entries.dense(values).sum(0).expand(4, 10), atol=1e-5)


def test_off_the_cpu_few_entries_are_picked_and_many_are_not():
    for count in (5, 50):
        entries = Entries(10, 10, count, torch.device("meta"), persistent=True)
        assert entries(torch.empty(2, 3, 10, device="meta"), torch.empty(count, device="meta")).shape == (2, 3, 10)


def test_the_layout_follows_places_that_are_written_anew():
    entries = Entries(8, 8, 2, torch.device("cpu"), persistent=True)
    entries.put(torch.tensor([0, 9]))
    x, values = torch.eye(8), torch.tensor([1.0, 2.0])
    before = entries(x, values)
    entries.load_state_dict({"places": torch.tensor([[0, 3], [1, 3]], dtype=torch.int32)})
    after = entries(x, values)
    assert before[0, 0] == 1 and before[1, 1] == 2 and before.sum() == 3
    assert after[1, 0] == 1 and after[3, 3] == 2 and after.sum() == 3


def test_draws_are_distinct_in_range_and_pefts():
    for total, count in ((10, 10), (1000, 30), (50, 20), (100_000, 2_000), (50_000, 12_400)):
        found = scattered(total, count, torch.Generator().manual_seed(1))
        assert len(set(found.tolist())) == count and found.min() >= 0 and found.max() < total
    assert torch.equal(permuted(100, 7, 3), torch.randperm(100, generator=torch.Generator().manual_seed(3))[:7])


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("kind", ["normal", "equal", "few large"])
def test_the_largest_are_found_in_large_weights_too(kind, top):
    W = torch.randn(700, 500, generator=torch.Generator().manual_seed(0))
    if kind == "equal":
        W = W.sign()
    if kind == "few large":
        W = W * (torch.rand(700, 500, generator=torch.Generator().manual_seed(1)) < 0.01)
    for count in (1, 3500, 200_000):
        found = by_magnitude(W, count, top=top)
        assert len(found.unique()) == count
        expected = W.abs().flatten().topk(count, largest=top).values.sort().values
        assert torch.equal(W.abs().flatten()[found].sort().values, expected)
