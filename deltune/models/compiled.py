"""torch.compile of a model's repeated blocks, in place: one block is compiled and serves all that are alike.

Only blocks that are trained run compiled; evaluation and generation run them as they are. What stands between blocks
(masks, embeddings, the loss) stays eager, and so does attention, which looks at numbers: the lengths of documents. So
no length, no number of documents and no layer is compiled anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from deltune.errors import EngineError, ModelError


def compile_blocks(model: nn.Module, device: torch.device, *, backend: str = "inductor") -> str:
    """Have the blocks of `model` run compiled where they are trained; returns what was done, in a line.

    Names of parameters and the modules themselves stay. The work itself is done at the first step, and again where a
    length is 1. Raises EngineError without a compiler, ModelError for a model without repeated blocks.
    """
    if backend == "inductor":
        _find_compiler(device)
    blocks = list(repeated(model))
    if not blocks:
        raise ModelError(f"engine.compile=true: {type(model).__name__} has no list of blocks of one kind. What fits: engine.compile=false")
    _keep_attention_eager()
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
        block._compiled_call_impl = _in_training(block, block._compiled_call_impl)
    kinds = sorted({type(block).__name__ for block in blocks})
    return f"{len(blocks)} blocks ({', '.join(kinds)}) are compiled at the first step"


def repeated(model: nn.Module) -> Iterator[nn.Module]:
    """The members of the model's outermost lists of at least two modules of one class."""
    for child in model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(member) for member in child}) == 1:
            yield from child
        else:
            yield from repeated(child)


def _in_training(block: nn.Module, compiled: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        if block.training and torch.is_grad_enabled():
            return compiled(*args, **kwargs)
        return block._call_impl(*args, **kwargs)

    return call


def _keep_attention_eager() -> None:
    from transformers import AttentionInterface

    from deltune.models import attention

    attention.register()
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.segment_attention))


def _find_compiler(device: torch.device) -> None:
    """EngineError unless torch can turn a graph into machine code here."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type == "cuda" and not has_triton():
        raise EngineError("engine.compile=true: on CUDA torch compiles with triton, which is not installed. What fits: pip install triton, or engine.compile=false")
    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        raise EngineError("engine.compile=true: torch compiles with a C++ compiler, and none is found. What fits: install g++ or name one in CXX, or engine.compile=false") from None
