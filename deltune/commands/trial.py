"""What a run will take, by trying it: the same architecture with few blocks and random weights makes some of the run's own steps.

Everything is the run's own: the code from weights to optimizer, the data, their order. Two depths are tried and continued
in a straight line to the model's; a model that is small enough is tried whole. No weight file is opened.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from deltune.commands.estimate import stored_bytes
from deltune.commands.train import Session
from deltune.engines import resident
from deltune.engines.engine import Engine
from deltune.errors import DeltuneError
from deltune.log import logger
from deltune.models.cost import flops_per_token
from deltune.models.filler import rounded
from deltune.models.recompute import apply, blocks_of
from deltune.training import randomness
from deltune.training.callbacks import Callback, RunInfo, StepRecord

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from deltune.commands.survey import Survey
    from deltune.data.pack import Batch
    from deltune.settings import Run

LOOKED_AT = 200  # of the run's first steps, among which those to try are chosen
TIMED = 5  # steps that are timed at each depth, and where their shapes are new ones made a first time before
MOST_AT_ONCE = 4  # micro-batches of a tried step
REMEMBERED = 20  # shapes of micro-batches whose kernels an engine keeps, about (KERNELS_KEPT)
SECONDS, TOO_LONG = 20.0, 60.0  # of the steps at the deeper depth, by the roofline: what is aimed at, and what is not begun
DEEPEST = 8  # blocks of a part
SHARE = 0.7  # of the free memory that a trial may take


class CannotTry(Exception):
    """Why a run is not told from a trial."""


@dataclass(frozen=True)
class Trial:
    """Of the run at its whole depth. `peak` is the largest resident size of the process while it trains, between its
    first step and its last; None where the system does not keep count."""

    step: float  # seconds of a mean optimizer step
    peak: float | None  # bytes
    depths: tuple[int, ...]  # in blocks
    whole: int
    took: float  # seconds of the trial itself
    steps: int  # at each depth

    def told(self) -> str:
        """From what."""
        depths = " and ".join(str(depth) for depth in self.depths)
        tried = "the whole model" if self.depths == (self.whole,) else f"{depths} of {self.whole} blocks"
        return f"{tried} with random weights, {self.steps} steps each, tried just now in {self.took:.0f} s"


def measure(
    run: Run, model: PreTrainedModel, found: Survey, *, recompute: str, num_steps: int, seconds: float, need: float, free: float,
    clock: str = "perf_counter",
) -> Trial:  # fmt: skip
    """Try `run`, whose shapes and adapters `model` has on the meta device; `recompute` is what its setting comes to.

    `seconds` of a step by the roofline and `need` in bytes tell how deep a trial may go, `free` is what there is.
    `clock` is a function of the module time. Raises CannotTry.
    """
    began = time.perf_counter()
    whole = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if not whole:
        raise CannotTry(f"{type(model).__name__} does not say how many blocks it has")
    steps = TIMED + 2 if found.lengths.min() == found.lengths.max() else 2 * TIMED + 2
    depths = depths_for(whole, recompute, seconds * steps * min(1.0, MOST_AT_ONCE / run.train.accumulate))
    if depths != (whole,):
        check_alike(model, whole)
    if need * (depths[-1] + 1) / (whole + 1) > SHARE * free:
        raise CannotTry("even some of its blocks would take too much memory")
    tried = [_in_a_process(_Asked(run, recompute, depth, num_steps, found.sampled, clock)) for depth in depths]
    peak = None
    if all(one.counted for one in tried):
        stored = stored_bytes(model) - tried[-1].stored
        peak = tried[-1].start + stored + continued(depths, [one.peak - one.start for one in tried], whole)
    return Trial(continued(depths, [one.step for one in tried], whole), peak, depths, whole, time.perf_counter() - began, tried[-1].steps)


# -- which depths -----------------------------------------------------------------------------------------------


def depths_for(whole: int, recompute: str, seconds: float) -> tuple[int, ...]:
    """One or two numbers of blocks, the whole model where its steps take so little. `seconds` of the whole's trial.

    Half of the blocks recompute where `selective`, so depths are even there. Raises CannotTry.
    """
    least = 2 if recompute == "selective" else 1
    if seconds <= SECONDS or whole <= 2 * least:
        found: tuple[int, ...] = (whole,)
    else:
        deep = next((d for d in range(DEEPEST, 2 * least, -2) if d < whole and seconds * d / whole <= SECONDS), 2 * least)
        found = (least, deep)
    if seconds * found[-1] / whole > TOO_LONG:
        raise CannotTry(f"steps of {found[-1]} blocks would take more than {TOO_LONG:.0f} s")
    return found


def check_alike(model: PreTrainedModel, whole: int) -> None:
    """CannotTry unless every block has the same parameters, trained in the same places, and the same kind of attention."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    blocks = [sorted((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()) for block in blocks_of(model)]
    if len(blocks) != whole or any(block != blocks[0] for block in blocks) or len(set(kinds)) > 1:
        raise CannotTry("its blocks are not all alike, so that some of them do not tell of the rest")


def continued(depths: Sequence[int], values: Sequence[float], whole: int) -> float:
    """The straight line through the values at one or two depths, at the whole depth; it never falls."""
    if len(depths) == 1:
        return values[0]
    slope = max(0.0, (values[1] - values[0]) / (depths[1] - depths[0]))
    return values[1] + slope * (whole - depths[1])


def at(works: Sequence[float], values: Sequence[float], work: float) -> float:
    """A value at some work, by a line whose slope is a median, and its height a mean without the extremes, so that single
    outliers do not count."""
    slopes = [(b - a) / (y - x) for (x, a), (y, b) in combinations(zip(works, values, strict=True), 2) if x != y]
    slope = max(0.0, statistics.median(slopes)) if slopes else 0.0
    return middle([value + slope * (work - x) for x, value in zip(works, values, strict=True)])


def middle(values: Sequence[float]) -> float:
    """Their mean without the least and the largest."""
    return statistics.fmean(sorted(values)[1:-1] if len(values) > 2 else values)


# -- one depth --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """Of the process that tries one depth."""

    run: Run
    recompute: str  # a name of recompute.KINDS: what run.model's auto comes to
    depth: int
    num_steps: int
    sampled: bool  # the data is too large to be tokenised for a trial
    clock: str


@dataclass(frozen=True)
class Tried:
    """What one depth took."""

    step: float  # seconds of a mean step of the run
    counted: bool  # whether the system counts resident bytes anew
    start: int  # resident bytes before the first step
    peak: float  # the most of them in the run's steps
    stored: int  # of them parameters and buffers
    steps: int  # that were tried


def _in_a_process(asked: _Asked) -> Tried:
    """In one of its own: its memory, and the kernels that are made for each new shape, are then as in a run, and one that
    the system ends for want of memory ends alone. CannotTry where it fails."""
    words = json.dumps({**vars(asked), "run": asked.run.to_dict()})
    done = subprocess.run([sys.executable, "-m", __name__], input=words, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise CannotTry(said[-1] if said else f"its process ended with {done.returncode}")
    return Tried(**json.loads(done.stdout))


def main() -> None:
    """The fields of an _Asked on standard input, those of a Tried on standard output, as JSON."""
    from deltune.settings import run_from

    words = json.load(sys.stdin)
    asked = _Asked(**{**words, "run": run_from(words["run"])})
    answer, sys.stdout = sys.stdout, sys.stderr
    logger.setLevel(logging.ERROR)
    try:
        tried = rehearse(asked)
    except DeltuneError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    print(json.dumps(vars(tried)), file=answer)


def rehearse(asked: _Asked) -> Tried:
    """Some steps of a run whose model has so many blocks, in this process; nothing is written."""
    return _Rehearsal(asked).go(asked.depth)


class _Rehearsal(Session):
    """A run of few steps that leaves nothing."""

    def __init__(self, asked: _Asked):
        run = asked.run
        run = replace(run, log=replace(run.log, every=1), train=replace(run.train, nonfinite="skip", max_nonfinite=2 * TIMED + 3))
        super().__init__(run, Engine(run.engine), None, None, None)
        self.recompute = asked.recompute
        self.sampled, self.total, self.clock = asked.sampled, asked.num_steps, getattr(time, asked.clock)

    def go(self, depth: int) -> Tried:
        for callback in self.own_callbacks():  # for what their libraries hold
            callback.close()
        self.load_data()
        self.load_model(depth)
        self.watch = _Watch(self.clock)
        self.callbacks = [self.watch]
        loop = self.build_loop()
        self.settle_recompute(loop)  # leaves kernels behind, as it does in the run; what it finds for so few blocks does not count
        apply(self.model, self.recompute)
        randomness.seed_all(self.run.seed)
        self.watch.follow(loop.optimizer)
        counted, start = resident.restart_peak(), resident.now()
        self.watch.begin()
        loop.run()
        chosen, seconds, updates = self.chosen, self.watch.seconds, self.watch.updates
        # a step is what it takes with kernels that are there, and what making them adds where they are not
        computing = [whole - update for whole, update in zip(seconds, updates, strict=True)]
        known = computing[-1 - TIMED : -1]
        step = at([chosen.work(i, self.model) for i in chosen.timed], known, chosen.mean_work(self.model))
        if chosen.first:
            kept = dict(zip(chosen.timed, known, strict=True))
            added = middle([(made - kept[i]) / number for made, (i, number) in zip(computing[1:], chosen.first.items(), strict=False)])
            step += max(0.0, added) * chosen.at_once * chosen.share_of_new()
        peak = self.engine.peak_memory_bytes() + self.watch.growth(chosen.first) * chosen.num_unmet
        counted = counted and self.engine.device.type == "cpu"
        return Tried(step * chosen.share + statistics.median(updates[1:]), counted, start, peak, stored_bytes(self.model), len(chosen.steps))

    def load_data(self) -> None:
        from deltune.commands.survey import SAMPLE_ROWS
        from deltune.data.prepare import prepare
        from deltune.models.load import load_tokenizer

        self.tokenizer = load_tokenizer(self.run.model)
        few = {"read_nums": SAMPLE_ROWS, "cache": None} if self.sampled else {}
        data = prepare(replace(self.run.data, streaming=False, **few), self.tokenizer).train
        if self.sampled:
            self.run = replace(self.run, train=replace(self.run.train, steps=self.total, epochs=None))  # the rows go round
        self.data = SimpleNamespace(train=data, evaluation=None)

    def loader(self) -> _Chosen:
        self.chosen = _Chosen(super().loader(), self.total, rounds=self.fast)
        return self.chosen

    def saver(self) -> None:
        return None

    def describe(self, num_steps: int) -> RunInfo:
        return RunInfo(self.run.folder, "trial", len(self.chosen.steps), 0, 0, 0, {})


class _Watch(Callback):
    """Seconds of every step, and of its optimizer's update; bytes after it."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.seconds: list[float] = []
        self.updates: list[float] = []
        self.resident: list[int] = []

    def follow(self, optimizer: Any) -> None:
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "asked", self.clock()))
        optimizer.register_step_post_hook(lambda *_: setattr(self, "update", self.clock() - self.asked))

    def begin(self) -> None:
        self.last, self.update = self.clock(), 0.0

    def on_step(self, record: StepRecord) -> None:
        now = self.clock()
        self.seconds.append(now - self.last)
        self.updates.append(self.update)
        self.resident.append(resident.now())
        self.begin()

    def growth(self, first: Mapping[int, int]) -> float:
        """Bytes by which the process grew for each new shape of the steps after the first one."""
        grown = [(b - a) / number for (a, b), number in zip(pairwise(self.resident), first.values(), strict=False)]
        return max(0.0, middle(grown)) if grown else 0.0


class _Chosen:
    """Stands in a loader's place: the steps to try, from the run's first ones. The timed ones stand for equal parts of all.

    The largest comes first, which makes the heap as wide as it gets; then those with shapes that have not been met, which
    makes their kernels; then all that are timed; and the largest again, since the heap has holes by then, as in a run.
    """

    def __init__(self, loader: Any, num_steps: int, *, rounds: bool):
        self.total = num_steps
        self.all = [[_Shape.of(batch, rounds) for batch in loader.step(i)] for i in range(min(num_steps, LOOKED_AT))]
        order = sorted((i for i, shapes in enumerate(self.all) if shapes), key=lambda i: max(shape.size for shape in self.all[i]))
        self.timed = [order[int((2 * i + 1) * len(order) / (2 * TIMED))] for i in (2, 0, 4, 1, 3)]  # places in `all`
        largest = sorted(loader.step(order[-1]), key=lambda batch: -batch.input_ids.numel())[:MOST_AT_ONCE]
        self.met = {_Shape.of(batch, rounds).kernels for batch in largest}
        self.first: dict[int, int] = {}  # {place: its shapes that had not been met}
        for i in self.timed:
            if new := {shape.kernels for shape in self.tried(i)} - self.met:
                self.first[i] = len(new)
                self.met |= new
        self.steps = [largest, *(loader.step(i)[:MOST_AT_ONCE] for i in (*self.first, *self.timed)), largest]

    def tried(self, i: int) -> list[_Shape]:
        return self.all[i][:MOST_AT_ONCE]

    def work(self, i: int, model: nn.Module) -> float:
        """FLOPs of a tried step."""
        return sum(shape.work(model) for shape in self.tried(i))

    @property
    def at_once(self) -> float:
        return statistics.fmean(len(self.tried(i)) for i in self.timed)

    @property
    def share(self) -> float:
        """Micro-batches of a mean step, for one of those that are tried."""
        return statistics.fmean(map(len, self.compared)) / self.at_once

    @property
    def compared(self) -> list[list[_Shape]]:
        """The steps whose mean is told: a run compares all but its first."""
        return self.all[1:] or self.all

    def mean_work(self, model: nn.Module) -> float:
        """FLOPs of as many mean micro-batches as a tried step has."""
        return self.at_once * statistics.fmean(shape.work(model) for shapes in self.compared for shape in shapes)

    def share_of_new(self) -> float:
        """Of the run's micro-batches those whose kernels have to be made. Steps that were not looked at are as the later half of those that were."""
        kept: dict[Any, None] = {}
        new = []
        for shapes in self.all:
            new.append([shape.kernels not in kept for shape in shapes])
            for shape in shapes:
                kept.pop(shape.kernels, None)
                kept[shape.kernels] = None
            while len(kept) > REMEMBERED:
                del kept[next(iter(kept))]
        looked, later = (list(chain.from_iterable(steps)) or [False] for steps in (new[1:], new[len(new) // 2 :]))
        rest = (self.total - len(new)) / self.total
        return (1 - rest) * statistics.fmean(looked) + rest * statistics.fmean(later)

    @property
    def num_unmet(self) -> int:
        """Shapes whose kernels the run will hold besides those of the tried steps."""
        return max(0, min(REMEMBERED, len({shape.kernels for shapes in self.all for shape in shapes})) - len(self.met))

    # -- as the loop asks a loader ------------------------------------------------------------------------------

    def step(self, i: int) -> list[Batch]:
        return self.steps[i]

    def num_steps(self, epochs: float) -> int:
        return self.total

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...

    def epochs_after(self, num_steps: int) -> None:
        return None


@dataclass(frozen=True)
class _Shape:
    """Lengths of the rows, or of the documents of a packed one; and what kernels are made for."""

    lengths: tuple[int, ...]
    kernels: tuple[int, ...]

    @classmethod
    def of(cls, batch: Batch, rounds: bool) -> _Shape:
        if batch.segments is not None:
            tokens = batch.segments[-1]
            return cls(tuple(b - a for a, b in pairwise(batch.segments)), (rounded(tokens) if rounds else tokens,))
        lengths = (batch.input_ids.shape[1],) * len(batch.input_ids)
        return cls(lengths, lengths)

    @property
    def size(self) -> int:
        return sum(self.lengths)

    def work(self, model: nn.Module) -> float:
        """FLOPs: linear in the tokens, and in the squares of the lengths."""
        fixed = flops_per_token(model, 0.0)
        grows = flops_per_token(model, 1.0) - fixed
        return fixed * self.size + grows * sum(length**2 for length in self.lengths)


if __name__ == "__main__":
    main()
