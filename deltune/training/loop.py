"""The training loop: one optimizer step at a time, each a pure function of the state before it, so that any can be redone.

A step counts its trained tokens over all micro-batches and ranks before any forward pass; every micro-batch's summed
loss is divided by that count. So one batch of eight, eight of one, and eight ranks with one each give one gradient.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deltune import dist
from deltune.engines.engine import Engine
from deltune.errors import Interrupted, NumericsError
from deltune.training import randomness
from deltune.training.ahead import Ahead
from deltune.training.callbacks import Callback, EvalRecord, RunInfo, StepRecord
from deltune.training.config import CheckpointConfig, EvalConfig, TrainConfig
from deltune.training.loss import ForwardStep, causal_lm_step
from deltune.training.numerics import diagnose, first_bad_weight
from deltune.training.signals import StopRequest
from deltune.training.state import Saver, Schedule

SMALLER_IS_BETTER = ("loss", "perplexity")  # and metrics of tasks that end so
ADDED = "extra_loss"  # the name under which it is logged


@dataclass
class Progress:
    """What the loop remembers between steps, besides tensors. Plain values, saved with every checkpoint."""

    step: int = 0  # the last finished one
    num_tokens: int = 0
    num_trained_tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_metric: float | None = None
    evals_without_gain: int = 0
    num_nonfinite: int = 0
    recompute: str = ""  # which blocks recompute their activations, a name of models.recompute.KINDS; kept for the whole run
    skip_steps: list[int] = field(default_factory=list)  # given up by a rollback; run through without an update
    loss_chain: str = hashlib.sha256(b"deltune").hexdigest()  # grows with every step's loss and gradient norm

    def extend_chain(self, loss: float, grad_norm: float) -> None:
        """Two runs with one chain have had the same numbers, bit for bit, at every step."""
        text = f"{self.loss_chain} {self.step} {loss.hex()} {grad_norm.hex()}"
        self.loss_chain = hashlib.sha256(text.encode()).hexdigest()


def metric_of(config: EvalConfig) -> str:
    return "loss" if config.metric == "auto" else config.metric


def improves(config: EvalConfig, value: float, best: float | None) -> bool:
    """Whether a metric's value beats the best so far by at least min_delta."""
    if value != value:  # not a number never wins
        return False
    if best is None:
        return True
    direction = config.direction
    if direction == "auto":
        direction = "min" if metric_of(config).endswith(SMALLER_IS_BETTER) else "max"
    return value < best - config.min_delta if direction == "min" else value > best + config.min_delta


class _NotFinite(Exception):
    """Raised inside a step, before its update."""

    def __init__(self, loss: float, grad_norm: float, where: str):
        super().__init__(where)
        self.loss, self.grad_norm, self.where = loss, grad_norm, where


class Loop:
    """Runs the steps that are left. Build it, `resume()` if wanted, then `run()`."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        loader: Any,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        engine: Engine,
        info: RunInfo,
        train: TrainConfig,
        eval: EvalConfig,
        checkpoint: CheckpointConfig,
        max_grad_norm: float | None,
        saver: Saver | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        callbacks: Sequence[Callback] = (),
        forward_step: ForwardStep = causal_lm_step,
        log_every: int = 1,
        schedules: Sequence[Schedule] = (),
        extra_loss: Callable[[], torch.Tensor | None] = lambda: None,
        gradient_rules: Sequence[Callable[[], None]] = (),
    ):
        self.model, self.optimizer, self.schedule, self.engine = model, optimizer, schedule, engine
        self.loader = Ahead(loader, info.num_steps, pin=engine.device.type == "cuda")
        self.info, self.train, self.eval, self.checkpoint = info, train, eval, checkpoint
        self.max_grad_norm, self.saver, self.evaluate = max_grad_norm, saver, evaluate
        self.callbacks, self.forward_step, self.log_every = list(callbacks), forward_step, log_every
        self.schedules = list(schedules)
        self.extra_loss, self.gradient_rules = extra_loss, list(gradient_rules)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.peak_rates = [group["lr"] for group in optimizer.param_groups]
        self.progress = Progress()
        self.seconds: list[float] = []  # of each step of this process
        self.peak_memory = 0  # bytes, from this process's first step to its last

    # -- the run ------------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Train to the last step. Returns "completed" or "early_stop"; raises Interrupted or NumericsError."""
        try:
            return self._run()
        finally:
            self.loader.close()

    def _run(self) -> str:
        self.model.train()
        stopped_by = "completed"
        if self._patience_is_over():  # a run killed between its last evaluation and its end
            return "early_stop"
        with StopRequest(self.checkpoint.grace_seconds) as request:
            if self.saver and self.train.nonfinite == "rollback" and self.progress.step == 0:
                self.save()
            while self.progress.step < self.info.num_steps:
                if self._asked_to_stop(request):
                    self._stop(request.signum)
                self._one_step()
                if self._evaluation_is_due() and self._evaluate_and_decide():
                    stopped_by = "early_stop"
                    break
                if self.checkpoint.every and self.progress.step % self.checkpoint.every == 0:
                    self.save()
            self.save()
        return stopped_by

    def resume(self) -> list[str]:
        """Go back to the newest whole checkpoint, if there is one. Returns what had to be passed over."""
        if self.saver is None:
            return []
        state, complaints = self.saver.load_newest(self.model, self.optimizer, self.engine, self.loader)
        if state is not None:
            self.progress = Progress(**state)
        return complaints

    def save(self) -> None:
        """Write a checkpoint of the last finished step, unless it is there already."""
        if self.saver is None or self.saver.last_saved == self.progress.step:
            return
        self._tell("before_save", self.progress.step)
        path = self.saver.save(
            self.progress.step, vars(self.progress), self.model, self.optimizer, self.engine, self.loader,
            best_step=self.progress.best_step if self.checkpoint.load_best else None,
        )
        self._tell("on_save", self.progress.step, path)

    def event(self, message: str) -> None:
        """Tell everyone of something out of the ordinary."""
        self._tell("on_event", self.progress.step, message)

    def _tell(self, what: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, what)(*arguments)

    def _asked_to_stop(self, request: StopRequest) -> bool:
        """All ranks answer alike, so that all leave at the same step."""
        if dist.world_size() == 1:
            return request.signum != 0
        asked = dist.any_rank(request.signum != 0, self.engine.device)
        if asked:
            request.signum = max(dist.gather_objects(request.signum))
        return asked

    def _stop(self, signum: int) -> None:
        self.save()
        kept = "" if self.saver is None else "; the same command goes on from there"
        message = f"stopped by signal {signum} after step {self.progress.step}{kept}"
        self.event(message)
        raise Interrupted(message, signum)

    # -- one step -----------------------------------------------------------------------------------------------

    def _one_step(self) -> None:
        began = time.perf_counter()
        step = self.progress.step + 1
        factor = self.schedule(step)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        before = randomness.capture(), self.loader.state()
        asked = time.perf_counter()
        batches = self.loader.step(step - 1)
        waited = time.perf_counter() - asked
        skipped, extra = False, {}
        counts = [float(sum(b.num_tokens for b in batches)), float(sum(b.num_trained_tokens for b in batches))]
        num_tokens, num_trained = (int(n) for n in dist.sum_over_ranks(counts, self.engine.device))
        try:
            loss, grad_norm, extra = self._gradient(batches, num_trained)
            if step in self.progress.skip_steps:
                skipped = True
            else:
                for changing in self.schedules:
                    changing.before_update(step)
                self._update(grad_norm)
        except _NotFinite as fault:
            loss, grad_norm, skipped = fault.loss, fault.grad_norm, True
            if self._answer(fault, step, before):
                return
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        for changing in self.schedules:
            changing.after_step(step)
        self.engine.synchronize()
        seconds = time.perf_counter() - began
        self._finish(step, loss, grad_norm, num_tokens, num_trained, seconds, waited, skipped, extra)

    def _gradient(self, batches: Sequence[Any], num_trained: int) -> tuple[float, float, dict[str, float]]:
        """(loss, gradient norm, extra scalars) of the whole step, gradients in place. Raises _NotFinite."""
        losses: list[torch.Tensor] = []
        extras: dict[str, list[float]] = {}
        placed = [b.to(self.engine.device) for b in batches]
        for batch in placed:
            with self.engine.autocast():
                result = self.forward_step(self.model, batch)
            loss, extra = result if isinstance(result, tuple) else (result, {})
            self.engine.backward(loss / max(num_trained, 1))
            losses.append(loss.detach())  # read after the last backward: reading waits for the device
            for name, value in extra.items():
                extras.setdefault(name, []).append(float(value))
        added = self.extra_loss()
        if added is not None and added.requires_grad:  # a function of the weights alone: once, whatever the split of the batch
            self.engine.backward(added / self.engine.world_size)
        self.engine.reduce_gradients(self.parameters)
        for rewrite in self.gradient_rules:
            rewrite()
        loss = dist.sum_over_ranks([sum(one.item() for one in losses)], self.engine.device)[0] / max(num_trained, 1)
        grad_norm = self.engine.grad_norm(self.parameters)
        if not (_is_finite(loss) and _is_finite(grad_norm)):
            self._restore_if_scale_overflowed(loss)
            where = self._where(placed)
            raise _NotFinite(loss, grad_norm, where)
        extra = {name: sum(values) / len(values) for name, values in extras.items()}
        return loss, grad_norm, extra if added is None else extra | {ADDED: added.item()}

    def _restore_if_scale_overflowed(self, loss: float) -> None:
        """fp16: a gradient that overflows under a finite loss lowers the loss scale and skips the step; no fault."""
        if _is_finite(loss) and self.engine.overflowed():
            raise _NotFinite(loss, float("inf"), "")

    def _where(self, batches: Sequence[Any]) -> str:
        def forward(model: torch.nn.Module, batch: Any) -> Any:
            with self.engine.autocast():
                return self.forward_step(model, batch)

        found = dist.gather_objects(diagnose(self.model, batches, forward))
        return "; ".join(f"rank {i}: {text}" if len(found) > 1 else text for i, text in enumerate(found))

    def _update(self, grad_norm: float) -> None:
        if self.max_grad_norm is not None:
            self.engine.clip(self.parameters, grad_norm, self.max_grad_norm)
        self.engine.step(self.optimizer)

    def _answer(self, fault: _NotFinite, step: int, before: tuple[Any, Any]) -> bool:
        """What the policy does about a loss or gradient that is not finite. True if the loop has gone back."""
        if not fault.where:
            self._tell("on_event", step, f"step {step}: fp16 gradients overflowed; skipped, loss scale lowered")
            return False
        message = f"step {step}: loss {fault.loss}, gradient norm {fault.grad_norm}; no update was made: {fault.where}"
        if step in self.progress.skip_steps:
            self._tell("on_event", step, f"{message}; skipped, as it was rolled back for this")
            return False
        self.progress.num_nonfinite += 1
        policy = self.train.nonfinite
        broken = dist.any_rank(first_bad_weight(self.model) is not None, self.engine.device)
        # every later step would break on a broken weight too, so there is nothing to skip to
        if policy == "stop" or self.progress.num_nonfinite >= self.train.max_nonfinite or (policy == "skip" and broken):
            if not broken:
                self._take_back(before)
                self.save()
            raise NumericsError(
                f"{message}. Look at those rows (deltune preview), lower optim.lr, or go on with train.nonfinite=skip or rollback."
            )
        self._tell("on_event", step, f"{message}; {'rolling back' if policy == 'rollback' else 'skipped'}")
        if policy == "skip":
            return False
        remembered, faults = [*self.progress.skip_steps, step], self.progress.num_nonfinite
        for complaint in self.resume():
            self.event(complaint)
        self.progress.skip_steps, self.progress.num_nonfinite = remembered, faults
        self._tell("on_event", step, f"rolled back to step {self.progress.step}; step {step} will not update")
        return True

    def _take_back(self, before: tuple[Any, Any]) -> None:
        """Undo what a step without update has used up, so that a checkpoint of now is one of the step before."""
        rng, place = before
        randomness.restore(*rng)
        self.loader.load_state(place)
        self.optimizer.zero_grad(set_to_none=True)

    def _finish(
        self, step: int, loss: float, grad_norm: float, num_tokens: int, num_trained: int, seconds: float,
        waited: float, skipped: bool, extra: dict[str, float],
    ) -> None:
        done = self.progress
        done.step = step
        done.num_tokens += num_tokens
        done.num_trained_tokens += num_trained
        done.seconds += seconds
        done.extend_chain(loss, grad_norm)
        self.seconds.append(seconds)
        self.peak_memory = self.engine.peak_memory_bytes()
        if step % self.log_every and step != self.info.num_steps and not skipped:
            return
        flops = self.info.flops_per_token * num_tokens
        peak = self.info.peak_flops * self.engine.world_size
        record = StepRecord(
            step=step, epoch=self.loader.epochs_done() or 0.0, loss=loss, grad_norm=grad_norm,
            lr=self.optimizer.param_groups[0]["lr"], num_trained_tokens=num_trained, num_tokens=num_tokens,
            seconds=seconds, data_seconds=waited, tokens_per_second=num_tokens / seconds,
            peak_memory_bytes=self.peak_memory, flops=flops,
            mfu=flops / seconds / peak if peak else 0.0, skipped=skipped, extra=extra,
        )
        self._tell("on_step", record)

    # -- evaluation ---------------------------------------------------------------------------------------------

    def _evaluation_is_due(self) -> bool:
        if self.evaluate is None:
            return False
        every = self.eval.every
        return self.progress.step == self.info.num_steps or bool(every and self.progress.step % every == 0)

    def _evaluate_and_decide(self) -> bool:
        """Evaluate, remember the best, save it; True if patience has run out."""
        began = time.perf_counter()
        metrics = self.evaluate()
        self.model.train()
        metric = metric_of(self.eval)
        if metric not in metrics:
            raise NumericsError(
                f"eval.metric={metric}: the evaluation gave no such number. What fits: {', '.join(sorted(metrics))}."
            )
        value, done = metrics[metric], self.progress
        is_best = improves(self.eval, value, done.best_metric)
        if is_best:
            done.best_step, done.best_metric, done.evals_without_gain = done.step, value, 0
        else:
            done.evals_without_gain += 1
        self._tell("on_eval", EvalRecord(done.step, metrics, is_best, time.perf_counter() - began))
        if is_best and self.checkpoint.load_best:
            self.save()
        if self._patience_is_over():
            self.event(f"no gain in {done.evals_without_gain} evaluations: stopping")
            return True
        return False

    def _patience_is_over(self) -> bool:
        return self.eval.patience is not None and self.progress.evals_without_gain >= self.eval.patience


def _is_finite(number: float) -> bool:
    return number - number == 0.0
