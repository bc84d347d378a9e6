"""New tokens: what their rows start as, that they are trained and saved with an adapter, and that a plain base gets them."""

from __future__ import annotations

import json
import math

import pytest
import torch

import deltune
from deltune.adapters.attach import adapters, attach, merge
from deltune.adapters.convert import to_lora
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.named import method
from deltune.adapters.tokens import for_rows, set_rows
from deltune.cli import main
from deltune.errors import AdapterError, CheckpointError, ConfigError, Interrupted, ModelError
from deltune.models.config import NEW_ROWS, FourBit, ModelConfig
from deltune.models.load import empty, load, load_tokenizer, new_vocabulary
from deltune.models.vocabulary import Growth, starts
from deltune.tables import kept, lengthen
from tests.adapted import bits, same, shaken
from tests.test_train_command import StopAt, chain
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

IDS = torch.tensor([[1, 2, 258, 263, 264, 265, 266, 5]])


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture
def settings(tiny_folder, tmp_path):
    rows = [{"prompt": f"say <a> {word}", "completion": f"hello <|turn|>{word}"} for word in ("one", "two", "three", "four", "five", "six", "seven")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": "r", "output": str(tmp_path / "runs"), "model": str(tiny_folder), "data.train": [str(data)], "data.eval": [str(data)],
        "model.add_tokens": ["<a>", "hello"], "model.add_special_tokens": ["<|turn|>"], "data.template": "plain", "engine.precision": "fp32",
        "train.steps": 4, "train.micro_batch": 2, "checkpoint.every": 2, "eval.samples": 0,
        "log.progress": "off", "log.report": False, "log.sinks": [], "optim.lr": 1e-2,
    }  # fmt: skip


# ---------------------------------------------------------------- how rows start


def growth(**texts):
    """Rows 8 to 11 of a table with 8, of which 6 are known; token ids by their texts."""
    ids = {264 - 256 + i: text for i, text in enumerate(texts)}
    pieces = {i: tuple(texts[text]) for i, text in ids.items()}
    return Growth(8, 12, tuple(range(8, 12)), ids, pieces, tuple(range(6)))


TABLE = torch.randn(12, 5, generator=torch.Generator().manual_seed(3)) * torch.tensor([1.0, 2, 3, 4, 5]) + 7


@pytest.mark.parametrize("how", NEW_ROWS)
def test_a_row_is_a_function_of_seed_and_text(how):
    one = starts(growth(cat=[1, 2], dog=[3]), TABLE, how, name="input", seed=5)
    other = starts(growth(dog=[3], cow=[4, 5], cat=[1, 2]), TABLE, how, name="input", seed=5)
    assert torch.equal(one[0], other[2]) and torch.equal(one[1], other[0])
    again, drawn = starts(growth(cat=[1, 2], dog=[3]), TABLE, how, name="input", seed=6), how not in ("subwords", "mean")
    assert torch.equal(one, again) != drawn
    assert torch.equal(one, starts(growth(cat=[1, 2], dog=[3]), TABLE, how, name="head", seed=5)) != drawn


def test_rows_start_by_the_known_tokens_rows():
    known = TABLE[:6].double()
    new = growth(cat=[1, 2, 2], dog=[])
    mean = starts(new, TABLE, "mean", name="input", seed=0)
    assert torch.equal(mean, known.mean(0).float().expand(4, 5))
    subwords = starts(new, TABLE, "subwords", name="input", seed=0)
    assert torch.equal(subwords[0], ((known[1] + 2 * known[2]) / 3).float()) and torch.equal(subwords[1:], mean[1:])


@pytest.mark.parametrize("how", ["normal", "uniform", "xavier", "kaiming"])
def test_drawn_rows_have_the_moments_that_are_said(how):
    many = 4000
    table = torch.cat([TABLE[:6], torch.zeros(many, 5)])
    new = Growth(6, 6 + many, tuple(range(6, 6 + many)), {i: str(i) for i in range(6, 6 + many)}, {}, tuple(range(6)))
    rows = starts(new, table, how, name="input", seed=1).double()
    known = TABLE[:6].double()
    mean, deviation = (known.mean(0), known.std(0, correction=0)) if how in ("normal", "uniform") else (torch.zeros(5), torch.ones(5))
    deviation = deviation * {"xavier": math.sqrt(2 / (len(table) + 5)), "kaiming": math.sqrt(2 / 5)}.get(how, 1.0)
    assert (rows.mean(0) - mean).abs().le(5 * deviation / math.sqrt(many)).all()
    assert torch.allclose(rows.std(0), deviation.double(), rtol=0.06)
    if how == "uniform":
        assert (rows - mean).abs().le(deviation * math.sqrt(3) * 1.0001).all()


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("tie", [False, True])
def test_a_longer_table_keeps_rows_ties_and_the_config(tie):
    model, plain = tiny_model(tie_word_embeddings=tie), tiny_model(tie_word_embeddings=tie)
    give_back = kept(model)
    lengthen(model, 320)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    assert model.config.vocab_size == model.vocab_size == model.lm_head.out_features == model.model.embed_tokens.num_embeddings == 320
    logits = model(IDS.clamp(max=263)).logits
    assert torch.equal(logits[..., :264], plain(IDS.clamp(max=263)).logits) and not logits[..., 264:].any()
    give_back()
    assert same(bits(model), bits(plain)) and model.config.vocab_size == 264 and model.lm_head.out_features == 264


def test_a_heads_bias_gets_its_mean():
    from transformers import PhiConfig, PhiForCausalLM

    model = PhiForCausalLM(PhiConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    torch.nn.init.normal_(model.lm_head.bias)
    mean = model.lm_head.bias.double().mean().float()
    lengthen(model, 24)
    assert torch.equal(model.lm_head.bias[20:], mean.expand(4)) and model.lm_head.bias.requires_grad


def test_what_cannot_be_lengthened_says_why():
    model = tiny_model()
    with pytest.raises(ModelError, match="has 264 rows already, more than 100"):
        lengthen(model, 100)
    attach(model, method("lora", targets=["embed_tokens"]))
    with pytest.raises(ModelError, match=r"input embedding is a Adapted.*before any adapter"):
        lengthen(model, 300)


def test_a_quantised_head_is_refused():
    from deltune.weights import quantise

    model = tiny_model()
    model.lm_head.weight = torch.nn.Parameter(quantise(model.lm_head.weight.detach(), "nf4"), requires_grad=False)
    with pytest.raises(ModelError, match=r"output head cannot be given more rows, for its weight is quantised. What fits: .* as quant=nf4 leaves it"):
        lengthen(model, 300)
    assert model.config.vocab_size == 264 and len(model.model.embed_tokens.weight) == 264


# ---------------------------------------------------------------- the tokenizer


def added(folder, **changes):
    return load_tokenizer(ModelConfig(path=str(folder), **changes))


def test_tokens_are_one_id_and_only_special_ones_are_left_out(tiny_folder):
    tokenizer = added(tiny_folder, add_tokens=["hello"], add_special_tokens=["<|turn|>"])
    ids = tokenizer("hello<|turn|> x")["input_ids"]
    assert ids[:2] == [259, 260] and len(ids) == 4
    assert tokenizer.decode(ids) == "hello<|turn|> x" and tokenizer.decode(ids, skip_special_tokens=True) == "hello x"


def test_a_file_of_tokens_is_the_list(tiny_folder, tmp_path):
    (tmp_path / "tokens.txt").write_bytes("\ufeffhello\r\nwörld \n".encode())
    assert added(tiny_folder, add_tokens=str(tmp_path / "tokens.txt")).get_added_vocab().keys() >= {"hello", "wörld "}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(add_tokens=[""]), r"add_tokens\[0\]: an empty text"),
        (dict(add_tokens=["xy", "a"]), r"add_tokens\[1\]: 'a' is a token already \(id 64\)"),
        (dict(add_tokens=[" "]), r"' ' is a token already \(id 220\)"),
        (dict(add_tokens=["xy"], add_special_tokens=["xy"]), r"add_special_tokens\[0\]: 'xy' is given twice, first in model.add_tokens\[0\]"),
        (dict(add_tokens="{}/none.txt"), "none.txt: cannot be read: No such file"),
        (dict(add_tokens="{}/gap.txt"), "gap.txt:2: an empty text cannot be a token"),
        (dict(add_tokens="{}/empty.txt"), "holds no token"),
        (dict(add_tokens="{}/latin.txt"), r"not UTF-8 text \(byte 1\)"),
        (dict(pad_token="add"), r"the tokenizer has a token that pads, '<pad>'"),
        (dict(pad_token="unk"), "has no unk token"),
    ],
)
def test_tokens_that_cannot_be_added_are_one_message(tiny_folder, tmp_path, changes, message):
    (tmp_path / "gap.txt").write_text("xy\n\nyz\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"x\xe4\n")
    changes = {key: value.format(tmp_path) if isinstance(value, str) else value for key, value in changes.items()}
    with pytest.raises(ModelError, match=message):
        added(tiny_folder, **changes)


@pytest.fixture
def padless(tmp_path):
    """A folder whose tokenizer names no token that pads."""
    folder = save_tiny(tmp_path / "padless")
    tokenizer = tiny_tokenizer()
    tokenizer._special_tokens_map["pad_token"] = None
    tokenizer.save_pretrained(folder)
    return folder


def test_which_token_pads(padless):
    assert added(padless).pad_token == "</s>" == added(padless, pad_token="eos").pad_token
    tokenizer, new = added(padless, pad_token="add"), new_vocabulary(ModelConfig(path=str(padless), pad_token="add"))
    assert tokenizer.pad_token == "[PAD]" and tokenizer.pad_token_id == 259 and new.texts == {259: "[PAD]"} and new.size == 264


def test_specials_that_a_llama_file_leaves_nameless_are_named(tmp_path, caplog):
    """Early Llama conversions have the tokens and name none of them."""
    folder = save_tiny(tmp_path / "nameless")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<unk>"])
    tokenizer.save_pretrained(folder)
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | {"bos_token": "", "eos_token": "", "unk_token": ""}))
    repaired = added(folder)
    assert (repaired.bos_token, repaired.eos_token, repaired.unk_token) == ("<s>", "</s>", "<unk>")
    assert repaired.eos_token_id == 257 and not new_vocabulary(ModelConfig(path=str(folder)))


def test_the_model_gets_rows_up_to_a_multiple(tiny_folder):
    config = ModelConfig(path=str(tiny_folder), add_tokens=[f"token {i}" for i in range(9)], vocab_multiple=64)
    new = new_vocabulary(config)
    assert (new.rows, new.size) == (264, 320) and new.ids == (*range(259, 264), *range(264, 320))
    assert new.pieces[259] == tuple(load_tokenizer(ModelConfig(path=str(tiny_folder)))("token 0")["input_ids"])
    assert new_vocabulary(ModelConfig(path=str(tiny_folder), vocab_multiple=8)) is None
    for model in (load(config), empty(config)):
        assert model.lm_head.weight.shape == (320, 32) and model.config.vocab_size == 320


# ---------------------------------------------------------------- in an adapter


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", ["lora", "vera", "prompt_tuning", "dora"])
def test_a_plain_base_answers_as_the_one_that_was_trained(tie, name, tmp_path):
    model = tiny_model(tie_word_embeddings=tie)
    lengthen(model, 267)
    where = {} if name == "prompt_tuning" else {"targets": ["q_proj"]}
    attach(model, method(name, trainable_token_indices=for_rows(model, [3, 264, 265, 266]), **where))
    shaken(model)
    expected = model(IDS).logits
    save_adapter(model, tmp_path)
    plain = tiny_model(tie_word_embeddings=tie)
    load_adapter(plain, tmp_path)
    assert torch.equal(plain(IDS).logits, expected)
    assert list(adapters(plain)) == ["default"] and adapters(plain)["default"].delta == adapters(model)["default"].delta
    assert plain.config.vocab_size == 267
    if name != "prompt_tuning":
        assert torch.allclose(merge(plain)(IDS).logits, expected, atol=1e-5)
        assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tie


@pytest.mark.parametrize("tie", [False, True])
def test_peft_answers_alike(tie, tmp_path):
    import peft

    model = tiny_model(tie_word_embeddings=tie)
    lengthen(model, 267)
    attach(model, method("lora", trainable_token_indices=for_rows(model, [3, 264, 265, 266]), targets=["q_proj", "down_proj"]))
    shaken(model)
    save_adapter(model, tmp_path / "ours")
    theirs = tiny_model(tie_word_embeddings=tie)
    theirs.resize_token_embeddings(267, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    assert torch.allclose(theirs(IDS).logits, model(IDS).logits, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny_model(tie_word_embeddings=tie)
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_table_that_peft_saved_after_a_resize_is_the_bases(tmp_path):
    """QLoRA's way: the base is resized and PEFT writes the whole tables."""
    import peft

    theirs = tiny_model(tie_word_embeddings=False)
    theirs.resize_token_embeddings(267, mean_resizing=False)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = load_adapter(tiny_model(), tmp_path)
    assert torch.allclose(model(IDS).logits, theirs(IDS).logits, atol=1e-6) and model.config.vocab_size == 267


def test_tables_trained_in_full_bring_their_rows(tmp_path):
    model = tiny_model()
    lengthen(model, 267)
    attach(model, method("lora", targets=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    set_rows(model, model.get_input_embeddings(), [264, 265, 266], torch.ones(3, 32))
    assert (model.model.embed_tokens.weight[264:] == 1).all() and not model.model.embed_tokens.base_layer.weight[264:].any()
    shaken(model)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(tiny_model(), tmp_path)(IDS).logits, model(IDS).logits)


def test_a_table_that_scales_is_trained_in_full(tmp_path):
    """Gemma's embeddings multiply their rows, so single rows cannot stand beside them; tied tables become two copies."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    def gemma():
        torch.manual_seed(0)
        small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
        return Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=264, **small)).eval()

    model = gemma()
    lengthen(model, 267)
    with pytest.raises(AdapterError, match=r"adapter.modules_to_save=\[embed_tokens, lm_head\]"):
        attach(model, method("lora", targets=["q_proj"], trainable_token_indices=for_rows(model, [264, 265, 266])))
    half = attach(gemma(), method("lora", targets=["q_proj"], modules_to_save=["embed_tokens"]))
    with pytest.raises(AdapterError, match=r"that this adapter does not train.*\[embed_tokens, lm_head\]"):
        set_rows(half, half.get_output_embeddings(), [1], torch.ones(1, 16))
    attach(model, method("lora", targets=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]))
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        set_rows(model, table, [264, 265, 266], torch.ones(3, 16))
    shaken(model)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(gemma(), tmp_path)(IDS).logits, model(IDS).logits)


def test_a_file_without_all_rows_leaves_the_base_alone(tmp_path):
    model = tiny_model()
    lengthen(model, 267)
    attach(model, method("lora", targets=["q_proj"], trainable_token_indices=for_rows(model, [264, 266])))
    save_adapter(model, tmp_path / "gap")
    other = tiny_model(seed=1)
    lengthen(other, 267)
    attach(other, method("lora", targets=["q_proj"], trainable_token_indices=for_rows(other, [264, 265, 266])))
    save_adapter(other, tmp_path / "other")
    for folder, message in (("gap", "the file lacks the row of token 265"), ("other", "another base model")):
        plain = tiny_model()
        before = bits(plain)
        with pytest.raises(AdapterError, match=message):
            load_adapter(plain, tmp_path / folder)
        assert same(bits(plain), before) and plain.config.vocab_size == 264 and plain.lm_head.out_features == 264


def test_a_head_with_a_bias_is_written_as_our_own(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    def phi():
        torch.manual_seed(0)
        model = PhiForCausalLM(PhiConfig(vocab_size=264, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
        return torch.nn.init.normal_(model.lm_head.bias) is not None and model

    model = phi()
    lengthen(model, 267)
    attach(model, method("lora", targets=["q_proj"], trainable_token_indices=for_rows(model, [264, 265, 266])))
    shaken(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DELTUNE_lora"
    assert torch.equal(load_adapter(phi(), tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(targets=["embed_tokens"]), "model.embed_tokens is adapted as a whole"),
        (dict(modules_to_save=["embed_tokens"]), r"model.embed_tokens is trained in full \(modules_to_save\)"),
        (dict(trainable_token_indices={"embed": [1]}), "'embed' matches no module of the model. Nearest names: embed_tokens"),
        (dict(trainable_token_indices={"norm": [1]}), "is a LlamaRMSNorm; rows are trained of Embedding and Linear"),
        (dict(trainable_token_indices=[264]), "has rows 0 to 263, and none for 264"),
        (dict(trainable_token_indices=[5, 5]), "5 is given twice"),
    ],
)
def test_rows_that_cannot_be_trained_are_one_message(changes, message):
    model = tiny_model()
    before = bits(model)
    with pytest.raises(AdapterError, match=message):
        attach(model, method("lora", **({"targets": ["q_proj"], "trainable_token_indices": [1]} | changes)))
    assert same(bits(model), before)


@pytest.mark.parametrize("tie", [False, True])
def test_more_rows_than_the_table_is_wide_merge_without_a_product(tie):
    model = tiny_model(tie_word_embeddings=tie)
    lengthen(model, 320)
    attach(model, method("lora", targets=["q_proj"], trainable_token_indices=for_rows(model, [3, *range(264, 320)])))
    shaken(model)
    expected, part = model(IDS).logits, model.model.embed_tokens.adapters["default"]
    rows = part.shared.rows.detach().clone()
    assert part.product() is None and part.delta(None).shape == (32, 320)
    merge(model)
    assert torch.equal(model.model.embed_tokens.weight[264:], rows[1:]) and torch.allclose(model(IDS).logits, expected, atol=1e-5)


def test_plain_lora_made_of_another_method_keeps_the_rows(tmp_path):
    model = tiny_model()
    lengthen(model, 267)
    attach(model, method("vera", rank=4, targets=["q_proj"], trainable_token_indices=for_rows(model, [264, 265, 266])))
    shaken(model)
    expected = model(IDS).logits
    to_lora(model)
    save_adapter(model, tmp_path, name="lora")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert torch.allclose(load_adapter(tiny_model(), tmp_path)(IDS).logits, expected, atol=1e-5)


# ---------------------------------------------------------------- a run


@pytest.mark.parametrize("tie", [False, True])
def test_a_runs_folder_is_all_that_it_takes(settings, tied_folder, tmp_path, capsys, tie):
    changes = {"model": str(tied_folder)} if tie else {}
    outcome = deltune.train(settings | changes | {"model.vocab_multiple": 64})
    assert outcome.metrics_after["loss"] < outcome.metrics_before["loss"]
    model = outcome.model.eval()
    rows = model.model.embed_tokens.adapters["default"].shared.rows
    assert rows.shape == (3 + 56, 32) and rows.requires_grad
    plain = load_adapter(tiny_model(tie_word_embeddings=tie), outcome.adapter)
    assert torch.allclose(plain(IDS).logits, model(IDS).logits, atol=1e-6)  # in one node here and plainly there

    def evaluated(*words):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        assert main(["eval", f"data={settings['data.train'][0]}", "data.template=plain", "engine.precision=fp32", f"out={out}", *words]) == 0
        return json.loads((out / "metrics.json").read_text())["all"]["loss"]

    base = settings["model"] if not tie else str(tied_folder)
    by_run, by_folder = evaluated(f"run={outcome.folder}"), evaluated(f"model={base}", f"adapter={outcome.adapter}")
    assert main(["merge", f"run={outcome.folder}", f"out={tmp_path / 'merged'}"]) == 0
    merged = evaluated(f"model={tmp_path / 'merged'}")
    assert by_run == by_folder == pytest.approx(outcome.metrics_after["loss"], rel=1e-5)
    assert merged == pytest.approx(by_run, rel=1e-4)
    assert json.loads((tmp_path / "merged/config.json").read_text())["vocab_size"] == 320
    assert load_tokenizer(ModelConfig(path=str(tmp_path / "merged")))("hello")["input_ids"] == [260]
    capsys.readouterr()
    assert main(["generate", f"run={outcome.folder}", "prompt=say <a> one", "max_new_tokens=4", "template=plain"]) == 0
    answers = capsys.readouterr().out
    assert main(["generate", f"model={base}", f"adapter={outcome.adapter}", "prompt=say <a> one", "max_new_tokens=4", "template=plain"]) == 0
    assert capsys.readouterr().out == answers


@pytest.mark.parametrize("name", ["lora", "trainable_tokens"])
def test_a_stopped_run_with_new_tokens_goes_on_to_the_same_end(settings, tmp_path, name):
    settings = settings | {"adapter": name, "model.new_rows": "normal"}
    straight = deltune.train(settings | {"name": "straight"})
    with pytest.raises(Interrupted):
        deltune.train(settings, callbacks=[StopAt(3)])
    outcome = deltune.train(settings)
    assert chain(tmp_path) == chain(tmp_path, "straight")
    for a, b in zip(straight.model.parameters(), outcome.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_does_not_go_on_with_other_tokens(settings, tmp_path):
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("<a>\nhello\n")
    settings = settings | {"model.add_tokens": str(tokens)}
    with pytest.raises(Interrupted):
        deltune.train(settings, callbacks=[StopAt(3)])
    tokens.write_text("hello\n<a>\n")
    with pytest.raises(CheckpointError, match="other new tokens: id 259 is '<a>' there, 'hello' now"):
        deltune.train(settings)


def test_without_an_adapter_the_rows_are_the_models(settings, tmp_path):
    outcome = deltune.train(settings | {"adapter": None, "train.steps": 1, "optim.lr": 1e-30, "optim.weight_decay": 0.0, "model.new_rows": "mean"})
    model = load(ModelConfig(path=str(outcome.adapter)))
    old = tiny_model().model.embed_tokens.weight[:259]
    assert torch.allclose(model.model.embed_tokens.weight[259:262], old.mean(0).expand(3, 32), atol=1e-6)
    assert load_tokenizer(ModelConfig(path=str(outcome.adapter)))("hello")["input_ids"] == [260]
    assert main(["eval", f"run={outcome.folder}", f"data={settings['data.train'][0]}", "data.template=plain"]) == 0


def test_settings_without_effect_are_refused(settings, tmp_path):
    plain = {key: value for key, value in settings.items() if "add_" not in key}
    for changes, message in (
        ({"model.new_rows": "mean"}, r"model.new_rows=mean .*has no effect without new tokens"),
        ({"model.grow": True}, r"model.grow=true .*has no effect without model.tokenizer"),
    ):
        with pytest.raises(ConfigError, match=message):
            deltune.train(plain | changes)
    from deltune.settings import GenerateSettings
    from deltune.settings import load as read

    with pytest.raises(ConfigError, match=r"model.add_tokens=.*has no effect: tokens are added where a model is trained"):
        read(GenerateSettings, mapping={"model.add_tokens": ["x"], "prompt": "x"})


def test_a_merged_vocabulary_grows_the_model(settings, tmp_path):
    """The way of Chinese-LLaMA: pieces of another vocabulary, rows for them, training, one folder."""
    from deltune.models import pieces
    from tests.test_vocab_command import LATIN, OTHER, trained

    base, other = trained(tmp_path, LATIN, "base"), trained(tmp_path, OTHER, "other")
    folder = tmp_path / "model"
    tiny_model(vocab_size=340).save_pretrained(folder)
    from deltune.commands.vocab import _write

    _write(pieces.read(base, "base"), tmp_path, folder)
    assert main(["vocab", "merge", f"base={folder}", f"other={other}", f"out={tmp_path / 'merged'}"]) == 0
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"prompt": "the dog", "completion": "рыбак чинит сети"}) + "\n" for _ in range(8)))
    changes = {"model": str(folder), "model.tokenizer": str(tmp_path / "merged"), "model.grow": True, "data.train": [str(text)], "data.eval": []}
    plain = {key: value for key, value in settings.items() if not key.startswith(("model.add", "eval."))}
    new = new_vocabulary(ModelConfig(path=str(folder), tokenizer=str(tmp_path / "merged"), grow=True))
    word = next(i for i, piece in new.texts.items() if piece == " рыбак")
    assert len(new.pieces[word]) > 5 and pieces.processor_of(pieces.read(base, "x")).decode(list(new.pieces[word])) == "рыбак"
    outcome = deltune.train(plain | changes)
    restored = tiny_model(vocab_size=340)
    load_adapter(restored, outcome.adapter)
    assert torch.allclose(restored(IDS).logits, outcome.model.eval()(IDS).logits, atol=1e-6) and restored.config.vocab_size == new.size
    with pytest.raises(ModelError, match=r"tokens are missing or have another id"):
        new_vocabulary(ModelConfig(path=str(folder), tokenizer=str(save_tiny(tmp_path / "other")), grow=True))
    with pytest.raises(ModelError, match=r"model.grow has no effect"):
        new_vocabulary(ModelConfig(path=str(folder), tokenizer=str(folder), grow=True))


def test_a_quantised_base_takes_new_tokens(settings, tmp_path):
    outcome = deltune.train(settings | {"quant": "nf4", "engine.precision": "auto"})
    assert outcome.metrics_after["loss"] < outcome.metrics_before["loss"]
    config = ModelConfig(path=settings["model"])
    again = load(config, quant=FourBit())
    load_adapter(again, outcome.adapter)
    assert len(again.model.embed_tokens.weight) == 264 and again.model.embed_tokens.adapters["default"].shared.rows.shape == (3, 32)


def test_a_plan_counts_the_new_rows(settings):
    from deltune.commands.estimate import shapes_of
    from deltune.settings import run_from

    plain = {key: value for key, value in settings.items() if not key.startswith("model.add")}
    counts = [sum(p.numel() for p in shapes_of(run_from(one)).parameters() if p.requires_grad) for one in (plain, settings)]
    assert counts[1] - counts[0] == 2 * 3 * 32
