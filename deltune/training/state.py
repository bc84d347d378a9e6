"""What a checkpoint holds: everything that the next step depends on, gathered from all parts and put back to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from deltune import dist
from deltune.engines.engine import Engine
from deltune.errors import CheckpointError, NumericsError
from deltune.optim.build import load_optimizer_state, optimizer_state
from deltune.training import randomness
from deltune.training.checkpoints import CheckpointStore, Snapshot


class Schedule(Protocol):
    """Something that changes weights around the optimizer's step, by the step's number alone."""

    def before_update(self, step: int) -> None:
        """The gradient of this step is whole, and the optimizer's step comes next."""

    def after_step(self, step: int) -> None:
        """Step `step` (1 is the first) is done, whether it updated anything or was skipped. Called once per optimizer step."""

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What it moves, or remembers, beside trained parameters and stored buffers; the same names at every step."""

    def loaded(self) -> None:
        """A checkpoint's tensors have been put back."""


def moving_tensors(model: torch.nn.Module, schedules: Sequence[Schedule] = ()) -> dict[str, torch.Tensor]:
    """What training changes: trained parameters, buffers that a model keeps in its state dict, and what schedules move."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    stored = model.state_dict(keep_vars=True)
    moving = trained | {name: b for name, b in model.named_buffers() if name in stored}
    for schedule in schedules:
        moving |= {name: tensor.detach() for name, tensor in schedule.tensors().items()}
    return moving


def load_moving_tensors(model: torch.nn.Module, tensors: dict[str, torch.Tensor], schedules: Sequence[Schedule] = ()) -> None:
    """Put them back. CheckpointError if names or shapes are not this model's."""
    own = moving_tensors(model, schedules)
    if own.keys() != tensors.keys():
        missing, left = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        raise CheckpointError(
            f"the checkpoint is of another model: missing {missing[:3]}, left over {left[:3]} ({len(missing)} and {len(left)} in all)"
        )
    with torch.no_grad():
        for name, target in own.items():
            if target.shape != tensors[name].shape or target.dtype != tensors[name].dtype:
                raise CheckpointError(
                    f"the checkpoint's {name} is {tuple(tensors[name].shape)} {tensors[name].dtype}, "
                    f"this model's {tuple(target.shape)} {target.dtype}"
                )
            target.copy_(tensors[name])
    for schedule in schedules:
        schedule.loaded()


class Saver:
    """Saves and loads a run's whole state. Every rank calls; rank 0 writes."""

    def __init__(self, store: CheckpointStore, schedules: Sequence[Schedule] = ()):
        self.store = store
        self.schedules = list(schedules)
        self.last_saved: int | None = None

    def save(
        self, step: int, progress: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer,
        engine: Engine, loader: Any, *, best_step: int | None,
    ) -> Path:
        """Write the checkpoint of a step. NumericsError if a trained weight is not finite: that is nothing to go on from."""
        self._check_finite(step, model)
        rng_tensors, rng_plain = randomness.capture()
        mine = {"rng_tensors": rng_tensors, "rng": rng_plain, "loader": loader.state()}
        everyone = dist.gather_objects(mine)

        def write() -> str:
            optim_tensors, optim_plain = optimizer_state(optimizer)
            rng = {f"rank{i}.{name}": t for i, one in enumerate(everyone) for name, t in one["rng_tensors"].items()}
            state = {
                "progress": progress,
                "optimizer": optim_plain,
                "engine": engine.state(),
                "ranks": [{"rng": one["rng"], "loader": one["loader"]} for one in everyone],
            }
            tensors = {"trainable": moving_tensors(model, self.schedules), "optimizer": optim_tensors, "rng": rng}
            return str(self.store.save(Snapshot(step, tensors, state), best_step=best_step))

        path = Path(dist.on_main(write))
        self.last_saved = step
        return path

    def _check_finite(self, step: int, model: torch.nn.Module) -> None:
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        for schedule in self.schedules:
            trained |= schedule.tensors()
        bad = next((name for name, p in trained.items() if not torch.isfinite(p).all()), None)
        everyone = [name for name in dist.gather_objects(bad) if name is not None]
        if everyone:
            raise NumericsError(
                f"step {step}: its update made the weight {everyone[0]} infinite or not a number, so it is not saved. "
                f"The last checkpoint in {self.store.folder} stands; lower optim.lr or set optim.max_grad_norm."
            )

    def load_newest(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, engine: Engine, loader: Any
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Put the newest whole checkpoint's state back. (its progress or None without one, messages on damaged ones).

        CheckpointError if there are checkpoints and none is whole: to start over in silence would give up the work.
        """

        def find() -> tuple[int | None, list[str]]:
            snapshot, complaints = self.store.newest()
            if snapshot is None and complaints:
                raise CheckpointError(
                    f"{self.store.folder}: no checkpoint is whole: {'; '.join(complaints)}. They are left as they are. What fits: "
                    "put a copy back, or remove that folder to begin again, or name=... for another run."
                )
            if snapshot is None:
                return None, complaints
            self.store.rotate(snapshot.state["progress"]["best_step"])  # a kill may have come between save and rotation
            return snapshot.step, complaints

        step, complaints = dist.on_main(find)
        if step is None:
            return None, complaints
        snapshot = self.store.load(step)
        load_moving_tensors(model, snapshot.tensors["trainable"], self.schedules)
        load_optimizer_state(optimizer, snapshot.tensors["optimizer"], snapshot.state["optimizer"])
        engine.load_state(snapshot.state["engine"])
        self._load_rank(snapshot, loader, step)
        self.last_saved = step
        return snapshot.state["progress"], complaints

    def _load_rank(self, snapshot: Snapshot, loader: Any, step: int) -> None:
        ranks = snapshot.state["ranks"]
        if len(ranks) == dist.world_size():
            own, prefix = ranks[dist.rank()], f"rank{dist.rank()}."
            tensors = snapshot.tensors["rng"]
            randomness.restore({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}, own["rng"])
        else:
            # another number of processes: no rank's draws can be continued, so each starts a stream of its own
            own = ranks[0]
            randomness.seed_all(step * 1_000_003 + dist.rank())
        loader.load_state(own["loader"])
