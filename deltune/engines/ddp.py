"""Several processes with a whole copy of the model each; gradients are summed in buckets after the last micro-batch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as group

from deltune import dist
from deltune.engines.config import DDP
from deltune.engines.engine import Engine
from deltune.errors import EngineError


class DDPEngine(Engine):
    """One process of `deltune launch -n N train engine=ddp`."""

    def __init__(self, config: DDP):
        super().__init__(config)
        if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
            raise EngineError(
                "engine=ddp wants several processes: start it with `deltune launch -n 2 train engine=ddp ...`, or use engine=single."
            )
        end_with_launcher()
        backend = config.backend
        if backend == "auto":
            backend = "nccl" if self.device.type == "cuda" else "gloo"
        if backend == "nccl" and self.device.type != "cuda":
            raise EngineError("engine.backend=nccl wants CUDA devices. What fits: engine.backend=gloo or auto.")
        if not group.is_initialized():
            group.init_process_group(backend, timeout=timedelta(seconds=config.timeout_seconds))
        self.rank, self.world_size = dist.rank(), dist.world_size()
        self.bucket_bytes = int(config.bucket_mb * 1e6)

    def place(self, model: torch.nn.Module) -> torch.nn.Module:
        model = super().place(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    group.broadcast(parameter, src=0)
        return model

    def reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        for bucket in self._buckets(parameters):
            for parameter in bucket:
                if parameter.grad is None:  # no example on this rank reached it; others' may have
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [p.grad for p in bucket]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            group.all_reduce(flat)
            for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))
        super().reduce_gradients(parameters)

    def _buckets(self, parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
        """Parameters of one type at a time, in order, up to the bucket's size."""
        bucket: list[torch.nn.Parameter] = []
        size = 0
        for parameter in parameters:
            extent = parameter.numel() * parameter.element_size()
            if bucket and (size + extent > self.bucket_bytes or parameter.dtype != bucket[0].dtype):
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += extent
        if bucket:
            yield bucket

    def close(self) -> None:
        super().close()
        if group.is_initialized():
            group.destroy_process_group()


def end_with_launcher() -> None:
    """On Linux, have a process of `deltune launch` asked to stop when the launcher dies, even by kill -9.

    Without this it would wait for peers that nobody starts, until the timeout.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() == 1:  # it died before the request was made
        raise EngineError("the launcher of this process has died")
