"""Writing an adapter: PEFT's two files, and `deltune.json` with what PEFT's have no place for.

Each file is replaced in one step. The last one written holds the hash of the tensors, so that a mixture of two saves
is found out when it is read.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

from deltune.adapters.adapted import Adapted
from deltune.adapters.attach import adapters
from deltune.adapters.delta import Delta
from deltune.adapters.files.identity import identity
from deltune.adapters.files.peft import CONFIG_FILE, TENSOR_FILE, bank_tensors, file_tensors, write_fields
from deltune.adapters.wrapper import wrappers
from deltune.errors import AdapterError
from deltune.weights import replacing, sha256_of, write_tensors

SIDECAR = "deltune.json"
FORMAT = "deltune-adapter-1"


def save_adapter(model: nn.Module, folder: str | Path, *, name: str = "default", base: str | None = None) -> Path:
    """Write one adapter into a folder, in PEFT's format, and return the folder.

    `base` is recorded as the base model's path or hub id; by default it is what the model says itself.
    """
    there = adapters(model)
    if name not in there:
        raise AdapterError(f"the model has no adapter {name!r} to save; it has {', '.join(there) or 'none'}")
    parts = {place: wrapper.adapters[name] for place, wrapper in wrappers(model) if name in wrapper.adapters}
    deltas = {place: part for place, part in parts.items() if isinstance(part, Delta)}
    taken = [place for place, wrapper in wrappers(model) if isinstance(wrapper, Adapted) and name in wrapper.adapters and _is_taken(place, wrapper, name)]
    fields = write_fields(model, there[name], deltas, base or _base_path(model), taken=bool(taken))
    tensors = {key: tensor for place, part in parts.items() for key, tensor in file_tensors(place, part).items()}
    banks = {id(bank): bank for delta in deltas.values() for bank in delta.banks_held()}
    for bank in banks.values():
        tensors.update(bank_tensors(bank))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / TENSOR_FILE, tensors)
    _write_json(folder / CONFIG_FILE, fields)
    record = {
        "format": FORMAT,
        "config": dataclasses.asdict(there[name]),
        "base": identity(model),
        "sha256": {TENSOR_FILE: sha256_of(folder / TENSOR_FILE)},
        **({"taken_out": taken} if taken else {}),
    }
    _write_json(folder / SIDECAR, record)
    return folder


def _is_taken(place: str, layer: Adapted, name: str) -> bool:
    """Whether this adapter's start was taken out of its quantised layer, which a load has to do again."""
    if layer.taken is None or layer.taken.name == name:
        return layer.taken is not None
    raise AdapterError(
        f"{place}: this quantised layer was rounded without the start of adapter {layer.taken.name}, and {name!r} is a change of that "
        "weight, which no model folder gives. What fits: make it on the base as it is loaded, quantised or not"
    )


def _base_path(model: nn.Module) -> str | None:
    if hasattr(model, "config") and hasattr(model.config, "name_or_path"):
        return model.config.name_or_path or None
    return None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2) + "\n"  # in the order given: of patterns the first that matches counts
    with replacing(path, len(text)) as temporary:
        temporary.write_text(text, encoding="utf-8")
