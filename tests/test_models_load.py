"""Loading: what is refused and with which words, what a random start is, and that nothing is filled in by chance."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltune.errors import ModelError
from deltune.models.config import ModelConfig
from deltune.models.folder import conversion, find
from deltune.models.load import check_pair, empty, load, load_tokenizer, model_identity, save_model
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def refusal(action, *words: str) -> str:
    """The message of a ModelError, after checking that it names these words."""
    with pytest.raises(ModelError) as caught:
        action()
    text = str(caught.value)
    for word in words:
        assert word in text, text
    return text


def set_key(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_loaded_weights_are_the_files(tiny_folder):
    model = load(ModelConfig(path=str(tiny_folder)))
    stored = load_file(tiny_folder / "model.safetensors")
    assert not model.training
    assert {name for name, _ in model.named_parameters()} == set(stored)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[name]), name


@pytest.mark.parametrize(("name", "dtype"), [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)])
def test_dtype_is_the_folders_own_or_the_one_asked_for(tmp_path, name, dtype):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "m")
    config = ModelConfig(path=str(tmp_path / "m"), dtype=name)
    assert load(config).dtype == dtype
    assert empty(config).dtype == dtype


def test_empty_model_has_the_shapes_and_opens_no_weights(folder):
    full = tiny_model()
    (folder / "model.safetensors").write_bytes(b"not read")
    bare = empty(ModelConfig(path=str(folder)))
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert {n: p.shape for n, p in bare.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}


def test_random_start_depends_on_its_seed_only(folder):
    (folder / "model.safetensors").unlink()
    config = ModelConfig(path=str(folder), start="random")
    torch.manual_seed(1)
    first = load(config, seed=7).state_dict()
    after = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(after, torch.random.get_rng_state()), "the global generator was drawn from"
    torch.manual_seed(2)
    again, other = load(config, seed=7).state_dict(), load(config, seed=8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_recomputed_activations_give_the_same_gradients(tiny_folder):
    gradients = []
    for checkpointing in (False, True):
        model = load(ModelConfig(path=str(tiny_folder), gradient_checkpointing=checkpointing)).train()
        # everything before the trained layer is frozen, which is where the re-entrant form loses the gradient
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1.mlp" in name or "layers.0.self_attn.q_proj" in name)
        recomputed = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, r=recomputed: r.append(1))
        ids = torch.arange(40).view(2, 20)
        model(input_ids=ids, labels=ids).loss.backward()
        assert len(recomputed) == (2 if checkpointing else 1)
        assert not model.model.embed_tokens(ids).requires_grad  # below the trained layers there is nothing to compute
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert len(plain) == 4
    for name in plain:
        assert torch.equal(plain[name], checkpointed[name]), name
        assert plain[name].abs().sum() > 0


def test_saved_folder_loads_with_equal_logits_and_replaces_an_older_one(tmp_path, tiny_folder):
    model = load(ModelConfig(path=str(tiny_folder), gradient_checkpointing=True))
    out = tmp_path / "out"
    save_model(tiny_model(seed=5), tiny_tokenizer(), out)
    save_model(model, load_tokenizer(ModelConfig(path=str(tiny_folder))), out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.use_cache and not model.config.use_cache
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny_tokenizer().chat_template


# -- what runs code, or could, is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "change", [{"auto_map": {"AutoModelForCausalLM": "code.Model"}}, {"text_config": {"list": [{"trust_remote_code": True}]}}, {"custom_pipelines": {"x": {}}}]
)
def test_custom_code_flags_are_refused(folder, name, change):
    set_key(folder / name, **change)
    config = ModelConfig(path=str(folder))
    for action in (load, load_tokenizer, empty):
        refusal(lambda action=action: action(config), name, "code", "What fits")


@pytest.mark.parametrize("place", ["modeling_tiny.py", "custom_generate/generate.py"])
def test_python_files_are_refused(folder, place):
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_text("raise SystemExit('ran')")
    refusal(lambda: load(ModelConfig(path=str(folder))), place, "Python code")


def test_links_may_not_leave_the_folder(folder, tmp_path):
    inside = folder / "copy.json"
    inside.symlink_to("config.json")
    load_tokenizer(ModelConfig(path=str(folder)))
    (tmp_path / "secret.json").write_text("{}")
    inside.unlink()
    inside.symlink_to(tmp_path / "secret.json")
    refusal(lambda: load(ModelConfig(path=str(folder))), "copy.json", "leaves the folder", str(tmp_path / "secret.json"))


def test_pickled_weights_are_refused_and_the_printed_conversion_works(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    target = folder.with_name("model-safetensors")
    code = conversion(folder, target)
    refusal(lambda: load(ModelConfig(path=str(folder))), "pytorch_model.bin", "pickles", f'python -c "{code}"', f"model.path={target}")
    exec(code)
    converted = load(ModelConfig(path=str(target))).state_dict()
    assert all(torch.equal(converted[name], weights[name]) for name in weights)
    load_tokenizer(ModelConfig(path=str(target)))


def test_no_call_in_the_package_asks_for_remote_code():
    import ast

    import deltune

    for file in Path(deltune.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                assert all(word.arg != "trust_remote_code" for word in node.keywords), file


# -- what is broken is named ----------------------------------------------------------------------------------------


def test_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    refusal(lambda: find(str(tmp_path / "nowhere")), "nowhere", "no such folder", "not a hub id")
    refusal(lambda: find(str(tmp_path / "file")), "this is a file")
    (tmp_path / "void").mkdir()
    refusal(lambda: load(ModelConfig(path=str(tmp_path / "void"))), "no config.json", "found nothing")


def test_an_adapter_or_run_folder_says_what_was_meant(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "acme/base"}')
    (tmp_path / "config.yaml").write_text("")
    for action in (load, load_tokenizer, empty):
        refusal(lambda action=action: action(ModelConfig(path=str(tmp_path / "adapter"))), "model.path=acme/base adapter=")
        refusal(lambda action=action: action(ModelConfig(path=str(tmp_path))), "folder of a run", str(tmp_path / "adapter"))


def test_offline_and_not_in_the_cache_is_one_clear_message(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for action in (load, load_tokenizer, empty):
        text = refusal(lambda action=action: action(ModelConfig(path="acme/absent", revision="v2")), "not a folder", str(tmp_path), "HF_HUB_OFFLINE is set", "acme/absent at revision v2")
        assert len(text.splitlines()) == 1


def test_what_the_hub_says_is_passed_on(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("401 Client Error.\nAccess to model acme/gated is restricted.")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    text = refusal(lambda: load(ModelConfig(path="acme/gated")), "not a folder", "the hub did not give it", "401 Client Error.")
    assert "HF_HUB_OFFLINE" not in text


def test_the_hubs_cache_is_used_offline(monkeypatch, tmp_path, tiny_folder):
    """The cache's layout: snapshots hold links into blobs, beside the folder."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "models--acme--tiny"
    snapshot = root / "snapshots" / commit
    for part in (snapshot, root / "blobs", root / "refs"):
        part.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(tiny_folder.iterdir())):
        shutil.copy(file, root / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = ModelConfig(path="acme/tiny")
    assert torch.equal(load(config).lm_head.weight, tiny_model().lm_head.weight)
    assert load_tokenizer(config).eos_token == "</s>"
    assert model_identity(config)["commit"] == commit


def test_damaged_weights(folder):
    config = ModelConfig(path=str(folder))
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refusal(lambda: load(config), "model.safetensors", f"{len(whole) - 100} bytes", "not a whole safetensors file")
    file.write_bytes(b"\xff" * 200)
    refusal(lambda: load(config), "not a whole safetensors file")
    file.unlink()
    refusal(lambda: load(config), "no *.safetensors files", "model.start=random")


def test_weights_that_do_not_fit_the_config(folder):
    config, file = ModelConfig(path=str(folder)), folder / "model.safetensors"
    weights = load_file(file)
    norm = weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    refusal(lambda: load(config), "model.norm.weight", "not in the weight files")
    save_file(weights | {"model.norm.weight": torch.ones(5)}, file, metadata={"format": "pt"})
    refusal(lambda: load(config), "model.norm.weight", "file [5], config [32]")
    save_file(weights | {"model.norm.weight": norm, "vision.weight": torch.ones(5)}, file, metadata={"format": "pt"})
    assert torch.equal(load(config).model.norm.weight, norm)


def test_weights_left_out_are_reported(folder, caplog):
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"vision.weight": torch.ones(5)}, file, metadata={"format": "pt"})
    with caplog.at_level("WARNING", logger="deltune"):
        import logging

        logging.getLogger("deltune").propagate = True
        load(ModelConfig(path=str(folder)))
    assert "vision.weight" in caplog.text


def test_shards(folder, tmp_path):
    tiny_model().save_pretrained(tmp_path / "s", max_shard_size="50KB")
    shards = sorted((tmp_path / "s").glob("model-*.safetensors"))
    assert len(shards) > 1
    config = ModelConfig(path=str(tmp_path / "s"))
    assert torch.equal(load(config).lm_head.weight, tiny_model().lm_head.weight)
    shards[0].unlink()
    refusal(lambda: load(config), shards[0].name, "missing")
    index = tmp_path / "s" / "model.safetensors.index.json"
    set_key(index, weight_map={"lm_head.weight": "../model/model.safetensors"})
    refusal(lambda: load(config), "outside the folder")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["config.json line 1", "not JSON"]),
        ("[]", ["holds a list"]),
        ('{"a": ' + "[" * 100_000, ["config.json is nested too deep"]),
        ("{}", ["names no model_type"]),
        ('{"model_type": "lama"}', ["does not know model_type 'lama'", "llama"]),
        ('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}', ["not a causal language model", "T5ForConditionalGeneration"]),
        ('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}', ["not a causal language model", "BertLMHeadModel"]),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}', ["stored quantised (gptq)"]),
        ('{"model_type": "llama", "hidden_size": "wide"}', ["config.json"]),
        ('{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}', ["config.json"]),
    ],
)
def test_config_json_that_is_no_causal_model(folder, text, words):
    (folder / "config.json").write_text(text)
    for action in (load, empty):
        refusal(lambda action=action: action(ModelConfig(path=str(folder))), *words)


def keys_of(value, path=()):
    """Paths to every value of nested objects, vocabularies left out."""
    for key in value:
        if key != "vocab":
            yield (*path, key)
            if isinstance(value[key], dict):
                yield from keys_of(value[key], (*path, key))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_any_wrong_value_in_a_folders_json_is_a_message(folder, name):
    """Each loads all the same or is refused in words; nothing else is raised."""
    draw, text, refused = random.Random(name), (folder / name).read_text(), 0
    for _ in range(30):
        values = json.loads(text)
        *way, last = draw.choice(list(keys_of(values)))
        inner = values
        for key in way:
            inner = inner[key]
        inner[last] = draw.choice([None, -1, 0, 7, 3.5, "x", "", [], {}, True, [1], {"a": 1}])
        (folder / name).write_text(json.dumps(values))
        for action in (load, empty, load_tokenizer):
            try:
                action(ModelConfig(path=str(folder)))
            except ModelError as error:
                refused += 1
                assert f"model.path={folder}: " in str(error)
    assert refused > 0


def test_attention_that_is_not_installed(tiny_folder):
    if torch.cuda.is_available():
        pytest.skip("flash attention may be there")
    refusal(lambda: load(ModelConfig(path=str(tiny_folder), attention="flash_attention_2")), "model.path", "lash")


def test_all_attention_agrees(tiny_folder):
    ids = torch.arange(30)[None]
    models = [load(ModelConfig(path=str(tiny_folder), attention=name)) for name in ("eager", "sdpa", "segment")]
    assert [m.config._attn_implementation for m in models] == ["eager", "sdpa", "segment"]
    for model in models[1:]:
        torch.testing.assert_close(models[0](ids).logits, model(ids).logits)


def test_attention_is_ours_where_the_model_can_run_it_and_named_in_no_file(tmp_path, tiny_folder, caplog):
    from transformers import BloomConfig, BloomForCausalLM

    model = load(ModelConfig(path=str(tiny_folder)))
    assert model.config._attn_implementation == empty(ModelConfig(path=str(tiny_folder))).config._attn_implementation == "segment"
    assert load(ModelConfig(path=str(tiny_folder)), fast=False).config._attn_implementation == "sdpa"
    assert load(ModelConfig(path=str(tiny_folder), attention="segment"), fast=False).config._attn_implementation == "segment"
    save_model(model, None, tmp_path / "saved")
    assert "segment" not in (tmp_path / "saved/config.json").read_text()

    BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4)).save_pretrained(tmp_path / "bloom")
    with caplog.at_level("INFO"):
        assert load(ModelConfig(path=str(tmp_path / "bloom"))).config._attn_implementation == "eager"
    assert "computes attention by itself" in caplog.text
    refusal(lambda: load(ModelConfig(path=str(tmp_path / "bloom"), attention="segment")), "model.attention=segment", "model.attention=auto")


# -- tokenizers -----------------------------------------------------------------------------------------------------


def test_a_pad_token_is_found_without_new_embeddings(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    loaded = load_tokenizer(ModelConfig(path=str(folder)))
    assert (loaded.pad_token, loaded.padding_side, len(loaded)) == ("</s>", "right", 259)
    tokenizer.unk_token = "!"
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(ModelConfig(path=str(folder))).pad_token == "!"


def test_tokenizer_faults(folder, tmp_path):
    config = ModelConfig(path=str(folder))
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    refusal(lambda: load_tokenizer(config), "no EOS token")
    (folder / "tokenizer.json").write_text('{"model": 3}')
    refusal(lambda: load_tokenizer(config), "model.path", "does not load")
    (folder / "tokenizer.json").unlink()
    refusal(lambda: load_tokenizer(config), "no tokenizer in the folder", "model.tokenizer=")
    refusal(lambda: load_tokenizer(ModelConfig(path=str(folder), tokenizer=str(tmp_path / "none"))), "model.tokenizer")


def test_chat_template_file_replaces_the_tokenizers_own(tiny_folder, tmp_path):
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    config = ModelConfig(path=str(tiny_folder), chat_template=str(file))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert load_tokenizer(config).apply_chat_template(messages, tokenize=False) == "[a][b]"
    file.write_text("{% for m in messages %}\n{{ m['content' }}{% endfor %}")
    refusal(lambda: load_tokenizer(config), str(file), "line 2")
    file.unlink()
    refusal(lambda: load_tokenizer(config), str(file), "cannot be read")


def test_tokenizer_larger_than_the_embedding_is_refused():
    check_pair(tiny_config(), tiny_tokenizer())
    check_pair(tiny_config(vocab_size=259), tiny_tokenizer())
    refusal(lambda: check_pair(tiny_config(vocab_size=258), tiny_tokenizer()), "0 to 257", "1 beyond", "<pad>", "258")


def test_identity_changes_with_the_files(folder):
    config = ModelConfig(path=str(folder))
    before = model_identity(config)
    assert before["weight_bytes"] == {"model.safetensors": os.path.getsize(folder / "model.safetensors")}
    set_key(folder / "config.json", rms_norm_eps=1e-4)
    after = model_identity(config)
    assert {name for name in before["sha256"] if before["sha256"][name] != after["sha256"][name]} == {"config.json"}
