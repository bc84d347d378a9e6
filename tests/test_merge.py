"""`deltune merge`: a plain Hugging Face folder that answers as base and adapter do."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from deltune.adapters.attach import attach, trainable
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.methods.lora import LoraConfig
from deltune.commands import merge as verb
from deltune.errors import AdapterError, ConfigError, ModelError
from tests.tiny import save_tiny, tiny_model


def adapter_for(folder, out, *, scale=0.05, **config):
    """An adapter with every tensor off its start, saved."""
    from transformers import AutoModelForCausalLM

    model = attach(AutoModelForCausalLM.from_pretrained(folder).eval(), LoraConfig(rank=4, **config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, out)
    return model


def merged(tmp_path, base, *words):
    out = tmp_path / "merged"
    assert verb.main([f"model={base}", f"adapter={tmp_path / 'adapter'}", f"out={out}", *words], None) == 0
    return out


IDS = torch.randint(250, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("tied", "config"),
    [
        (False, {}),
        (False, {"targets": ["q_proj", "embed_tokens", "lm_head"]}),
        (True, {"targets": ["q_proj", "embed_tokens"]}),
        (True, {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (False, {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_the_folder_answers_as_base_and_adapter(tmp_path, tied, config, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    model = adapter_for(base, tmp_path / "adapter", **config)
    out = merged(tmp_path, base)
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, model(IDS).logits, atol=1e-5)
        assert not torch.allclose(plain(IDS).logits, tiny_model(tie_word_embeddings=tied)(IDS).logits, atol=1e-2)
    assert AutoTokenizer.from_pretrained(out)("hello")["input_ids"] == AutoTokenizer.from_pretrained(base)("hello")["input_ids"]
    assert not list(out.glob("adapter*")) and not list(tmp_path.glob(".*"))
    said = capsys.readouterr().out
    assert f"merged {len([1 for _ in model.modules() if hasattr(_, 'base_layer')])} layers" in said
    assert float(re.search(r"largest difference of a logit (\S+)", said)[1]) < 1e-4
    assert "at 0 of 128 (0.0 %)" in said


def test_a_weight_is_rounded_once(tmp_path):
    """bfloat16 base, float32 adapter: each merged weight is the rounded exact sum."""
    base = tmp_path / "base"
    tiny_model().to(torch.bfloat16).save_pretrained(base)
    save_tiny(tmp_path / "with_tokenizer")
    for file in (tmp_path / "with_tokenizer").glob("tokenizer*"):
        file.rename(base / file.name)
    adapter_for(base, tmp_path / "adapter", targets=["q_proj"])
    weights = load_file(base / "model.safetensors")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    A, B = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
    exact = weights[f"{name}.weight"].double() + 16 / 4 * B @ A
    found = load_file(merged(tmp_path, base) / "model.safetensors")
    assert found[f"{name}.weight"].dtype == torch.bfloat16
    assert torch.equal(found[f"{name}.weight"], exact.to(torch.bfloat16))
    assert all(torch.equal(found[key], weights[key]) for key in weights if "q_proj" not in key)
    (tmp_path / "merged").rename(tmp_path / "first")
    wide = load_file(merged(tmp_path, base, "dtype=float32") / "model.safetensors")
    assert torch.allclose(wide[f"{name}.weight"].double(), exact, atol=1e-7)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"


def test_a_narrower_type_shows_in_the_verdict(tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    adapter_for(base, tmp_path / "adapter", scale=0.2)
    merged(tmp_path, base, "dtype=bfloat16")
    said = capsys.readouterr().out
    assert "bfloat16" in said
    assert 1e-4 < float(re.search(r"largest difference of a logit (\S+)", said)[1]) < 1


def test_nothing_is_written_over(tmp_path):
    base = save_tiny(tmp_path / "base")
    adapter_for(base, tmp_path / "adapter", targets=["q_proj"])
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"merged: something is there already"):
        merged(tmp_path, base)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.txt"]


def test_a_merge_that_does_not_work_leaves_no_folder(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    model = adapter_for(base, tmp_path / "adapter", targets=["q_proj"])
    other = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="another base model"):
        merged(tmp_path, other)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.mul_(3e3)  # beyond float16's range
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"not finite in float16.*dtype=float32"):
        merged(tmp_path, base, "dtype=float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]


def test_the_merged_folder_is_a_base_like_any_other(tmp_path):
    from transformers import AutoModelForCausalLM

    base = save_tiny(tmp_path / "base")
    adapter_for(base, tmp_path / "adapter")
    out = merged(tmp_path, base)
    plain = AutoModelForCausalLM.from_pretrained(out)
    with pytest.raises(AdapterError, match="same shapes and other weights"):
        load_adapter(plain, tmp_path / "adapter")
