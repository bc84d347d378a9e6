"""bitsandbytes' CUDA kernels for optimizers, and memory that the driver pages between device and CPU; all that is known of it here.

The state they work on is that of `moments`, so a checkpoint does not depend on them.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from deltune.optim.moments import Place
from deltune.weights.codes import dynamic_levels

SMALLEST_PAGED = 100_000  # values; below, a page would hold several tensors
NAMES = {"adamw": "adam", "lion": "lion"}  # its adam decays weights apart from the gradient
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(device: torch.device) -> str:
    """Why the kernels cannot be used on a device, as half a sentence; nothing if they can."""
    if device.type != "cuda":
        return f"bitsandbytes' kernels want CUDA, and this is {device.type}"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed (pip install 'deltune[quant]')"
    from bitsandbytes.cextension import lib

    return "" if lib.compiled_with_cuda else "bitsandbytes has no library for this CUDA (python -m bitsandbytes tells more)"


class Kernels(Place):
    """On CUDA. `paged` moments lie in unified memory: on the device while there is room, else in the CPU's. It is given back
    when the process ends."""

    def __init__(self, paged: bool):
        self.paged = paged

    def zeros(self, parameter: Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not self.paged or not name.startswith("moment") or parameter.numel() < SMALLEST_PAGED:
            return super().zeros(parameter, name, shape, dtype)
        from bitsandbytes import functional

        paged = functional.get_paged(*shape, dtype=dtype, device=parameter.device)
        functional.fill(paged, 0)  # and waits
        return paged

    def update(self, rule: str, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if parameter.dtype not in TYPES:
            return super().update(rule, parameter, gradient, state, group)
        from bitsandbytes import functional

        moments = [state["moment1"], state.get("moment2")]
        if self.paged:
            for moment in moments:
                if getattr(moment, "is_paged", False):  # its own mark on memory that it gave
                    functional.prefetch_tensor(moment)
        common = {
            "optimizer_name": NAMES[rule], "g": gradient, "p": parameter, "state1": moments[0], "state2": moments[1],
            "beta1": group["betas"][0], "beta2": group["betas"][1], "beta3": 0.0, "alpha": 0.0, "eps": group["eps"],
            "step": state["step"], "lr": group["lr"], "weight_decay": group["weight_decay"],
        }  # fmt: skip
        if "largest1" not in state:
            functional.optimizer_update_32bit(**common)
            return None
        two = moments[1] is not None
        functional.optimizer_update_8bit_blockwise(
            **common, qmap1=dynamic_levels(parameter.device), qmap2=dynamic_levels(parameter.device, False) if two else None,
            absmax1=state["largest1"], absmax2=state.get("largest2"),
        )  # fmt: skip
        return None

    def finish(self) -> None:
        if self.paged:  # the CPU may read a page from here on
            torch.cuda.synchronize()
