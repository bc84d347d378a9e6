"""An engine owns device, precision and what processes say to each other; it sees a module and an optimizer, no more.

Gradients are summed, never averaged: the loss is already divided by the trained tokens of all ranks. The sum over
ranks is one explicit step after the last micro-batch rather than a wrapper around the module, so a rank without
examples, parameters without gradient and any mixture of frozen weights need no special case.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from deltune.engines import resident
from deltune.engines.config import EngineConfig
from deltune.engines.precision import AUTOCAST, Precision
from deltune.errors import EngineError
from deltune.log import logger

KERNELS_KEPT = 512  # those of some twenty rounded numbers of tokens, see models/filler.py


def pick_device(name: str) -> torch.device:
    """The device of a setting; EngineError if it is not there."""
    from deltune import dist

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise EngineError("engine.device=cuda: torch sees no CUDA device here. What fits: engine.device=cpu or auto.")
        index = dist.local_rank()
        if index >= torch.cuda.device_count():
            raise EngineError(
                f"engine.device=cuda: process {index} of this machine has no device; there are {torch.cuda.device_count()}. "
                f"What fits: deltune launch -n {torch.cuda.device_count()}."
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if name == "mps" and not torch.backends.mps.is_available():
        raise EngineError("engine.device=mps: torch sees no Apple GPU here. What fits: engine.device=cpu or auto.")
    return torch.device(name)


class Engine:
    """One process on one device."""

    rank = 0
    world_size = 1

    def __init__(self, config: EngineConfig):
        self.config = config
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
            # warn_only: a kernel without a deterministic form still runs, and torch says which one it was
            # (set_deterministic_debug_mode does what use_deterministic_algorithms does, without importing the compiler)
            torch.set_deterministic_debug_mode("warn")
            torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over memory
        self.device = pick_device(config.device)
        # oneDNN keeps a kernel for each shape that it has met, 1,024 of them, half a megabyte each. Read at its first product,
        # so a library's user may have been before us.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
        os.environ.setdefault("LRU_CACHE_CAPACITY", "1")  # torch's own of the same kernels, each with scratch memory: 1,024 again
        self.compute_in(Precision(config.precision))

    def compute_in(self, precision: Precision) -> None:
        """Take what `precision.settle` has made of engine.precision, and say so; until then auto is the weights' own type."""
        if precision.why:
            logger.info("%s", precision.why)
        self.precision = precision.name
        self.loss_scale = LossScale() if precision.name == "fp16" else None

    def place(self, model: torch.nn.Module) -> torch.nn.Module:
        """Move the model to the device; on several ranks also make the trained weights equal to rank 0's."""
        return model.to(self.device)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The arithmetic of a forward pass."""
        dtype = AUTOCAST.get(self.precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of one micro-batch's share of the loss."""
        (loss if self.loss_scale is None else loss * self.loss_scale.scale).backward()

    def reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """After the last micro-batch: the true gradient of the whole step, in every parameter's `.grad`."""
        if self.loss_scale is not None:
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                torch._foreach_mul_(gradients, 1.0 / self.loss_scale.scale)

    def grad_norm(self, parameters: Iterable[torch.nn.Parameter]) -> float:
        """Euclidean norm over all gradients, in float32 or wider; not finite if any gradient is not."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return 0.0
        wide = torch.float64 if gradients[0].dtype == torch.float64 else torch.float32
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2.0, dtype=wide))).item()

    def clip(self, parameters: Iterable[torch.nn.Parameter], norm: float, max_norm: float) -> None:
        """Scale all gradients so that their norm, measured before as `norm`, is at most `max_norm`."""
        if norm > max_norm:
            gradients = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(gradients, max_norm / norm)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Apply a finite gradient."""
        optimizer.step()
        if self.loss_scale is not None:
            self.loss_scale.applied()

    def overflowed(self) -> bool:
        """Told of a gradient that is not finite: True if the loss scale was at fault and has been lowered."""
        return self.loss_scale is not None and self.loss_scale.lower()

    def restart_peak_memory(self) -> None:
        """From now on `peak_memory_bytes` is the most since now. Memory that was freed goes back to the system first."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            resident.restart_peak()

    def peak_memory_bytes(self) -> int:
        """The most memory this process has held since `restart_peak_memory`: of the device where it keeps count, else resident."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident.peak()

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read afterwards means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs of the engine, as plain values."""
        return {} if self.loss_scale is None else {"scale": self.loss_scale.scale, "good_steps": self.loss_scale.good_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.loss_scale is not None and state:
            self.loss_scale.scale = float(state["scale"])
            self.loss_scale.good_steps = int(state["good_steps"])

    def close(self) -> None:
        """Leave the process as it was found."""
        if self.config.deterministic:
            torch.set_deterministic_debug_mode("default")


class LossScale:
    """Dynamic loss scaling for fp16 (arXiv:1710.03740): halve on overflow, double after 2,000 good steps."""

    GROWTH_INTERVAL = 2000
    SMALLEST = 1.0

    def __init__(self, scale: float = 2.0**16):
        self.scale = scale
        self.good_steps = 0

    def applied(self) -> None:
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL:
            self.scale, self.good_steps = self.scale * 2.0, 0

    def lower(self) -> bool:
        """Halve the scale; False if it is as low as it goes, so that the gradient itself must be bad."""
        self.good_steps = 0
        if self.scale <= self.SMALLEST:
            return False
        self.scale /= 2.0
        return True
