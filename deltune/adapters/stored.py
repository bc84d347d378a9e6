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

    def to_file(self) -> dict[str, Tensor]:
        """The tensors of the file by their leaf. Override with `from_file` where the file's form is another one."""
        state = self.state_dict()
        return {leaf: state[name] for name, leaf in self.leaves().items()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors with the names and shapes of `to_file`."""
        state = self.state_dict()
        for name, leaf in self.leaves().items():
            state[name].copy_(tensors[leaf])


def storage_of(config: AdapterConfig, site: Site) -> dict[str, Any]:
    """Device and type of what a method puts on a layer, to be passed to torch's constructors."""
    dtype = site.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    return {"device": site.device, "dtype": dtype}
