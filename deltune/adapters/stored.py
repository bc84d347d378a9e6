"""Stored: what deltas and banks have in common: the device and type of their tensors, and how these go into a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltune.adapters.config import AdapterConfig
from deltune.adapters.layers import Site


class Stored(nn.Module):
    """A module whose tensors have names in a file."""

    def leaves(self) -> dict[str, str]:
        """Names of the saved parameters and buffers, each to its name in the file."""
        raise NotImplementedError

    def frozen(self, name: str, dtype: torch.dtype) -> Tensor:
        """A large buffer in this type. A copy is kept for as long as the buffer stays what it is: cast in each forward pass it
        would cost a pass over it, and be held for the backward pass besides."""
        buffer = self.get_buffer(name)
        if buffer.dtype == dtype:
            return buffer
        copies = self.__dict__.setdefault("_copies", {})
        state = (buffer._version, buffer.data_ptr(), buffer.device, dtype)
        if name not in copies or copies[name][0] != state:
            with torch.inference_mode(False):  # training may come after an evaluation
                copies[name] = (state, buffer.detach().to(dtype))
        return copies[name][1]

    def to_file(self) -> dict[str, Tensor]:
        """The tensors of the file by their leaf. Override with `from_file` where the file's form is another one."""
        state = self.state_dict()
        return {leaf: state[name] for name, leaf in self.leaves().items()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors with the names and shapes of `to_file`."""
        state = self.state_dict()
        for name, leaf in self.leaves().items():
            state[name].copy_(tensors[leaf])


def storage_dtype(dtype: str, base: torch.dtype) -> torch.dtype:
    """The type of an adapter's tensors for the config's `dtype`, on a base weight of this type.

    auto is float32, or the base's type where that is wider. On a base in a short type the Parameters are so the master
    copies themselves: they take steps that a short type would round away, their gradients come in float32, and no
    optimizer needs copies of its own. Each method's forward casts its small tensors to the activations' type where they
    are used, and never the activations to the tensors' type, which would copy every input and keep it for backward.
    """
    return torch.promote_types(base, torch.float32) if dtype == "auto" else getattr(torch, dtype)


def storage_of(config: AdapterConfig, site: Site) -> dict[str, Any]:
    """Device and type of what a method puts on a layer, to be passed to torch's constructors."""
    return {"device": site.device, "dtype": storage_dtype(config.dtype, site.dtype)}
