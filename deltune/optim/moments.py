"""AdamW and Lion whose moments take less memory: in float32 or in 8 bits by blocks, kept by a `Place` that may be paged.

The state of a parameter is one thing wherever it is computed: `step`, the moments `moment1` and `moment2` in the
parameter's shape (float32, or uint8 codes), and with codes `largest1` and `largest2`, the largest magnitude of each
block of 256. A parameter of fewer than 4,096 values keeps float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltune.optim import blockwise

SMALLEST_IN_8_BITS = 4096  # below, codes save nothing worth their error
CHUNK = 1 << 18  # values updated at a time, a multiple of blockwise.BLOCK: what is wide between codes and codes stays in the cache
SIGNED = (True, False)  # the mean has a sign, the mean square none
NUM_MOMENTS = {"adamw": 2, "lion": 1}


def in_8_bits(parameter: Tensor, bits: int) -> bool:
    return bits == 8 and parameter.numel() >= SMALLEST_IN_8_BITS


def shapes(parameter: Tensor, rule: str, bits: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor that is remembered of a parameter."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    coded = in_8_bits(parameter, bits)
    for i in range(1, NUM_MOMENTS[rule] + 1):
        found[f"moment{i}"] = (tuple(parameter.shape), torch.uint8 if coded else torch.float32)
        if coded:
            found[f"largest{i}"] = ((blockwise.num_blocks(parameter.numel()),), torch.float32)
    return found


class Place:
    """Where moments lie and what computes with them: here, beside their parameter, in plain torch on any device."""

    def zeros(self, parameter: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=parameter.device)

    def update(self, rule: str, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step on a contiguous parameter; `state["step"]` counts it already."""
        values, gradient = parameter.view(-1), gradient.reshape(-1)
        wide = torch.promote_types(values.dtype, torch.float32)
        for start in range(0, len(values), CHUNK):
            part = slice(start, start + CHUNK)
            blocks = slice(start // blockwise.BLOCK, (start + CHUNK) // blockwise.BLOCK)
            moments = [self._read(state, i, part, blocks) for i in range(NUM_MOMENTS[rule])]
            moved = values[part].to(wide)
            RULES[rule](moved, gradient[part].to(torch.float32), moments, state["step"], group)
            values[part].copy_(moved)
            for i, moment in enumerate(moments):
                self._write(state, i, part, blocks, moment)

    def finish(self) -> None:
        """All parameters of a step have been updated."""

    @staticmethod
    def _read(state: dict[str, Any], i: int, part: slice, blocks: slice) -> Tensor:
        stored = state[f"moment{i + 1}"].view(-1)[part]
        return stored if stored.dtype == torch.float32 else blockwise.dequantise(stored, state[f"largest{i + 1}"][blocks], SIGNED[i])

    @staticmethod
    def _write(state: dict[str, Any], i: int, part: slice, blocks: slice, moment: Tensor) -> None:
        stored = state[f"moment{i + 1}"].view(-1)[part]
        if stored.dtype == torch.float32:
            return  # was updated in place
        codes, largest = blockwise.quantise(moment, SIGNED[i])
        stored.copy_(codes)
        state[f"largest{i + 1}"][blocks] = largest


def _adamw(values: Tensor, gradient: Tensor, moments: list[Tensor], step: int, group: dict[str, Any]) -> None:
    """arXiv:1711.05101, algorithm 2."""
    mean, square = moments
    beta1, beta2 = group["betas"]
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    values.mul_(1 - group["lr"] * group["weight_decay"])
    root = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    values.addcdiv_(mean.to(values.dtype), root.to(values.dtype), value=-group["lr"] / (1 - beta1**step))


def _lion(values: Tensor, gradient: Tensor, moments: list[Tensor], step: int, group: dict[str, Any]) -> None:
    """arXiv:2302.06675, algorithm 2."""
    (mean,) = moments
    beta1, beta2 = group["betas"]
    values.mul_(1 - group["lr"] * group["weight_decay"])
    values.add_(torch.lerp(mean, gradient, 1 - beta1).sign_().to(values.dtype), alpha=-group["lr"])
    mean.lerp_(gradient, 1 - beta2)


RULES = {"adamw": _adamw, "lion": _lion}


class Moments(torch.optim.Optimizer):
    """An optimizer by a name of RULES over `groups`, with moments of 32 or 8 bits."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, rule: str, bits: int, place: Place, betas: tuple[float, float], eps: float = 0.0):
        super().__init__(groups, {"betas": betas, "eps": eps})
        self.rule, self.bits, self.place = rule, bits, place

    @property
    def kind(self) -> str:
        """What a checkpoint's state is of: the same wherever it was computed, paged or not."""
        return f"{self.rule}, {self.bits} bits"

    def empty_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What is remembered of a parameter before its first step."""
        held = shapes(parameter, self.rule, self.bits)
        return {"step": 0, **{name: self.place.zeros(parameter, name, shape, dtype) for name, (shape, dtype) in held.items()}}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(self.empty_state(parameter))
                state["step"] += 1
                whole = parameter.detach() if parameter.is_contiguous() else parameter.detach().contiguous()
                self.place.update(self.rule, whole, parameter.grad.contiguous(), state, group)
                if not parameter.is_contiguous():
                    parameter.copy_(whole)
        self.place.finish()
