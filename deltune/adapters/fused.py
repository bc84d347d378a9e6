"""Which adapted layers of a model are computed together, in one autograd node. What cannot be is told, and computed plainly.

Told by structure: layers of one module that are given the very same tensor are a group (the projections of an attention);
a module whose traced forward is last(act(gate(x)) ⊙ up(x)), or last(act(first(x))), is a feed-forward block, and one
node. Parameters keep their names, and a model fits its files as before. Whether a layer can be is asked at every call:
hooks, several adapters, a merge or a compiler may come later.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltune.adapters.adapted import Adapted, Below, watched
from deltune.adapters.config import name_of
from deltune.adapters.delta import Delta
from deltune.adapters.experts import AdaptedStack
from deltune.adapters.forms import FOREIGN_ERRORS, LINEAR, Form, form_of
from deltune.adapters.layers import kind_of, out_in
from deltune.adapters.magnitude import Magnitude
from deltune.adapters.nodes import GatedNode, How, Layer, Middle, feed_forward, linears
from deltune.adapters.wrapper import original, walk, wrappers
from deltune.recipe import set_recipe


@dataclass(frozen=True)
class Fusion:
    """What is computed together; or, with `why_not`, what is not."""

    where: str  # full name of a layer, or of the module that holds the layers
    what: str
    why_not: str = ""


def fuse(model: nn.Module, example: Mapping[str, Any] | None = None) -> list[Fusion]:
    """Have adapted layers be computed together where they can. Does it anew if it was done before.

    Which layers are given the same tensor is seen in one forward pass without gradient, in eval mode: of `example` (the
    model's keyword arguments), or of two tokens where the model is a Hugging Face one. Without either no groups are found.
    """
    unfuse(model)
    found: list[Fusion] = []
    holders = dict(wrappers(model))
    for place, holder in holders.items():
        if isinstance(holder, AdaptedStack):
            found.append(Fusion(place, "experts", "the experts of a mixture take their own tokens each"))
        elif isinstance(holder, Adapted):
            call = call_of(holder)
            if isinstance(call, str):
                found.append(Fusion(place, type(holder.base_layer).__name__, call))
            if holder.site.kind in LINEAR:
                holder.fused = Together([holder])
    layers = {place: holder for place, holder in holders.items() if isinstance(holder, Adapted) and holder.fused is not None}
    groups, why = _groups(model, layers, example)
    if why:
        found.append(Fusion("", "layers with one input", why))
    blocks = list(_blocks(model, layers))
    inside = {f"{block.where}.{name}" for block, made in blocks for name in (made.names if made else ())}
    for group in groups:
        together = Together([layers[place] for place in group])
        for place in group:
            layers[place].fused = together
    for block, made in blocks:
        if made is not None:
            made.parent.forward = made
        found.append(block)
    able = {place for place, layer in layers.items() if not isinstance(call_of(layer), str)} - inside
    for group in [*groups, *([place] for place in layers if not any(place in group for group in groups))]:
        group = [place for place in group if place in able]
        if len(group) > 1:
            parent = group[0].rpartition(".")[0]
            found.append(Fusion(parent, ", ".join(place.rpartition(".")[2] for place in group)))
        elif group:
            found.append(Fusion(group[0], "one layer"))
    return found


def told(found: Iterable[Fusion]) -> list[str]:
    """One line on what is computed together, and one on each reason why something is not."""
    nodes = Counter(record.what.partition(":")[0] for record in found if not record.why_not)
    reasons = Counter(record.why_not for record in found if record.why_not)
    together = ", ".join(f"{count} × {what}" for what, count in nodes.items())
    return [f"one node each: {together or 'nothing'}", *(f"computed plainly ({count} ×): {why}" for why, count in reasons.items())]


def unfuse(model: nn.Module) -> None:
    """Have every layer be computed by itself again."""
    for module in model.modules():
        if isinstance(module, Adapted):
            module.fused = None
        elif isinstance(vars(module).get("forward"), FeedForward):
            del module.forward


# ---------------------------------------------------------------- one layer


class Call(NamedTuple):
    """A layer as a node takes it."""

    layer: Layer
    how: How
    bare: bool  # no adapter acts on it


def call_of(module: nn.Module) -> Call | str:
    """A linear layer, adapted or not, as it would be called now; or why a node cannot compute it."""
    base = original(module)
    if kind_of(base) not in LINEAR or not isinstance(module, (Adapted, type(base))):
        return f"a {type(base).__name__} is not a linear layer"
    if watched(base):
        return "hooks act on the layer"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "the layer itself is trained"
    weight = out_in(base, base.weight)
    running = module.to_run() if isinstance(module, Adapted) else []
    if not running:
        return Call(Layer(weight, base.bias), How(), bare=True)
    if len(running) > 1:
        return f"{len(running)} adapters act on it"
    delta: Delta = module.adapters[running[0]]
    inner = delta.inner if isinstance(delta, Magnitude) else delta
    if not inner.in_product_form:
        return f"{name_of(delta.config)} is not a product of two factors, or is computed faster by itself"
    if watched(delta) or watched(inner):
        return "hooks act on the adapter"
    B, A, scale = inner.running_product(weight.detach())
    stretch = delta.stretch(Below(module, running, 0)) if isinstance(delta, Magnitude) else None
    return Call(Layer(weight, base.bias, A, B, stretch), How(scale, module.dropout_of(running[0])), bare=False)


def compute_type(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type in which a layer's products are taken; None where a node must not be used: in a compiler, which fuses by
    itself, within transforms of functions, for tensors that are more than numbers, and where types do not fit."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    if type(x) not in (Tensor, nn.Parameter) or not x.is_floating_point() or not x.numel():
        return None
    kinds = ("cpu", "cuda") if x.device.type == "meta" else (x.device.type,)
    short = [torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)]
    if short:
        return None if torch.float64 in (x.dtype, weight.dtype) else short[0]
    return x.dtype if x.dtype == weight.dtype else None


# ---------------------------------------------------------------- layers with one input


class Shares(NamedTuple):
    """Outputs of a group that its first layer has computed, for the others to fetch when they are called."""

    x: Tensor
    version: int
    state: tuple[Any, ...]
    outputs: dict[int, tuple[tuple[Any, ...], Tensor]]  # id of a layer -> (what it stood at, its output)


class Together:
    """Adapted layers that are given the same tensor. The first one's call computes all of them.

    The others get their share if they are called with that very tensor, unchanged, and nothing of theirs has changed; a
    layer that is called otherwise, or once more, is computed by itself.
    """

    def __init__(self, layers: list[Adapted]):
        self.layers = layers
        self._shares: Shares | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "_shares": None}  # what is computed is no part of a model

    def answer(self, layer: Adapted, x: Tensor) -> Tensor | None:
        share = self._fetch(layer, x)
        if share is not None:
            return share
        own = call_of(layer)
        dtype = None if isinstance(own, str) or own.bare else compute_type(x, own.layer.weight)
        if dtype is None:
            return None
        calls = {layer: own}
        if layer is self.layers[0] and not x.is_inference():  # such a tensor does not tell when it is changed
            for other in self.layers[1:]:
                call = call_of(other)
                if not isinstance(call, str) and not call.bare and compute_type(x, call.layer.weight) == dtype:
                    calls[other] = call
        outputs = linears(x, [call.layer for call in calls.values()], [call.how for call in calls.values()], dtype)
        if len(calls) > 1:
            later = {id(other): (standing(other), y) for other, y in list(zip(calls, outputs, strict=True))[1:]}
            self._shares = Shares(x, x._version, surroundings(x), later)
        return outputs[0]

    def _fetch(self, layer: Adapted, x: Tensor) -> Tensor | None:
        shares = self._shares
        if shares is None or shares.x is not x:
            return None
        stood, y = shares.outputs.pop(id(layer), (None, None))
        if not shares.outputs:
            self._shares = None
        fits = stood == standing(layer) and shares.version == x._version and shares.state == surroundings(x)
        return y if fits else None


def standing(layer: Adapted) -> tuple[Any, ...]:
    """What tells that a layer would answer otherwise than before."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return (tuple(layer.to_run()), layer.training, call_is_watched(layer), tuple((id(t), t._version) for t in tensors))


def call_is_watched(layer: Adapted) -> bool:
    return watched(layer.base_layer) or any(watched(delta) for delta in layer.adapters.values())


def surroundings(x: Tensor) -> tuple[Any, ...]:
    kind = "cpu" if x.device.type == "meta" else x.device.type
    return torch.is_grad_enabled(), torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)


def _groups(model: nn.Module, layers: Mapping[str, Adapted], example: Mapping[str, Any] | None) -> tuple[list[list[str]], str]:
    """Names of layers of one module that are given the same tensor, and why they could not be told if so."""
    siblings = [place.rpartition(".")[0] for place in layers]
    candidates = {place: layer for place, layer in layers.items() if siblings.count(place.rpartition(".")[0]) > 1}
    example = _two_tokens(model) if example is None else example
    if not candidates or example is None:
        return [], "the model has no example of its input" if candidates else ""
    seen: list[tuple[str, Tensor]] = []  # holding the tensors, so that no two have one id

    def note(place: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: seen.append((place, args[0])) if args else None

    handles = [layer.register_forward_pre_hook(note(place)) for place, layer in candidates.items()]
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            model(**example)
    except FOREIGN_ERRORS as error:
        return [], f"the model cannot be run on an example: {str(error).strip().partition(chr(10))[0]}"
    finally:
        for handle in handles:
            handle.remove()
        for module in was_training:
            module.training = True
    times = [place for place, _ in seen]
    groups: dict[tuple[str, int], list[str]] = {}
    for place, x in seen:
        if times.count(place) == 1:
            groups.setdefault((place.rpartition(".")[0], id(x)), []).append(place)
    return [group for group in groups.values() if len(group) > 1], ""


def _two_tokens(model: nn.Module) -> dict[str, Any] | None:
    """The least input of a Hugging Face model of text."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embeddings is None or not hasattr(embeddings, "weight") or not hasattr(model, "config"):
        return None
    ids = torch.zeros(1, 2, dtype=torch.long, device=embeddings.weight.device)
    takes = inspect.signature(model.forward).parameters
    # with a cache, for without one a mask is made by looking at numbers, of which the meta device has none
    return {name: value for name, value in {"input_ids": ids, "decoder_input_ids": ids, "use_cache": True}.items() if name in takes}


# ---------------------------------------------------------------- feed-forward blocks


class FeedForward:
    """Put on a feed-forward module as its `forward`. One node; where it cannot be, the product is one and keeps its recipe."""

    def __init__(self, parent: nn.Module, form: Form):
        self.parent = parent
        self.form = form

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.form.first, self.form.last)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or torch.compiler.is_compiling():
            return type(self.parent).forward(self.parent, *args, **kwargs)
        middle = self.form.middle(self.parent)
        y = self._in_one(x, middle)
        if y is None:
            y = self._by_parts(x, middle)
        for name in self.form.tail:
            y = self.parent.get_submodule(name)(y)
        return y

    def _in_one(self, x: Tensor, middle: Middle) -> Tensor | None:
        modules = [self.parent.get_submodule(name) for name in self.names]
        act = self.parent.get_submodule(self.form.activation_module) if self.form.activation_module else None
        if _globally_watched() or any(watched(module) for module in modules) or (act is not None and watched(act)):
            return None
        calls = [call_of(module) for module in modules]
        if any(isinstance(call, str) for call in calls) or all(call.bare for call in calls):
            return None
        types = {compute_type(x, call.layer.weight) for call in calls}
        if len(types) > 1 or None in types:
            return None
        return feed_forward(x, [call.layer for call in calls], [call.how for call in calls], middle, types.pop())

    def _by_parts(self, x: Tensor, middle: Middle) -> Tensor:
        outputs = [self.parent.get_submodule(name)(x) for name in self.form.first]
        gate, up = middle.inputs(outputs)
        plain = up is None or gate.dtype != up.dtype
        h = middle.product(gate, up) if plain else GatedNode.apply(middle, gate, up)
        if up is None:
            set_recipe(h, middle.activation.forward, gate)
        else:
            set_recipe(h, middle.product, gate, up)
        return self.parent.get_submodule(self.form.last)(h)


def _globally_watched() -> bool:
    module = nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks or module._global_backward_hooks or module._global_backward_pre_hooks)


def _blocks(model: nn.Module, layers: Mapping[str, Adapted]) -> Iterator[tuple[Fusion, FeedForward | None]]:
    """What each module with adapted layers is found to be, where it takes one tensor."""
    parents = {place.rpartition(".")[0] for place in layers}
    for where, module in walk(model):
        if where not in parents or not where or len(inspect.signature(type(module).forward).parameters) != 2:
            continue
        if sum(kind_of(original(child)) in LINEAR for child in module.children()) < 2:
            continue
        found = f"has a forward of its own kind: {vars(module)['forward']}" if "forward" in vars(module) else form_of(module)
        if isinstance(found, str):
            yield Fusion(where, "feed-forward block", found), None
            continue
        made = FeedForward(module, found)
        calls = {name: call_of(module.get_submodule(name)) for name in made.names}
        reasons = {name: call for name, call in calls.items() if isinstance(call, str)}
        what = f"feed-forward block: {', '.join(made.names)}"
        if reasons:
            yield Fusion(where, what, "its product alone is one node: " + "; ".join(f"{name}: {why}" for name, why in reasons.items())), made
        else:
            yield Fusion(where, what), made
