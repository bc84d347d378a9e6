"""Adapter files are read exactly or not at all, and a refusal leaves the model as it was."""

from __future__ import annotations

import json
import logging
import random
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltune.adapters.attach import adapters, attach, detach, merge_in_place, trainable
from deltune.adapters.config import OverTime
from deltune.adapters.files import load_adapter, save_adapter
from deltune.adapters.files.identity import identity
from deltune.adapters.methods.lora import LoraConfig
from deltune.errors import AdapterError
from tests.tiny import tiny_model

CONFIG, TENSORS, RECORD = "adapter_config.json", "adapter_model.safetensors", "deltune.json"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
IDS = torch.tensor([[1, 5, 2, 10, 7]])


def made(model=None, **changes):
    """A model with an adapter off its start."""
    model = attach(model or tiny_model(), LoraConfig(**({"rank": 2, "targets": ["q_proj", "v_proj"]} | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def folder(tmp_path):
    return save_adapter(made(), tmp_path / "adapter")


def as_from_peft(folder):
    """Without our own record, which would notice changed tensors first."""
    (folder / RECORD).unlink()
    return folder


def change_fields(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def state(model):
    """Everything a failed load could have touched."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    parameters = [(name, parameter.requires_grad, parameter.sum().item()) for name, parameter in model.named_parameters()]
    return modules, parameters, sorted(vars(model))


def refused(folder, message, model=None, **options):
    """Loading raises, and both a plain model and one with another adapter stay as they are."""
    for target in [model] if model is not None else [tiny_model(), made()]:
        before = state(target)
        with pytest.raises(AdapterError, match=message) as caught:
            load_adapter(target, folder, name="new", **options)
        assert state(target) == before
        assert str(folder) in str(caught.value)


# ---------------------------------------------------------------- tensors

TENSOR_FAULTS = {
    "wrong shape": (lambda t: t.update({FIRST: torch.zeros(3, 32)}), r"q_proj\.lora_A\.weight: shape \[3, 32\] found, \[2, 32\] expected"),
    "transposed": (lambda t: t.update({FIRST: t[FIRST].T.contiguous()}), r"shape \[32, 2\] found"),
    "missing": (lambda t: t.pop(FIRST), r"lacks .*layers\.0\.self_attn\.q_proj\.lora_A\.weight"),
    "left over": (lambda t: t.update({FIRST.replace("q_proj", "o_proj"): t[FIRST].clone()}), r"nothing in this model takes: .*o_proj"),
    "a part that LoRA has not": (lambda t: t.update({FIRST.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)}), "lora_magnitude_vector"),
    "not a number": (lambda t: t[FIRST].view(-1)[3:4].fill_(float("nan")), "1 of 64 values are not finite"),
    "infinite": (lambda t: t[FIRST].fill_(float("inf")), "64 of 64 values are not finite"),
    "whole numbers": (lambda t: t.update({FIRST: torch.zeros(2, 32, dtype=torch.int64)}), r"torch\.int64 found"),
    "eight bits": (lambda t: t.update({FIRST: torch.zeros(2, 32, dtype=torch.float8_e4m3fn)}), "float8_e4m3fn tensors"),
    "float64": (lambda t: t.update({k: v.double() for k, v in t.items()}), "would be rounded"),
    "renamed": (lambda t: t.update({"x" + FIRST: t.pop(FIRST)}), "lacks .* and has tensors"),
    "empty": (lambda t: t.clear(), "lacks .* and 3 more"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensors_that_do_not_fit_are_refused(folder, fault):
    change, message = TENSOR_FAULTS[fault]
    change_tensors(as_from_peft(folder), change)
    refused(folder, message)


def test_a_damaged_or_exchanged_file_is_noticed(folder):
    for change in (lambda t: t[FIRST].add_(1e-6), lambda t: t.clear()):
        change_tensors(folder, change)
        refused(folder, "adapter_model.safetensors is not the file that was saved with it")


def test_every_bit_of_the_tensor_file_is_guarded(folder):
    path = folder / TENSORS
    whole = bytearray(path.read_bytes())
    places = random.Random(0).sample(range(len(whole)), 60)
    model = tiny_model()
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        refused(folder, "adapter_model", model)
    for size in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, "adapter_model", model)


@pytest.mark.parametrize("ending", ["bin", "pt", "pkl", "ckpt"])
def test_a_pickle_is_not_opened(folder, ending):
    (folder / TENSORS).unlink()
    (folder / f"adapter_model.{ending}").write_bytes(b"cos\nsystem\n(S'touch /tmp/opened'\ntR.")
    refused(folder, "this is a pickle.*safetensors")


def test_missing_files_are_named(folder, tmp_path):
    (folder / TENSORS).unlink()
    refused(folder, "adapter_model.safetensors: no such file")
    refused(tmp_path / "nowhere", "no adapter_config.json here")


# ---------------------------------------------------------------- fields

SET = {
    "use_qalora": True,
    "lora_bias": True,
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [1],
    "velora_config": {"num_groups": 64},
    "megatron_config": {"x": 1},
    "megatron_core": "another",
    "qalora_group_size": 32,
    "ensure_weight_tying": True,
    "bias": "all",
    "a_field_of_next_year": 0.5,
    "another": 0,
}


@pytest.mark.parametrize("field", SET)
def test_a_field_that_may_change_the_mathematics_is_refused(folder, field):
    change_fields(folder, **{field: SET[field]})
    refused(folder, rf"{field} is .*not supported and may change what the adapter computes")


def test_parameters_that_this_model_does_not_have_are_refused(folder):
    change_fields(folder, target_parameters=["experts.down_proj"])
    refused(folder, r"target_parameters: 'experts\.down_proj' matches no parameter of this model that holds experts' weights")


def test_fields_that_say_nothing_are_no_obstacle(folder):
    before = load_adapter(tiny_model(), folder)(IDS).logits
    nothing = [None, False, [], {}, ""]
    change_fields(folder, **{f"field_{i}": value for i, value in enumerate(nothing)}, **dict.fromkeys(SET))
    change_fields(folder, megatron_core="megatron.core", bias="none", auto_mapping={"base_model_class": "X"}, task_type="SEQ_CLS", inference_mode=False, qalora_group_size=16)
    assert torch.equal(load_adapter(tiny_model(), folder)(IDS).logits, before)


@pytest.mark.parametrize("kind", ["XLORA", "NO_SUCH_TYPE", "lora", None, 3, [], {}])
def test_another_method_is_refused_by_name(folder, kind):
    change_fields(folder, peft_type=kind)
    refused(folder, rf"peft_type is {re.escape(repr(kind))}; supported are .*LORA")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(r=4), r"shape \[2, 32\] found, \[4, 32\] expected"),
        (dict(target_modules=["q_proj"]), "nothing in this model takes"),
        (dict(target_modules=["q_proj", "v_proj", "o_proj"]), r"lacks .*o_proj"),
        (dict(target_modules=["c_attn"]), "match no module of this model"),
        (dict(target_modules=["q_proj", "mlp"]), "is a LlamaMLP"),
        (dict(target_modules=None), "match no module"),
        (dict(target_modules="(("), "no regular expression"),
        (dict(modules_to_save=["lm_head"]), r"lacks base_model\.model\.lm_head\.weight"),
        (dict(layers_to_transform=[0]), r"nothing in this model takes: .*layers\.1"),
        (dict(lora_dropout=2.0), "dropout is 2.0"),
        (dict(r="2"), "rank is '2'"),
        (dict(r=0), "rank is 0"),
    ],
)
def test_fields_that_do_not_fit_the_tensors_or_the_model_are_refused(folder, fields, message):
    change_fields(folder, **fields)
    refused(folder, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"', "[" * 100_000, "\ufeff{}", "nul"])
def test_text_that_is_no_config_is_refused(folder, text):
    for name in (CONFIG, RECORD):
        kept = (folder / name).read_text()
        (folder / name).write_text(text, encoding="utf-8")
        refused(folder, name, tiny_model())
        (folder / name).write_text(kept)
    (folder / CONFIG).write_bytes(b"\xff\xfe{}")
    refused(folder, "not readable as JSON", tiny_model())


def test_no_value_of_any_field_ends_in_a_traceback(folder):
    fields = json.loads((folder / CONFIG).read_text())
    record = json.loads((folder / RECORD).read_text())
    values = [None, True, -1, 3, 2.5, 1e999, "x", "((", "", [], [1], ["x"], [[]], [None], {}, {"x": 1}, {"((": 2}, {"q_proj": "x"}, {"q_proj": -1}]
    model = tiny_model()
    before = state(model)
    num_refused = 0
    for name, whole in ((CONFIG, fields), (RECORD, record), (RECORD, {**record, **record["base"]})):
        for field in whole:
            for value in values:
                changed = whole | {field: value} if field in record or name == CONFIG else record | {"base": record["base"] | {field: value}}
                (folder / name).write_text(json.dumps(changed))
                try:
                    detach(load_adapter(model, folder))
                except AdapterError:
                    num_refused += 1
        (folder / CONFIG).write_text(json.dumps(fields))
        (folder / RECORD).write_text(json.dumps(record))
    assert state(model) == before
    assert num_refused > 150


# ---------------------------------------------------------------- the base model


def test_another_base_is_refused_unless_asked_for(folder):
    other = tiny_model(seed=1)
    refused(folder, "another base model: it has the same shapes and other weights.*any_base", other)
    assert "default" in adapters(load_adapter(other, folder, any_base=True))
    deeper = tiny_model(num_hidden_layers=3)
    refused(folder, r"it was a LlamaForCausalLM of [\d,]+ parameters, and this is a LlamaForCausalLM of [\d,]+", deeper)
    refused(folder, r"lacks .*layers\.2", deeper, any_base=True)


def test_one_changed_weight_makes_another_base():
    model = tiny_model()
    before = identity(model)
    assert identity(tiny_model()) == before
    for name, parameter in model.named_parameters():
        saved = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.01)
        assert identity(model)["weights"] != before["weights"], name
        assert identity(model)["shapes"] == before["shapes"]
        with torch.no_grad():
            parameter.copy_(saved)
    assert identity(model) == before


def test_samples_fall_into_all_rows_and_columns():
    layer = torch.nn.Linear(512, 512, bias=False)
    columns, rows = set(), set()
    with torch.no_grad():
        layer.weight.copy_(torch.arange(512 * 512).view(512, 512))
        from deltune.adapters.files.identity import _sample

        for value in _sample(layer.weight).long().tolist():
            rows.add(value // 512)
            columns.add(value % 512)
    assert len(rows) > 40 and len(columns) > 40


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_base_in_another_type_is_the_same_base(tmp_path, saved, loaded):
    stored = tiny_model().to(torch.bfloat16)  # what a model folder holds
    folder = save_adapter(made(stored.to(saved)), tmp_path / "a")
    assert adapters(load_adapter(tiny_model().to(torch.bfloat16).to(loaded), folder))
    refused(folder, "other weights", tiny_model(seed=1).to(loaded))


def test_a_base_that_cannot_be_compared_is_a_warning(folder, tmp_path, caplog):
    half = save_adapter(made(tiny_model().to(torch.float16)), tmp_path / "half")
    with caplog.at_level(logging.WARNING, logger="deltune"):
        logging.getLogger("deltune").addHandler(caplog.handler)
        load_adapter(tiny_model().to(torch.bfloat16), half)
        logging.getLogger("deltune").removeHandler(caplog.handler)
    assert "cannot be compared" in caplog.text


def test_what_is_recorded_is_the_base_below_all_adapters(folder, tmp_path):
    model = made()
    attach(model, LoraConfig(rank=1), name="other")
    merge_in_place(model)
    again = save_adapter(model, tmp_path / "again")
    for name in (TENSORS, RECORD):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


# ---------------------------------------------------------------- saving


def test_saving_over_an_older_adapter_leaves_no_stray_file(folder):
    before = (folder / TENSORS).read_bytes()
    save_adapter(made(rank=3), folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([CONFIG, TENSORS, RECORD])
    assert (folder / TENSORS).read_bytes() != before
    assert adapters(load_adapter(tiny_model(), folder))["default"].rank == 3


@pytest.mark.parametrize("num_written", [0, 1, 2])
def test_a_save_that_stops_halfway_never_leaves_a_wrong_adapter(folder, monkeypatch, num_written):
    import os

    expected = load_adapter(tiny_model(), folder)(IDS).logits
    real, done = os.replace, []

    def replace(*arguments):
        if len(done) == num_written:
            raise KeyboardInterrupt
        done.append(arguments)
        real(*arguments)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(made(rank=3), folder)
    monkeypatch.undo()
    assert len(done) == num_written and not list(folder.glob(".*"))
    if num_written == 0:
        assert torch.equal(load_adapter(tiny_model(), folder)(IDS).logits, expected)
    else:
        refused(folder, "a later save did not finish")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_adapter_keeps_its_type(tmp_path, dtype):
    model = made(dtype=dtype)
    folder = save_adapter(model, tmp_path / "a")
    again = load_adapter(tiny_model(), folder, trainable=True)
    assert {str(p.dtype) for p in trainable(again).values()} == {f"torch.{dtype}"}
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_file_in_any_type_is_trained_on_in_float32(tmp_path, dtype):
    """One of PEFT's, which has no record of ours, on a base in a short type: no value is lost, and small steps count."""
    folder = save_adapter(made(dtype=dtype), tmp_path / "a")
    (folder / RECORD).unlink()
    model = load_adapter(tiny_model().to(torch.bfloat16), folder, trainable=True)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    held = load_file(folder / TENSORS)
    assert {tensor.dtype for tensor in held.values()} == {getattr(torch, dtype)}
    written = load_file(save_adapter(model, tmp_path / "b") / TENSORS)
    assert all(torch.equal(written[key], held[key].float()) for key in held)
    with torch.no_grad():
        before = [p.clone() for p in trainable(model).values()]
        for parameter in trainable(model).values():
            parameter.add_(parameter, alpha=1e-4)
    assert all((p - b).abs().max() > 0 for p, b in zip(trainable(model).values(), before, strict=True))


def test_names_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(AdapterError, match="no adapter 'other' to save; it has default"):
        save_adapter(made(), tmp_path / "a", name="other")
    assert not (tmp_path / "a").exists()


def test_the_record_says_how_the_adapter_was_made(folder):
    record = json.loads((folder / RECORD).read_text())
    assert record["config"]["targets"] == ["q_proj", "v_proj"] and record["config"]["rank"] == 2
    assert LoraConfig(**{**record["config"], "schedule": OverTime()}) == adapters(made())["default"]


def test_a_loaded_adapter_is_frozen_unless_asked_for(folder):
    model = load_adapter(tiny_model(), folder)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model = load_adapter(tiny_model(), folder, trainable=True)
    model(IDS).logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable(model).keys()
    assert len(trainable(model)) == 8
