"""Prompt tuning, P-tuning and prefix tuning: held to PEFT, to the papers' formulas and to what a user may get wrong."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft.tuners.p_tuning.model import PromptEncoder
from peft.tuners.prefix_tuning.model import PrefixEncoder
from safetensors.torch import load_file, save_file

from deltune.adapters.attach import attach, trainable
from deltune.adapters.config import named
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from tests.peft_twin import TOLERANCE, read_peft, save_peft, with_peft
from tests.tiny import save_tiny, tiny_config, tiny_model, tiny_tokenizer

IDS = torch.tensor([[5, 17, 200, 31, 90], [9, 250, 3, 77, 61]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
PROMPTS = {
    "prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "sampled": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", prompt_tuning_init="SAMPLE_VOCAB"),
    "p_tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", encoder_hidden_size=12),
    "p_tuning_lstm": peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", encoder_reparameterization_type="LSTM", encoder_num_layers=1),
    "prefix_tuning": peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix_mlp": peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=12),
}


def exact(**changes):
    return tiny_model(**changes).double()


def delta_of(model):
    return next(holder.adapters["default"] for _, holder in wrappers(model))


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 4}, {"head_dim": 16}], ids=str)
def test_it_is_pefts(kind, shape, tmp_path):
    """Logits with and without padding on the right, generation, gradients, and files both ways."""
    theirs = with_peft(exact(**shape), PROMPTS[kind])
    save_peft(theirs, tmp_path / "theirs")
    ours = load_adapter(exact(**shape), tmp_path / "theirs", trainable=True)
    assert (ours(IDS).logits - exact(**shape)(IDS).logits).abs().max() > 1e-3
    soft = 0 if kind.startswith("prefix") else 4  # PEFT leaves the soft tokens' logits in
    answer, expected = ours(IDS, attention_mask=MASK).logits, theirs(IDS, attention_mask=MASK).logits[:, soft:]
    assert (answer - expected)[MASK.bool()].abs().max() < TOLERANCE
    assert (ours(IDS).logits - theirs(IDS).logits[:, soft:]).abs().max() < TOLERANCE

    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 258, "eos_token_id": None}
    assert torch.equal(ours.generate(IDS, **settings), theirs.generate(input_ids=IDS, **settings))

    save_adapter(ours, tmp_path / "ours")
    again = read_peft(exact(**shape), tmp_path / "ours")
    assert (again(IDS).logits[:, soft:] - ours(IDS).logits).abs().max() < TOLERANCE
    assert torch.equal(load_file(tmp_path / "ours" / "adapter_model.safetensors")["prompt_embeddings"], load_file(tmp_path / "theirs" / "adapter_model.safetensors")["prompt_embeddings"])
    fields, known = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert fields.keys() <= known.keys()
    # PEFT fills these in on reading; an encoder's width where there is no encoder is one of them
    shapes = {"token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"} | ({"encoder_hidden_size"} if kind == "prefix_tuning" else set())
    assert {name: fields[name] for name in fields.keys() - shapes} == {name: known[name] for name in fields.keys() - shapes} | {"inference_mode": True}

    if kind in ("prompt_tuning", "prefix_tuning"):
        ours(IDS).logits.square().mean().backward()
        theirs(IDS).logits[:, soft:].square().mean().backward()
        expected = theirs.prompt_encoder["default"].embedding.weight.grad
        assert (delta_of(ours).tokens.grad - expected).abs().max() <= 1e-7 * max(1, expected.abs().max())  # theirs are in float32


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_the_encoder_is_pefts(encoder):
    model = attach(exact(), named("p_tuning", num_virtual_tokens=4, encoder=encoder, encoder_hidden_size=12, dtype="auto"))
    ours = delta_of(model)
    config = peft.PromptEncoderConfig(num_virtual_tokens=4, token_dim=32, num_transformer_submodules=1, encoder_hidden_size=12, encoder_reparameterization_type=encoder.upper())
    theirs = PromptEncoder(config).double()
    theirs.embedding.weight.data.copy_(ours.tokens)
    if encoder == "lstm":
        theirs.lstm_head.load_state_dict(ours.encoder.lstm.state_dict())
        theirs.mlp_head.load_state_dict(ours.encoder.mlp.state_dict())
    else:
        theirs.mlp_head.load_state_dict(ours.encoder.state_dict())
    expected = theirs(torch.arange(4)[None])[0]
    assert (ours.soft() - expected).abs().max() < 1e-12
    ours.soft().square().sum().backward()
    expected.square().sum().backward()
    assert torch.allclose(ours.tokens.grad, theirs.embedding.weight.grad, atol=1e-12)
    assert sum(p.numel() for p in trainable(model).values()) == sum(p.numel() for p in theirs.parameters())


def test_the_projection_is_pefts():
    model = attach(exact(), named("prefix_tuning", num_virtual_tokens=4, projection=True, encoder_hidden_size=12, dtype="auto"))
    ours = delta_of(model)
    theirs = PrefixEncoder(peft.PrefixTuningConfig(num_virtual_tokens=4, token_dim=16, num_layers=2, encoder_hidden_size=12, prefix_projection=True)).double()
    theirs.embedding.weight.data.copy_(ours.tokens)
    theirs.transform.load_state_dict(ours.encoder.state_dict())
    assert (ours.encoded() - theirs(torch.arange(4)[None])[0]).abs().max() < 1e-12


def test_a_soft_token_of_a_words_embedding_is_that_word():
    model = attach(exact(), named("prompt_tuning", num_virtual_tokens=3, init="text", init_ids=[7, 8], dtype="auto"))
    words = torch.tensor([[7, 8, 7]]).expand(2, -1)  # over and over
    expected = exact()(torch.cat([words, IDS], dim=1)).logits[:, 3:]
    assert (model(IDS).logits - expected).abs().max() < 1e-12


def test_a_prefix_of_words_keys_and_values_is_these_words():
    """The formula, by transformers' own cache: keys and values of three words in front of the text."""
    words = torch.tensor([[7, 8, 9]])
    cache = exact()(words, use_cache=True).past_key_values
    model = attach(exact(), named("prefix_tuning", num_virtual_tokens=3, dtype="auto"))
    with torch.no_grad():
        for i in range(3):
            for layer in range(2):
                for which, states in enumerate((cache.layers[layer].keys, cache.layers[layer].values)):
                    begin = (2 * layer + which) * 16  # 2 heads of 8
                    delta_of(model).tokens[i, begin : begin + 16] = states[0, :, i].flatten()
    expected = exact()(torch.cat([words.expand(2, -1), IDS], dim=1)).logits[:, 3:]
    assert (model(IDS).logits - expected).abs().max() < 1e-7  # norms are in float32


def test_parameter_counts_are_the_papers():
    d, layers, kv, n, h = 32, 2, 16, 5, 12
    counts = {
        ("prompt_tuning", ()): n * d,
        ("p_tuning", (("encoder_hidden_size", h),)): n * d + (d * h + h) + (h * h + h) + (h * d + d),
        ("prefix_tuning", ()): n * 2 * layers * kv,
        ("prefix_tuning", (("projection", True), ("encoder_hidden_size", h))): n * kv + (kv * h + h) + (h + 1) * 2 * layers * kv,
    }
    for (method, fields), count in counts.items():
        model = attach(tiny_model(), named(method, num_virtual_tokens=n, **dict(fields)))
        assert sum(p.numel() for p in trainable(model).values()) == count, method


def test_starts(tmp_path):
    table = tiny_model().get_input_embeddings().weight
    sampled = delta_of(attach(tiny_model(), named("prompt_tuning"))).tokens
    assert all((row == table).all(dim=1).any() for row in sampled) and len(sampled.unique(dim=0)) > 10
    drawn = delta_of(attach(tiny_model(), named("prompt_tuning", init="random", num_virtual_tokens=200))).tokens
    assert drawn.abs().max() <= 0.5 and abs(float(drawn.detach().std()) - 12**-0.5) < 0.01
    folder = save_tiny(tmp_path / "model")
    for fields in ({"init_tokenizer": str(folder)}, {}):
        model = tiny_model()
        model.config.name_or_path = str(folder)
        told = attach(model, named("prompt_tuning", init="text", init_text="good", num_virtual_tokens=6, **fields))
        ids = tiny_tokenizer()("good", add_special_tokens=False)["input_ids"]
        assert torch.equal(delta_of(told).tokens, table[(ids + ids)[:6]])
        save_adapter(told, tmp_path / "adapter")
        assert delta_of(load_adapter(tiny_model(), tmp_path / "adapter")).config.init_ids == ids  # no tokenizer was needed
        read_peft(tiny_model(), tmp_path / "adapter")
    scale = delta_of(attach(tiny_model(), named("p_tuning", num_virtual_tokens=200))).tokens
    assert abs(float(scale.detach().std()) - 1) < 0.05


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init": "text"}, "needs init_text or init_ids"),
        ({"init_text": "good"}, "say init=text"),
        ({"init": "text", "init_ids": [1, 2, 3], "num_virtual_tokens": 2}, "some would be left out"),
        ({"init": "text", "init_ids": [264]}, "264 is no token id; the vocabulary has 264"),
        ({"init": "text", "init_text": "good"}, "set init_tokenizer"),
        ({"init": "text", "init_text": "good", "init_tokenizer": "/nowhere/at/all"}, "no tokenizer in"),
    ],
    ids=str,
)
def test_a_start_that_cannot_be_is_refused(fields, words):
    model = tiny_model()
    model.config.name_or_path = ""
    with pytest.raises(AdapterError, match=words):
        attach(model, named("prompt_tuning", **fields))
    assert not wrappers(model)


def test_a_text_longer_than_the_prompt_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "model")
    with pytest.raises(AdapterError, match="init_text has 4 tokens and num_virtual_tokens is 3"):
        attach(tiny_model(), named("prompt_tuning", init="text", init_text="good", init_tokenizer=str(folder), num_virtual_tokens=3))


def test_settings_of_another_encoder_are_refused():
    for method, fields in (("p_tuning", {"encoder_dropout": 0.1}), ("p_tuning", {"encoder_num_layers": 3}), ("prefix_tuning", {"encoder_hidden_size": 4})):
        with pytest.raises(AdapterError, match=next(iter(fields))):
            attach(tiny_model(), named(method, **fields))


def test_an_lstm_drops_between_its_layers_in_training():
    model = attach(tiny_model(), named("p_tuning", encoder="lstm", encoder_dropout=0.5, num_virtual_tokens=4))
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_what_peft_means_and_we_do_not_have_is_refused_by_name(tmp_path):
    theirs = save_peft(with_peft(tiny_model(), PROMPTS["prompt_tuning"]), tmp_path / "theirs")
    fields = json.loads((theirs / "adapter_config.json").read_text())
    for name, value in (("num_transformer_submodules", 2), ("something_new", True), ("num_virtual_tokens", None)):
        (theirs / "adapter_config.json").write_text(json.dumps(fields | {name: value}))
        with pytest.raises(AdapterError, match=name):
            load_adapter(tiny_model(), theirs)
    (theirs / "adapter_config.json").write_text(json.dumps(fields | {"num_virtual_tokens": 5}))
    with pytest.raises(AdapterError, match=r"prompt_embeddings: .*4, 32.*5, 32"):
        load_adapter(tiny_model(), theirs)
    (theirs / "adapter_config.json").write_text(json.dumps(fields))
    save_file({"prompt_embeddings": torch.zeros(4, 32), "base_model.model.x": torch.zeros(1)}, theirs / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="nothing in this model takes"):
        load_adapter(tiny_model(), theirs)


def test_a_prefix_needs_one_shape_of_keys_in_every_layer():
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(tiny_config())
    model.model.layers[1].self_attn.k_proj = torch.nn.Linear(32, 8, bias=False)
    with pytest.raises(AdapterError, match=r"layers.1.self_attn.k_proj makes 8, and the config says 2 heads of 8"):
        attach(model, named("prefix_tuning"))
