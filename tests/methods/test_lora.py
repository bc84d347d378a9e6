"""LoRA and what is made of it, held to PEFT and to the papers' formulas."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from deltune.adapters.attach import attach, merge_in_place, switch, trainable, unmerge
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.methods.lora import LoraConfig
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.peft_twin import held_to_peft, ids, read_peft, save_peft
from tests.test_adapters_methods import deltas_of, shaken
from tests.test_adapters_peft import tiny_gpt2
from tests.tiny import tiny_model

LLAMA = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
        {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "gaussian"},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    ],
    ids=str,
)  # fmt: skip
def test_lora_is_pefts(fields, tmp_path):
    held_to_peft(peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": LLAMA} | fields)), tmp_path)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=str)
def test_gpt2s_transposed_layers_are_pefts(fields, tmp_path):
    held_to_peft(peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **fields), tmp_path, make=tiny_gpt2)


# -- starts that PEFT takes out of the base

THEIRS = {
    "pissa": (tiny_model, dict(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=LLAMA)),
    "pissa-dora": (tiny_model, dict(r=4, lora_alpha=8, init_lora_weights="pissa", target_modules=LLAMA, use_dora=True)),
    "pissa-rslora": (tiny_model, dict(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=LLAMA, use_rslora=True)),
    "pissa-patterns": (tiny_model, dict(r=4, init_lora_weights="pissa", target_modules=LLAMA, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})),
    "pissa-embedding": (tiny_model, dict(r=4, init_lora_weights="pissa", target_modules=["embed_tokens", "q_proj"])),
    "pissa-gpt2": (tiny_gpt2, dict(r=4, init_lora_weights="pissa", target_modules=["c_attn"], fan_in_fan_out=True)),
    "olora": (tiny_model, dict(r=4, lora_alpha=4, init_lora_weights="olora", target_modules=LLAMA)),
}  # fmt: skip


def theirs_of(case, tmp_path):
    """PEFT's model after a start of its own, moved off it; its files lie in the folder."""
    make, fields = THEIRS[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(make(), peft.LoraConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_peft(wrapped, tmp_path)
    return make, wrapped


@pytest.mark.parametrize("case", sorted(THEIRS))
def test_a_pissa_or_olora_file_of_pefts_is_read_onto_the_unchanged_base(case, tmp_path):
    make, theirs = theirs_of(case, tmp_path / "theirs")
    base = make()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    ours = load_adapter(base, tmp_path / "theirs", trainable=True)
    x = ids(ours)
    assert (ours(x).logits - theirs(x).logits).abs().max() < 2e-5
    assert (ours(x).logits - make()(x).logits).abs().max() > 1e-3
    for _, wrapper in wrappers(ours):
        assert torch.equal(wrapper.base_layer.weight, before[f"{wrapper.site.name}.weight"])
    for name, parameter in trainable(ours).items():  # what is trained is what PEFT trains
        if name.endswith("lora_A"):
            assert parameter.shape[0] == (2 if "patterns" in case and "q_proj" in name else 4)
    save_adapter(ours, tmp_path / "ours")
    assert torch.equal(load_adapter(make(), tmp_path / "ours")(x).logits, ours(x).logits)
    assert (read_peft(make(), tmp_path / "ours")(x).logits - ours(x).logits).abs().max() < 2e-5


def test_pefts_mica_trains_a_alone(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LLAMA, init_lora_weights="mica")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(tiny_model(), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_A" in name:
                parameter.add_(0.1)
    save_peft(wrapped, tmp_path)
    ours = load_adapter(tiny_model(), tmp_path, trainable=True)
    assert {name.rpartition(".")[2] for name in trainable(ours)} == {"lora_A"}
    assert {name for name, p in wrapped.named_parameters() if p.requires_grad and "lora_B" in name} == set()
    assert (ours(ids(ours)).logits - wrapped(ids(ours)).logits).abs().max() < 1e-5


# -- the file of a start that is taken out is a plain LoRA of twice the rank


@pytest.mark.parametrize("name", ["pissa", "milora", "olora", "loftq", "dude", "nzlora"])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_a_start_that_is_taken_out_is_saved_as_a_lora_of_twice_the_rank(name, scaling, tmp_path):
    more = {"residual": True} if name == "nzlora" else {}
    config = named(name, rank=3, alpha=5, scaling=scaling, targets=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}, alpha_pattern={"down_proj": 7}, **more)
    ours = shaken(attach(tiny_model(), config))
    x = ids(ours)
    save_adapter(ours, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["r"], fields["rank_pattern"], fields["init_lora_weights"]) == (6, {"down_proj": 4}, True)
    times = 2 if scaling == "standard" else 2**0.5
    assert fields["lora_alpha"] == pytest.approx(5 * times) and fields["alpha_pattern"]["down_proj"] == pytest.approx(7 * times)
    back = load_adapter(tiny_model(), tmp_path, trainable=True)
    assert torch.equal(back(x).logits, ours(x).logits)
    assert trainable(back).keys() == trainable(ours).keys() and deltas_of(back).popitem()[1].config.init == config.init
    assert (read_peft(tiny_model(), tmp_path)(x).logits - ours(x).logits).abs().max() < 1e-4
    (tmp_path / "deltune.json").unlink()  # all that another program has
    plain = load_adapter(tiny_model(), tmp_path)
    assert (plain(x).logits - ours(x).logits).abs().max() < 1e-4
    assert deltas_of(plain).popitem()[1].config.init == "kaiming"


# -- one factor alone


@pytest.mark.parametrize("train", ["A", "B"])
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal", "nonzero", "pissa", "milora", "olora", "loftq"])
@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_one_factor_alone_is_trained_and_learns(train, init, target, tmp_path):
    model = attach(tiny_model(), LoraConfig(rank=4, train=train, init=init, targets=[target]))
    names = trainable(model)
    assert {name.rpartition(".")[2] for name in names} == {f"lora_{train}"}
    model(ids(model)).logits.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in names.values())
    save_adapter(model, tmp_path)
    assert trainable(load_adapter(tiny_model(), tmp_path, trainable=True)).keys() == names.keys()


def test_what_a_start_cannot_do_is_refused_with_its_reason():
    for fields, words in (
        ({"init": "mica", "train": "B"}, "nothing would be learned"),
        ({"svd": "full"}, "svd has no effect with init=kaiming"),
        ({"part": "mid", "init": "pissa"}, "part has no effect with init=pissa: it belongs to init=milora"),
        ({"init": "milora", "part": "mid", "svd": "full"}, "full decomposition anyway"),
        ({"gamma": 2.0}, "gamma has no effect"),
        ({"residual": True, "init": "pissa"}, "residual has no effect"),
        ({"loftq_iterations": 2}, "loftq_iterations has no effect"),
        ({"init": "orthogonal", "rank": 5}, "q_proj: init=orthogonal needs an even rank, and it is 5; 6 fits"),
        ({"init": "pissa", "rank": 1000}, r"q_proj: init=pissa gives a rank of at most min\(in, out\) = \d+, and rank is 1000"),
    ):
        with pytest.raises(AdapterError, match=words):
            attach(tiny_model(), LoraConfig(targets=["q_proj"], **fields))


# -- counts


def test_parameter_counts_are_the_papers():
    """LoRA r·(in + out); LoRA-FA r·out; MiCA r·in; DoRA r·(in + out) + out. A start taken out trains no more."""
    n_in, n_out, r = 12, 20, 4
    pairs = {"lora": r * (n_in + n_out), "pissa": r * (n_in + n_out), "loftq": r * (n_in + n_out), "lora_fa": r * n_out, "mica": r * n_in, "dora": r * (n_in + n_out) + n_out, "dude": r * (n_in + n_out) + n_out}
    for name, count in pairs.items():
        model = attach(nn.Sequential(nn.Linear(n_in, n_out)), named(name, rank=r))
        assert sum(p.numel() for p in trainable(model).values()) == count, name


# -- DoRA


def dora_layer(bias=True, dtype=torch.float64, kind=nn.Linear, **fields):
    torch.manual_seed(0)
    model = nn.Sequential(kind(7, 5, bias=bias) if kind is nn.Linear else kind(7, 5)).to(dtype)
    return shaken(attach(model, named("dora", rank=2, dtype="auto", targets=["0"], **fields)))


@pytest.mark.parametrize("bias", [True, False])
def test_dora_is_the_papers_formula_and_its_gradient_with_the_norm_fixed(bias):
    """W' = diag(m / c)(W + sBA) with c = ‖W + sBA‖ of each row, written with loops; its gradient by finite differences of
    the same formula in which c stays what it was."""
    model = dora_layer(bias)
    layer = model[0].base_layer
    delta = deltas_of(model)["0"]
    W, b = layer.weight.detach(), layer.bias.detach() if bias else None
    A, B, m = delta.inner.lora_A, delta.inner.lora_B, delta.magnitude
    s = delta.inner.scale
    x = torch.randn(3, 7, dtype=torch.float64)

    def changed(A, B):
        return [[float(W[i, j]) + s * sum(B[i, k] * A[k, j] for k in range(2)) for j in range(7)] for i in range(5)]

    fixed = [sum(float(v) ** 2 for v in row) ** 0.5 for row in changed(A.detach(), B.detach())]

    def answer(x, A, B, m):
        whole = torch.stack([torch.stack([m[i] / fixed[i] * v for v in row]) for i, row in enumerate(changed(A, B))])
        return linear(x, whole, b)

    assert torch.allclose(model(x), answer(x, A, B, m), atol=1e-12)
    inputs = [t.detach().clone().requires_grad_() for t in (x, A, B, m)]
    weight = torch.randn(3, 5, dtype=torch.float64)

    def numeric(which):
        gradient = torch.zeros_like(inputs[which])
        for place in range(gradient.numel()):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [t.detach().clone() for t in inputs]
                moved[which].view(-1)[place] += step
                ends.append((answer(*moved) * weight).sum())
            gradient.view(-1)[place] = (ends[0] - ends[1]) / 2e-6
        return gradient

    given = x.clone().requires_grad_()
    (model(given) * weight).sum().backward()
    for which, found in enumerate((given.grad, A.grad, B.grad, m.grad)):
        assert torch.allclose(found, numeric(which), atol=1e-7), which


@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_doras_norms_are_right_after_the_base_has_moved_and_over_another_adapter(kind):
    model = dora_layer(kind=kind)
    x = torch.randn(3, 7, dtype=torch.float64) if kind is nn.Linear else torch.tensor([0, 3, 6])
    delta = deltas_of(model)["0"]

    def expected(W):
        whole = W + delta.inner.delta(None)
        whole = (delta.magnitude / whole.norm(dim=1)).unsqueeze(1) * whole
        return linear(x, whole, model[0].base_layer.bias) if kind is nn.Linear else whole.T[x]

    def W():
        weight = model[0].base_layer.weight.detach()
        return weight if kind is nn.Linear else weight.T

    assert torch.allclose(model(x), expected(W()), atol=1e-12)
    with torch.no_grad():
        model[0].base_layer.weight.mul_(1.5)  # in place
    assert torch.allclose(model(x), expected(W()), atol=1e-12)
    model[0].base_layer.weight = nn.Parameter(torch.randn_like(model[0].base_layer.weight), requires_grad=False)
    assert torch.allclose(model(x), expected(W()), atol=1e-12)
    shaken(attach(model, named("lora", rank=2, dtype="auto", targets=["0"]), name="below"), names=["below"], seed=3)
    switch(model, ["below", "default"])
    below = deltas_of(model, "below")["0"]
    assert torch.allclose(model(x), expected(W() + below.delta(None)), atol=1e-12)
    model.eval()
    for round_ in range(3):  # weights are freed and made anew, perhaps at one address
        with torch.no_grad():
            below.lora_B.add_(round_)
        merge_in_place(model, "below")
        assert torch.allclose(model(x), expected(W()), atol=1e-12)
        unmerge(model)
        with torch.no_grad():
            delta.inner.lora_A.mul_(1.1)
        assert torch.allclose(model(x), expected(W() + below.delta(None)), atol=1e-12)
    switch(model, "default")
    assert torch.allclose(model(x), expected(W()), atol=1e-12)


def test_a_row_of_zeros_stays_finite_under_dora():
    model = nn.Sequential(nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[1] = 0
    x = torch.randn(2, 6)
    before = model(x)
    attach(model, named("dora", rank=2))
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in trainable(model).values())
