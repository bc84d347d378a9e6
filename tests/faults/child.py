"""A training run in one process, small and whole: what `deltune train` puts together, without transformers.

Imports only torch and deltune, so that it starts in a second. All that a trial varies is in `Task`; the last thing that
a run writes is final.json, which two runs have in common exactly if they are the same run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch  # noqa: F401  its writer is replaced by the hooks
import torch

from deltune import dist, log
from deltune.data.loader import Loader
from deltune.data.pack import pad
from deltune.engines.config import DDP, Single
from deltune.engines.ddp import DDPEngine
from deltune.engines.engine import Engine
from deltune.errors import DeltuneError
from deltune.optim.build import build_optimizer
from deltune.optim.config import AdamW
from deltune.optim.groups import parameter_groups
from deltune.training import randomness, storage
from deltune.training.callbacks import Callback, RunInfo, StepRecord
from deltune.training.checkpoints import CheckpointStore
from deltune.training.config import CheckpointConfig, EvalConfig, TrainConfig
from deltune.training.lock import FolderLock
from deltune.training.loop import Loop
from deltune.training.loss import causal_lm_step
from deltune.training.metrics import MetricsFile
from deltune.training.state import Saver, load_moving_tensors
from tests.faults import hooks
from tests.faults.lab import FINAL_NAME
from tests.faults.model import VOCAB, Decoder
from tests.faults.rows import RandomRows


@dataclass(frozen=True)
class Task:
    """One process. `folder` is the run's; its parent holds nothing else."""

    folder: str
    log: str  # file that takes what the process says
    variant: str = "full"  # or "lora"
    steps: int = 16
    every: int = 3
    eval_every: int = 4
    limit: int = 2
    micro_batch: int = 4
    accumulate: int = 2
    lr: float = 3e-3
    nonfinite: str = "stop"
    grace_seconds: float = 20.0
    step_seconds: float = 0.0  # a pause in each step
    poison: tuple[str, int] | None = None  # what breaks, at which step
    given_up: tuple[int, ...] = ()  # steps run through without an update
    kill_at: tuple[int, str] | None = None  # call and phase, see hooks.Kill
    cut_at: tuple[int, str, str] | None = None  # call, model and folder, see hooks.PowerCut
    journal: str | None = None  # list the calls in this file
    sync_seconds: float = 0.0  # a pause in each fsync
    file_limit_bytes: int | None = None  # no file may grow beyond
    forks: bool = False  # leave a process behind that lives on
    rank: int = 0
    world: int = 1
    port: int = 0

    @property
    def path(self) -> Path:
        return Path(self.folder)


# -- the model and what is poisoned ---------------------------------------------------------------------------


def build_model(task: Task) -> torch.nn.Module:
    model = Decoder(seed=1)
    if task.variant == "lora":
        from deltune.adapters.attach import attach
        from deltune.adapters.methods.lora import LoraConfig

        attach(model, LoraConfig(rank=4, dropout=0.1), seed=1)
    return model


class NanGradient(torch.autograd.Function):
    """Zero forward, not-a-number backward."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(ctx.saved_tensors[0], math.nan)


class Step:
    """The forward pass of a micro-batch: every library's generator counts, one step may be poisoned."""

    def __init__(self, task: Task):
        self.poison, self.pause = task.poison, task.step_seconds
        self.loop: Loop | None = None
        self.spent = False

    def __call__(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        time.sleep(self.pause)
        factor = 1.0 + 0.1 * (random.random() + float(numpy.random.rand()))
        if self.poison is None or self.loop.progress.step + 1 != self.poison[1] or self.spent:
            return causal_lm_step(model, batch) * factor
        return self._poisoned(self.poison[0], model, batch) * factor

    def _poisoned(self, kind: str, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        trained = [p for p in model.parameters() if p.requires_grad]
        if kind == "weight":
            self.spent = True  # it stays broken by itself
            with torch.no_grad():
                trained[len(trained) // 2].view(-1)[0] = math.nan
        if kind == "gradient":
            return causal_lm_step(model, batch) + NanGradient.apply(trained[-1])
        if kind == "batch":
            mlp = model.layers[1].mlp
            mlp.forward = lambda x: type(mlp).forward(mlp, x) * math.nan
            try:
                return causal_lm_step(model, batch)
            finally:
                del mlp.forward
        return causal_lm_step(model, batch)


class Evaluation:
    """Mean loss on rows of its own, in eval mode."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.batch = model, pad(list(RandomRows(count=8, seed=99)), VOCAB - 1)

    def __call__(self) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            return {"loss": causal_lm_step(self.model, self.batch).item() / self.batch.num_trained_tokens}


# -- the run --------------------------------------------------------------------------------------------------


def build_engine(task: Task) -> Engine:
    if task.world == 1:
        return Engine(Single(device="cpu", threads=1))
    return DDPEngine(DDP(device="cpu", threads=1, backend="gloo", timeout_seconds=10.0))


def build_loop(task: Task, engine: Engine) -> Loop:
    model = engine.place(build_model(task))
    config = AdamW(lr=task.lr, weight_decay=0.01)
    step = Step(task)
    loader = Loader(
        RandomRows(), micro_batch=task.micro_batch, accumulate=task.accumulate, rank=task.rank, world_size=task.world, seed=3,
        shuffle=True, pad_id=VOCAB - 1, num_examples=None,
    )
    count = sum(p.numel() for p in model.parameters())
    loop = Loop(
        model, loader=loader, optimizer=build_optimizer(parameter_groups(model.named_parameters(), config), config),
        schedule=lambda number: min(1.0, number / 4) * (1.0 - 0.5 * number / task.steps), engine=engine,
        info=RunInfo(task.path, "run", task.steps, 0, count, count, {}),
        train=TrainConfig(
            steps=task.steps, micro_batch=task.micro_batch, accumulate=task.accumulate, nonfinite=task.nonfinite
        ),
        eval=EvalConfig(every=task.eval_every),
        checkpoint=CheckpointConfig(every=task.every, save_total_limit=task.limit, grace_seconds=task.grace_seconds),
        max_grad_norm=1.0, saver=Saver(CheckpointStore(task.path / "checkpoints", task.limit)), evaluate=Evaluation(model),
        forward_step=step,
    )
    step.loop = loop
    loop.progress.skip_steps = list(task.given_up)
    return loop


class Promise(Callback):
    """Tells the power cut what the run takes for safe."""

    def __init__(self, cut: hooks.PowerCut):
        self.cut = cut

    def on_save(self, step: int, path: Path) -> None:
        self.cut.saved = step


class Talk(Callback):
    """Events on the terminal, for messages to be looked for."""

    def on_event(self, step: int, message: str) -> None:
        print(f"event at step {step}: {message}", flush=True)

    def on_step(self, record: StepRecord) -> None:
        print(f"step {record.step}", flush=True)


def weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def train(task: Task, visitor: hooks.Visitor | None) -> None:
    """What deltune/commands/train.py does, in its order."""
    engine = build_engine(task)
    lock = FolderLock(task.path)
    dist.on_main(lock.acquire)
    try:
        if (task.path / FINAL_NAME).exists():
            print("complete", flush=True)
            return
        if task.forks and os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        loop = build_loop(task, engine)
        randomness.seed_all(7 + task.rank)
        complaints = loop.resume()
        loop.info = replace(loop.info, start_step=loop.progress.step)
        loop.callbacks += [MetricsFile(task.path / "metrics.jsonl"), Talk()]
        if isinstance(visitor, hooks.PowerCut):
            loop.callbacks.append(Promise(visitor))
        for callback in loop.callbacks:
            callback.on_start(loop.info)
        for complaint in complaints:
            loop.event(f"passed over a damaged checkpoint: {complaint}")
        stopped_by = loop.run()
        finish(task, loop, stopped_by)
    finally:
        lock.release()
        engine.close()


def finish(task: Task, loop: Loop, stopped_by: str) -> None:
    """The last weights' hash, the best ones', and the chain of all losses."""
    progress = loop.progress
    last = weights_hash(loop.model)
    if progress.best_step is not None:
        load_moving_tensors(loop.model, loop.saver.store.load(progress.best_step).tensors["trainable"])
    final = {
        "weights": last, "best_weights": weights_hash(loop.model), "loss_chain": progress.loss_chain,
        "step": progress.step, "best_step": progress.best_step, "best_metric": (progress.best_metric or 0.0).hex(),
        "stopped_by": stopped_by, "num_trained_tokens": progress.num_trained_tokens,
    }
    dist.on_main(lambda: storage.write_json(task.path / FINAL_NAME, final))


def visitor_of(task: Task) -> hooks.Visitor | None:
    if task.kill_at is not None:
        return hooks.Kill(*task.kill_at)
    if task.cut_at is not None:
        return hooks.PowerCut(task.path.parent, *task.cut_at)
    if task.journal is not None:
        return hooks.Journal(task.journal)
    return hooks.SlowSync(task.sync_seconds) if task.sync_seconds else None


def surroundings(task: Task) -> None:
    """What the process has before the run begins: its output, its rank, its limits."""
    handle = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    if task.world > 1:
        os.environ.update(
            RANK=str(task.rank), LOCAL_RANK=str(task.rank), WORLD_SIZE=str(task.world), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(task.port),
        )
    if task.file_limit_bytes is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (task.file_limit_bytes, task.file_limit_bytes))
    log.set_up()


def main(task: Task) -> None:
    """The whole process; exits as the command line does: 0, or a DeltuneError's code with its message on standard error."""
    surroundings(task)
    visitor = visitor_of(task)
    if visitor is not None:
        hooks.Hooks(task.path.parent, visitor).install()
    code = 0
    try:
        train(task, visitor)
    except DeltuneError as error:
        print(f"deltune: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except Exception:
        traceback.print_exc()
        code = 1
    if isinstance(visitor, hooks.Journal):
        visitor.close()
    sys.stdout.flush()
    os._exit(code)  # a forked child leaves without its parent's exit handlers


def words_of(task: Task) -> str:
    """A task as one word on a command line."""
    return json.dumps(asdict(task))


if __name__ == "__main__":
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()}
    main(Task(**values))
