"""How examples share a forward pass, settled once the model is known: every verb that makes batches asks here.

Packed rows need a model in which documents of one row never meet. Where that cannot be had, `data.batching=auto` pads
and says why, and what asks for packing by name is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from deltune.errors import ConfigError
from deltune.log import logger

if TYPE_CHECKING:
    from deltune.data.config import DataConfig
    from deltune.data.loader import Loader
    from deltune.settings import PreviewSettings, Run


class Batching(NamedTuple):
    """`name` is packed, grouped or padded; `why_padded` says why auto did not pack, and is empty otherwise."""

    name: str
    why_padded: str = ""

    @property
    def packed(self) -> bool:
        return self.name == "packed"

    def __str__(self) -> str:
        return f"{self.name} ({self.why_padded})" if self.why_padded else self.name


def settled(data: DataConfig, model: Any, *, tokens: int | None = None, fast: str = "auto", own_step: str = "") -> Batching:
    """What `data.batching` is for this model. `tokens` is train.micro_batch_tokens; `own_step` names a forward pass of the
    caller's own, which may know padded batches only. Raises ConfigError where packing is asked for and cannot be."""
    if data.batching in ("grouped", "padded"):
        return Batching(data.batching)
    asked = "data.batching=packed" if data.batching == "packed" else "train.micro_batch_tokens" if tokens is not None else ""
    if not asked:
        if fast == "off":
            return Batching("padded", "fast=off")
        if own_step:
            return Batching("padded", f"{own_step} is your own and may expect a mask; data.batching=packed hands it packed rows")
    reason = cannot_pack(model)
    if reason and asked:
        raise ConfigError(f"{asked}: {reason}. What fits: data.batching=auto, grouped or padded, and examples counted by train.micro_batch.")
    return Batching("padded", reason) if reason else Batching("packed")


def of_run(run: Run, model: Any, *, own_step: str = "") -> Batching:
    """What it is in a training run; a reason to pad is logged."""
    found = settled(run.data, model, tokens=run.train.micro_batch_tokens, fast=run.fast, own_step=own_step)
    if found.why_padded:
        logger.info("%s batches are padded: %s", "evaluation" if own_step == "eval_step" else "training", found.why_padded)
    return found


def loader(settings: Run | PreviewSettings, dataset: Any, name: str, pad_id: int, *, rank: int = 0, world_size: int = 1) -> Loader:
    """The batches of a training run; `name` is packed, grouped or padded."""
    from deltune.data.loader import Loader

    data, train = settings.data, settings.train
    # a number of epochs ends with a short step; a number of steps goes round as often as it takes
    num_examples = None if train.steps else max(1, round((train.epochs or 1.0) * dataset.examples_per_epoch))
    return Loader(
        dataset, micro_batch=train.micro_batch, micro_batch_tokens=train.micro_batch_tokens, accumulate=train.accumulate,
        rank=rank, world_size=world_size, seed=data.seed, shuffle=data.shuffle, batching=name, pad_id=pad_id,
        num_examples=num_examples,
    )  # fmt: skip


def cannot_pack(model: Any) -> str:
    """Why rows of several documents would not be as rows of one in this model, with its adapters; empty if they are."""
    from deltune.models.attention import keeps_documents_apart

    if any(module.num_positions_taken for module in model.modules() if hasattr(module, "num_positions_taken")):
        return "a learned prompt stands in front of a row, not of each document in it"
    return keeps_documents_apart(model)
