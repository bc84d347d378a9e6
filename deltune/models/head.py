"""What a causal language model does from its last hidden states to the loss, and the loss from there without logits.

Nothing is told by a model's name. The model's own forward runs up to its head, whatever stands on the way; what it does
to the head's output is read off the operations that it carries out on a few tokens, and held to their numbers. What
cannot be told so is computed the plain way, and the reason is part of the description.

Shapes: ids [batch, seq]; states [batch, seq, width], or [rows, width] of the rows whose next token is trained.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, noop_context_fn

from deltune.errors import ModelError
from deltune.log import logger
from deltune.models import filler
from deltune.models.cross_entropy import (
    Tail,
    chunk_rows,
    cross_entropy_of,
    linear_cross_entropy,
    linear_scores,
    scores_of,
)
from deltune.models.generation import inference, undisturbed_random

IGNORE = -100
NUM_PROBED = 3  # tokens


@runtime_checkable
class StandsFor(Protocol):
    """A module in the place of another, such as one with adapters."""

    def stands_for(self) -> nn.Module | None:
        """The module that a call now comes down to; None if it does more than any one of them."""


@dataclass(frozen=True)
class Head:
    """A model's head, as the loss needs it and `deltune plan` shows it."""

    vocab: int
    width: int
    bias: bool
    tied: bool  # to the input embeddings
    state: str  # frozen, trained, or adapted: called as a module, a chunk of rows at a time
    tail: Tail
    why_not: str = ""  # why the logits are made whole; empty if they are not

    def __str__(self) -> str:
        if self.why_not:
            return f"whole logits: {self.why_not}"
        tail = [f"scale {self.tail.scale:g}"] if self.tail.scale != 1.0 else []
        tail += [f"softcap {self.tail.softcap:g}"] if self.tail.softcap is not None else []
        words = [f"{self.state} head {self.vocab:,} x {self.width:,}", *(["tied"] if self.tied else []), *(["bias"] if self.bias else []), *tail]
        return f"no logits beyond a chunk ({', '.join(words)})"


# -- what there is ----------------------------------------------------------------------------------------------


def describe(model: nn.Module) -> Head:
    """The head of a causal language model: two forward passes over a few tokens, in eval mode, that leave no trace.

    On the meta device the operations are read there too, and only their numbers cannot be compared.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not hasattr(head, "weight") or head.weight.ndim != 2:
        return Head(0, 0, False, False, "unknown", Tail(), "the model names no output layer with a weight")
    linear = plain_linear(head)
    state = "adapted" if linear is None else "trained" if any(p.requires_grad for p in linear.parameters()) else "frozen"
    embedding = model.get_input_embeddings()
    tied = embedding is not None and hasattr(embedding, "weight") and embedding.weight is head.weight
    has_bias = hasattr(head, "bias") and isinstance(head.bias, Tensor)
    with inference(model), undisturbed_random(model):
        tail, why_not = _tail(model, head)
    return Head(*head.weight.shape, has_bias, tied, state, tail, why_not)


def described(model: nn.Module) -> Head:
    """As `describe`, and a word in the log where the logits are made whole."""
    head = describe(model)
    if head.why_not:
        logger.warning("the loss makes all logits of a micro-batch at once: %s", head.why_not)
    return head


def plain_linear(head: nn.Module) -> nn.Linear | None:
    """The linear layer that a call of this module comes down to, if it does nothing besides."""
    while isinstance(head, StandsFor):
        if _watched(head):
            return None
        head = head.stands_for()
    # a subclass may compute anything, and so may a hook, or a forward put on the module itself
    if type(head) is not nn.Linear or _watched(head) or "forward" in vars(head):
        return None
    plain = all(type(p) in (nn.Parameter, Tensor) for p in (head.weight, head.bias) if p is not None)
    return head if plain and head.weight.is_floating_point() else None


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _tail(model: nn.Module, head: nn.Module) -> tuple[Tail, str]:
    """What the model does after its head, and why it cannot be told."""
    ids = torch.arange(NUM_PROBED, device=head.weight.device)[None] % head.weight.shape[0]
    inputs = {"input_ids": ids, "use_cache": False}
    calls: list[tuple[Tensor, Tensor]] = []
    steps = _Steps()

    def follow(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # a copy, since the model may go on in place
        calls.append((args[0] if args else None, output.clone() if isinstance(output, Tensor) else None))
        steps.start(output)

    on_meta = ids.device.type == "meta"
    handle = head.register_forward_hook(follow)
    try:
        with _without_numbers(on_meta), steps:
            logits = model(**inputs).logits
    except (NotImplementedError, RuntimeError) as error:
        if not on_meta:
            raise
        return Tail(), f"its forward pass depends on numbers, so this shows with its weights only: {_first_line(error)}"
    finally:
        handle.remove()
    if len(calls) != 1:
        return Tail(), f"the model calls its output layer {len(calls)} times in a forward pass"
    states, z = calls[0]
    if not isinstance(states, Tensor) or states.shape[:-1] != ids.shape:
        return Tail(), "the states that reach the output layer are not one for each token"
    tail, why_not = steps.found(logits)
    if why_not:
        return Tail(), why_not
    if not on_meta and not _close(tail(z.double()), logits.double(), logits.dtype):
        return Tail(), "what the model does after its output layer does not give the logits that it returns"
    try:
        with _without_numbers(on_meta):
            states_before_head(model, inputs)
    except (RuntimeError, IndexError, ValueError) as error:
        return Tail(), f"the model cannot do without its output layer's rows: {_first_line(error)}"
    return tail, ""


@contextmanager
def _without_numbers(on_meta: bool) -> Iterator[None]:
    """On the meta device, tensors are made there, and a question about numbers (is the mask all ones?) is answered by yes."""
    if not on_meta:
        yield
        return
    with torch.device("meta"), _Yes():
        yield


class _Yes(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return True if func is Tensor.__bool__ else func(*args, **(kwargs or {}))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Within a few roundings of the type that the model computed in."""
    return bool(torch.isclose(found, expected, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps * float(expected.abs().max()), equal_nan=True).all())


class _Steps(TorchDispatchMode):
    """Follows the head's output through the operations on it, as far as these are a scale and a softcap."""

    SAME = ("_to_copy", "detach", "alias", "clone", "view", "_unsafe_view", "slice", "expand")  # where the shape stays

    def __init__(self) -> None:
        super().__init__()
        # the followed tensors, kept alive so that their ids stay theirs: (tensor, factor before tanh, factor after it)
        self.followed: dict[int, tuple[Tensor, float, float | None]] = {}
        self.storages: set[int] = set()  # of these, which views of any shape write to
        self.why_not = ""

    def start(self, output: Any) -> None:
        if isinstance(output, Tensor):
            self._follow(output, 1.0, None)
        else:
            self.why_not = "the output layer returns more than one tensor"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.followed and not self._step(func, args, out) and func._schema.is_mutable:
            written = args[0] if isinstance(args[0], Tensor) else None
            if written is not None and written.untyped_storage()._cdata in self.storages:
                self.why_not = f"the model writes into its logits by {func.overloadpacket.__name__}"
        return out

    def _step(self, func: Any, args: tuple, out: Any) -> bool:
        """Whether this operation is understood."""
        name = func.overloadpacket.__name__.removesuffix("_")
        first = args[0] if args else None
        if not isinstance(out, Tensor) or not isinstance(first, Tensor) or id(first) not in self.followed or out.shape != first.shape:
            return False
        _, before, after = self.followed[id(first)]
        factor = args[1] if name in ("mul", "div") and len(args) == 2 and isinstance(args[1], (int, float)) else None
        if factor is not None:
            factor = float(factor) if name == "mul" else 1.0 / factor
            before, after = (before * factor, None) if after is None else (before, after * factor)
        elif name == "tanh" and after is None:
            after = 1.0
        elif name not in self.SAME:
            return False
        self._follow(out, before, after)
        return True

    def _follow(self, tensor: Tensor, before: float, after: float | None) -> None:
        self.followed[id(tensor)] = (tensor, before, after)
        self.storages.add(tensor.untyped_storage()._cdata)

    def found(self, logits: Tensor) -> tuple[Tail, str]:
        """The tail up to these logits, and why there is none."""
        if self.why_not:
            return Tail(), self.why_not
        if id(logits) not in self.followed:
            return Tail(), "the model does more to its output layer's result than to scale it and cap it"
        _, before, after = self.followed[id(logits)]
        return (Tail(before) if after is None else Tail(before * after, after)), ""


# -- the loss ---------------------------------------------------------------------------------------------------


def trained_rows(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(places in [batch · seq] whose next token is trained, that token), each [rows], of labels [batch, seq]."""
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()  # the last position predicts nothing
    rows = (following != IGNORE).nonzero().squeeze(1)
    return rows, following[rows]


def states_before_head(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """What the model hands to its head [batch, seq, width]. The head itself is given no position."""
    caught: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        caught.append(args[0])
        return args[0][:, :0], *args[1:]

    handle = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        model(**inputs)
    finally:
        handle.remove()
    if len(caught) != 1:
        raise ModelError(f"{type(model).__name__} has called its output layer {len(caught)} times in a forward pass. What fits: fast=off")
    return caught[0]


def states_of_rows(model: nn.Module, inputs: Mapping[str, Any], rows: Tensor, device: str | None = None) -> Tensor:
    """What the model hands to its head of these places [rows, width]; and, where kernels are made for shapes, of some places
    more, which nobody reads: see filler.py. `device` is the type of device that the meta device stands for."""
    layer = model.get_output_embeddings()
    if filler.makes_kernels(device or rows.device.type, layer.weight.dtype):
        inputs = filler.filled(inputs)
        rows = F.pad(rows, (0, filler.rounded(len(rows)) - len(rows)))
    return states_before_head(model, inputs).flatten(0, -2).index_select(0, rows)


def summed_loss(
    model: nn.Module, head: Head | None, inputs: Mapping[str, Any], rows: Tensor, targets: Tensor, *,
    device: str | None = None, contexts: Callable[[], Any] = noop_context_fn,
) -> Tensor:
    """Σ −log p(target) of these rows, a scalar: in chunks as the head is described, or plainly without a description.

    For a model on the meta device: `device` is the type of device whose chunk sizes are taken, and `contexts` gives what is
    entered around a chunk's forward pass and its recomputation, as torch.utils.checkpoint has it.
    """
    if head is None or head.why_not:
        return F.cross_entropy(logits_of(model, inputs, rows).float(), targets, reduction="sum")
    states = states_of_rows(model, inputs, rows, device)
    layer = model.get_output_embeddings()
    linear = plain_linear(layer)
    if linear is not None:
        return linear_cross_entropy(states, linear.weight, linear.bias, targets, head.tail, device=device)
    states = states[: len(targets)]

    def of_chunk(chunk: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy_of(layer(chunk), wanted, head.tail)

    num_rows = chunk_rows(layer.weight, states.dtype, device or states.device.type)
    # a module of any kind: what it computes of a chunk is computed again for its gradient, so that none is kept
    losses = [
        checkpoint(of_chunk, chunk, wanted, use_reentrant=False, context_fn=contexts) if torch.is_grad_enabled() else of_chunk(chunk, wanted)
        for chunk, wanted in zip(states.split(num_rows), targets.split(num_rows), strict=True)
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def scores(model: nn.Module, head: Head | None, inputs: Mapping[str, Any], rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss of each row in float32, whether its target is the most probable token), each [rows]."""
    if head is None or head.why_not:
        logits = logits_of(model, inputs, rows).float()
        return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
    states = states_of_rows(model, inputs, rows)
    layer = model.get_output_embeddings()
    linear = plain_linear(layer)
    if linear is not None:
        return linear_scores(states, linear.weight, linear.bias, targets, head.tail)
    states = states[: len(targets)]
    num_rows = chunk_rows(layer.weight, states.dtype, states.device.type)
    parts = [
        scores_of(layer(chunk), wanted, head.tail)
        for chunk, wanted in zip(states.split(num_rows), targets.split(num_rows), strict=True)
    ]
    return torch.cat([losses for losses, _ in parts]), torch.cat([hits for _, hits in parts])


def logits_of(model: nn.Module, inputs: Mapping[str, Any], rows: Tensor) -> Tensor:
    """The logits of these rows, whole [rows, vocab].

    The head is by far the widest layer, so only these rows enter it, where a model applies it to a choice of positions
    (`logits_to_keep`): each is computed as before, whatever the model does to its logits afterwards.
    """
    layer = model.get_output_embeddings() if "logits_to_keep" in inspect.signature(model.forward).parameters else None
    if layer is None:
        return model(**inputs).logits.flatten(0, -2).index_select(0, rows)
    handle = layer.register_forward_pre_hook(lambda _, args: (args[0].flatten(0, -2).index_select(0, rows)[None], *args[1:]))
    try:
        return model(**inputs).logits[0]
    finally:
        handle.remove()
