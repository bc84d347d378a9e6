"""A quantised base: what is quantised while it is loaded, what stays, how much of it is there at once, and what is refused."""

from __future__ import annotations

import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deltune import weights
from deltune.adapters.attach import attach
from deltune.adapters.config import named
from deltune.commands.arithmetic import of_run
from deltune.commands.estimate import stored_bytes
from deltune.errors import AdapterError, ConfigError, ModelError
from deltune.models import quantise
from deltune.models.config import EightBit, FourBit, ModelConfig, QuantConfig
from deltune.models.dry_run import dry_run
from deltune.models.load import empty, load, originals
from deltune.settings import EvalSettings, load_run
from deltune.settings.words import load as load_settings
from tests.architectures import KINDS, small
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

QUANTS = [FourBit("nf4"), FourBit("fp4", double=False, block_size=128), EightBit()]


def linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]


def quantised_layers(model: nn.Module) -> list[str]:
    return [name.removesuffix(".weight") for name, parameter in model.named_parameters() if weights.is_quantised(parameter)]


@pytest.mark.parametrize("quant", QUANTS, ids=lambda quant: quant.name)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_loaded_layer_is_what_quantising_the_plain_one_gives(tiny_folder, quant, dtype):
    config = ModelConfig(path=str(tiny_folder), dtype=dtype)
    model, plain = load(config, quant=quant), load(config)
    assert quantised_layers(model) == [name for name in linear_layers(plain) if name != "lm_head"]
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if weights.is_quantised(parameter):
            double, block = (quant.double, quant.block_size) if isinstance(quant, FourBit) else (False, 64)
            expected = weights.quantise(other, quant.name, double=double, block_size=block)
            assert all(torch.equal(part, expected.parts()[key]) for key, part in parameter.parts().items()), name
            assert not parameter.requires_grad and parameter.dtype == other.dtype
        else:
            assert torch.equal(parameter, other), name
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")
    with torch.no_grad():
        ids = torch.arange(20).view(2, 10)
        for name in quantised_layers(model):
            plain.get_submodule(name).weight = nn.Parameter(weights.dequantised(model.get_submodule(name).weight))
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("start", ["pretrained", "random"])
def test_no_more_than_a_layer_is_there_in_full(tmp_path, monkeypatch, start):
    tiny_model(num_hidden_layers=6).save_pretrained(tmp_path, max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    seen: list[weakref.ref] = []
    most = 0

    def watched(weight, *rest):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(weight))
        return codes_of(weight, *rest)

    codes_of = quantise.codes_of
    monkeypatch.setattr(quantise, "codes_of", watched)
    model = load(ModelConfig(path=str(tmp_path), start=start), quant=FourBit())
    assert len(seen) == len(quantised_layers(model)) == 6 * 7
    assert most <= (1 if start == "pretrained" else 7)  # a random start draws a block at a time
    assert not any(ref() is not None for ref in seen)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "gpt_neox", "phi3", "mixtral"])
def test_other_architectures(tmp_path, kind):
    plain = small(kind)
    plain.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), attention="eager")
    model = load(config, quant=FourBit(block_size=32))
    names = quantised_layers(model)
    assert names and {name for name in linear_layers(plain) if plain.get_submodule(name) is not plain.get_output_embeddings()} == set(names)
    original = originals(config)
    for name in names:
        layer, before = model.get_submodule(name), plain.get_submodule(name)
        W = before.weight.detach().T if type(before).__name__ == "Conv1D" else before.weight.detach()
        assert torch.equal(original(name), W)
        expected = weights.dequantised(weights.quantise(W.contiguous(), "nf4", block_size=32))
        assert torch.equal(weights.dequantised(layer.weight), expected.T if type(before).__name__ == "Conv1D" else expected)
        before.weight = nn.Parameter(weights.dequantised(layer.weight))
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)
    random = load(ModelConfig(path=str(tmp_path), attention="eager", start="random"), quant=FourBit(block_size=32))
    assert quantised_layers(random) == names
    with torch.no_grad():
        assert random(ids).logits.isfinite().all() and random(ids).logits.std() > 0
    assert originals(ModelConfig(path=str(tmp_path), start="random")) is None


def test_a_tied_head_stays_and_stays_tied(tmp_path):
    save_tiny(tmp_path, tie_word_embeddings=True)
    for start in ("pretrained", "random"):
        model = load(ModelConfig(path=str(tmp_path), start=start), quant=FourBit())
        assert model.lm_head.weight is model.model.embed_tokens.weight and not weights.is_quantised(model.lm_head.weight)
        assert len(quantised_layers(model)) == 14


def test_a_random_start_is_drawn_from_the_seed(tiny_folder):
    config = ModelConfig(path=str(tiny_folder), start="random")
    first, same, other = (load(config, seed=seed, quant=FourBit()) for seed in (1, 1, 2))
    name = "model.layers.1.mlp.up_proj.weight"
    values = [weights.dequantised(dict(model.named_parameters())[name]) for model in (first, same, other)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])
    assert values[0].std() == pytest.approx(0.02, rel=0.15)


def test_skipped_layers_stay(tiny_folder):
    config = ModelConfig(path=str(tiny_folder))
    model = load(config, quant=EightBit(skip=["*mlp*", "model.layers.0.self_attn.q_proj"]))
    assert not any("mlp" in name or name == "model.layers.0.self_attn.q_proj" for name in quantised_layers(model))
    assert len(quantised_layers(model)) == 7
    with pytest.raises(ModelError, match=r"quant\.skip: pattern 'gate' matches no linear layer"):
        load(config, quant=EightBit(skip=["gate"]))


def test_what_is_trained_in_full_is_not_quantised(tiny_folder):
    config, lora = ModelConfig(path=str(tiny_folder)), named("lora", targets=["q_proj"], modules_to_save=["down_proj"])
    with pytest.raises(AdapterError, match=r"'down_proj' is stored quantised.*quant\.skip=\['\*down_proj\*'\]"):
        attach(load(config, quant=FourBit()), lora)
    attach(load(config, quant=FourBit(skip=["*down_proj*"])), lora)
    attach(load(config, quant=FourBit()), named("lora", modules_to_save=["lm_head"]))


def test_none_is_the_plain_model(tiny_folder):
    config = ModelConfig(path=str(tiny_folder))
    assert not quantised_layers(load(config, quant=QuantConfig()))
    assert not quantised_layers(load(config))


def test_without_memory_shapes_types_and_bytes_are_the_same(tiny_folder):
    config = ModelConfig(path=str(tiny_folder))
    for quant in QUANTS:
        model, shadow = load(config, quant=quant), empty(config, quant=quant)
        described = [[(name, p.shape, p.dtype, weights.stored_bytes(p), type(p)) for name, p in m.named_parameters()] for m in (model, shadow)]
        assert described[0] == described[1]
        assert all(p.is_meta for p in shadow.parameters())


def test_an_account_of_a_step_knows_codes_and_the_values_of_one_layer(tiny_folder):
    def parts(quant: QuantConfig) -> tuple[int, dict[str, float]]:
        model = empty(ModelConfig(path=str(tiny_folder)), quant=quant)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
        return stored_bytes(model), dry_run(model, batch=2, seq=16).parts

    (plain_bytes, plain), (coded_bytes, coded) = parts(QuantConfig()), parts(FourBit())
    num_quantised = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 64 * 32)
    assert plain_bytes - coded_bytes == pytest.approx(num_quantised * (4 - 0.5159), rel=0.01)
    assert plain["weight_copies"] == 0 and coded["weight_copies"] in (0, 64 * 32 * 4)  # at the worst moment, which may be another's
    assert coded["activations"] == plain["activations"]
    assert sum(coded.values()) <= sum(plain.values()) + 64 * 32 * 4


def test_files_that_do_not_fit_are_named(tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    config, file = ModelConfig(path=str(folder)), folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: torch.zeros(3, 5)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name}: file \[3, 5\], config \[64, 32\]"):
        load(config, quant=FourBit())
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 tensors \\({name}\\) not in the weight files"):
        load(config, quant=FourBit())
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.0\.mlp\.up_proj\.weight in the weight files"):
        originals(config)("model.layers.0.mlp.up_proj")
    save_file({**tensors, name: tensors[name] * float("nan")}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not finite"):
        load(config, quant=FourBit())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["quant=nf4", "adapter=null"], "quant.name=nf4 .*leaves nothing to train"),
        (["quant=int8", "adapter=lora", "adapter.schedule=relora"], "schedule.name=relora, which adds to the base's weights"),
        (["quant=nf4", "adapter=lora", "quant.compute_dtype=float32", "engine.precision=bf16"], "quant.compute_dtype=float32 .*no effect with engine.precision=bf16"),
        (["quant=int8", "adapter=lora", "quant.double=true"], "quant=int8 has no such key; nf4 and fp4 have it"),
        (["adapter=lora", "quant.block_size=64"], "quant=none has no such key"),
        (["quant=nf4", "adapter=lora", "quant.block_size=100"], "must be one of 32, 64"),
        (["quant=nf3", "adapter=lora"], "nf4"),
        (["load_in_4bit=true", "adapter=lora"], "quant=nf4"),
        (["bnb_4bit_quant_type=nf4", "adapter=lora"], "quant.name"),
        (["bnb_4bit_use_double_quant=true", "adapter=lora", "quant=nf4"], "quant.double"),
    ],
)
def test_settings_without_effect_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        load_run(["data=x.json", *words])


@pytest.mark.parametrize("stated", [[], ["quant=none"]])
def test_what_uses_a_run_quantises_as_it_did(tmp_path, stated):
    run = load_run(["data=x.json", "adapter=lora", "quant=fp4", "quant.block_size=128", f"output={tmp_path}", "name=r"])
    (run.folder / "adapter").mkdir(parents=True)
    (run.folder / "config.yaml").write_text(run.to_yaml(), encoding="utf-8")
    found = load_settings(EvalSettings, [f"run={run.folder}", "data.eval=x.json", *stated]).quant
    assert found == (run.quant if not stated else QuantConfig())


@pytest.mark.parametrize(("words", "computed"), [([], torch.float32), (["quant.compute_dtype=bfloat16"], torch.bfloat16), (["model.dtype=bfloat16"], torch.bfloat16)])
def test_layers_compute_in_the_type_that_is_asked_for(tiny_folder, words, computed):
    run = load_run(["data=x.json", f"model={tiny_folder}", "adapter=lora", "quant=nf4", "engine.precision=fp32", *words])
    model = load(run.model, quant=run.quant)
    of_run(run, model, torch.device("cpu"))
    assert {p.dtype for p in model.parameters() if weights.is_quantised(p)} == {computed}


def test_every_architecture_of_the_tests_has_what_can_be_quantised():
    for kind in KINDS:
        model = small(kind)
        chosen = quantise.layers(model, EightBit())
        assert chosen and model.get_output_embeddings() not in chosen.values(), kind


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="torch.compile does not know this Python")
def test_compiled_layers_compute_with_the_same_values():
    layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    layers[0].weight = nn.Parameter(weights.quantise(layers[0].weight, "nf4"), requires_grad=False)
    layers[2].weight = nn.Parameter(weights.quantise(layers[2].weight, "int8"), requires_grad=False)
    found = []
    for form in (layers, torch.compile(layers, backend="aot_eager", fullgraph=True)):
        x = torch.linspace(-1, 1, 48).view(3, 16).requires_grad_()
        form(x).square().sum().backward()
        found.append(x.grad)
    torch._dynamo.reset()
    assert torch.allclose(*found, rtol=1e-5)
