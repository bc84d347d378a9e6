"""Adapters on quantised bases leave the program: merged into plain or newly rounded folders, and read by PEFT on bitsandbytes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

import deltune
from deltune import weights
from deltune.adapters.attach import attach
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.wrapper import wrappers
from deltune.commands import merge as verb
from deltune.errors import AdapterError, ConfigError, ModelError
from deltune.models.config import EightBit, FourBit, ModelConfig
from deltune.models.load import load, originals
from deltune.models.requantise import write
from deltune.training.callbacks import Callback
from tests.adapted import shaken
from tests.tiny import save_tiny

IDS = torch.randint(250, (2, 12), generator=torch.Generator().manual_seed(0))
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # whole blocks of 64 in every row


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "base", **WIDE)


def quantised(base, kind="nf4", **settings):
    config = EightBit() if kind == "int8" else FourBit(name=kind, **settings)
    return load(ModelConfig(path=str(base)), quant=config)


def adapted(base, folder, method="lora", **settings):
    """A quantised model with an adapter off its start, which is saved into the folder."""
    model = attach(quantised(base, **settings), named(method, rank=4), originals=originals(ModelConfig(path=str(base))))
    save_adapter(shaken(model, size=0.02), folder)
    return model


def merged(tmp_path, base, *words):
    out = tmp_path / "merged"
    assert verb.main([f"model={base}", f"adapter={tmp_path / 'adapter'}", f"out={out}", *words], None) == 0
    return out


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def by_bitsandbytes(model):
    """In training mode: in eval mode it computes in bfloat16 on some CPUs, and fails there for rows narrower than a block."""
    with torch.no_grad():
        return model.train()(IDS).logits.float()


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "oft"])
def test_a_quantised_base_is_merged_in_values_and_stored_in_bfloat16(tmp_path, base, method, capsys):
    settings = {} if method == "oft" else {"rank": 4}
    model = attach(quantised(base), named(method, **settings, **({"block_size": 4} if method == "oft" else {})), originals=originals(ModelConfig(path=str(base))))
    save_adapter(shaken(model, size=0.02), tmp_path / "adapter")
    out = merged(tmp_path, base, "quant=nf4")
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for place, layer in wrappers(model):
        W = weights.dequantised(layer.base_layer.weight)
        exact = W + layer.adapters["default"].delta(W)
        assert torch.allclose(stored[f"{place}.weight"].float(), exact, rtol=2**-8, atol=1e-6), place
    assert torch.allclose(logits(load(ModelConfig(path=str(out), dtype="float32"))), logits(model), atol=0.02)
    assert re.search(r"another token becomes the most probable at \d+ of 128", capsys.readouterr().out)
    assert not list(tmp_path.glob(".*"))


def test_layers_that_nothing_is_merged_into_are_plain_too(tmp_path, base):
    model = attach(quantised(base), named("lora", rank=4, targets=["q_proj"]))
    save_adapter(shaken(model), tmp_path / "adapter")
    stored = load_file(merged(tmp_path, base, "quant=nf4", "dtype=float32") / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(stored[f"{name}.weight"], weights.dequantised(model.get_submodule(name).weight))


@pytest.mark.parametrize(("kind", "settings"), [("nf4", {}), ("fp4", {"double": False, "block_size": 32}), ("int8", {})])
def test_a_merged_model_is_rounded_again_where_that_is_asked_for_as_bitsandbytes_has_it(tmp_path, base, kind, settings, capsys):
    from transformers import AutoModelForCausalLM

    adapted(base, tmp_path / "adapter", kind=kind, **settings)
    words = [f"quant={kind}", *(f"quant.{key}={str(value).lower()}" for key, value in settings.items())]
    plain = merged(tmp_path, base, *words)
    plain = plain.rename(tmp_path / "plain")
    out = merged(tmp_path, base, *words, f"requantise={kind}", "text=README.md")
    said = capsys.readouterr().out
    read = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, device_map="cpu")
    ours = load(ModelConfig(path=str(plain)), quant=EightBit() if kind == "int8" else FourBit(name=kind, **settings))
    layer, own = (model.model.layers[0].mlp.down_proj for model in (read, ours))
    values = weights.dequantised(own.weight, torch.float32)
    if kind == "int8":
        assert type(layer).__name__ == "Linear8bitLt"
        assert torch.allclose(layer.weight.data * layer.weight.SCB[:, None] / 127, values, atol=1e-6)
    else:
        import bitsandbytes.functional as bnb

        assert type(layer).__name__ == "Linear4bit"
        assert torch.equal(bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state), weights.dequantised(own.weight))
    error = float(re.search(rf"rounded the merged weights to {kind} again: (\S+) % off", said)[1]) / 100
    exact = load_file(plain / "model.safetensors")
    W = exact["model.layers.0.mlp.down_proj.weight"].float()
    assert error == pytest.approx(float((values - W).norm() / W.norm()), rel=0.2)
    assert 0.001 < error < 0.02 if kind == "int8" else 0.08 < error < 0.13
    assert torch.allclose(by_bitsandbytes(read), logits(ours), atol=0.05 if kind == "int8" else 0.02)
    assert re.search(r"compared with the unmerged adapter on \d+ tokens: .* at \d+ of \d+ \(\d+\.\d %\)", said.splitlines()[-2])


def test_a_folder_of_many_files_is_rounded_file_by_file(tmp_path, base):
    load(ModelConfig(path=str(base))).save_pretrained(tmp_path / "many", max_shard_size="50KB")
    files = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    write(tmp_path / "many", tmp_path / "out", FourBit())
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == files
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: file for file in files for name in load_file(tmp_path / "out" / file)}
    assert index == found
    write(base, tmp_path / "one", FourBit())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert all(torch.equal(load_file(tmp_path / "out" / file)[name], whole[name]) for name, file in found.items())


def test_what_cannot_be_rounded_again_says_so(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"is stored as \[in, out\].*requantise=none"):
        write(tmp_path / "gpt2", tmp_path / "out", FourBit())


def test_a_text_to_compare_on_must_be_one(tmp_path, base):
    adapted(base, tmp_path / "adapter")
    (tmp_path / "empty.txt").write_text(" \n")
    for name, problem in (("empty.txt", "there is no text in it"), ("none.txt", "cannot be read")):
        with pytest.raises(ConfigError, match=problem):
            merged(tmp_path, base, "quant=nf4", f"text={tmp_path / name}")
        assert not (tmp_path / "merged").exists()


# ---------------------------------------------------------------- PEFT on bitsandbytes


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_reads_the_adapter_on_a_bitsandbytes_model_with_equal_logits(tmp_path, base, method):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = adapted(base, tmp_path / "adapter", method)
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype=torch.float32, device_map="cpu")
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    layer = theirs.base_model.model.model.layers[0].mlp.up_proj
    assert type(layer.base_layer).__name__ == "Linear4bit"
    assert torch.allclose(by_bitsandbytes(theirs), logits(model), atol=2e-5)
    with theirs.disable_adapter():
        assert (by_bitsandbytes(theirs) - logits(model)).abs().max() > 0.01


def test_peft_refuses_an_adapter_whose_base_it_could_not_have(tmp_path, base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = adapted(base, tmp_path / "adapter", "pissa")
    with pytest.raises((ValueError, KeyError), match="DELTUNE_lora"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    source = originals(ModelConfig(path=str(base)))
    again = load_adapter(quantised(base), tmp_path / "adapter", originals=source)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(AdapterError, match="give originals"):
        load_adapter(quantised(base), tmp_path / "adapter")


# ---------------------------------------------------------------- a run


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, record):
        if record.step == self.step:
            raise KeyboardInterrupt


def test_a_run_on_codes_goes_on_and_is_used_as_it_was_trained(base, tmp_path):
    """PiSSA's start is taken out of the base's layers by the run, by the run that goes on, and by what uses its adapter."""
    from deltune.commands.open_model import opened
    from deltune.settings import Trained, load

    rows = [{"prompt": f"number {i}", "completion": f"{i}."} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": str(base), "adapter": "pissa", "adapter.rank": 4, "quant": "nf4", "data.train": str(tmp_path / "rows.jsonl"), "output": str(tmp_path),
        "name": "r", "train.steps": 4, "train.micro_batch": 4, "checkpoint.every": 2, "log.sinks": [], "log.progress": "off", "log.report": False, "optim.lr": 1e-3,
    }  # fmt: skip
    straight = deltune.train(settings | {"name": "straight"})
    with pytest.raises(KeyboardInterrupt):
        deltune.train(settings, callbacks=[StopAt(3)])
    outcome = deltune.train(settings)
    for (place, one), (_, other) in zip(wrappers(outcome.model), wrappers(straight.model), strict=True):
        weight = one.base_layer.weight
        assert weights.held_beside(weight) is not None, place
        assert all(torch.equal(part, other.base_layer.weight.parts()[name]) for name, part in weight.parts().items())
    assert torch.equal(logits(outcome.model), logits(straight.model))
    with opened(load(Trained, [f"run={tmp_path / 'r'}"], None)) as it:
        for (place, one), (_, other) in zip(wrappers(it.model), wrappers(outcome.model), strict=True):
            assert all(torch.equal(part, other.base_layer.weight.parts()[name]) for name, part in one.base_layer.weight.parts().items()), place
        assert torch.allclose(logits(it.model), logits(outcome.model), atol=1e-5)  # a run computes in its fast forms
