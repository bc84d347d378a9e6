"""`engine.precision=auto` made one of the others, once, from what the device is good at and what the weights are stored in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltune.weights import multiplies_bfloat16

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Arithmetic of a forward pass, and the type in which the base's weights are to be stored for it."""

    name: str  # fp32 (the weights' own type), or bf16 or fp16 under autocast
    storage: torch.dtype | None = None  # None leaves them as they are
    why: str = ""  # in one line, of what auto has chosen


def settle(asked: str, *, device: torch.device, stored: torch.dtype, frozen: bool, keep: bool = False) -> Precision:
    """What `asked` (engine.precision) means for weights `stored` in a type.

    `frozen`: no weight of the base is trained, so that it may be rounded for good. `keep`: its type was asked for.
    """
    if asked != "auto":
        return Precision(asked)
    fast = multiplies_bfloat16(device)
    if stored == torch.float32 and fast:
        if frozen and not keep:
            return Precision("fp32", torch.bfloat16, f"{device.type} multiplies bfloat16 fast: the frozen float32 weights are stored and multiplied in bfloat16, adapters stay float32 (engine.precision=fp32 keeps them)")
        why = "model.dtype asks for float32 weights" if keep else "weights of the model are trained, so they stay float32"
        return Precision("bf16", None, f"{device.type} multiplies bfloat16 fast, and {why}: bf16 under autocast (engine.precision=fp32 computes in float32)")
    if stored == torch.bfloat16 and not fast:
        if keep:
            return Precision("fp32", None, f"{device.type} has no instructions for bfloat16, which model.dtype asks for: this will be slow")
        return Precision("fp32", torch.float32, f"{device.type} has no instructions for bfloat16: the weights are stored and multiplied in float32, which is faster and takes twice the memory (model.dtype=bfloat16 keeps them)")
    return Precision("fp32", None, f"computed in the weights' own type, {str(stored).removeprefix('torch.')}")
