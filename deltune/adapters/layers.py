"""Layers that can carry an adapter, and how each stores its weight. A layer is one of these kinds or it is refused.

Legend: a delta thinks of every layer as y = W x + b with W [out, in]. `linear` stores W; `conv1d` (GPT-2's) and
`embedding` (W = tableᵀ, x one-hot) store Wᵀ [in, out]. A `norm` scales each channel of what it has normalised, and W
[out, 1] are those scales; it stores them as [out]. `experts` are many layers in one parameter of a module: W is
[experts, out, in] then, stored so or transposed.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltune.errors import AdapterError
from deltune.weights import Rounding, rounding_of

# These read their children's weights instead of calling them, so an adapter on a child would be without effect.
READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Site:
    """One place where a delta sits: what the layer there is, without the layer."""

    name: str  # the layer's full name in the model before any adapter
    kind: str  # linear, conv1d, embedding, norm or experts
    n_in: int  # an embedding's number of rows
    n_out: int
    dtype: torch.dtype  # of the base weight
    device: torch.device
    has_bias: bool
    rounding: Rounding | None = None  # of a weight that is stored quantised
    padding_idx: int | None = None  # an embedding's row that is never trained
    tied_to: str | None = None  # the embedding whose weight this layer holds too, for methods that follow ties
    experts: int = 0  # of a stack of experts, their number; n_in and n_out are one expert's
    transposed: bool = False  # a stack that is stored as [experts, in, out]
    mistaken: bool = False  # its module does not say so, and PEFT takes it for [experts, out, in]
    depth: int = 0  # how many later stacks of its module the same adapter is on, which is part of PEFT's names


class Stack(nn.Module):
    """The weights of a module's experts, which it keeps as one parameter, as a layer. It holds nothing of its own."""

    def __init__(self, owner: nn.Module, leaf: str, transposed: bool):
        super().__init__()
        self.__dict__.update(owner=owner, leaf=leaf, transposed=transposed)  # not as a submodule: the owner holds this one
        self.holder = f"adapted_{leaf}"  # the name under which the owner holds what adapters add
        self.training = owner.training

    @property
    def weight(self) -> nn.Parameter:
        return self.owner._parameters[self.leaf]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            self.owner._parameters[self.leaf] = value
        else:
            super().__setattr__(name, value)


def stacks_of(module: nn.Module) -> dict[str, bool]:
    """The parameters in which a module keeps all experts' weights, in its order; whether each is stored as [experts, in, out].

    Told by names and by shapes that fit each other, so that no other three-dimensional parameter is taken for one.
    """
    own = {name: p for name, p in module._parameters.items() if p is not None and p.ndim == 3 and p.is_floating_point()}
    down = own.get("down_proj")
    found: dict[str, bool] = {}
    for name, parameter in own.items() if down is not None else ():
        times = {"gate_up_proj": 2, "gate_proj": 1, "up_proj": 1}.get(name)
        if times is None or len(parameter) != len(down):
            continue
        (_, a, b), (_, c, d) = parameter.shape, down.shape
        fits = {False: (a, b) == (times * d, c), True: (b, a) == (times * c, d)}
        said = vars(module).get("is_transposed")  # transformers' word
        if said is None and fits[False] != fits[True]:
            said = fits[True]
        if said is not None and fits[said]:
            found[name] = said
    if len(set(found.values())) != 1:
        return {}
    return {name: next(iter(found.values())) for name in own if name in found or name == "down_proj"}


def conv1d_class() -> type[nn.Module] | None:
    """GPT-2's transposed linear layer; None while transformers is not loaded, for then no model can have one."""
    module = sys.modules.get("transformers.pytorch_utils")
    return None if module is None else module.Conv1D


def kind_of(module: nn.Module) -> str | None:
    """The layer's kind, or None. A subclass counts if it computes what its parent computes."""
    kinds = {"linear": nn.Linear, "conv1d": conv1d_class(), "embedding": nn.Embedding}
    for kind, cls in kinds.items():
        if cls is not None and isinstance(module, cls) and type(module).forward is cls.forward:
            return kind
    if isinstance(module, Stack):
        return "experts"
    return "norm" if _is_norm(module) else None


def _is_norm(module: nn.Module) -> bool:
    """LayerNorm, RMSNorm and the like, of torch or of a model's own file: told by what they hold, take and are called."""
    if not type(module).__name__.endswith("Norm") or isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._NormBase)):
        return False
    held = {name for name, parameter in module._parameters.items() if parameter is not None}
    if module._modules or held not in ({"weight"}, {"weight", "bias"}) or module.weight.ndim != 1:
        return False
    return len(inspect.signature(type(module).forward).parameters) == 2  # self and x: no gate, no residual


def is_altered_linear(module: nn.Module) -> bool:
    """A subclass of Linear with a forward of its own, for example a quantised one: a linear layer that we must not guess at."""
    return isinstance(module, nn.Linear) and kind_of(module) is None


def site_of(name: str, layer: nn.Module) -> Site:
    """Describe a layer. Raises AdapterError if it cannot carry an adapter."""
    kind = kind_of(layer)
    if kind is None:
        raise AdapterError(
            f"{name} is a {type(layer).__name__}; adapters go on Linear, Conv1D and Embedding layers that compute what "
            "these classes compute"
        )
    if kind == "embedding" and (layer.max_norm is not None or layer.scale_grad_by_freq or layer.sparse):
        raise AdapterError(f"{name} is an Embedding with max_norm, scale_grad_by_freq or sparse, which adapters do not follow")
    if kind == "norm":
        return Site(name, kind, 1, len(layer.weight), layer.weight.dtype, layer.weight.device, layer._parameters.get("bias") is not None)
    if kind == "experts":
        num_experts, n_out, n_in = out_in(layer, layer.weight).shape
        mistaken = layer.transposed and not vars(layer.owner).get("is_transposed", False)
        has_bias = f"{layer.leaf}_bias" in layer.owner._parameters
        return Site(name, kind, n_in, n_out, layer.weight.dtype, layer.weight.device, has_bias, experts=num_experts, transposed=layer.transposed, mistaken=mistaken)
    rows, columns = layer.weight.shape
    n_out, n_in = (rows, columns) if kind == "linear" else (columns, rows)
    has_bias = kind != "embedding" and layer.bias is not None
    padding_idx = layer.padding_idx if kind == "embedding" else None
    return Site(name, kind, n_in, n_out, layer.weight.dtype, layer.weight.device, has_bias, rounding_of(layer.weight), padding_idx)


def out_in(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A view of a tensor shaped as the layer's stored weight, as [out, in]; of one shaped [out, in], as stored."""
    kind = kind_of(layer)
    if kind == "experts":
        return tensor.mT if layer.transposed else tensor
    if kind == "norm":
        return tensor.unsqueeze(1) if tensor.ndim == 1 else tensor.squeeze(1)
    return tensor if kind == "linear" else tensor.T
