"""Reading an adapter. Everything is checked before the model is touched, and what does not fit exactly is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltune.adapters.adapted import Taken
from deltune.adapters.attach import Prepared, install, looked_at, prepare, unmerge
from deltune.adapters.config import ADAPTERS, AdapterConfig, OverTime, complaint
from deltune.adapters.delta import Delta
from deltune.adapters.files.identity import COARSER, base_tensors, difference, identity
from deltune.adapters.files.peft import (
    CONFIG_FILE,
    OWN,
    PREFIX,
    TENSOR_FILE,
    WHOLE,
    bank_tensors,
    file_key,
    file_tensors,
    form_for,
    format_of,
    own_format,
    read_config,
)
from deltune.adapters.files.save import FORMAT, SIDECAR
from deltune.adapters.files.vocabulary import give_rows, undone_if_it_fails
from deltune.adapters.quantised import Originals, exact_weight, is_quantised, take_out
from deltune.adapters.wrapper import base_name
from deltune.errors import AdapterError, DeltuneError
from deltune.log import logger
from deltune.weights import PICKLE_ENDINGS, check_tensor, read_tensors, sha256_of

SHOWN = 5  # names listed in a message


@undone_if_it_fails
def load_adapter(
    model: nn.Module, folder: str | Path, *, name: str = "default", trainable: bool = False, any_base: bool = False,
    originals: Originals | None = None,
) -> nn.Module:  # fmt: skip
    """Attach an adapter from a folder that Deltune or PEFT wrote, in place, and return the model.

    A base with fewer tokens than the one that it was made on is given rows for them. A folder without an adapter of its own
    may have it in a sub-folder of its name, as PEFT writes them. It runs beside
    the adapters that are active already, and is frozen unless `trainable`. `any_base` allows a base model other than the
    one it was made on. `originals` gives a quantised layer's weight as it was before, for an adapter whose start was taken
    out of it (see quantised.py). A `.ckpt` file is taken for one of MyTransformers', see mytransformers.py. Raises AdapterError if
    anything does not fit; the model is then as it was.
    """
    if Path(folder).suffix == ".ckpt":
        from deltune.adapters.files.mytransformers import load_mytransformers

        return load_mytransformers(model, folder, name=name, trainable=trainable)
    folder = _find(Path(folder), name)
    with _at(folder / CONFIG_FILE):
        fields = _read_json(folder / CONFIG_FILE)
    with _at(folder / TENSOR_FILE):
        tensors = _read_all(folder)
        give_rows(model, fields, tensors)
    record: Mapping[str, Any] = {}
    if (folder / SIDECAR).exists():
        with _at(folder / SIDECAR):
            record = _read_json(folder / SIDECAR)
            _check_record(model, folder, record, any_base)
    with _at(folder / CONFIG_FILE):
        check_types(model, tensors)
        read = read_config(model, fields)
        prepared = prepare(model, _as_recorded(read, record.get("config") or {}, fields), name)
    with _at(folder / TENSOR_FILE):
        _fill(model, prepared, _completed(prepared, fields, tensors, originals))
    with _at(folder / SIDECAR):
        _take_out(model, prepared, record, originals, any_base)
    install(model, prepared, trainable=trainable)
    return model


def _as_recorded(read: AdapterConfig, recorded: Mapping[str, Any], fields: Mapping[str, Any]) -> AdapterConfig:
    """The config as it was given when the adapter was made, where PEFT's fields still say the same; else as they say.

    PEFT's fields tell the function. The record can also tell which part of it was trained, e.g. after a PiSSA start.
    """
    try:
        config_class = ADAPTERS.resolve(recorded["delta"])
        given = config_class(**{**recorded, "schedule": OverTime(**recorded["schedule"])})
    except (KeyError, TypeError):  # no record, or one of another version
        return read
    ours = str(fields.get("peft_type")).startswith(OWN)
    written = (own_format(type(given)) if ours else form_for(given)).write(given)
    if complaint(given) or any(fields.get(name) != value for name, value in written.items()):
        return read
    return dataclasses.replace(
        given, targets=read.targets, exclude=[], modules_to_save=read.modules_to_save, trainable_token_indices=read.trainable_token_indices
    )  # fmt: skip


@contextmanager
def _at(path: Path) -> Iterator[None]:
    """Put the file's name before a message that does not have it."""
    try:
        yield
    except DeltuneError as error:
        message = str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
        raise AdapterError(message) from None


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder, folder / name):
        if (candidate / CONFIG_FILE).is_file():
            return candidate
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}")) if folder.is_dir() else []
    hint = f"; its sub-folders {', '.join(inside)} hold adapters, name one of them" if inside else ""
    raise AdapterError(f"{folder}: no {CONFIG_FILE} here{hint}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"a JSON object is expected, a {type(value).__name__} found")
    return value


def _read_all(folder: Path) -> dict[str, Tensor]:
    pickles = [path for path in sorted(folder.glob("adapter_model.*")) if path.suffix in PICKLE_ENDINGS]
    if pickles and not (folder / TENSOR_FILE).exists():
        return read_tensors(pickles[0])  # which refuses it and says what to do
    return read_tensors(folder / TENSOR_FILE)


def _check_record(model: nn.Module, folder: Path, record: Mapping[str, Any], any_base: bool) -> None:
    if record.get("format") != FORMAT:
        raise AdapterError(f"format is {record.get('format')!r}; this version reads {FORMAT}")
    try:
        quantised = record["base"].get("quantised", {})
        found = identity(model, without=quantised)
        recorded_hash, recorded_types = record["sha256"][TENSOR_FILE], set(record["base"]["weights"])
        problem = difference(record["base"], found, but=_taken_weights(record))
        unknown = not recorded_types & set(found["weights"]) or not set(found.get("quantised", ())) <= set(quantised)
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"not as it was written: {error}") from None
    if recorded_hash != sha256_of(folder / TENSOR_FILE):
        raise AdapterError(
            f"{TENSOR_FILE} is not the file that was saved with it: it was damaged, or a later save did not finish. If it "
            f"was replaced on purpose, delete {SIDECAR}"
        )
    if problem and not any_base:
        raise AdapterError(f"the adapter was made on another base model: {problem}. To load it all the same, give any_base")
    if not problem and unknown:
        logger.warning("%s: the base model's shapes fit; its weights cannot be compared, for they are stored in another way than those that the adapter was made on", folder)


def _taken_weights(record: Mapping[str, Any]) -> list[str]:
    return [f"{place}.weight" for place in record.get("taken_out", [])]


@torch.no_grad()
def _take_out(model: nn.Module, prepared: Prepared, record: Mapping[str, Any], originals: Originals | None, any_base: bool) -> None:
    """Have quantised layers be rounded without the adapter's start, as they were when it was made. On a base that is not
    quantised there is nothing to do: what was taken out and what is added are the same there."""
    if record.get("taken_out"):
        unmerge(model)
    for place in record.get("taken_out", []):
        module = prepared.places.get(place)
        if module is None or not is_quantised(module):
            continue
        if originals is None:
            raise AdapterError(
                f"{place}: the adapter's start was taken out of this layer before it was quantised, so its weight has to be read "
                "again: give originals=models.load.originals(config), or load the base without quantisation"
            )
        try:
            if not take_out(module, prepared.deltas[place], exact_weight(module, place, originals)):
                raise AdapterError(f"{place}: the start of another adapter was taken out of this layer already, and only one can be; detach that one first")
        except BaseException:
            prepared.put_back()
            raise
        prepared.taken[place] = Taken(prepared.name, functools.partial(exact_weight, module, place, originals))
    problem = difference(record["base"], identity(model, without=record["base"].get("quantised", {}))) if prepared.taken else None
    if problem and not any_base:
        prepared.put_back()
        raise AdapterError(f"the adapter was made on another base model: {problem}. To load it all the same, give any_base")


def check_types(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raise AdapterError if the file's types are none that this model's adapter can hold without loss."""
    found = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    unknown = found - COARSER.keys()
    if unknown:
        raise AdapterError(f"the file holds {', '.join(map(str, unknown))} tensors, which are no type that an adapter is trained in")
    if torch.float64 in found and any(tensor.dtype != torch.float64 for tensor in base_tensors(model).values()):
        raise AdapterError("the file holds float64 tensors and the model is not in float64, so they would be rounded")


@torch.no_grad()
def _completed(prepared: Prepared, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], originals: Originals | None) -> dict[str, Tensor]:
    """The file's tensors with what its method can work out from the base and does not store. Of a quantised layer that is its
    weight before it was rounded, where there is one to be had."""

    def looked(place: str, delta: Delta) -> Tensor:
        module = prepared.places[place]
        exact = exact_weight(module, place, originals) if originals is not None and is_quantised(module) else None
        return looked_at(module, delta, exact)

    form = format_of(fields)[1]
    complete = form.complete
    whole = {key: tensor for key, tensor in tensors.items() if not (key.endswith(form.idle) and not tensor.any())}
    for place, delta in prepared.deltas.items() if complete else ():
        head = f"{PREFIX}{place}."
        own = {leaf: tensors[head + leaf] for leaf in delta.to_file() if head + leaf in tensors}
        found = complete(fields, delta, own, functools.partial(looked, place, delta))
        whole.update({head + leaf: tensor for leaf, tensor in found.items()})
    return whole


@torch.no_grad()
def _fill(model: nn.Module, prepared: Prepared, tensors: Mapping[str, Tensor]) -> None:
    """Copy the file's tensors into the prepared parts; each must be there, fit, and be finite, and none be left over."""
    parts = prepared.deltas | prepared.copies
    own = {key: tensor for place, part in parts.items() for key, tensor in file_tensors(place, part).items()}
    expected = own | {key: tensor for bank in prepared.banks for key, tensor in bank_tensors(bank).items()}
    given = _without_repeats(prepared, _without_base_copies(base_tensors(model), tensors, expected))
    missing, left = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or left:
        raise AdapterError(" and ".join(filter(None, [_listed("lacks", missing), _listed("has tensors that nothing in this model takes:", left)])))
    for key, tensor in expected.items():
        if tensor.is_floating_point():
            check_tensor(key, given[key], tuple(tensor.shape))
        elif given[key].shape != tensor.shape or given[key].dtype != tensor.dtype:
            raise AdapterError(f"{key}: {given[key].dtype} {list(given[key].shape)} found, {tensor.dtype} {list(tensor.shape)} expected")
    for bank in prepared.banks:
        bank.from_file({key.removeprefix(WHOLE): given[key] for key in bank_tensors(bank)})
    for place, delta in prepared.deltas.items():
        delta.from_file({leaf: given[file_key(place, delta, leaf)] for leaf in delta.to_file()})
    for place, copied in prepared.copies.items():
        for key, tensor in file_tensors(place, copied).items():
            tensor.copy_(given[key])


def _without_repeats(prepared: Prepared, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors but for a bank's that PEFT writes once more in every layer. They must equal the bank's."""
    rest = dict(tensors)
    for place, delta in prepared.deltas.items():
        for leaf, shared in delta.repeats.items():
            key, whole = f"{PREFIX}{place}.{leaf}", f"{WHOLE}{shared}"
            repeated = rest.pop(key, None)
            if repeated is not None and (whole not in rest or not torch.equal(repeated, rest[whole])):
                raise AdapterError(f"{key}: the layers share this tensor, and {whole} is another one")
    return rest


def _listed(words: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{words} {', '.join(names[:SHOWN])}{more}"


def _without_base_copies(base: Mapping[str, Tensor], tensors: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """The file's tensors but for copies of the base's own, which PEFT adds for embeddings. They must equal this base's."""
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        ours = base.get(base_name(key.removeprefix(PREFIX))) if key not in expected else None
        if ours is None:
            rest[key] = tensor
        elif tensor.shape != ours.shape or not torch.equal(tensor.to(ours), ours):
            raise AdapterError(
                f"{key}: the file holds a weight of the base that differs from this model's, so the adapter belongs to a base "
                "with another vocabulary or other weights"
            )
    return rest
