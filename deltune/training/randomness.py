"""The state of every random generator that training may draw from, as tensors and plain values: no pickle."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators (torch's on every device)."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, plain values) that `restore` puts back to the bit."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(numpy.int64))}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    plain = {
        "python": [version, list(internal), gauss],
        "numpy": [name, int(position), int(has_gauss), float(cached)],
    }
    return tensors, plain


def restore(tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
    """Undo everything drawn since `capture`."""
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    name, position, has_gauss, cached = plain["numpy"]
    numpy.random.set_state((name, tensors["numpy"].numpy().astype(numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"].to(torch.uint8))
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"].to(torch.uint8))
