"""What `engine.precision` means for one model on one device: settled once, before adapters are attached."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltune import dist
from deltune.engines.precision import Precision, settle
from deltune.models import kbit
from deltune.models.quantise import compute_in
from deltune.weights import store_as

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from deltune.settings import Run, Trained


def of_run(run: Run, model: PreTrainedModel, device: torch.device) -> Precision:
    """For training `run`; the frozen weights of `model`, which may be on the meta device, are then stored as it says."""
    precision = meant(run, model, device)
    _store(run, model, precision)
    return precision


def meant(run: Run, model: PreTrainedModel, device: torch.device) -> Precision:
    """As `of_run`, and nothing is done to the model; the answer is the same before and after."""
    adapter = run.adapter
    frozen = adapter is not None and not adapter.modules_to_save and not adapter.schedule.moves_base
    return _settled(run, model, device, frozen)


def of_use(settings: Trained, model: PreTrainedModel, device: torch.device) -> Precision:
    """For answers of a model: nothing is trained, so all of it may be stored as suits the device."""
    precision = _settled(settings, model, device, frozen=True)
    _store(settings, model, precision)
    return precision


def _settled(settings: Run | Trained, model: PreTrainedModel, device: torch.device, frozen: bool) -> Precision:
    keep = settings.model.dtype != "auto"
    # rank 0 answers for all: processes on unlike machines compute alike
    return dist.on_main(lambda: settle(settings.engine.precision, device=device, stored=model.dtype, frozen=frozen, keep=keep))


def _store(settings: Run | Trained, model: PreTrainedModel, precision: Precision) -> None:
    if precision.storage is not None:
        store_as(model, precision.storage, but=tuple(model._keep_in_fp32_modules_strict or ()))
    compute_in(model, settings.quant)
    kbit.prepare(model)
