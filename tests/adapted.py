"""What the suites over methods share: an adapter moved off its start, and two models compared to the bit."""

from __future__ import annotations

import torch


def shaken(model, seed=0, names=("default",), size=0.3):
    """Move adapters away from their start, so that no term of their formula is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".adapters.{adapter}." in name for adapter in names):
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
