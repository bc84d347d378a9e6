"""Which modules a config means. Every name in it must mean something: one without effect is an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from deltune.adapters.config import AdapterConfig, name_of
from deltune.adapters.layers import (
    READ_WEIGHTS,
    is_altered_linear,
    kind_of,
    site_of,
    stacks_of,
)
from deltune.adapters.whole import ModelDelta
from deltune.adapters.wrapper import TrainedCopy, original, walk
from deltune.errors import AdapterError
from deltune.log import logger
from deltune.weights import is_quantised

ALL_LINEAR = "all-linear"
LINEAR = ("linear", "conv1d", "experts")  # kinds that it means


def select(model: nn.Module, config: AdapterConfig) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The layers to adapt and the modules to train in full, by full name; wrappers stand for what they hold.

    Raises AdapterError if a target, exclusion or module to save matches nothing, or something that cannot be adapted.
    """
    modules = {name: module for name, module in walk(model) if name}
    saved = _modules_to_save({name: module for name, module in modules.items() if kind_of(original(module)) != "experts"}, config)
    if issubclass(config.delta_class(), ModelDelta):
        return _hosts(model, config, saved), saved
    candidates = {name: module for name, module in modules.items() if not any(inside(name, other) for other in saved)}
    excluded = _excluded(modules, config.exclude)
    candidates = {name: module for name, module in candidates.items() if name not in excluded}
    if isinstance(config.targets, str) and config.targets in KEYWORDS:
        layers = KEYWORDS[config.targets](model, candidates)
    elif isinstance(config.targets, str):
        layers = _by_pattern(candidates, config)
    else:
        layers = _by_names(candidates, config)
    layers = {name: module for name, module in modules.items() if name in layers}  # in the model's order, whatever the list's
    if not layers:
        raise AdapterError(_nothing(model, modules, config))
    for name, module in layers.items():
        _check(name, module, modules.get(name.rpartition(".")[0], model), config)
    return layers, saved


def _hosts(model: nn.Module, config: AdapterConfig, saved: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that a method of the whole model acts beside; none may be within one that is trained in full."""
    found = config.delta_class().find(model, config)
    for name in found:
        around = next((other for other in saved if inside(name, other)), None)
        if around is not None:
            raise AdapterError(f"modules_to_save: {around} would be a copy without what {name_of(config)} adds to {name}; train less of the model in full")
    return found


def inside(name: str, module: str) -> bool:
    """Whether a full name is that module or something in it."""
    return name == module or name.startswith(module + ".")


def ends_with(name: str, ending: str) -> bool:
    """Whether a name is this one, or ends with it from a dot on."""
    return name == ending or name.endswith("." + ending)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, where the model says which it is."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _modules_to_save(modules: Mapping[str, nn.Module], config: AdapterConfig) -> dict[str, nn.Module]:
    saved: dict[str, nn.Module] = {}
    for ending in config.modules_to_save:
        found = [name for name in modules if ends_with(name, ending)]
        if not found:
            raise AdapterError(f"modules_to_save: {ending!r} matches no module of the model.{nearest(ending, modules)}")
        if any(is_quantised(parameter) for name in found for parameter in modules[name].parameters()):
            raise AdapterError(f"modules_to_save: {ending!r} is stored quantised, and codes cannot be trained in full. What fits: quant.skip=['*{ending}*']")
        saved.update({name: modules[name] for name in found})
    # of a module and one inside it the outer one counts
    return {name: module for name, module in saved.items() if not any(inside(name, o) for o in saved if o != name)}


def _excluded(modules: Mapping[str, nn.Module], endings: Iterable[str]) -> set[str]:
    names: set[str] = set()
    for ending in endings:
        found = [name for name in modules if ends_with(name, ending)]
        if not found:
            raise AdapterError(f"exclude: {ending!r} matches no module of the model.{nearest(ending, modules)}")
        names.update(name for name in modules if any(inside(name, other) for other in found))
    return names


def _all_linear(model: nn.Module, candidates: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    head = output_head(model)
    passed_over = [name for name, module in candidates.items() if _holds_unknown_experts(module)]
    if passed_over:
        logger.warning("targets: all-linear passes over the experts in %s and %d more, whose layout is not known", passed_over[0], len(passed_over) - 1)
    return {
        name: module
        for name, module in candidates.items()
        if (kind_of(original(module)) in LINEAR or is_altered_linear(original(module)))
        and module is not head
        and not ends_with(name, "lm_head")
    }


def _holds_unknown_experts(module: nn.Module) -> bool:
    three = any(p is not None and p.ndim == 3 for p in module._parameters.values())
    return three and "Expert" in type(module).__name__ and not stacks_of(module)


def _all_norms(model: nn.Module, candidates: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in candidates.items() if kind_of(original(module)) == "norm"}


def _all_layers(model: nn.Module, candidates: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return _all_linear(model, candidates) | _all_norms(model, candidates)


def _all_biases(model: nn.Module, candidates: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in _all_layers(model, candidates).items() if site_of(name, original(module)).has_bias}


def _input_embedding(model: nn.Module, candidates: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    tables = {name: module for name, module in candidates.items() if kind_of(original(module)) == "embedding"}
    if hasattr(model, "get_input_embeddings"):
        return {name: module for name, module in tables.items() if module is model.get_input_embeddings()}
    return tables if len(tables) == 1 else {}


# Words for `targets` that mean kinds of layers, each to what finds them
KEYWORDS: dict[str, Callable[[nn.Module, Mapping[str, nn.Module]], dict[str, nn.Module]]] = {
    ALL_LINEAR: _all_linear,
    "all-norms": _all_norms,
    "all-layers": _all_layers,
    "all-biases": _all_biases,
    "input-embedding": _input_embedding,
}

# Where no layer is such
NONE_SUCH = {
    ALL_LINEAR: "the model has no Linear or Conv1D layer that is left to adapt",
    "all-norms": "the model has no LayerNorm, RMSNorm or the like that is left to adapt",
    "all-layers": "the model has no Linear, Conv1D or norm layer that is left to adapt",
    "all-biases": "no layer of the model that is left to adapt has a bias; name layers that shall get one, or `all-layers`",
    "input-embedding": "the model does not say which Embedding its input goes through, or it is left out; name it",
}


def _by_pattern(candidates: Mapping[str, nn.Module], config: AdapterConfig) -> dict[str, nn.Module]:
    pattern = config.targets
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"targets: {pattern!r} is no regular expression: {error}") from None
    return {
        name: module
        for name, module in candidates.items()
        if (_is_layer(module, config) or is_altered_linear(original(module))) and expression.fullmatch(name)
    }


def _by_names(candidates: Mapping[str, nn.Module], config: AdapterConfig) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for ending in config.targets:
        found = {name: module for name, module in candidates.items() if ends_with(name, ending)}
        if not found:
            raise AdapterError(
                f"targets: {ending!r} matches no module that is left to adapt.{nearest(ending, _layer_names(candidates, config))}"
            )
        layers.update(_stacks_within(found, candidates))
    return layers


def _stacks_within(found: Mapping[str, nn.Module], candidates: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules found, where one that owns stacks of experts stands for these."""
    layers: dict[str, nn.Module] = {}
    for name, module in found.items():
        leaves = [f"{name}.{leaf}" for leaf in stacks_of(module)]
        layers.update({leaf: candidates[leaf] for leaf in leaves if leaf in candidates} or {name: module})
    return layers


def _check(name: str, module: nn.Module, parent: nn.Module, config: AdapterConfig) -> None:
    """Raise AdapterError if an adapter on this module would be impossible or without effect."""
    if isinstance(module, TrainedCopy):
        raise AdapterError(f"{name} is trained in full by adapter {', '.join(module.adapters)}; it cannot be adapted as well")
    site = site_of(name, original(module))
    if ("linear" if site.kind == "experts" else site.kind) not in config.delta_class().kinds:
        raise AdapterError(
            f"{name} is a {type(original(module)).__name__}, of kind {site.kind}; {name_of(config)} works on layers of kind "
            f"{', '.join(config.delta_class().kinds)}"
        )
    if isinstance(parent, READ_WEIGHTS):
        raise AdapterError(
            f"{name}: its owner, a {type(parent).__name__}, reads this layer's weight without calling the layer, so an "
            f"adapter would have no effect. Put {name} into exclude, or name targets without it"
        )


def _is_layer(module: nn.Module, config: AdapterConfig) -> bool:
    """Whether an expression over names can mean it: norms stand among the layers of a block, and few methods adapt them."""
    kind = kind_of(original(module))
    return kind is not None and (kind != "norm" or kind in config.delta_class().kinds)


def _layer_names(modules: Mapping[str, nn.Module], config: AdapterConfig) -> list[str]:
    return [name for name, module in modules.items() if _is_layer(module, config)]


def nearest(wanted: str, names: Iterable[str]) -> str:
    """The end of a message: names like the one wanted, as short as they can be told apart from others."""
    endings = dict.fromkeys(".".join(name.split(".")[-(wanted.count(".") + 1) :]) for name in names)
    close = difflib.get_close_matches(wanted, endings, n=4, cutoff=0.5)
    if close:
        return f" Nearest names: {', '.join(close)}"
    some = ", ".join(list(endings)[:8])
    return f" There are: {some}" + (", …" if len(endings) > 8 else "")


def _nothing(model: nn.Module, modules: Mapping[str, nn.Module], config: AdapterConfig) -> str:
    if not modules:
        return (
            f"the model itself is a single {type(model).__name__}, which cannot be replaced in place; put it into a "
            "module, e.g. torch.nn.Sequential"
        )
    if isinstance(config.targets, str) and config.targets in KEYWORDS:
        return f"targets: {NONE_SUCH[config.targets]}"
    layers = _layer_names(modules, config)
    if isinstance(config.targets, list):
        return f"targets is empty.{nearest('', layers)}"
    hint = ""
    if any(ends_with(name, config.targets) for name in modules):
        hint = f" One string is a regular expression over full names; for name endings give a list: [{config.targets}]."
    return f"targets: no layer's full name matches {config.targets!r}.{hint}{nearest(config.targets, layers)}"
