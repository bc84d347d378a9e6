"""PEFT's adapter_config.json: which of its fields mean what here. A field that is set and not known is refused.

Such a field may change what the adapter computes, and ignoring it would load a wrong adapter without a word.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from deltune.adapters.bank import Bank
from deltune.adapters.config import ADAPTERS, DELTAS, AdapterConfig
from deltune.adapters.delta import Delta, PeftFormat
from deltune.adapters.experts import ExpertLora
from deltune.adapters.layers import kind_of
from deltune.adapters.targets import ALL_LINEAR, ends_with, inside, output_head
from deltune.adapters.whole import ModelDelta
from deltune.adapters.wrapper import original, walk
from deltune.errors import AdapterError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
WHOLE = "base_model."  # tensors that belong to the whole adapter: banks
OWN = "DELTUNE_"  # our own peft_type: this and the parametrisation's name
PEFT_VERSION = "0.21.2"  # whose format is written; tests hold it to that version

# Of no effect on what an adapter computes
INFORMATION = frozenset({"peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"})
# Understood here, for every method
SELECTION = frozenset({"target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"})
TOKENS = "trainable_token_indices"
# The one type of PEFT's that adapts parameters, such as those of experts, and that trains tokens' rows besides
TAKES_PARAMETERS = "LORA"
# Of no effect while they have this value
HARMLESS = {"bias": "none"}


def format_of(fields: Mapping[str, Any]) -> tuple[type[AdapterConfig], PeftFormat]:
    """The config class and file format that these fields are in. AdapterError names the supported peft_types."""
    peft_type = fields.get("peft_type")
    if isinstance(peft_type, str) and peft_type.startswith(OWN) and peft_type.removeprefix(OWN) in DELTAS:
        config_class = ADAPTERS.resolve(peft_type.removeprefix(OWN))
        return config_class, own_format(config_class)
    formats: dict[str, list[tuple[type[AdapterConfig], PeftFormat]]] = {}
    for delta in DELTAS:
        config_class = ADAPTERS.resolve(delta)
        form = config_class.delta_class().peft
        if form is not None:
            formats.setdefault(form.type, []).append((config_class, form))
    if not isinstance(peft_type, str) or peft_type not in formats:
        raise AdapterError(f"peft_type is {peft_type!r}; supported are {', '.join(sorted(formats))}, and our own, which begin with {OWN}")
    sharing = formats[peft_type]
    told = [found for found in sharing if found[1].told is not None and found[1].told(fields)]
    return (told or [found for found in sharing if found[1].told is None] or sharing)[0]


def form_for(config: AdapterConfig, deltas: Mapping[str, Delta] | None = None, *, taken: bool = False) -> PeftFormat:
    """PEFT's format where it can say what this config is, on these layers, else our own in the same container. `taken`: its
    start was taken out of quantised layers, so its base is none that PEFT could load."""
    form = config.delta_class().peft
    unsaid = any(delta.site.kind == "experts" and not isinstance(delta, ExpertLora) for delta in (deltas or {}).values())
    if config.trainable_token_indices and form is not None:  # of a head with a bias PEFT would lose it
        unsaid |= form.type != TAKES_PARAMETERS or any(delta.beside_method and delta.site.has_bias for delta in (deltas or {}).values())
    if form is None or unsaid or taken or not form.fits(config):
        return own_format(type(config))
    return form


# What every method has and `write_fields` says in PEFT's words, and what has no effect on the function
COMMON = frozenset({"delta", "targets", "exclude", "modules_to_save", TOKENS, "dtype", "schedule"})


def own_format(config_class: type[AdapterConfig]) -> PeftFormat:
    """Our fields as they are, under a peft_type that other programs refuse by name."""
    names = [field.name for field in dataclasses.fields(config_class) if field.name not in COMMON]
    delta = next((name for name in DELTAS if ADAPTERS.resolve(name) is config_class), None)
    if delta is None:
        raise AdapterError(f"{config_class.__name__} is in no table of a file in deltune/adapters/methods, so nothing could read its file back")

    def read(fields: Mapping[str, Any]) -> dict[str, Any]:
        missing = [name for name in names if name not in fields]
        if missing:
            raise AdapterError(f"the fields {', '.join(missing)} are missing")
        return {name: fields[name] for name in names}

    def write(config: AdapterConfig) -> dict[str, Any]:
        return {name: getattr(config, name) for name in names}

    return PeftFormat(type=OWN + delta, write=write, read=read, fields=frozenset(names))


def check_fields(fields: Mapping[str, Any], form: PeftFormat) -> None:
    """Raise AdapterError for a field that is set and that neither we nor the method understand."""
    known = INFORMATION | SELECTION | form.fields
    known |= {"target_parameters", TOKENS} if form.type == TAKES_PARAMETERS else {TOKENS} if form.type.startswith(OWN) else set()
    harmless = HARMLESS | dict(form.harmless)
    for name, value in fields.items():
        if name in known or value is None or value is False or value in ("", [], {}):
            continue
        if name in harmless and value == harmless[name]:
            continue
        raise AdapterError(
            f"{name} is {value!r}. This field is not supported and may change what the adapter computes, so the adapter is "
            "not loaded"
        )


def target_names(model: nn.Module, fields: Mapping[str, Any]) -> list[str]:
    """Full names of the layers that PEFT would adapt, by its own rules. AdapterError if there are none."""
    stacks = {name for name, module in walk(model) if kind_of(original(module)) == "experts"}
    ours = str(fields.get("peft_type")).startswith(OWN)  # which names experts as it names other layers
    names = [name for name, _ in walk(model) if name and (ours or name not in stacks)]
    targets = _names_or_pattern(fields, "target_modules")
    if targets == ALL_LINEAR:
        head = output_head(model)
        linear = {name for name, m in walk(model) if kind_of(original(m)) in ("linear", "conv1d") and m is not head}
        found = [name for name in names if name in linear]
    else:
        found = [name for name in names if _is_target(name, targets, fields)]
    excluded = _names_or_pattern(fields, "exclude_modules")
    saved = saved_names(fields)
    found = [
        name
        for name in found
        if not (excluded and _matches(name, excluded))
        and not any(inside(name, other) for other in names if any(ends_with(other, ending) for ending in saved))
    ]
    wanted = _names_or_pattern(fields, "target_parameters")
    for parameter in [wanted] if isinstance(wanted, str) else wanted:
        matching = [name for name in stacks if ends_with(name, parameter)]
        if not matching:
            raise AdapterError(f"target_parameters: {parameter!r} matches no parameter of this model that holds experts' weights")
        found += matching
    if not found:
        raise AdapterError(f"target_modules {targets!r} match no module of this model")
    return list(dict.fromkeys(found))


def saved_names(fields: Mapping[str, Any]) -> list[str]:
    names = _names_or_pattern(fields, "modules_to_save")
    if isinstance(names, str):
        raise AdapterError(f"modules_to_save is {names!r}; a list of names is expected")
    return names


def _names_or_pattern(fields: Mapping[str, Any], field: str) -> list[str] | str:
    value = fields.get(field) or []
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise AdapterError(f"{field} is {value!r}; a list of names or one regular expression is expected")
    return value


def _is_target(name: str, targets: list[str] | str, fields: Mapping[str, Any]) -> bool:
    # a full name in the list counts whatever its layer's number
    if isinstance(targets, str):
        return _matches(name, targets)
    return name in targets or (_matches(name, targets) and _in_layers(name, fields))


def _matches(name: str, wanted: list[str] | str) -> bool:
    if isinstance(wanted, str):
        return _compiled(wanted).fullmatch(name) is not None
    return any(ends_with(name, ending) for ending in wanted)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{pattern!r} is no regular expression: {error}") from None


def _in_layers(name: str, fields: Mapping[str, Any]) -> bool:
    """PEFT's layers_to_transform: the number after the layers' name, or the first number in the module's name."""
    wanted = fields.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    wanted = wanted if isinstance(wanted, list) else [wanted]
    patterns = _names_or_pattern(fields, "layers_pattern")
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return found is not None and int(found[1]) in wanted
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = _compiled(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.").match(name)
        if found:
            return int(found[found.re.groups]) in wanted
    return False


def read_config(model: nn.Module, fields: Mapping[str, Any]) -> AdapterConfig:
    """Our config for PEFT's fields, with the targets spelled out for this model."""
    config_class, form = format_of(fields)
    check_fields(fields, form)
    chosen = {} if issubclass(config_class.delta_class(), ModelDelta) else {"targets": target_names(model, fields)}
    tokens = fields.get(TOKENS) or []
    return config_class(**chosen, modules_to_save=saved_names(fields), trainable_token_indices=tokens, **form.read(fields))


def write_fields(
    model: nn.Module, config: AdapterConfig, deltas: Mapping[str, Delta], base: str | None, *, taken: bool = False
) -> dict[str, Any]:  # fmt: skip
    """PEFT's fields for an adapter on this model; `taken` as in `form_for`."""
    form = form_for(config, deltas, taken=taken)
    stacks = [place for place, delta in deltas.items() if delta.site.kind == "experts"] if form.type == TAKES_PARAMETERS else []
    fields = {
        "peft_type": form.type,
        "peft_version": PEFT_VERSION,
        "task_type": _task_type(model),
        "inference_mode": True,
        "base_model_name_or_path": base,
        "revision": None,
        "auto_mapping": None,
        # what is tied to a target follows it there too, and is not named
        "target_modules": shortest_names(model, [place for place, delta in deltas.items() if _is_target_of(delta) and place not in stacks]),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(config.modules_to_save) or None,
        "bias": "none",
        **form.write(config),
    }
    if stacks:
        fields["target_parameters"] = sorted(stacks)
    if config.trainable_token_indices:
        fields[TOKENS] = config.trainable_token_indices
    return {name: value for name, value in fields.items() if name not in form.lacks}


def _is_target_of(delta: Delta) -> bool:
    return delta.site.tied_to is None and not delta.beside_method


def _task_type(model: nn.Module) -> str | None:
    if not hasattr(model, "can_generate") or not model.can_generate() or model.config.is_encoder_decoder:
        return None
    return "CAUSAL_LM"


def file_tensors(place: str, part: nn.Module) -> dict[str, Tensor]:
    """The tensors of a delta, or of a module trained in full, by their key in the file."""
    tensors = part.to_file() if isinstance(part, Delta) else part.state_dict()
    return {file_key(place, part, leaf): tensor for leaf, tensor in tensors.items()}


def file_key(place: str, part: nn.Module, leaf: str) -> str:
    return leaf if isinstance(part, Delta) and part.named_alone else f"{PREFIX}{place}.{leaf}"


def bank_tensors(bank: Bank) -> dict[str, Tensor]:
    return {f"{WHOLE}{leaf}": tensor for leaf, tensor in bank.to_file().items()}


def shortest_names(model: nn.Module, chosen: Iterable[str]) -> list[str]:
    """Name endings that mean exactly these modules; full names where an ending would mean others too."""
    chosen = set(chosen)
    every = [name for name, _ in walk(model) if name]  # experts too: a name that means them as well is not one for others
    meant: dict[str, set[str]] = {}
    for name in every:
        meant.setdefault(name.rpartition(".")[2], set()).add(name)
    short = {ending for ending in (name.rpartition(".")[2] for name in chosen) if meant[ending] <= chosen}
    full = {name for name in chosen if name.rpartition(".")[2] not in short}
    return sorted(short) + sorted(full)
