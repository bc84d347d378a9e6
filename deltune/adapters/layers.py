"""Layers that can carry an adapter, and how each stores its weight. A layer is one of these kinds or it is refused.

Legend: a delta thinks of every layer as y = W x + b with W [out, in]. `linear` stores W; `conv1d` (GPT-2's) and
`embedding` (W = tableᵀ, x one-hot) store Wᵀ [in, out].
"""

from __future__ import annotations

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
    kind: str  # linear, conv1d or embedding
    n_in: int  # an embedding's number of rows
    n_out: int
    dtype: torch.dtype  # of the base weight
    device: torch.device
    has_bias: bool
    padding_idx: int | None = None  # an embedding's row that is never trained


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
    return None


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
    rows, columns = layer.weight.shape
    n_out, n_in = (rows, columns) if kind == "linear" else (columns, rows)
    has_bias = kind != "embedding" and layer.bias is not None
    padding_idx = layer.padding_idx if kind == "embedding" else None
    return Site(name, kind, n_in, n_out, layer.weight.dtype, layer.weight.device, has_bias, padding_idx)


def out_in(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A view of a tensor shaped as the layer's stored weight, as [out, in]; of one shaped [out, in], as stored."""
    return tensor if kind_of(layer) == "linear" else tensor.T
