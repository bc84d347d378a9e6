"""Recipe: how a tensor can be made again from others that are kept anyway, so that nobody need save it for backward.

A producer that knows a cheap way puts a recipe on its output. An autograd node that would save this tensor saves the
recipe's tensors in its place and calls `make` in its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ATTRIBUTE = "_deltune_recipe"


@dataclass(frozen=True)
class Recipe:
    """`function(*saved)` is the tensor, bit for bit. It must not draw random numbers, nor hold the tensor itself."""

    function: Callable[..., Tensor]
    saved: tuple[Tensor, ...]  # to go through `ctx.save_for_backward`, never to be kept by a node in another way
    versions: tuple[int, ...]  # of the tensor and of `saved`, as they were when the recipe was written

    def make(self, saved: Sequence[Tensor]) -> Tensor:
        """The tensor, made of what `ctx.saved_tensors` gives back for `saved`. Without gradient."""
        with torch.no_grad():
            return self.function(*saved)


def set_recipe(tensor: Tensor, function: Callable[..., Tensor], *saved: Tensor) -> Tensor:
    """Put a recipe on a tensor and return it. Call it on what `Function.apply` returned, where gradients are on.

    Nothing is recorded where nothing is saved for backward either (without gradients), nor while torch.compile traces,
    which chooses by itself what to compute again.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        setattr(tensor, ATTRIBUTE, Recipe(function, saved, tuple(t._version for t in (tensor, *saved))))
    return tensor


def recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe on this very tensor; None if it has none, or if it or what it is made of was changed in place since."""
    if torch.compiler.is_compiling():
        return None
    recipe: Recipe | None = vars(tensor).get(ATTRIBUTE)
    if recipe is None or recipe.versions != tuple(t._version for t in (tensor, *recipe.saved)):
        return None
    return recipe
