"""Deltune held to PEFT: the same function, gradients and merged weights, and each reads the other's files."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from deltune.adapters.attach import adapters, attach, detach, disabled, merge, trainable
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.methods.lora import LoraConfig
from deltune.errors import AdapterError
from tests import peft_twin as twin
from tests.peft_twin import ids, read_peft, save_peft
from tests.tiny import tiny_model

LLAMA = ["q_proj", "v_proj", "down_proj"]
GPT2 = ["c_attn", "c_fc"]


def tiny_gpt2(seed=0, tied=True):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def with_peft(model, **fields):
    """PEFT's LoRA with these fields, moved off its start."""
    return twin.with_peft(model, peft.LoraConfig(**fields))


CASES = {
    "llama": (tiny_model, dict(r=4, lora_alpha=8, target_modules=LLAMA)),
    "llama-rslora": (tiny_model, dict(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear")),
    "llama-patterns": (
        tiny_model,
        dict(r=4, lora_alpha=8, target_modules=LLAMA, rank_pattern={"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3}, alpha_pattern={"1.self_attn.v_proj": 5}),
    ),
    "llama-regex": (tiny_model, dict(r=2, target_modules=r".*layers\.\d+\.mlp\.(up|gate)_proj")),
    "llama-layers": (tiny_model, dict(r=2, target_modules=["o_proj"], layers_to_transform=[1])),
    "llama-layers-pattern": (tiny_model, dict(r=2, target_modules=["o_proj"], layers_to_transform=0, layers_pattern="layers")),
    "llama-exclude": (tiny_model, dict(r=2, target_modules=LLAMA, exclude_modules=["layers.0.self_attn.q_proj"])),
    "llama-exclude-regex": (tiny_model, dict(r=2, target_modules=LLAMA, exclude_modules=r".*layers\.1\..*")),
    "llama-saved-head": (tiny_model, dict(r=2, target_modules=LLAMA, modules_to_save=["lm_head"])),
    "llama-embedding": (tiny_model, dict(r=2, target_modules=["embed_tokens", "q_proj"])),
    "llama-tied-embedding": (lambda: tiny_model(tie_word_embeddings=True), dict(r=2, target_modules=["embed_tokens"])),
    "llama-head": (tiny_model, dict(r=2, target_modules=["lm_head"])),
    "gpt2": (tiny_gpt2, dict(r=4, target_modules=GPT2, fan_in_fan_out=True)),
    "gpt2-embedding": (lambda: tiny_gpt2(tied=False), dict(r=4, target_modules=["wte", "wpe"])),
}
cases = pytest.mark.parametrize("case", sorted(CASES))


def test_on_a_bfloat16_base_both_keep_the_adapter_in_float32(tmp_path):
    """And the files are the same both ways; ours is no farther from the float32 answer, though it copies no input."""
    base = tiny_model().to(torch.bfloat16)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=LLAMA)).eval()
    with torch.no_grad():
        for i, parameter in enumerate(p for p in theirs.parameters() if p.requires_grad):
            assert parameter.dtype == torch.float32
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    ours = load_adapter(copy.deepcopy(base), save_peft(theirs, tmp_path / "theirs"), trainable=True)
    assert {parameter.dtype for parameter in trainable(ours).values()} == {torch.float32}
    exact = load_adapter(copy.deepcopy(base).float(), tmp_path / "theirs")
    x = ids(base)
    errors = [float((model(x).logits.float() - exact(x).logits).detach().norm()) for model in (ours, theirs)]
    assert 0 < errors[0] <= 1.5 * errors[1]
    written, read = (load_file(folder / "adapter_model.safetensors") for folder in (save_adapter(ours, tmp_path / "ours"), tmp_path / "theirs"))
    assert written.keys() == read.keys() and all(torch.equal(written[key], read[key]) for key in read)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(again(x).logits, theirs(x).logits)


@cases
def test_peft_files_give_the_same_function_gradients_and_merged_weights(case, tmp_path):
    make, fields = CASES[case]
    theirs = with_peft(make().double(), **fields)
    save_peft(theirs, tmp_path)
    ours = load_adapter(make().double(), tmp_path, trainable=True)
    x = ids(ours)
    assert (ours(x).logits - theirs(x).logits).abs().max() < 1e-9
    assert (ours(x).logits - make().double()(x).logits).abs().max() > 1e-3

    ours(x).logits.square().mean().backward()
    theirs(x).logits.square().mean().backward()
    expected = {gradient_key(name): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    found = {gradient_key(name): p.grad for name, p in trainable(ours).items()}
    assert found.keys() == expected.keys() and len(found) > 1
    for key, gradient in found.items():
        assert (gradient - expected[key]).abs().max() <= 1e-9 * max(1.0, float(expected[key].abs().max())), key

    if case == "llama-tied-embedding":
        return  # PEFT merges into the tensor that the head shares
    merge(ours)
    merged = theirs.merge_and_unload()
    expected = dict(merged.named_parameters())
    assert dict(ours.named_parameters()).keys() == expected.keys()
    for name, parameter in ours.named_parameters():
        assert (parameter - expected[name]).abs().max() < 1e-9, name


def gradient_key(name):
    """A parameter's name without either library's own words for where it keeps it."""
    name = name.removeprefix("base_model.model.").replace("lora_embedding_", "lora_")
    return ".".join(part for part in name.split(".") if part not in ("adapters", "default", "modules_to_save", "weight"))


@cases
def test_peft_loads_ours_with_equal_logits(case, tmp_path):
    make, fields = CASES[case]
    save_peft(with_peft(make(), **fields), tmp_path / "theirs")
    ours = load_adapter(make(), tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    theirs = read_peft(make(), tmp_path / "ours")
    x = ids(ours)
    assert (theirs(x).logits - ours(x).logits).abs().max() < 1e-5
    written, read = load_file(tmp_path / "ours" / "adapter_model.safetensors"), load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert written.keys() == {key for key in read if "base_layer" not in key}
    assert all(torch.equal(tensor, read[key]) for key, tensor in written.items())


@pytest.mark.parametrize("make", [tiny_model, tiny_gpt2])
@pytest.mark.parametrize("changes", [{}, {"scaling": "rslora", "init": "gaussian", "dropout": 0.1}, {"modules_to_save": ["lm_head"], "alpha": 3.5}])
def test_an_adapter_of_ours_goes_through_peft_and_back(make, changes, tmp_path):
    config = LoraConfig(rank=4, exclude=["0.mlp"] if make is tiny_model else ["h.0"], **changes)
    ours = attach(make(), config)
    with torch.no_grad():
        for parameter in trainable(ours).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    x = ids(ours)
    save_adapter(ours, tmp_path / "ours", base="some/model")
    theirs = read_peft(make(), tmp_path / "ours")
    assert (theirs(x).logits - ours(x).logits).abs().max() < 1e-5
    assert theirs.peft_config["default"].base_model_name_or_path == "some/model"
    assert theirs.peft_config["default"].lora_dropout == config.dropout
    save_peft(theirs, tmp_path / "back")
    assert "deltune.json" not in {path.name for path in (tmp_path / "back").iterdir()}
    back = load_adapter(make(), tmp_path / "back")
    assert torch.equal(back(x).logits, ours(x).logits)
    again = adapters(back)["default"]
    assert (again.rank, again.alpha, again.scaling, again.init) == (config.rank, config.alpha, config.scaling, config.init)


def test_the_file_has_pefts_form(tmp_path):
    model = attach(tiny_model(), LoraConfig(targets=["q_proj", "1.self_attn.v_proj"], rank=2))
    save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA" and fields["task_type"] == "CAUSAL_LM" and fields["bias"] == "none"
    assert fields["target_modules"] == ["q_proj", "model.layers.1.self_attn.v_proj"]
    assert fields.keys() <= peft.LoraConfig().to_dict().keys()
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight" in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"]])
def test_the_start_is_drawn_from_pefts_distribution(init, targets):
    model = tiny_model(hidden_size=128, num_hidden_layers=6)
    ours = trainable(attach(model, LoraConfig(rank=16, targets=targets, init=init)))
    detach(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=targets, init_lora_weights=True if init == "kaiming" else init))
    for factor in "AB":
        found = torch.cat([p.detach().flatten() for name, p in ours.items() if name.endswith(f"lora_{factor}")])
        expected = torch.cat([p.detach().flatten() for name, p in wrapped.named_parameters() if f"_{factor}.default" in name])
        assert found.shape == expected.shape
        assert torch.allclose(found.std(), expected.std(), rtol=0.06)
        assert torch.allclose(found.mean(), expected.mean(), atol=4 * float(expected.std()) / expected.numel() ** 0.5 + 1e-12)
        if init == "kaiming" and targets == ["q_proj"]:
            assert torch.allclose(found.abs().max(), expected.abs().max(), rtol=0.01)


def test_named_sub_folders_are_found(tmp_path):
    wrapped = with_peft(tiny_model(), r=2, target_modules=["q_proj"])
    wrapped.add_adapter("french", peft.LoraConfig(r=3, target_modules=["v_proj"], init_lora_weights=False))
    save_peft(wrapped, tmp_path)
    x = ids(wrapped)
    model = load_adapter(tiny_model(), tmp_path)
    load_adapter(model, tmp_path / "french", name="french")
    load_adapter(model, tmp_path / "french", name="again")
    wrapped.set_adapter("french")
    detach(model, "default")
    detach(model, "again")
    assert torch.allclose(model(x).logits, wrapped(x).logits, atol=1e-5)
    (tmp_path / "adapter_config.json").unlink()
    assert torch.equal(load_adapter(tiny_model(), tmp_path, name="french")(x).logits, model(x).logits)
    with pytest.raises(AdapterError, match=r"sub-folders french hold adapters"):
        load_adapter(tiny_model(), tmp_path)


def test_without_adapters_the_model_is_the_base_as_in_peft():
    theirs = with_peft(tiny_model(), r=2, target_modules=LLAMA, modules_to_save=["lm_head"])
    ours = attach(tiny_model(), LoraConfig(rank=2, targets=LLAMA, modules_to_save=["lm_head"]))
    x = ids(ours)
    with torch.no_grad():
        ours.lm_head.adapters["default"].weight.add_(1)
    with disabled(ours), theirs.disable_adapter():
        assert torch.equal(ours(x).logits, theirs(x).logits)
    assert not torch.equal(ours(x).logits, tiny_model()(x).logits)


@pytest.mark.parametrize("start", ["eva", "orthogonal", "mica", False])
def test_starts_that_leave_the_base_alone_load(start, tmp_path):
    save_peft(with_peft(tiny_model(), r=2, target_modules=["q_proj"]), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {"init_lora_weights": start}))
    assert adapters(load_adapter(tiny_model(), tmp_path))


@pytest.mark.parametrize("start", ["pissa_niter_4", "corda", "lora_ga", "loftq", "something_new"])
def test_starts_that_change_the_base_and_cannot_be_computed_again_are_refused(start, tmp_path):
    save_peft(with_peft(tiny_model(), r=2, target_modules=["q_proj"]), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {"init_lora_weights": start}))
    with pytest.raises(AdapterError, match=f"init_lora_weights is '{start}'.*path_initial_model_for_weight_conversion"):
        load_adapter(tiny_model(), tmp_path)


def test_an_embedding_table_of_another_base_is_refused(tmp_path):
    wrapped = with_peft(tiny_model(), r=2, target_modules=["embed_tokens"])
    with torch.no_grad():
        wrapped.get_input_embeddings().base_layer.weight[7] += 0.1
    save_peft(wrapped, tmp_path)
    with pytest.raises(AdapterError, match=r"embed_tokens\.base_layer\.weight: the file holds a weight of the base that differs"):
        load_adapter(tiny_model(), tmp_path)
