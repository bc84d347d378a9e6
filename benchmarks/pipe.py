"""How the suite and a candidate's process talk: a line of JSON for an order, a line of JSON for its answer, nothing else.

Orders: {"do": "steps", "count": n} and {"do": "end"}. Answers: {"ready": ...} once, then {"cpu": s, "wall": s, "losses":
[...], "tokens": n, "transient": bytes, "peak": bytes} for each order, or {"fault": text}. What a candidate prints goes to its log.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.nursery import Nursery

CALM = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}  # fmt: skip


class Fault(RuntimeError):
    """A candidate could not do what it was told; the message is its own."""


class Process:
    """A candidate seen from the suite: a new process, or what a nursery forks as `python -m command...`. Every wait has an end."""

    def __init__(self, command: Sequence[str], log: Path, *, nursery: Nursery | None = None, patience: float = 300.0):
        self.log, self.patience = log, patience
        with open(log, "a") as errors:
            if nursery:
                self.child = nursery.fork(command, errors)
            else:
                self.child = subprocess.Popen(
                    list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **CALM}
                )

    def hear(self) -> dict[str, Any]:
        """The next answer. Raises Fault where the child says so, ends, or is silent too long."""
        timer = threading.Timer(self.patience, self.child.kill)
        timer.start()
        try:
            line = self.child.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            self.child.wait(timeout=60)
            raise Fault(f"ended with status {self.child.returncode}: {last_line(self.log)}")
        answer = json.loads(line)
        if "fault" in answer:
            raise Fault(answer["fault"])
        return answer

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        try:
            self.child.stdin.write(json.dumps(order) + "\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            pass  # hear() says why it went
        return self.hear()

    def steps(self, count: int) -> dict[str, Any]:
        return self.ask({"do": "steps", "count": count})

    def end(self) -> None:
        """Ask it to end, and make sure."""
        if self.child.poll() is None:
            try:
                self.child.stdin.write('{"do": "end"}\n')
                self.child.stdin.flush()
                self.child.wait(timeout=10)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                self.child.kill()
                self.child.wait()
        self.child.stdin.close()
        self.child.stdout.close()


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1][:300] if lines else "no message"


class Pacer:
    """The candidate's side: training calls `ended` after each step with its loss; it returns when the next may begin.

    A step is everything from one call to the next: loading the batch, forward, backward, update, records.
    `clock` gives the seconds that count (CPU time, or CUDA-event time); it defaults to this process's CPU time.
    `rest` is called when a turn is over: it gives back what another candidate may need.
    """

    def __init__(self, *, clock: Callable[[], float] = time.process_time, peak: Any = None, rest: Callable[[], None] | None = None):
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # what a library prints must not be taken for an answer
        sys.stdout = sys.stderr
        self.clock, self.peak, self.rest = clock, peak, rest
        self.left, self.losses, self.tokens, self.began = 0, [], 0, None

    def ready(self, **facts: Any) -> None:
        """Say that the first step can begin, and wait until it may."""
        self.say({"ready": True, **facts})
        self.wait()

    def ended(self, loss: float | None, tokens: int = 0) -> None:
        if loss is not None:
            self.losses.append(float(loss))
        self.tokens += tokens
        self.left -= 1
        if self.left == 0:
            self.answer()
            self.wait()

    def answer(self) -> None:
        cpu, wall = self.clock() - self.began[0], time.perf_counter() - self.began[1]
        transient, peak = self.peak.stop() if self.peak else (None, None)
        if self.rest:
            self.rest()
        self.say({"cpu": cpu, "wall": wall, "losses": self.losses, "tokens": self.tokens, "transient": transient, "peak": peak})

    def wait(self) -> None:
        line = sys.stdin.readline()
        order = json.loads(line) if line else {"do": "end"}
        if order["do"] == "end":
            self.answers.flush()
            os._exit(0)  # training is in the middle of a loop that has no other way out
        self.left, self.losses, self.tokens = order["count"], [], 0
        if self.peak:
            self.peak.start()
        self.began = (self.clock(), time.perf_counter())

    def say(self, what: dict[str, Any]) -> None:
        self.answers.write(json.dumps(what) + "\n")
        self.answers.flush()

    def guarded(self, work: Callable[[], Any]) -> None:
        """Run a candidate to its end; whatever stops it becomes its answer, the traceback its log."""
        try:
            work()
        except BaseException as fault:
            traceback.print_exc()
            self.say({"fault": f"{type(fault).__name__}: {' '.join(str(fault).split())[:400]}"})
            os._exit(1)
