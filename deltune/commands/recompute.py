"""`model.gradient_checkpointing=auto`: the first of none, selective, full that fits, by a micro-batch that is tried out.

The trial leaves no trace: random generators, stored buffers and gradients are as before it, so the run's numbers are
those of a run without it. What was chosen is kept by every checkpoint, whatever is free when the run goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deltune import dist
from deltune.errors import AdapterError, ModelError
from deltune.models.recompute import KINDS, apply

if TYPE_CHECKING:
    import torch

    from deltune.data.pack import Batch
    from deltune.settings import Run
    from deltune.training.loss import ForwardStep

SHARE = 0.9  # of the free memory
HEAP = 2.2  # resident bytes of a CPU step for each byte of its tensors: glibc keeps freed blocks (docs/performance.md)
ALLOCATOR = 1.1  # the same on a GPU
SMALL = 8  # the first trial is with this part of the tokens of the largest micro-batch


@dataclass(frozen=True)
class Chosen:
    """A name of KINDS, and why."""

    kind: str
    reason: str


def settle(
    run: Run, model: Any, engine: Any, *, forward_step: ForwardStep, own_step: bool, batch: Batch, small: Batch, state_bytes: float, free: float
) -> Chosen:
    """What the setting means for this model. `batch` is as large as micro-batches get, `small` the first trial's.

    `state_bytes` is what the optimizer has yet to allocate, `free` what this process may have. The model then recomputes
    so. Every rank calls, and all choose what the most careful one does.
    """
    kind = run.model.recompute
    if kind != "auto":
        apply(model, kind)
        return Chosen(kind, f"model.gradient_checkpointing={run.model.gradient_checkpointing}".replace("True", "true").replace("False", "false"))
    if own_step:
        apply(model, "none")
        return Chosen("none", "forward_step is your own, and is not called for a trial; model.gradient_checkpointing=full or selective recomputes")
    if run.engine.compile:
        apply(model, "none")
        return Chosen("none", "a compiled model is not tried out; model.gradient_checkpointing=full or selective recomputes")
    found = _smallest_that_fits(model, engine, forward_step, batch, small, state_bytes, free)
    everyone = dist.gather_objects(found)
    chosen = max(everyone, key=lambda one: KINDS.index(one.kind))
    apply(model, chosen.kind)
    return chosen


def _smallest_that_fits(model: Any, engine: Any, forward_step: ForwardStep, batch: Batch, small: Batch, state_bytes: float, free: float) -> Chosen:
    from deltune.training.display import memory as written

    factor = ALLOCATOR if engine.device.type == "cuda" else HEAP
    room, tried = SHARE * free - state_bytes, []
    for kind in KINDS:
        try:
            apply(model, kind)
            # a part of the whole needs at least that part of its bytes, since some of them do not grow
            needed = factor * transient_bytes(model, engine, forward_step, small) * batch.input_ids.numel() / small.input_ids.numel()
            if room / 4 < needed <= room:  # near enough to be worth the whole
                needed = factor * transient_bytes(model, engine, forward_step, batch)
        except (ModelError, AdapterError) as error:  # a model that cannot recompute, or an adapter in the cache
            return Chosen(tried[0][0], f"{error}") if tried else Chosen("none", f"{error}")
        tried.append((kind, needed))
        if needed <= room:
            break
    kind, needed = tried[-1]
    over = [f"{name} {written(size)}" for name, size in tried[:-1]]
    reason = f"a largest micro-batch of {batch.input_ids.numel():,} tokens needs about {written(needed)}, and {written(max(0.0, room))} are free"
    return Chosen(kind, reason + (f" ({', '.join(over)})" if over else "") + ("" if needed <= room else "; it may not fit: deltune plan names what does"))


def transient_bytes(model: Any, engine: Any, forward_step: ForwardStep, batch: Batch) -> float:
    """Bytes that one micro-batch holds at its worst moment beside what is there already; infinity where a GPU has not as many."""
    import torch

    batch = batch.to(engine.device)

    def action() -> None:
        with engine.autocast():
            result = forward_step(model, batch)
        (result[0] if isinstance(result, tuple) else result).backward()

    with untouched(model):
        if engine.device.type != "cuda":
            from deltune.models.dry_run import peak_bytes_of

            return float(peak_bytes_of(model, action))
        torch.cuda.reset_peak_memory_stats(engine.device)
        before = torch.cuda.memory_allocated(engine.device)
        try:
            action()
        except torch.OutOfMemoryError:
            return float("inf")
        return float(torch.cuda.max_memory_allocated(engine.device) - before)


class untouched:
    """Random generators, stored buffers, gradients and the model's mode are afterwards as before."""

    def __init__(self, model: Any):
        self.model = model

    def __enter__(self) -> None:
        from deltune.training import randomness

        self.random, self.training = randomness.capture(), self.model.training
        stored = self.model.state_dict(keep_vars=True)
        self.buffers = {name: (b, b._version, b.detach().clone()) for name, b in self.model.named_buffers() if name in stored}
        self.model.train()

    def __exit__(self, *_: Any) -> None:
        import torch

        from deltune.training import randomness

        for parameter in self.model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for buffer, version, kept in self.buffers.values():
                if buffer._version != version:
                    buffer.copy_(kept)
        self.model.train(self.training)
        randomness.restore(*self.random)


# -- what is tried ----------------------------------------------------------------------------------------------


def trial_batches(run: Run, dataset: Any, packed: bool, pad_id: int) -> tuple[Batch, Batch]:
    """(as large as micro-batches of the run get, a small one)."""
    from deltune.data.loader import batch

    examples = _longest(run, dataset)
    tokens = max(2, sum(len(example.ids) for example in examples) // SMALL)
    few: list[Any] = []
    for example in examples:
        limit = min(len(example.ids), max(2, tokens - sum(len(one.ids) for one in few)))
        few.append(example._replace(ids=example.ids[:limit], labels=example.labels[:limit]))
        if sum(len(one.ids) for one in few) >= tokens:
            break
    return tuple(batch([_trained(e) for e in chosen], packed=packed, pad_id=pad_id) for chosen in (examples, few))


def _longest(run: Run, dataset: Any) -> list[Any]:
    from deltune.data.dataset import Example

    train = run.train
    if not hasattr(dataset, "lengths"):  # a stream, of which no more is known than its limit
        ids = np.zeros(run.data.max_length, dtype=np.int32)
        number = train.micro_batch if train.micro_batch_tokens is None else max(1, train.micro_batch_tokens // len(ids))
        return [Example(ids, ids, "trial")] * number
    order = np.argsort(-dataset.lengths.astype(np.int64), kind="stable")
    if train.micro_batch_tokens is None:
        order = order[: train.micro_batch]
    else:
        order = order[: max(1, int(np.searchsorted(np.cumsum(dataset.lengths[order].astype(np.int64)), train.micro_batch_tokens, side="right")))]
    return [dataset[int(i)] for i in order]


def _trained(example: Any) -> Any:
    """With its last token trained, as a piece of a prompt is not, so that there is a loss."""
    labels = np.array(example.labels)
    labels[-1] = example.ids[-1]
    return example._replace(labels=labels)


def free_for_one(device: torch.device) -> float:
    """Bytes that this process may have besides what it holds: on a CPU the processes of a machine share them."""
    from deltune.commands.estimate import free_memory, held_now

    if device.type == "cuda":
        return free_memory(device)
    return (free_memory(device) - held_now()) / dist.local_world_size()
