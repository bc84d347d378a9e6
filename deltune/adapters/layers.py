"""Layers that can carry an adapter, and how each stores its weight. A layer is one of these kinds or it is refused.

Legend: a delta thinks of every layer as y = W x + b with W [out, in]. `linear` stores W; `conv1d` (GPT-2's) and
`embedding` (W = tableᵀ, x one-hot) store Wᵀ [in, out]. A `norm` scales each channel of what it has normalised, and W
[out, 1] are those scales; it stores them as [out].
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltune.errors import AdapterError

# These read their children's weights instead of calling them, so an adapter on a child would be without effect.
READ_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Site:
    """One place where a delta sits: what the layer there is, without the layer."""

    name: str  # the layer's full name in the model before any adapter
    kind: str  # linear, conv1d, embedding or norm
    n_in: int  # an embedding's number of rows
    n_out: int
    dtype: torch.dtype  # of the base weight
    device: torch.device
    has_bias: bool
    padding_idx: int | None = None  # an embedding's row that is never trained
    tied_to: str | None = None  # the embedding whose weight this layer holds too, for methods that follow ties


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
    rows, columns = layer.weight.shape
    n_out, n_in = (rows, columns) if kind == "linear" else (columns, rows)
    has_bias = kind != "embedding" and layer.bias is not None
    padding_idx = layer.padding_idx if kind == "embedding" else None
    return Site(name, kind, n_in, n_out, layer.weight.dtype, layer.weight.device, has_bias, padding_idx)


def out_in(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A view of a tensor shaped as the layer's stored weight, as [out, in]; of one shaped [out, in], as stored."""
    kind = kind_of(layer)
    if kind == "norm":
        return tensor.unsqueeze(1) if tensor.ndim == 1 else tensor.squeeze(1)
    return tensor if kind == "linear" else tensor.T
