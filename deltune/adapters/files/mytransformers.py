"""Reading MyTransformers' trainable-only checkpoints: one pickle of tensors, read with `weights_only=True`, and only when
it is named.

Such a file holds `<layer>.weight_a` and `weight_b` for many methods whose functions differ, so the method is taken from
the `config.json` that its trainer leaves beside it, or has to be said. With their lora_scaler as alpha, s = alpha / r
(rsLoRA: alpha / √r). Their VeRA multiplies by s as well, which ours and PEFT's do not: it is put into the vector b.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltune.adapters.attach import Prepared, install, prepare
from deltune.adapters.config import named
from deltune.adapters.files.load import check_types
from deltune.adapters.ranked import SCALINGS
from deltune.adapters.targets import nearest
from deltune.adapters.wrapper import walk
from deltune.errors import AdapterError, DeltuneError
from deltune.weights import check_tensor

# their flags `use_…` of which each chooses another method
SWITCHES = ["dora", "hira", "mos_lora", "me_lora", "lora_ga", "lora_one", "rslora", "pissa", "olora", "vera", "sharelora", "tied_lora", "adalora", "delta_lora", "lora_moe", "milora", "plora", "mora", "gora", "increlora", "salora", "mola", "nlora", "nora", "randlora", "dude", "loraga_pro", "goat", "rasa", "dense_lora", "eva", "delora", "nzlora", "lora_sb", "lora_da", "ralora", "dralora", "prolora", "bslora", "sinelora", "loran", "loda", "aurora", "loha", "lokr", "ridgelora", "lora_dash"]


@dataclass(frozen=True)
class Kind:
    """A method as such a file holds it: their name of a layer's tensor -> ours in a file."""

    switch: str  # their flag; empty for plain LoRA, which has none
    method: str  # ours
    leaves: Mapping[str, str]
    shared: Mapping[str, str]  # tensors that stand once, under the first layer: their name -> the bank's
    scaling: str = "standard"
    finish: Callable[[dict[str, Tensor], float], dict[str, Tensor]] = lambda tensors, scale: tensors


def _scale_into_b(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    return {**tensors, "vera_lambda_b": tensors["vera_lambda_b"] * scale}


PAIR = {"weight_a": "lora_A.weight", "weight_b": "lora_B.weight"}
KINDS = {
    "lora": Kind("", "lora", PAIR, {}),
    "rslora": Kind("rslora", "rslora", PAIR, {}, scaling="rslora"),
    "dora": Kind("dora", "dora", {**PAIR, "origin_magnitude": "lora_magnitude_vector"}, {}),
    "moslora": Kind("mos_lora", "moslora", {"weight_a": "lora_A", "weight_b": "lora_B", "weight_ab_mixer": "mixer"}, {}),
    "vera": Kind(
        "vera", "vera", {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"},
        {"shared_weight_a": "vera_A", "shared_weight_b": "vera_B"}, finish=_scale_into_b,
    ),
}  # fmt: skip


def load_mytransformers(
    model: nn.Module, path: str | Path, *, method: str | None = None, alpha: float | None = None, name: str = "default",
    trainable: bool = False,
) -> nn.Module:
    """Attach the adapter of a MyTransformers checkpoint (.ckpt), in place, and return the model.

    `method` is lora, rslora, dora, moslora or vera, and `alpha` their lora_scaler; both are read from config.json beside
    the file unless given. The checkpoint must be of a Hugging Face model (their flag --huggingface), whose layers have
    this model's names. Raises AdapterError if anything does not fit; the model is then as it was.
    """
    path = Path(path)
    tensors = _read(path)
    said = _config_beside(path)
    kind = _kind(path, method or _method_said(path, said))
    alpha = alpha if alpha is not None else said.get("lora_scaler")
    if not isinstance(alpha, int | float):
        raise AdapterError(f"{path}: alpha is unknown, for no config.json with lora_scaler lies beside it; give alpha=")
    layers, shared = _by_layer(path, tensors, kind)
    prepared = _prepare(model, path, layers, shared, kind, float(alpha), name)
    _fill(path, prepared, layers, shared, kind, float(alpha))
    install(model, prepared, trainable=trainable)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise AdapterError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever foreign bytes make of it
        first = str(error).partition("\n")[0]
        raise AdapterError(f"{path}: not a checkpoint of plain tensors, which is all that is read: {first}") from None
    content = content.get("model_state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise AdapterError(f"{path}: a dict of names and tensors is expected")
    return {key.removeprefix("module."): tensor for key, tensor in content.items()}


def _config_beside(path: Path) -> dict[str, Any]:
    beside = path.with_name("config.json")
    if not beside.is_file():
        return {}
    try:
        said = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{beside}: not readable as JSON: {error}") from None
    return said if isinstance(said, dict) else {}


def _method_said(path: Path, said: Mapping[str, Any]) -> str:
    """The method of their config's flags; without one it is LoRA."""
    if not said:
        raise AdapterError(f"{path}: no config.json beside it says which method this is; give method= ({', '.join(KINDS)})")
    on = [switch for switch in SWITCHES if said.get(f"use_{switch}") is True]
    if not on:
        return "lora"
    found = [method for method, kind in KINDS.items() if kind.switch in on]
    if len(on) != 1 or not found:
        raise AdapterError(f"{path}: config.json says {', '.join(on)}; the methods that are read are {', '.join(KINDS)}")
    return found[0]


def _kind(path: Path, method: str) -> Kind:
    if method not in KINDS:
        raise AdapterError(f"{path}: method is {method!r}; those that are read are {', '.join(KINDS)}")
    return KINDS[method]


def _by_layer(path: Path, tensors: Mapping[str, Tensor], kind: Kind) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors of each layer, and those that all share, by our names."""
    layers: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, leaf = key.rpartition(".")
        if leaf in kind.leaves:
            layers.setdefault(layer, {})[kind.leaves[leaf]] = tensor
        elif leaf in kind.shared:
            shared[kind.shared[leaf]] = tensor
        else:
            raise AdapterError(f"{path}: {key} is not a tensor of {kind.method}; a checkpoint of its trained tensors alone is expected (--save-trainable)")
    for layer, held in layers.items():
        missing = [theirs for theirs, ours in kind.leaves.items() if ours not in held]
        if missing:
            raise AdapterError(f"{path}: {layer} lacks {', '.join(missing)}")
    missing = [theirs for theirs, ours in kind.shared.items() if ours not in shared]
    if missing or not layers:
        raise AdapterError(f"{path}: lacks {', '.join(missing or kind.leaves)}")
    return layers, shared


def _prepare(
    model: nn.Module, path: Path, layers: Mapping[str, dict[str, Tensor]], shared: Mapping[str, Tensor], kind: Kind, alpha: float, name: str
) -> Prepared:
    names = [place for place, _ in walk(model)]
    for layer in layers:
        if layer not in names:
            raise AdapterError(f"{path}: {layer} is no layer of this model.{nearest(layer, [n for n in names if n])}")
    ranks = {layer: _rank(held) for layer, held in layers.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    check_types(model, {f"{place}.{leaf}": tensor for place, held in {**layers, "": shared}.items() for leaf, tensor in held.items()})
    fields: dict[str, Any] = {"targets": list(layers), "rank": rank}
    if kind.method != "vera":
        fields |= {"alpha": alpha, "rank_pattern": {_escaped(layer): r for layer, r in ranks.items() if r != rank}}
    return prepare(model, named(kind.method, **fields), name)


def _rank(held: Mapping[str, Tensor]) -> int:
    return next(held[leaf].shape[0] for leaf in ("lora_A.weight", "lora_A", "vera_lambda_d") if leaf in held)


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


@torch.no_grad()
def _fill(path: Path, prepared: Prepared, layers: Mapping[str, dict[str, Tensor]], shared: Mapping[str, Tensor], kind: Kind, alpha: float) -> None:
    for bank in prepared.banks:
        fitting = {key: tensor[tuple(slice(size) for size in bank.to_file()[key].shape)] for key, tensor in shared.items()}
        _check(path, fitting, bank.to_file())
        bank.from_file(fitting)
    for place, delta in prepared.deltas.items():
        scale = SCALINGS[kind.scaling](alpha, _rank(layers[place]))
        tensors = kind.finish(dict(layers[place]), scale)
        _check(path, {f"{place}.{leaf}": tensor for leaf, tensor in tensors.items()}, {f"{place}.{leaf}": t for leaf, t in delta.to_file().items()})
        delta.from_file(tensors)


def _check(path: Path, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if given.keys() != expected.keys():
        raise AdapterError(f"{path}: tensors {', '.join(sorted(given))} found, {', '.join(sorted(expected))} expected")
    try:
        for key, tensor in expected.items():
            check_tensor(f"{path}: {key}", given[key], tuple(tensor.shape))
    except DeltuneError as error:
        raise AdapterError(str(error)) from None
