"""The fast forms of a model that is to be trained, put in place by training, and by what tells of it beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def put(model: nn.Module, *, adapted: bool) -> list[str]:
    """Have norms, rotary embeddings and, where there is an adapter, its layers be computed in one node where they can be.

    Returns what is and what is not, with the reason, a line each. May be done again, and says the same.
    """
    from deltune.models import lean

    lines = [f"model: {line}" for line in lean.told(lean.make_lean(model))]
    if adapted:
        from deltune.adapters import fused

        lines += [f"adapters: {line}" for line in fused.told(fused.fuse(model))]
    return lines
