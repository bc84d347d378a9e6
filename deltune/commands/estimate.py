"""What a run will need: memory by part, time and disk, from the model's shapes and the data's lengths. Touches no weights."""

from __future__ import annotations

import shutil
import sys
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deltune import weights
from deltune.commands import fast
from deltune.commands.arithmetic import meant, of_run
from deltune.commands.survey import ROUND, MicroBatches, Survey, micro_batches
from deltune.engines import resident
from deltune.engines.engine import pick_device
from deltune.engines.precision import AUTOCAST
from deltune.errors import AdapterError, ModelError
from deltune.models.cost import Speed, arithmetic, device_speed
from deltune.models.dry_run import dry_run
from deltune.models.recompute import KINDS
from deltune.optim.build import state_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltune.settings import Run

SHARE = 0.9  # of the free memory, which recomputation is chosen to stay below
ON_DEVICE = 5e8  # CUDA's context and libraries, about; the allocator does not count them


def shapes_of(run: Run) -> PreTrainedModel:
    """The run's model on the meta device with its adapter attached, or its trainable parameters chosen.

    Attention that runs compiled kernels only is replaced by torch's own, which keeps as much.
    """
    from deltune.commands.new_tokens import set_moving
    from deltune.models.load import empty

    compiled = run.model.attention in ("flash_attention_2", "flex_attention")
    model = empty(replace(run.model, attention="sdpa") if compiled else run.model, fast=run.fast == "auto", quant=run.quant)
    of_run(run, model, pick_device(run.engine.device))
    set_moving(run, model)
    if run.fast == "auto":
        fast.put(model, adapted=run.adapter is not None)
    return model


def shapes_for(run: Run, found: Survey, batching: str) -> MicroBatches:
    """The run's micro-batches; where there are fewer examples than one holds, of all of them. `batching` is packed,
    grouped or padded, as `commands.batching` settles it."""
    size = min(run.train.micro_batch, found.examples_per_epoch)
    return micro_batches(found, size, batching=batching, capacity=run.train.micro_batch_tokens)


def stored_bytes(model: torch.nn.Module) -> int:
    return sum(map(weights.stored_bytes, (*model.parameters(), *model.buffers())))


def trained_bytes(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


# -- memory -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the worst moment of a step. `heap` is what glibc may keep of blocks that were freed: as much
    again as the small ones, by trials."""

    parts: dict[str, float]
    heap: float

    @property
    def least(self) -> float:
        return sum(self.parts.values())

    @property
    def most(self) -> float:
        return self.least + self.heap


def memory_of(run: Run, model: PreTrainedModel, shapes: MicroBatches, device: torch.device) -> Memory:
    """The largest micro-batch of the run: `shapes.size` examples, one of them the longest there is."""
    account = dry_run(
        model, batch=shapes.size, seq=shapes.longest, trained=shapes.most_trained, padded=shapes.padding > 0,
        device=device.type, autocast=AUTOCAST.get(meant(run, model, device).name), recompute=recompute_meant(run),
        accumulate=run.train.accumulate > 1, fast=run.fast == "auto",
        lengths=shapes.largest if shapes.batching == "packed" else None,
    )  # fmt: skip
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts: dict[str, float] = {"weights": stored_bytes(model), "optimizer state": state_bytes(parameters, run.optim)}
    parts |= {name.replace("_", " "): size for name, size in account.parts.items()}
    if device.type == "cpu":
        parts["program"] = held_now()
    else:
        parts["device context, about"] = ON_DEVICE
    return Memory(parts, float(account.small_bytes) if device.type == "cpu" and sys.platform == "linux" else 0.0)


def recompute_meant(run: Run) -> str:
    """The setting; auto is none here, and `settle_recompute` tells what it comes to."""
    return "none" if run.model.recompute == "auto" else run.model.recompute


def settle_recompute(run: Run, model: PreTrainedModel, shapes: MicroBatches, device: torch.device) -> Run:
    """The run with auto replaced by what training would choose where this much memory is free, as far as the account tells."""
    if run.model.recompute != "auto":
        return run
    for kind in KINDS:
        changed = replace(run, model=replace(run.model, gradient_checkpointing=kind))
        try:
            if memory_of(changed, model, shapes, device).most <= SHARE * free_memory(device):
                return changed
        except ModelError:
            break
    else:
        return changed
    return replace(run, model=replace(run.model, gradient_checkpointing="none"))


def held_now() -> float:
    """Bytes of this process: Python and the libraries, which training loads too."""
    return float(resident.now())


def free_memory(device: torch.device) -> float:
    """Bytes that this process could have: what is free, and what it holds already."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    return float(psutil.virtual_memory().available) + held_now()


def fitting(run: Run, found: Survey, batching: str, device: torch.device, free: float) -> Iterator[tuple[str, Memory]]:
    """Changes of the run, as words of a command line, after which it fits into `free` bytes: the mildest of each kind."""

    def needed(changed: Run) -> Memory:
        """ModelError or AdapterError where the model cannot do it."""
        limit = changed.data.max_length
        clipped = replace(found, lengths=found.lengths.clip(max=limit), trained=found.trained.clip(max=limit))
        return memory_of(changed, shapes_of(changed), shapes_for(changed, clipped, batching), device)

    for kind in (_smaller_batches(run), _recomputing(run), _lighter_weights(run), _shorter_examples(run, found), _adapter(run)):
        changes = list(kind)  # from the mildest, which needs most, to the strictest
        try:
            mildest = bisect_left(changes, True, key=lambda change: needed(change[1]).most <= free)
            if mildest < len(changes):
                words, changed = changes[mildest]
                yield words, needed(changed)
        except (AdapterError, ModelError):
            continue  # a kind of change that this model does not have


def _smaller_batches(run: Run) -> Iterator[tuple[str, Run]]:
    """Fewer examples at once and as many in a step, so that the numbers stay the same."""
    train, tokens = run.train, run.train.micro_batch_tokens
    if tokens is not None:
        while (tokens := tokens // 2) >= run.data.max_length:
            accumulate = train.accumulate * (train.micro_batch_tokens // tokens)
            changed = replace(run, train=replace(train, micro_batch_tokens=tokens, accumulate=accumulate))
            yield f"train.micro_batch_tokens={tokens} train.accumulate={accumulate}", changed
        return
    for size in range(train.micro_batch // 2, 0, -1):
        if train.micro_batch % size == 0:
            accumulate = train.accumulate * train.micro_batch // size
            changed = replace(run, train=replace(train, micro_batch=size, accumulate=accumulate))
            yield f"train.micro_batch={size} train.accumulate={accumulate}", changed


def _recomputing(run: Run) -> Iterator[tuple[str, Run]]:
    if run.model.recompute == "full":
        return
    if run.model.recompute in ("auto", "none"):
        yield _recomputed(run, "selective")
    words, changed = _recomputed(run, "full")
    yield words, changed
    for more, smaller in _smaller_batches(changed):
        yield f"{words} {more}", smaller


def _recomputed(run: Run, kind: str) -> tuple[str, Run]:
    return f"model.gradient_checkpointing={kind}", replace(run, model=replace(run.model, gradient_checkpointing=kind))


def _lighter_weights(run: Run) -> Iterator[tuple[str, Run]]:
    if run.model.dtype in ("auto", "float32") and run.engine.precision in ("auto", "fp32"):
        yield "model.dtype=bfloat16", replace(run, model=replace(run.model, dtype="bfloat16"))


def _shorter_examples(run: Run, found: Survey) -> Iterator[tuple[str, Run]]:
    for limit in reversed(ROUND):
        if limit < found.lengths.max():
            yield f"data.max_length={limit}", replace(run, data=replace(run.data, max_length=limit))


def _adapter(run: Run) -> Iterator[tuple[str, Run]]:
    if run.adapter is None and not run.model.enable and not run.model.disable:
        from deltune.adapters.config import ADAPTERS

        yield "adapter=lora", replace(run, adapter=ADAPTERS.resolve("lora")())


# -- time -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    """Seconds."""

    step: float
    evaluation: float  # one pass over the evaluation data, without generating
    num_evaluations: int
    speed: Speed

    def total(self, num_steps: int) -> float:
        return num_steps * self.step + self.num_evaluations * self.evaluation


def time_of(run: Run, model: PreTrainedModel, found: Survey, shapes: MicroBatches, num_steps: int, device: torch.device) -> Time:
    """A mean step by the roofline of every kernel, and the optimizer's passes over what it moves."""
    lengths = shapes.typical if shapes.batching == "packed" else None
    seq = max(2, round(shapes.seq) if lengths is None else sum(lengths))
    account = dry_run(
        model, batch=shapes.size, seq=seq, trained=max(1, min(round(shapes.trained), shapes.size * (seq - 1))),
        padded=shapes.padding > 0, device=device.type, autocast=AUTOCAST.get(meant(run, model, device).name),
        recompute=recompute_meant(run), fast=run.fast == "auto", lengths=lengths,
    )  # fmt: skip
    speed = device_speed(device, {arithmetic(meant(run, model, device).name, p.dtype) for p in model.parameters()})
    state = state_bytes([p for p in model.parameters() if p.requires_grad], run.optim)
    moved = 3 * trained_bytes(model) + 2 * state  # gradient read, the rest read and written
    step = run.train.accumulate * speed.seconds((*account.forward, *account.backward)) + moved / speed.bytes_per_second
    share = found.num_evaluation * found.evaluation_length / (shapes.size * shapes.seq)  # of a micro-batch's forward pass
    during = num_steps // run.eval.every if run.eval.every else 0
    num_evaluations = (during + run.eval.at_start + 1) if found.num_evaluation else 0
    return Time(step, share * speed.seconds(account.forward), num_evaluations, speed)


# -- disk -------------------------------------------------------------------------------------------------------


def disk_of(run: Run, model: PreTrainedModel, num_steps: int) -> dict[str, float]:
    """Bytes below the run's folder at its end."""
    trained, parameters = trained_bytes(model), [p for p in model.parameters() if p.requires_grad]
    one = trained + state_bytes(parameters, run.optim) + moved_bytes(run, model)
    saved = 1 + (num_steps // run.checkpoint.every if run.checkpoint.every else 0)
    kept = min(saved, run.checkpoint.save_total_limit + 1)  # the best one besides
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return {f"checkpoints, {kept} of {saved}": kept * one, run.result: trained if run.result == "adapter" else whole if run.adapter is None else whole - trained}


def moved_bytes(run: Run, model: PreTrainedModel) -> float:
    """Of base weights that the adapter moves without training them, which each checkpoint holds too."""
    if run.adapter is None or not run.adapter.schedule.moves_base:
        return 0
    from deltune.adapters.schedules import over_time

    return sum(tensor.numel() * tensor.element_size() for tensor in over_time(model).tensors().values())


def free_disk(folder: Path) -> float:
    """Bytes free where a folder is, or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return float(shutil.disk_usage(place).free)
