"""What is done to a base whose linear layers are in codes before an adapter is trained on it, as one rule:

1. Linear layers other than the head are codes, frozen, and compute in the base's short type.
2. Norms are float32. Widening loses nothing, and a norm is where a short type's rounding tells most.
3. Embeddings and head stay in the base's own type, and what a forward pass multiplies is in it too: where that is short,
   the pass runs under autocast, which is what lets float32 norms and 16-bit matrices follow one another.
4. Only the adapter is trained, in float32, with whatever its config trains beside it (adapter.modules_to_save).
5. No gradient is asked of the embeddings' output. Recomputed blocks need none (`models.recompute`): their gradient is
   that of what is trained inside and above them.

The rule is a property of the quantised base, not of training: answers are given by the same function that was trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from deltune.models.select import is_norm
from deltune.weights import is_quantised, stored_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def holds_codes(model: nn.Module) -> bool:
    return any(is_quantised(parameter) for parameter in model.parameters())


def prepare(model: PreTrainedModel) -> None:
    """Do to a quantised base what the rule says of its weights; nothing to any other."""
    if not holds_codes(model):
        return
    for module in model.modules():
        if is_norm(module):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()


def autocast_for(precision: str, dtype: torch.dtype) -> str:
    """engine.precision for a quantised base whose embeddings are `dtype`: its own type, under autocast where that is short."""
    return SHORT.get(dtype, precision)


def told(model: PreTrainedModel, precision: str) -> Iterator[str]:
    """What the rule has come to for a model with its adapter attached; nothing where no weight is in codes."""
    weights = [p for p in model.parameters() if is_quantised(p)]
    if not weights:
        return
    kinds = sorted({w.kind for w in weights})
    per_value = sum(stored_bytes(w) for w in weights) / sum(w.numel() for w in weights)
    yield f"base: {len(weights):,} linear layers in {', '.join(kinds)}, {per_value:.3f} bytes a value, frozen"
    yield f"norms: {_types(p for module in model.modules() if is_norm(module) for p in module.parameters(recurse=False))}"
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    yield f"embeddings and head: {_types(p for table in tables if table is not None for p in table.parameters() if not p.requires_grad)}"
    trained = [p for p in model.parameters() if p.requires_grad]
    yield f"trained: {len(trained):,} tensors in {_types(trained)}; multiplied {'in float32' if precision == 'fp32' else f'under autocast in {precision}'}"
    yield "no gradient is asked of the embeddings' output; recomputed blocks need none"


def _types(parameters: Iterator[nn.Parameter] | list[nn.Parameter]) -> str:
    found = {str(p.dtype).removeprefix("torch."): None for p in parameters}
    return ", ".join(found) or "none"
