"""MyTransformers' trainable-only checkpoints give the function that their layers compute, stated here from their formula."""

from __future__ import annotations

import json

import pytest
import torch

from deltune.adapters.attach import adapters, trainable
from deltune.adapters.config import name_of
from deltune.adapters.files.mytransformers import load_mytransformers
from deltune.errors import AdapterError
from tests.tiny import tiny_model

LAYERS = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
RANK, ALPHA = 3, 12.0


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.2


def shape_of(model, layer):
    return model.get_submodule(layer).weight.shape


def checkpoint(model, method):
    """(tensors as that trainer names them, layer -> the whole adapted weight by its formula)."""
    tensors, weights = {}, {}
    widest_in = max(shape_of(model, layer)[1] for layer in LAYERS)
    widest_out = max(shape_of(model, layer)[0] for layer in LAYERS)
    A_all, B_all = drawn(90, RANK, widest_in), drawn(91, widest_out, RANK)
    for number, layer in enumerate(LAYERS):
        W = model.get_submodule(layer).weight.detach()
        n_out, n_in = W.shape
        A, B, M, m = (drawn(10 * number + i, *s) for i, s in enumerate([(RANK, n_in), (n_out, RANK), (RANK, RANK), (n_out,)]))
        s = ALPHA / RANK
        if method == "vera":
            b, d = drawn(50 + number, n_out), drawn(60 + number, RANK)
            tensors |= {f"{layer}.lambda_b": b, f"{layer}.lambda_d": d}
            change = s * torch.einsum("o,or,r,ri->oi", b, B_all[:n_out], d, A_all[:, :n_in])
            weights[layer] = W + change
            continue
        tensors |= {f"{layer}.weight_a": A, f"{layer}.weight_b": B}
        if method == "moslora":
            tensors[f"{layer}.weight_ab_mixer"] = M
            weights[layer] = W + s * B @ M @ A
        elif method == "dora":
            tensors[f"{layer}.origin_magnitude"] = m.abs()
            whole = W + s * B @ A
            weights[layer] = m.abs()[:, None] * whole / whole.norm(dim=1, keepdim=True)
        else:
            weights[layer] = W + (ALPHA / RANK**0.5 if method == "rslora" else s) * B @ A
    if method == "vera":  # named_parameters lists a shared tensor once, under the first layer that holds it
        tensors |= {f"{LAYERS[0]}.shared_weight_a": A_all, f"{LAYERS[0]}.shared_weight_b": B_all}
    return tensors, weights


def saved(folder, tensors, *, nested=True, **config):
    torch.save({"model_state_dict": tensors, "optimizer_state_dict": {}} if nested else tensors, folder / "final.ckpt")
    if config:
        (folder / "config.json").write_text(json.dumps({"lora_rank": RANK, **config}))
    return folder / "final.ckpt"


SWITCH = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "moslora": {"use_mos_lora": True}, "vera": {"use_vera": True}}
IDS = torch.tensor([[1, 5, 9, 2], [3, 3, 7, 4]])


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("method", sorted(SWITCH))
def test_a_checkpoint_gives_the_function_of_its_formula(method, nested, tmp_path):
    model = tiny_model().double()
    tensors, weights = checkpoint(model, method)
    path = saved(tmp_path, tensors, nested=nested, lora_scaler=ALPHA, use_flash_attention=True, **SWITCH[method])
    load_mytransformers(model, path, trainable=True)
    plain = tiny_model().double()
    with torch.no_grad():
        for layer, weight in weights.items():
            plain.get_submodule(layer).weight.copy_(weight)
    assert (model(IDS).logits - plain(IDS).logits).abs().max() < 1e-9
    assert name_of(adapters(model)["default"]) == method and trainable(model)


def test_what_the_file_cannot_say_must_be_said(tmp_path):
    model = tiny_model().double()
    tensors, weights = checkpoint(model, "lora")
    path = saved(tmp_path, tensors)
    with pytest.raises(AdapterError, match=r"no config\.json beside it says which method"):
        load_mytransformers(model, path)
    with pytest.raises(AdapterError, match="give alpha="):
        load_mytransformers(model, path, method="lora")
    load_mytransformers(model, path, method="lora", alpha=ALPHA)
    W = model.get_submodule(LAYERS[0])
    x = drawn(5, 2, W.in_features)
    assert (W(x) - x @ weights[LAYERS[0]].T).abs().max() < 1e-12


def test_the_command_line_takes_one_for_an_adapter(tmp_path, capsys):
    from deltune.adapters.files import load_adapter
    from deltune.commands.merge import main

    tiny_model().save_pretrained(tmp_path / "base")
    from tests.tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "base")
    tensors, weights = checkpoint(tiny_model().double(), "lora")
    path = saved(tmp_path, {key: tensor.float() for key, tensor in tensors.items()}, lora_scaler=ALPHA)
    assert main([f"model={tmp_path / 'base'}", f"adapter={path}", f"out={tmp_path / 'merged'}"], None) == 0
    capsys.readouterr()
    from safetensors.torch import load_file

    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for layer, weight in weights.items():
        assert (merged[f"{layer}.weight"] - weight).abs().max() < 1e-5
    load_adapter(tiny_model(), path)


def refused(tmp_path, tensors, message, **config):
    model = tiny_model().double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError, match=message):
        load_mytransformers(model, saved(tmp_path, tensors, **{"lora_scaler": ALPHA, **config}))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_what_would_be_another_function_is_refused(tmp_path):
    tensors, _ = checkpoint(tiny_model().double(), "lora")
    refused(tmp_path, tensors, "config.json says hira; the methods that are read are lora", use_hira=True)
    refused(tmp_path, tensors, "config.json says dora, milora", use_dora=True, use_milora=True)
    refused(tmp_path, tensors, "lacks origin_magnitude", use_dora=True)
    refused(tmp_path, {**tensors, "model.norm.weight": drawn(0, 4)}, r"model\.norm\.weight is not a tensor of lora")
    refused(tmp_path, {"layers.0.attention.wq.weight_a": drawn(0, 3, 4), "layers.0.attention.wq.weight_b": drawn(0, 4, 3)}, "is no layer of this model")
    broken = {**tensors, f"{LAYERS[0]}.weight_a": tensors[f"{LAYERS[0]}.weight_a"][:, :-1]}
    refused(tmp_path, broken, r"lora_A\.weight: shape .* found")
    refused(tmp_path, {key: tensor * float("nan") for key, tensor in tensors.items()}, "not finite")


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    (tmp_path / "final.ckpt").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "opened").encode() + b"'\ntR.")
    with pytest.raises(AdapterError, match="not a checkpoint of plain tensors"):
        load_mytransformers(tiny_model(), tmp_path / "final.ckpt")
    assert not (tmp_path / "opened").exists()
