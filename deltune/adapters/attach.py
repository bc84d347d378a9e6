"""Put adapters on a model, switch, merge and take them off. All of it in place, on any nn.Module.

While an adapter is attached every other parameter is frozen; when the last one goes, the model is as it was. Nothing
changes until everything has been checked, so a call that raises leaves the model alone.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as replace_field

import torch
from torch import Tensor, nn

from deltune import weights
from deltune.adapters.adapted import Adapted, Taken
from deltune.adapters.bank import Bank, scopes
from deltune.adapters.config import AdapterConfig, complaint, name_of
from deltune.adapters.delta import Delta
from deltune.adapters.experts import AdaptedStack, expert_delta
from deltune.adapters.fused import unfuse
from deltune.adapters.layers import Site, Stack, kind_of, out_in, site_of
from deltune.adapters.magnitude import Magnitude
from deltune.adapters.quantised import Originals, exact_weight, is_quantised, put_back, take_out
from deltune.adapters.targets import inside, output_head, select
from deltune.adapters.tokens import BesideConfig, TokensBeside, places, ties_agree
from deltune.adapters.whole import ModelDelta, host_of
from deltune.adapters.wrapper import Beside, TrainedCopy, Wrapper, hosts, original, replace, walk, wrappers
from deltune.dist import gathered
from deltune.errors import AdapterError

# On the model, while it has adapters: names of the parameters that were trainable before the first one.
TRAINABLE_BEFORE = "_trainable_before_adapters"


@dataclass(frozen=True)
class Prepared:
    """An adapter that fits the model and is not in it yet. Keys are full module names."""

    name: str
    places: dict[str, nn.Module]  # what stands there now
    deltas: dict[str, Delta]
    banks: list[Bank]  # what deltas share, each once
    copies: dict[str, nn.Module]
    taken: dict[str, Taken] = field(default_factory=dict)  # by layer, what its start took out of a quantised weight

    def put_back(self) -> None:
        """Undo the one change that is made to the model before everything is filled."""
        for place, taken in self.taken.items():
            put_back(self.places[place], taken.exact())
        self.taken.clear()


def attach(
    model: nn.Module, config: AdapterConfig, *, name: str = "default", seed: int = 0, originals: Originals | None = None
) -> nn.Module:  # fmt: skip
    """Add an adapter, in place, and return the model. It runs beside the adapters that are active already.

    The start of each layer is a function of the seed and the layer's name alone. On the meta device nothing is filled.
    `originals` gives a quantised layer's weight [out, in] as it was before; a start that is taken out of W then looks at
    that one, and the layer is rounded anew without it, see quantised.py. Raises AdapterError if the config does not fit.
    """
    prepared = prepare(model, config, name)
    config.delta_class().check(config, [place for place, delta in prepared.deltas.items() if not delta.beside_method])
    unmerge(model)
    try:
        begin(prepared, seed, originals)
    except BaseException:
        prepared.put_back()
        raise
    install(model, prepared, trainable=True)
    return model


@torch.no_grad()
def begin(prepared: Prepared, seed: int | str, originals: Originals | None = None) -> None:
    """Fill a prepared adapter with its start: what needs no data, then what looks at the base's weights."""
    for bank in prepared.banks:
        if bank.sites[0].device.type == "meta":
            continue
        name = f"{type(bank).__name__}.{bank.name}.{bank.key}"
        bank.reset(generator_for(name, seed))
        if bank.starts_from_base:
            calls = {site.name: functools.partial(weight_of, prepared.places[site.name]) for site in bank.sites}
            bank.start(calls, generator_for(f"{name}.start", seed))
    for place, delta in prepared.deltas.items():
        if delta.site.device.type != "meta":
            delta.reset(generator_for(place, seed))
            module, generator = prepared.places[place], generator_for(f"{place}.start", seed)
            if delta.starts_from_original and originals is not None and is_quantised(module):
                W = exact_weight(module, place, originals)
                delta.start(looked_at(module, delta, W), generator)
                if take_out(module, delta, W):
                    prepared.taken[place] = Taken(prepared.name, functools.partial(exact_weight, module, place, originals))
                delta.settle(stored_weight_of(module))
            elif delta.needs_original and is_quantised(module):
                raise AdapterError(
                    f"{place}: {delta.needs_original}, and this layer's weight is rounded already: give originals, e.g. "
                    "models.load.originals(config), which reads it as it was"
                )
            elif delta.starts_from_base:
                delta.start(looked_at(module, delta), generator)
            if type(delta).start_bias is not Delta.start_bias and delta.site.has_bias:
                delta.start_bias(bias_of(prepared.places[place]))


def weight_of(module: nn.Module) -> Tensor:
    """W [out, in] of a layer, or of the layer in a wrapper, as it was before any merge; of a model its embeddings'. In
    float32 or wider."""
    return weights.float_view(stored_weight_of(module))


def stored_weight_of(module: nn.Module) -> Tensor:
    """As `weight_of`, in the type that it is stored in and never a copy."""
    if not isinstance(module, Wrapper) and hasattr(module, "get_input_embeddings"):
        module = module.get_input_embeddings()
    weight = _own(module, "weight")
    with gathered(weight):
        return out_in(original(module), weight.detach())


def looked_at(module: nn.Module, delta: Delta, W: Tensor | None = None) -> Tensor:
    """What a delta's start looks at: W [out, in], or [W, b] if it says so and the layer has a bias. W: in its weight's place."""
    W = stored_weight_of(module) if W is None else W
    if delta.looks_at_stored:
        return W
    W = weights.float_view(W)
    return torch.cat([W, bias_of(module).to(W).unsqueeze(1)], dim=1) if delta.bias_column and delta.site.has_bias else W


def bias_of(module: nn.Module) -> Tensor:
    """A layer's own bias [out], as `weight_of` gives its weight."""
    bias = _own(module, "bias")
    with gathered(bias):
        return weights.float_view(bias)


def _own(module: nn.Module, name: str) -> Tensor:
    return module.originals()[name] if isinstance(module, Adapted) else getattr(original(module), name)


def ready(module: nn.Module, delta: Delta) -> None:
    """Have a delta take its last step before it runs, on the base weight of its layer as it is now."""
    if delta.measures_base and delta.site.device.type != "meta":
        delta.ready(weight_of(module))
    if type(delta).ready_bias is not Delta.ready_bias and delta.site.has_bias and delta.site.device.type != "meta":
        delta.ready_bias(bias_of(module))


def generator_for(place: str, seed: int | str) -> torch.Generator:
    """Random numbers for one layer, the same whatever else is adapted and on every device."""
    digest = hashlib.sha256(f"{seed}/{place}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def prepare(model: nn.Module, config: AdapterConfig, name: str) -> Prepared:
    """Everything that an adapter adds, allocated and not filled. Does not touch the model."""
    fault = complaint(config)
    if fault:
        raise AdapterError(fault)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict(), name):
        raise AdapterError(f"an adapter cannot be called {name!r}; use letters, digits, - and _, and no method's name")
    if name in adapters(model):
        raise AdapterError(f"the model has an adapter {name!r} already; detach it, or give this one another name")
    make: type[Delta] = Magnitude if config.magnitude else config.delta_class()
    if issubclass(make, ModelDelta):
        config = make.settled(model, config)
    layers, saved = select(model, config)
    first = {id(module): place for place, module in reversed(layers.items())}  # one module may stand in two places
    layers = {place: module for place, module in layers.items() if first[id(module)] == place}
    ties = _ties(model, layers, saved) if make.follows_ties else {}
    describe = make.site_of if issubclass(make, ModelDelta) else site_of
    sites = [describe(place, original(module)) for place, module in layers.items()]
    for place, (module, lead) in ties.items():
        layers[place] = module
        sites = [*(site for site in sites if site.name != place), replace_field(site_of(place, original(module)), tied_to=lead)]
    stacks = [site for site in _with_depth(sites) if site.kind == "experts"]
    expert = {site.name: expert_delta(config, site, make) for site in stacks}
    sites = [site for site in sites if site.kind != "experts"]
    shared = {attribute: scopes(config, sites, attribute, *of) for attribute, of in config.delta_class().banks(config).items()}
    deltas = {site.name: make(config, site, {attribute: by_name[site.name] for attribute, by_name in shared.items()}) for site in sites}
    deltas = {place: (deltas | expert)[place] for place in layers}
    banks = list({id(bank): bank for by_name in shared.values() for bank in by_name.values()}.values())
    copies = {place: _copy(place, module) for place, module in saved.items()}
    tokens = _token_rows(model, places(model, config, layers, saved), saved)
    rows = {id(delta.shared): delta.shared for _, delta in tokens.values()}
    return Prepared(
        name, layers | {place: module for place, (module, _) in tokens.items()} | saved,
        deltas | {place: delta for place, (_, delta) in tokens.items()}, [*banks, *rows.values()], copies,
    )  # fmt: skip


def _token_rows(
    model: nn.Module, found: dict[str, tuple[nn.Module, BesideConfig]], saved: dict[str, nn.Module]
) -> dict[str, tuple[nn.Module, TokensBeside]]:
    """The parts that train rows of single tokens: place -> the module there, and the part."""
    ties = _ties(model, {place: module for place, (module, _) in found.items()}, saved)
    ties_agree(found, ties)
    parts: dict[str, tuple[nn.Module, TokensBeside]] = {}
    for lead, (module, config) in found.items():
        if lead in ties:
            continue
        held = {lead: module} | {place: other for place, (other, to) in ties.items() if to == lead}
        sites = [replace_field(site_of(place, original(other)), tied_to=None if place == lead else lead) for place, other in held.items()]
        shared = scopes(config, sites, "shared", *TokensBeside.banks(config)["shared"])
        parts.update({site.name: (held[site.name], TokensBeside(config, site, {"shared": shared[site.name]})) for site in sites})
    return parts


def _with_depth(sites: Sequence[Site]) -> list[Site]:
    """Of several stacks of one module each with the number of those that come after it."""
    owners = [site.name.rpartition(".")[0] for site in sites]
    return [replace_field(site, depth=owners[i + 1 :].count(owners[i])) if site.kind == "experts" else site for i, site in enumerate(sites)]


def _ties(model: nn.Module, layers: dict[str, nn.Module], saved: dict[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Layers that hold the weight of another of these, wherever they are: name -> the layer, and the name of the one it is tied to."""
    leads: dict[int, str] = {}
    for place, module in sorted(layers.items(), key=lambda layer: kind_of(original(layer[1])) != "embedding"):
        leads.setdefault(id(_own(module, "weight")), place)
    found: dict[str, tuple[nn.Module, str]] = {}
    for place, module in walk(model):
        if kind_of(original(module)) in (None, "norm"):
            continue
        lead = leads.get(id(_own(module, "weight")))
        if lead is None or module is layers[lead]:
            continue
        if isinstance(module, TrainedCopy) or any(inside(place, other) for other in saved):
            raise AdapterError(f"{place} holds the same weight as {lead} and would not see its change, for a copy of it is trained in full (modules_to_save)")
        found[place] = (module, lead)
    return found


def _copy(place: str, module: nn.Module) -> nn.Module:
    if isinstance(module, TrainedCopy) and module.running:
        raise AdapterError(f"{place} is trained in full by adapter {module.running[0]}, which is active; switch it off first")
    if isinstance(module, Adapted) or (not isinstance(module, TrainedCopy) and wrappers(module)):
        raise AdapterError(f"modules_to_save: {place} is, or holds, a layer with an adapter; it cannot be trained in full as well")
    return copy.deepcopy(original(module))


def install(model: nn.Module, prepared: Prepared, *, trainable: bool) -> None:
    """Put a prepared adapter in, filled, and freeze everything that is not an adapter's."""
    unmerge(model)
    for place, delta in prepared.deltas.items():
        ready(prepared.places[place], delta)
    names = [*active(model), prepared.name]
    if not hasattr(model, TRAINABLE_BEFORE):
        setattr(model, TRAINABLE_BEFORE, [name for name, p in model.named_parameters() if p.requires_grad])
    model.requires_grad_(False)
    exchange: dict[int, nn.Module] = {}
    for place, part in (prepared.deltas | prepared.copies).items():
        module = wrapper = prepared.places[place]
        if isinstance(part, ModelDelta):
            wrapper = host_of(part, module)
        elif not isinstance(module, Wrapper):
            wrapper = TrainedCopy(module) if place in prepared.copies else AdaptedStack(place, module) if isinstance(module, Stack) else Adapted(place, module)
            exchange[id(module)] = wrapper
        wrapper.add(prepared.name, part, trainable=trainable)
        if place in prepared.taken:
            wrapper.taken = prepared.taken[place]
    replace(model, exchange)
    for _, wrapper in wrappers(model):
        wrapper.set_active(names)


def adapters(model: nn.Module) -> dict[str, AdapterConfig]:
    """The config of each attached adapter, by name."""
    found: dict[str, AdapterConfig] = {}
    for _, wrapper in wrappers(model):
        if not isinstance(wrapper, TrainedCopy):
            found.update({name: delta.config for name, delta in wrapper.adapters.items() if name not in found and not delta.beside_method})
    return found


def active(model: nn.Module) -> list[str]:
    """Names of the adapters that run, in their order."""
    return next((list(wrapper.active) for _, wrapper in wrappers(model)), [])


def switch(model: nn.Module, names: str | Sequence[str]) -> None:
    """Run exactly these adapters, in this order; the others rest and are not trained. Unmerges first."""
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    _known(model, names)
    for _, wrapper in wrappers(model):
        if isinstance(wrapper, TrainedCopy):
            wrapper.check_active(names)
    unmerge(model)
    for _, wrapper in wrappers(model):
        wrapper.set_active(names)


def enable(model: nn.Module, names: str | Sequence[str]) -> None:
    """Run these adapters too, after those that run already. Unmerges first."""
    names = [names] if isinstance(names, str) else list(names)
    switch(model, [*active(model), *names])


def _known(model: nn.Module, names: Sequence[str]) -> None:
    there = adapters(model)
    for name in names:
        if name not in there:
            raise AdapterError(f"the model has no adapter {name!r}; it has {', '.join(there) or 'none'}")


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The model without its adapters, for the length of a `with`; merged ones are taken out and put back."""
    merged = {id(wrapper): wrapper.merged for _, wrapper in _adapted(model)}
    unmerge(model)
    before = [(wrapper, wrapper.enabled) for _, wrapper in wrappers(model)]
    for wrapper, _ in before:
        wrapper.enabled = False
    try:
        yield model
    finally:
        for wrapper, enabled in before:
            wrapper.enabled = enabled
        for _, wrapper in _adapted(model):
            if merged.get(id(wrapper)):
                wrapper.merge(merged[id(wrapper)])


def _adapted(model: nn.Module) -> list[tuple[str, Adapted]]:
    return [(name, wrapper) for name, wrapper in wrappers(model) if isinstance(wrapper, Adapted)]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the active adapters train, by their name in the model."""
    own = {id(parameter) for _, wrapper in wrappers(model) for parameter in wrapper.adapters.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in own and p.requires_grad}


def extra_loss(model: nn.Module) -> Tensor | None:
    """The sum of what active deltas add to the training loss; None if they add nothing."""
    holders = [holder for _, holder in wrappers(model) if not isinstance(holder, TrainedCopy)]
    running = [(name, holder.adapters[name]) for holder in holders for name in holder.running]
    layers = Counter(name for name, _ in running)
    losses = [(delta.loss(), layers[name] if delta.averages_loss else 1) for name, delta in running]
    losses = [loss / count for loss, count in losses if loss is not None]
    return torch.stack(losses).sum() if losses else None


def merge_in_place(model: nn.Module, names: str | Sequence[str] | None = None) -> None:
    """Fold active adapters (all of them, or these) into the weights, so that they cost nothing. `unmerge` is exact."""
    running = active(model)
    names = running if names is None else [names] if isinstance(names, str) else list(names)
    _known(model, names)
    for name in names:
        if name not in running:
            raise AdapterError(f"adapter {name!r} is switched off; switch it on before merging it in place")
    unmerge(model)
    _check_mergeable_models(model, names)
    layers = [(wrapper, [name for name in wrapper.running if name in names]) for _, wrapper in _adapted(model)]
    for wrapper, held in layers:
        wrapper.check_mergeable(held)
    for wrapper, held in layers:
        if held:
            wrapper.merge(held)


def unmerge(model: nn.Module) -> None:
    """Undo `merge_in_place`, bit for bit."""
    for _, wrapper in _adapted(model):
        if wrapper.merged:
            wrapper.unmerge()


def merge(model: nn.Module, name: str | None = None) -> nn.Module:
    """Fold one adapter, or all of them, into the weights for good, and return the model.

    A merged weight that was tied to another layer is untied, and so is the model's config. Raises AdapterError if an
    adapter has no matrix to merge, or, without a name, if some adapters are switched off.
    """
    resting = [other for other in adapters(model) if other not in active(model)]
    if name is None and resting:
        raise AdapterError(f"adapters {', '.join(resting)} are switched off; detach them or switch them on before merging all")
    names = active(model) if name is None else [name]
    if not names:
        raise AdapterError("the model has no adapter to merge")
    _known(model, names)
    unmerge(model)
    _check_mergeable_models(model, names)
    for _, wrapper in _adapted(model):
        wrapper.check_mergeable([n for n in names if n in wrapper.adapters])
    _check_sole_copies(model, names)
    shared = shared_parameters(model)
    replaced: dict[int, nn.Module] = {}
    for _, wrapper in wrappers(model):
        held = [n for n in names if n in wrapper.adapters]
        if isinstance(wrapper, TrainedCopy) and held:
            replaced[id(wrapper)] = wrapper.adapters[held[0]].requires_grad_(False)
        elif held:
            if id(wrapper.base_layer.weight) in shared:
                weights.snapshot(wrapper.base_layer)  # the others keep the tied tensor as it is
            wrapper.fold(held)
    _tie_again(model, names)
    replace(model, replaced)
    for n in names:
        _remove(model, n)
    _untie_config(model)
    return model


def _tie_again(model: nn.Module, names: Sequence[str]) -> None:
    """Have layers that were tied, and were changed alike, hold one weight again."""
    places = dict(_adapted(model))
    for wrapper in places.values():
        held = [name for name in names if name in wrapper.adapters]
        leads = {wrapper.adapters[name].site.tied_to for name in held}
        lead = places.get(leads.pop()) if len(leads) == 1 else None
        if lead is not None and held == [name for name in names if name in lead.adapters]:
            wrapper.base_layer.weight = lead.base_layer.weight


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take one adapter off, or all of them, and return the model; after the last it is bit for bit what it was."""
    names = list(adapters(model)) if name is None else [name]
    if not names:
        raise AdapterError("the model has no adapter to detach")
    _known(model, names)
    unmerge(model)
    for n in names:
        _remove(model, n)
    return model


def _remove(model: nn.Module, name: str) -> None:
    exchange: dict[int, nn.Module] = {}
    for _, wrapper in wrappers(model):
        if name in wrapper.adapters:
            wrapper.remove(name)
        if not wrapper.adapters and isinstance(wrapper, AdaptedStack):
            wrapper.take_off()
        elif not wrapper.adapters and isinstance(wrapper, Wrapper):
            exchange[id(wrapper)] = wrapper.base_layer
            if isinstance(wrapper, Adapted) and wrapper.taken is not None and is_quantised(wrapper):
                put_back(wrapper, wrapper.taken.exact())
    replace(model, exchange)
    for host, holder in hosts(model):
        if not holder.adapters:
            holder.take_off(host)
    left = [other for other in active(model) if other != name]
    for _, wrapper in wrappers(model):
        wrapper.set_active(left)
    if not wrappers(model):
        unfuse(model)
    if not wrappers(model) and hasattr(model, TRAINABLE_BEFORE):
        before = set(getattr(model, TRAINABLE_BEFORE))
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in before)
        delattr(model, TRAINABLE_BEFORE)


def _check_mergeable_models(model: nn.Module, names: Sequence[str]) -> None:
    for place, holder in wrappers(model):
        for name in [name for name in names if isinstance(holder, Beside) and name in holder.adapters]:
            delta = holder.adapters[name]
            raise AdapterError(f"{place}: adapter {name} ({name_of(delta.config)}) cannot be merged, for {delta.why_not_mergeable}")


def _check_sole_copies(model: nn.Module, names: Sequence[str]) -> None:
    for place, wrapper in wrappers(model):
        others = [other for other in wrapper.adapters if other not in names]
        if isinstance(wrapper, TrainedCopy) and others and len(others) < len(wrapper.adapters):
            raise AdapterError(f"{place} is trained in full by adapter {others[0]} as well, whose copy would be lost; detach it first")


def shared_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that more than one module holds."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(module))
    return {parameter for parameter, modules in holders.items() if len(modules) > 1}


def _untie_config(model: nn.Module) -> None:
    """Where head and embedding no longer hold one tensor, have the config say so, or a reload would tie them again."""
    head = output_head(model)
    if head is None or not hasattr(model, "config") or not model.config.get_text_config().tie_word_embeddings:
        return
    if original(head).weight is not original(model.get_input_embeddings()).weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
