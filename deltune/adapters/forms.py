"""The form of a feed-forward block, read from the traced graph of its forward: last(act(gate(x)) ⊙ up(x)), or last(act(first(x))).

Nothing is told by names: what is linear says so by its kind, and an activation is known by its values.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from deltune.adapters.layers import kind_of
from deltune.adapters.nodes import ACTIVATIONS, Middle, any_activation
from deltune.adapters.wrapper import original

LINEAR = ("linear", "conv1d")
# What a model may raise that cannot be run, or traced, outside of its program.
FOREIGN_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, NotImplementedError, fx.proxy.TraceError)


@dataclass(frozen=True)
class Form:
    """A feed-forward module's forward: last(act(gate) ⊙ up), and modules after it."""

    first: tuple[str, ...]  # the gate's layer and then the other's; one layer with both, or without a gate
    chunked: int | None  # which half of the one layer is the gate
    gated: bool
    last: str
    tail: tuple[str, ...]
    activation: str | Callable[[Tensor], Tensor]  # a name of ACTIVATIONS, or a function
    activation_module: str  # the module that is the function, if it is one

    def middle(self, parent: nn.Module) -> Middle:
        if isinstance(self.activation, str):
            function = ACTIVATIONS[self.activation] if self.activation else any_activation(parent.get_submodule(self.activation_module))
        else:
            function = any_activation(self.activation)
        return Middle(function, self.gated, self.chunked)


class _Tracer(fx.Tracer):
    """Calls of submodules are not looked into."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def form_of(module: nn.Module) -> Form | str:
    """The form of a module's forward if it is a feed-forward block's, else why it is none."""
    try:
        graph = _Tracer().trace(module)
    except FOREIGN_ERRORS as error:
        return f"its forward cannot be traced: {str(error).strip().partition(chr(10))[0]}"
    try:
        return _Reader(module, graph).form()
    except _OtherForm as error:
        return str(error)


class _OtherForm(Exception):
    """The graph is no feed-forward block's; the message says what it has instead."""


class _Reader:
    """Reads a graph from its output back to its input."""

    def __init__(self, module: nn.Module, graph: fx.Graph):
        self.module = module
        self.x, *nodes, output = graph.nodes
        self.result = output.args[0]
        self.unread = set(nodes)

    def form(self) -> Form:
        tail: list[str] = []
        node = self.result
        while self.is_module(node) and isinstance(self.called(node), (nn.Dropout, nn.Identity)):
            tail.insert(0, str(node.target))
            node = self.taken(node)
        last = self.linear(node)
        node = self.taken(node)
        factors = self.factors(node)
        if len(factors) == 1:
            (name, source), up = self.activation(node), None
        else:
            at = next((i for i, factor in enumerate(factors) if self.is_activation(factor)), None)
            if at is None:
                raise _OtherForm("neither factor of its product is an activation of a layer's output")
            (name, source), up = self.activation(factors[at]), factors[1 - at]
        function, act_module = name
        if up is None:
            first, chunked = (self.fed_by_x(source),), None
        elif self.is_half(source) and self.is_half(up):
            first, chunked = self.halves(source, up)
        else:
            first, chunked = (self.fed_by_x(source), self.fed_by_x(up)), None
        if self.unread:
            raise _OtherForm(f"it computes something else besides: {sorted(map(str, self.unread))[0]}")
        if len({*first, last}) != len(first) + 1:
            raise _OtherForm("it uses a layer twice")
        return Form(first, chunked, up is not None, last, tuple(tail), function, act_module)

    def is_module(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node.op == "call_module"

    def called(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def taken(self, node: fx.Node) -> fx.Node:
        """The one input of a node, which is read by it."""
        self.unread.discard(node)
        if not node.args or not isinstance(node.args[0], fx.Node):
            raise _OtherForm(f"{node} takes no tensor first")
        return node.args[0]

    def linear(self, node: Any) -> str:
        if not self.is_module(node) or kind_of(original(self.called(node))) not in LINEAR or len(node.args) != 1 or node.kwargs:
            raise _OtherForm(f"{node} is not a linear layer's output")
        return str(node.target)

    def fed_by_x(self, node: Any) -> str:
        name = self.linear(node)
        if self.taken(node) is not self.x:
            raise _OtherForm(f"{name} is not given the module's input")
        return name

    def factors(self, node: fx.Node) -> list[fx.Node]:
        times = (node.op == "call_function" and node.target in (operator.mul, torch.mul)) or (node.op == "call_method" and node.target == "mul")
        if not times or len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
            return [node]
        self.unread.discard(node)
        return list(node.args)

    def is_activation(self, node: fx.Node) -> bool:
        if self.is_module(node):
            return kind_of(original(self.called(node))) is None
        return node.op == "call_function" and node.target not in (operator.getitem, operator.mul, torch.mul)

    def activation(self, node: fx.Node) -> tuple[tuple[str | Callable[[Tensor], Tensor], str], fx.Node]:
        """((name or function, module's name), the node that it acts on)."""
        if not self.is_activation(node):
            raise _OtherForm(f"{node} is not an activation")
        if any(isinstance(arg, fx.Node) for arg in (*node.args[1:], *node.kwargs.values())):
            raise _OtherForm(f"{node} takes more than one tensor")
        if self.is_module(node):
            module, where = self.called(node), str(node.target)
            if any(True for _ in module.parameters()) or any(True for _ in module.buffers()) or len(node.args) != 1 or node.kwargs:
                raise _OtherForm(f"{where} has tensors of its own")
            function: Callable[[Tensor], Tensor] = module
        else:
            if len(node.args) != 1:
                raise _OtherForm(f"{node} has unnamed settings")
            function, where = functools.partial(node.target, **node.kwargs), ""
        known = recognised(function)
        if known is None:
            raise _OtherForm(f"{node} does not act on each number by itself")
        return (known or ("" if where else function), where), self.taken(node)

    def is_half(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node.op == "call_function" and node.target is operator.getitem

    def halves(self, gate: fx.Node, up: fx.Node) -> tuple[tuple[str], int]:
        sides = gate.args[1], up.args[1]
        whole = self.taken(gate)
        if self.taken(up) is not whole or sorted(map(str, sides)) != ["0", "1"]:
            raise _OtherForm("its product is not of the two halves of one layer's output")
        is_chunk = (whole.op == "call_method" and whole.target == "chunk") or (whole.op == "call_function" and whole.target is torch.chunk)
        settings = (*whole.args[1:], *whole.kwargs.values())
        if not is_chunk or settings != (2, -1):
            raise _OtherForm(f"{whole} does not halve the last dimension")
        return (self.fed_by_x(self.taken(whole)),), int(sides[0])


def recognised(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name in ACTIVATIONS of the function that this one is, up to rounding; "" for another one that acts on each
    number by itself, always alike; None for any else. Told by its values."""
    x = torch.linspace(-8, 8, 1024, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        y = function(x)
        again = function(x.flip(0)).flip(0)
    if y.shape != x.shape or not torch.equal(y, again):
        return None
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(known.forward(x), y, rtol=1e-6, atol=1e-6)), "")
