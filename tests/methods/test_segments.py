"""AdaMSS and GLoRA, held to PEFT and to their formulas."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deltune.adapters.attach import attach, merge, trainable
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.methods.segments import clusters
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.peft_twin import held_to_peft, ids, our_gradients, read_peft, save_peft, their_gradients, with_peft
from tests.tiny import tiny_model

LLAMA = ["q_proj", "v_proj", "down_proj"]


def with_biases():
    """A Llama whose linear layers have biases that are not zero."""
    model = tiny_model(attention_bias=True, mlp_bias=True)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.3, generator=generator)
    return model


def layer(n_in=9, n_out=6, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_in, n_out, bias=bias)).double()


def shaken(model, size=0.3):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def adapted(method, model=None, **fields):
    """A shaken adapter on one layer, the layer's W and b, and the delta."""
    model = layer() if model is None else model
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone() if model[0].bias is not None else 0.0
    attach(model, named(method, dtype="auto", **fields))
    shaken(model)
    return model, W, b, model[0].adapters["default"]


def agrees(model, W, b):
    """The adapted model, and the merged one, are this plain layer."""
    x = torch.randn(3, W.shape[1], dtype=torch.float64)
    assert (model(x) - x @ W.T - b).abs().max() < 1e-9
    assert (merge(model)(x) - x @ W.T - b).abs().max() < 1e-9


def num_trained(model):
    return sum(parameter.numel() for parameter in trainable(model).values())


# ---------------------------------------------------------------- AdaMSS


@pytest.mark.parametrize("fields", [{"r": 8}, {"r": 6, "num_subspaces": 3, "subspace_rank": 2}, {"r": 8, "use_dynamic_rank": True, "subspace_rank": 4, "svd_threshold": 0.5, "use_asa": True}], ids=str)
@pytest.mark.parametrize("make", [tiny_model, with_biases])
def test_adamss_is_pefts(fields, make, tmp_path):
    pytest.importorskip("sklearn", reason="PEFT clusters with scikit-learn")
    # r well below out: rows of a square orthogonal U are all equally far from each other, and rounding alone decides
    config = peft.AdamssConfig(target_modules=LLAMA, **fields)
    ours = held_to_peft(config, tmp_path, make=make, ours_alone=("adamss_rows",), gradients=False)

    theirs = with_peft(make().double(), config)
    ours = load_adapter(make().double(), tmp_path / "theirs", trainable=True)
    x = ids(ours)
    theirs(x).logits.square().mean().backward()
    ours(x).logits.square().mean().backward()
    expected, found = their_gradients(theirs), our_gradients(ours)
    assert not found, "the file holds no tensor as it is kept here"
    for key, gradient in expected.items():
        place, _, leaf = key.removeprefix("base_model.model.").rpartition(".adamss_")
        delta, (which, i) = ours.get_submodule(place).adapters["default"], leaf.split(".")
        rank = int(delta.adamss_ranks[int(i)])
        mine = delta.adamss_A.grad[int(i), :rank] if which == "A" else delta.adamss_B.grad[delta.adamss_rows == int(i), :rank]
        assert (mine - gradient).abs().max() < 1e-9


def test_the_clusters_are_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    for n, d, count in ((40, 7, 5), (300, 30, 8), (6, 3, 6)):
        rows = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
        theirs = cluster.KMeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=123456789)
        assert clusters(rows, count).tolist() == theirs.fit_predict(rows.numpy()).tolist()


def test_rows_fall_into_the_clusters_that_are_there_and_none_is_empty():
    generator = torch.Generator().manual_seed(1)  # from some draws Lloyd's stops with one of them cut in two
    centres = 10 * torch.randn(3, 4, generator=generator)
    rows = centres.repeat_interleave(5, dim=0) + 0.1 * torch.randn(15, 4, generator=generator)
    found = clusters(rows, 3)
    assert sorted(found.bincount().tolist()) == [5, 5, 5] and all(len(set(part.tolist())) == 1 for part in found.split(5))
    assert torch.equal(found, clusters(rows, 3))
    same = torch.ones(6, 2)  # every row equal: two clusters would get none
    assert clusters(same, 3).max() < 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rho", [1, 2])
def test_adamss_changes_rows_by_cluster_and_the_bias_by_its_last_column(bias, rho):
    K, r = 3, 4
    model, W, b, delta = adapted("adamss", layer(bias=bias), rank=r, num_subspaces=K, subspace_rank=rho)
    assert num_trained(model) == K * rho * r + 6 * rho  # A_i ρ×r, and of the B_i together a row for each output
    wide = torch.cat([W, b.unsqueeze(1)], dim=1) if bias else W
    V = delta.adamss_newB
    assert V.shape == (r, wide.shape[1]) and (V @ V.T - torch.eye(r)).abs().max() < 1e-5
    change = torch.zeros_like(wide)
    for i in range(K):
        rows = (delta.adamss_rows == i).nonzero().flatten().tolist()
        rank = int(delta.adamss_ranks[i])
        assert rank == min(len(rows), rho)
        A, B = delta.adamss_A.detach()[i, :rank], delta.adamss_B.detach()[rows, :rank]
        for place, row in enumerate(rows):
            for k in range(rank):
                change[row] += B[place, k] * (A[k] @ V)
    agrees(model, W + change[:, :9], b + change[:, 9] if bias else b)


def test_adamss_starts_from_orthonormal_directions_of_each_cluster_and_changes_nothing():
    model = layer()
    x = torch.randn(4, 9, dtype=torch.float64)
    before = model(x)
    attach(model, named("adamss", rank=5, num_subspaces=2, subspace_rank=2, dtype="auto"))
    assert torch.equal(model(x), before)
    delta = model[0].adapters["default"]
    U, _ = delta.taken_apart(torch.cat([model[0].weight, model[0].bias.unsqueeze(1)], dim=1).detach())
    for i in range(2):
        rank = int(delta.adamss_ranks[i])
        A, mine = delta.adamss_A.detach()[i, :rank].float(), U[delta.adamss_rows == i]
        assert (A @ A.T - torch.eye(rank)).abs().max() < 1e-5
        best = torch.linalg.svdvals(mine)[:rank].square().sum()
        assert abs(float((mine @ A.T).square().sum() - best)) < 1e-4


@pytest.mark.parametrize("fields", [{}, {"dynamic": 0.5}, {"dynamic": 0.02}], ids=str)
def test_adamss_starts_where_pefts_does(fields):
    pytest.importorskip("sklearn", reason="PEFT clusters with scikit-learn")
    dynamic = {"use_dynamic_rank": True, "svd_threshold": fields["dynamic"]} if fields else {}
    theirs = with_peft(with_biases(), peft.AdamssConfig(r=8, num_subspaces=3, subspace_rank=4, target_modules=LLAMA, **dynamic), shake=0)
    ours = {"dynamic_rank": True, "threshold": fields["dynamic"]} if fields else {}
    model = attach(with_biases(), named("adamss", rank=8, num_subspaces=3, subspace_rank=4, targets=LLAMA, **ours))
    ranks = set()
    for place, wrapper in wrappers(model):
        delta, base = wrapper.adapters["default"], wrapper.base_layer
        mine, (U, _) = delta.to_file(), delta.taken_apart(torch.cat([base.weight, base.bias.unsqueeze(1)], dim=1).detach())
        for i, other in enumerate(theirs.get_submodule(f"base_model.model.{place}").adamss_A["default"]):
            A, rows = mine[f"adamss_A.{i}"], U[delta.adamss_rows == i]
            assert A.shape == other.shape
            ranks.add(len(A))
            # what the cluster's rows span most: exactly here, and from a random sample of as many columns there
            best, found = (float((rows @ basis.T).square().sum()) for basis in (A, other.detach()))
            assert found - 1e-5 <= best <= 1.15 * found
    assert len(ranks) > 1 and max(ranks) <= 4


def test_an_adamss_file_is_read_by_its_clusters_and_a_broken_one_is_refused(tmp_path, monkeypatch):
    def model():
        return layer(bias=False).float()

    adapted_model = shaken(attach(model(), named("adamss", rank=4, num_subspaces=3)))
    save_adapter(adapted_model, tmp_path)
    monkeypatch.setattr("deltune.adapters.methods.segments.clusters", lambda *a: pytest.fail("the rows were clustered again"))
    x = torch.randn(2, 9)
    assert torch.equal(load_adapter(model(), tmp_path)(x), adapted_model(x))
    (tmp_path / "deltune.json").unlink()
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.0.adamss_rows"
    for wrong in (torch.full_like(tensors[key], 3), tensors[key][:4].clone(), tensors[key].float()):
        save_file(tensors | {key: wrong}, path)
        with pytest.raises(AdapterError, match="does not give a cluster below 3 for each of 6 rows"):
            load_adapter(model(), tmp_path)


def test_magnitude_does_not_go_around_what_changes_the_bias():
    with pytest.raises(AdapterError, match="magnitude cannot go around adamss, which changes the bias too"):
        attach(layer(), named("adamss", magnitude=True))


# ---------------------------------------------------------------- GLoRA

FORMS = [
    {},
    {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
]


@pytest.mark.parametrize("fields", FORMS, ids=str)
@pytest.mark.parametrize("make", [tiny_model, with_biases])
def test_glora_is_pefts(fields, make, tmp_path):
    held_to_peft(peft.GloraConfig(r=3, target_modules=LLAMA, **fields), tmp_path, make=make)


@pytest.mark.parametrize("form_ab", ["lora", "vector", "constant", "none"])
@pytest.mark.parametrize("form_c", ["lora", "vector", "none"])
@pytest.mark.parametrize("form_de", ["vector", "constant", "none"])
def test_glora_has_a_factor_and_a_sum_for_weight_and_bias(form_ab, form_c, form_de):
    out, n_in, r = 6, 9, 2
    if (form_ab, form_c, form_de) == ("none", "none", "none"):
        with pytest.raises(AdapterError, match="nothing would be trained"):
            attach(layer(), named("glora", form_ab="none", form_c="none", form_de="none"))
        return
    fields = {"rank": r} if "lora" in (form_ab, form_c) else {}
    model, W, b, delta = adapted("glora", **fields, form_ab=form_ab, form_c=form_c, form_de=form_de)
    count = 2 * {"lora": r * (out + n_in), "vector": out, "constant": 1, "none": 0}[form_ab]
    count += {"lora": r * (n_in + 1), "vector": n_in, "none": 0}[form_c] + 2 * {"vector": out, "constant": 1, "none": 0}[form_de]
    assert num_trained(model) == count
    own = {name: parameter.detach() for name, parameter in delta.named_parameters()}
    assert len(own) == len(delta.state_dict()), "a path that is not there holds nothing"

    def entry(path, row, column=0):
        if f"{path}_Xd" in own:
            return sum(float(own[f"{path}_Xd"][row, k] * own[f"{path}_Xu"][k, column]) for k in range(r))
        if f"{path}_X" not in own:
            return 0.0
        flat = own[f"{path}_X"].flatten()
        return float(flat[row if flat.numel() > 1 else 0])

    new_W, new_b = W.clone(), b.clone()
    for o in range(out):
        for i in range(n_in):
            new_W[o, i] = W[o, i] + W[o, i] * entry("A", o, i) + entry("B", o, i)
        new_b[o] = b[o] + b[o] * entry("D", o) + entry("E", o) + sum(float(W[o, i]) * entry("C", i) for i in range(n_in))
    agrees(model, new_W, new_b)


def test_glora_without_a_form_for_the_weight_is_pefts_and_its_zeros_are_passed_over(tmp_path):
    """PEFT saves a matrix of zeros as large as W for each path that is not there."""
    config = peft.GloraConfig(r=3, config_A_B="none", target_modules=LLAMA)
    theirs = with_peft(with_biases().double(), config)
    save_peft(theirs, tmp_path / "theirs")
    ours = load_adapter(with_biases().double(), tmp_path / "theirs")
    x = ids(ours)
    assert (ours(x).logits - theirs(x).logits).abs().max() < 1e-9
    save_adapter(ours, tmp_path / "ours")
    assert not [key for key in load_file(tmp_path / "ours" / "adapter_model.safetensors") if "zeros" in key]
    with pytest.raises(UserWarning, match=r"glora_A\.default\.zeros"):  # which PEFT makes itself, and says so
        read_peft(with_biases().double(), tmp_path / "ours")
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("glora_A.zeros"))
    save_file(tensors | {key: torch.ones_like(tensors[key])}, path)
    with pytest.raises(AdapterError, match=r"glora_A\.zeros"):
        load_adapter(with_biases().double(), tmp_path / "theirs")


def test_zeros_of_the_bias_that_are_not_zero_are_refused(tmp_path):
    folder = save_peft(with_peft(tiny_model(), peft.GloraConfig(r=3, target_modules=LLAMA)), tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("glora_E.zeros"))
    save_file(tensors | {key: torch.ones_like(tensors[key])}, path)
    with pytest.raises(AdapterError, match=r"glora_E\.zeros is not zero"):
        load_adapter(tiny_model(), folder)


def test_glora_needs_the_weight_only_where_a_path_has_its_shape(monkeypatch):
    from deltune.adapters.adapted import Below

    def refused(self):
        pytest.fail("W was read in a forward pass")

    for form_ab in ("vector", "constant"):
        model, *_ = adapted("glora", form_ab=form_ab, form_c="none")
        with monkeypatch.context() as patch:
            patch.setattr(Below, "weight", refused)
            patch.setattr(Below, "stored", refused)
            model(torch.randn(2, 9, dtype=torch.float64))


def test_the_fields_of_a_file_are_pefts(tmp_path):
    save_adapter(attach(layer().float(), named("glora", rank=2)), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["peft_type"] == "GLORA" and fields["config_A_B"] == "lora" and "layers_pattern" not in fields
