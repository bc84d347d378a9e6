"""Who this process is among its peers: the one place that knows a process group. Everything works without one."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from deltune.errors import DeltuneError


def rank() -> int:
    """This process's place among all, 0 alone. Known before any process group exists (the launcher's RANK)."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def _group_ready() -> bool:
    import torch.distributed as group

    return group.is_available() and group.is_initialized()


def barrier() -> None:
    if world_size() > 1 and _group_ready():
        import torch.distributed as group

        group.barrier()


def sum_over_ranks(values: list[float], device: Any = "cpu") -> list[float]:
    """The element-wise sum over all ranks, in float64, so that counts stay exact to 2^53."""
    if world_size() == 1 or not _group_ready():
        return list(values)
    import torch
    import torch.distributed as group

    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    group.all_reduce(tensor)
    return tensor.tolist()


def any_rank(flag: bool, device: Any = "cpu") -> bool:
    """True on every rank if it is true on one."""
    return sum_over_ranks([float(flag)], device)[0] > 0


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank. The value is pickled by torch between the run's own processes only."""
    if world_size() == 1 or not _group_ready():
        return value
    import torch.distributed as group

    box = [value]
    group.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1 or not _group_ready():
        return [value]
    import torch.distributed as group

    box: list[Any] = [None] * world_size()
    group.all_gather_object(box, value)
    return box


def on_main(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 and give its value to every rank; if it fails there, it fails everywhere.

    A DeltuneError is raised anew on the other ranks, so that none waits for a peer that has given up.
    """
    value, fault = None, None
    if is_main():
        try:
            value = action()
        except DeltuneError as error:
            fault = error
    if world_size() > 1:
        value, text = broadcast_object((value, None if fault is None else (type(fault), str(fault))))
        if fault is None and text is not None:
            raise text[0](text[1])
    if fault is not None:
        raise fault
    return value


@contextmanager
def gathered(*parameters: Any):
    """The whole of parameters that an engine keeps in shards. Nothing is sharded yet, so it yields at once."""
    yield
