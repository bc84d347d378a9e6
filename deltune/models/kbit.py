"""What is done to a base whose linear layers are in codes before an adapter is trained on it, as one rule:

1. Linear layers other than the head are codes, frozen, and give their values in the base's type.
2. Norms are float32: weights and what comes in are widened, which loses nothing, and what goes out is rounded once to the
   base's type. A norm is where a short type's rounding tells most.
3. Embeddings and head stay in the base's type.
4. Only the adapter is trained, in float32, with whatever its config trains beside it (adapter.modules_to_save).
5. No gradient is asked of the embeddings' output. Recomputed blocks need none (`models.recompute`): their gradient is
   that of what is trained inside and above them.

The rule is a property of the quantised base, not of training: answers are given by the same function that was trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from deltune.models.select import is_norm
from deltune.weights import is_quantised, stored_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare(model: PreTrainedModel) -> None:
    """Do to a quantised base what the rule says of its norms, once it is stored in its type; nothing to any other model."""
    short = model.dtype
    if short.itemsize >= 4 or not any(is_quantised(parameter) for parameter in model.parameters()):
        return
    for module in model.modules():
        if is_norm(module) and all(parameter.dtype == short for parameter in module.parameters(recurse=False)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
            # hooks, so that what stands in for a norm's forward (models.lean) sees float32 alone
            module.register_forward_pre_hook(_widened)
            module.register_forward_hook(partial(_rounded, dtype=short))


def _widened(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in inputs)


def _rounded(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor, *, dtype: torch.dtype) -> Tensor:
    return out.to(dtype)


def told(model: PreTrainedModel) -> Iterator[str]:
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
    yield f"trained: {len(trained):,} tensors in {_types(trained)}"
    yield "no gradient is asked of the embeddings' output; recomputed blocks need none"


def _types(parameters: Iterable[nn.Parameter]) -> str:
    found = {str(p.dtype).removeprefix("torch."): None for p in parameters}
    return ", ".join(found) or "none"
