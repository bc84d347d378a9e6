"""Which decoder blocks compute their activations twice rather than keep them. The numbers of a run do not depend on it.

A step keeps of each block what its backward pass reads. A recomputed block keeps its input alone and runs forward once
more when its gradient is due.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from deltune.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("none", "selective", "full")  # from the fastest to the smallest


def apply(model: PreTrainedModel, kind: str, context_fn: Any = None) -> int:
    """Have a model recompute by a name of KINDS, and return how many of its blocks then do.

    none: no block. full: every block. selective: the lower half of the blocks that a gradient reaches, so about half of
    what full saves for half of its work. Which half matters: the upper blocks' activations are free again by the time
    when the lower ones are recomputed. Choosing by operation (keeping matrix products, recomputing what is cheap) should
    save little where norms, activations and their products are single nodes, which keep less than the products' results.

    `context_fn` is torch.utils.checkpoint's. ModelError where the model has no blocks that can be recomputed.
    """
    if kind == "none":
        _disable(model)
        return 0
    try:
        # not re-entrant: the re-entrant form drops gradients where a block's input needs none, as under an adapter
        settings = {"use_reentrant": False} | ({} if context_fn is None else {"context_fn": context_fn})
        if hasattr(model, "activation_checkpointing_enable"):  # the name that transformers 6 keeps
            model.activation_checkpointing_enable(settings)
        else:
            model.gradient_checkpointing_enable(settings)
    except ValueError:
        raise ModelError(f"{type(model).__name__} cannot recompute activations. What fits: model.gradient_checkpointing=none") from None
    # enabling has the embeddings' output ask for a gradient, for the re-entrant form's sake: all below the lowest adapter would be computed
    model.disable_input_require_grads()
    model.config.use_cache = False
    blocks = blocks_of(model)
    if kind == "full":
        return len(blocks)
    reached = reached_blocks(model)
    if len(reached) < 2:
        _disable(model)
        raise ModelError(f"{type(model).__name__} has no two blocks to choose from. What fits: model.gradient_checkpointing=none or full")
    chosen = {id(block) for block in reached[: len(reached) // 2]}
    for block in blocks:
        block.gradient_checkpointing = id(block) in chosen
    return len(chosen)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that can be recomputed one by one, from the lowest."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def reached_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Those from which something trained lies below or within: the others keep nothing for a backward pass."""
    blocks = blocks_of(model)
    inside = {id(p) for block in blocks for p in block.parameters()}
    embedding = model.get_input_embeddings()
    if embedding is not None and any(p.requires_grad for p in embedding.parameters() if id(p) not in inside):
        return blocks
    lowest = next((i for i, block in enumerate(blocks) if any(p.requires_grad for p in block.parameters())), len(blocks))
    return blocks[lowest:]


def _disable(model: PreTrainedModel) -> None:
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
