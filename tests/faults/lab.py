"""Starts runs, waits for them, and says whether what one left is bit for bit what an undisturbed run leaves.

Most children are forked from a process that has imported torch and no more, so a trial takes a fraction of a second;
they are processes like any other: own pid, own lock, killed by the system. Some are started from nothing.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FINAL_NAME = "final.json"
PATIENCE_SECONDS = 120.0  # a child that takes longer hangs


@dataclass
class Row:
    """A line of the table. Each trial ends as identical, as refused with nothing lost, or as a failure."""

    fault: str
    trials: int = 0
    identical: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    note: str = ""
    listed: bool = False  # the trials go through a list of cases instead of drawing at random

    def count(self, problem: str | None, *, refused: bool = False) -> None:
        """One trial: `problem` is None if it ended as it should."""
        self.trials += 1
        if problem is not None:
            self.failures.append(problem)
        elif refused:
            self.refused += 1
        else:
            self.identical += 1

    @property
    def bound(self) -> str:
        """95 % upper bound of the failure rate: with no failure in n trials, 3/n (Hanley, Lippman-Hand 1983)."""
        if self.listed and not self.failures:
            return "cases"
        return f"{min(1.0, 3 / self.trials):.1%}" if self.trials and not self.failures else "-"


class Child:
    """A running process, forked or fresh."""

    def __init__(self, process: Any):
        self.process = process
        self.pid: int = process.pid

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int | None:
        """Its exit code, minus the signal that ended it, or None if it still runs after so long."""
        if isinstance(self.process, subprocess.Popen):
            try:
                return self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
        self.process.join(seconds)
        return self.process.exitcode

    def send(self, signum: int) -> bool:
        """Whether the signal found it alive."""
        if self.wait(0) is not None:
            return False
        os.kill(self.pid, signum)
        return True

    def kill(self) -> bool:
        """kill -9, and wait for it to be gone. Whether it was still running."""
        self.send(signal.SIGKILL)
        return self.wait() == -signal.SIGKILL


class Lab:
    """A folder of trials, and the process from which children are forked."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._numbers = itertools.count(1)
        self._references: dict[Any, Evidence] = {}
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._context = multiprocessing.get_context("forkserver")
        # torch imports its compiler when asked for deterministic kernels; children look at the main module again,
        # which under pytest is pytest
        preload = ["tests.faults.child", "torch._inductor", *({"pytest"} & sys.modules.keys())]
        self._context.set_forkserver_preload(preload)

    def task(self, **settings: Any) -> Any:
        """A run in a folder of its own."""
        from tests.faults.child import Task

        place = self.folder / f"trial-{next(self._numbers):05d}"
        (place / "out").mkdir(parents=True)
        return Task(folder=str(place / "out" / "run"), log=str(place / "log.txt"), **settings)

    def forget(self, task: Any) -> None:
        """Remove what a trial left."""
        shutil.rmtree(task.path.parent.parent)

    def start(self, task: Any) -> Child:
        """A child forked from the warm process."""
        from tests.faults import child

        process = self._context.Process(target=child.main, args=(task,))
        process.start()
        return Child(process)

    def start_fresh(self, task: Any, *, environment: dict[str, str] | None = None, folder: Path = ROOT) -> Child:
        """A child that starts from nothing, in another environment or folder if wanted."""
        from tests.faults.child import words_of

        words = [sys.executable, "-m", "tests.faults.child", words_of(task)]
        return Child(subprocess.Popen(words, cwd=folder, env=os.environ | (environment or {}), stdin=subprocess.DEVNULL))

    def run(self, task: Any) -> tuple[int | None, str]:
        """(exit code, what it said) of a run to its end."""
        before = said(task)
        code = self.start(task).wait()
        return code, said(task).removeprefix(before)

    def reference(self, task: Any) -> Evidence:
        """What an undisturbed run with these settings leaves."""
        key = replace(task, folder="", log="")
        if key not in self._references:
            own = replace(self.task(), **{k: v for k, v in vars(key).items() if k not in ("folder", "log")})
            code, text = self.run(own)
            assert code == 0, f"the undisturbed run ends with {code}: {text[-2000:]}"
            self._references[key] = evidence(own.path)
            self.forget(own)
        return self._references[key]

    def to_the_end(self, task: Any, reference: Evidence, *, older_may_stay: bool = False) -> str | None:
        """Go on with a run until it is complete; what differs from the undisturbed one."""
        code, text = self.run(task)
        if code != 0:
            return f"the run that goes on ends with {code}: {text[-1500:]}"
        return difference(task.path, reference, older_may_stay=older_may_stay)


def said(task: Any) -> str:
    path = Path(task.log)
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


# -- what a run leaves ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """What two equal runs have in common, to the bit."""

    curve: tuple[tuple[int, str, str], ...]  # step, loss and gradient norm as float hex
    evaluations: tuple[tuple[int, str], ...]
    final: tuple[tuple[str, Any], ...]
    checkpoints: tuple[str, ...]


def evidence(folder: Path) -> Evidence:
    """Read by json alone, so that a fault in the program's own reader cannot hide one in what it wrote."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    if any(line["kind"] == "event" and line["message"].startswith("rolled back") for line in lines):
        steps = list({line["step"]: line for line in steps}.values())  # after a rollback, the last try of a step counts
    return Evidence(
        curve=tuple((s["step"], float(s["loss"]).hex(), float(s["grad_norm"]).hex()) for s in steps),
        evaluations=tuple((e["step"], float(e["metrics"]["loss"]).hex()) for e in lines if e["kind"] == "eval"),
        final=tuple(json.loads((folder / FINAL_NAME).read_text(encoding="utf-8")).items()),
        checkpoints=tuple(sorted(p.name for p in (folder / "checkpoints").iterdir() if ".damaged-" not in p.name)),
    )


def leftovers(folder: Path) -> list[str]:
    """Hidden files and folders below a run's: all that is temporary is hidden, and of the rest only the lock."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name != ".lock")


def difference(folder: Path, reference: Evidence, *, older_may_stay: bool = False) -> str | None:
    """None if the run in the folder is the reference's, bit for bit and with nothing left lying about.

    `older_may_stay`: of the checkpoints only the newest is compared, where a fault may add others or bring them back.
    """
    found = evidence(folder)
    if older_may_stay:
        found, reference = (replace(one, checkpoints=one.checkpoints[-1:]) for one in (found, reference))
    for name in ("curve", "evaluations", "final", "checkpoints"):
        ours, theirs = getattr(found, name), getattr(reference, name)
        if ours != theirs:
            first = next((pair for pair in itertools.zip_longest(ours, theirs) if pair[0] != pair[1]), None)
            return f"{name} differs: {first[0]} where the undisturbed run has {first[1]}"
    left = leftovers(folder)
    return f"left lying about: {left}" if left else None


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint folder, whole or not; 0 without one."""
    names = [p.name for p in (folder / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return max((int(name[5:]) for name in names), default=0)


def logged_step(folder: Path) -> int:
    """The last step in metrics.jsonl; 0 without one."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    except FileNotFoundError:
        return 0
    return sum(b'"kind": "step"' in line for line in lines)


def wait_for_step(child: Child, folder: Path, step: int) -> bool:
    """Wait until a step is logged; False if the process ended before."""
    until = time.monotonic() + PATIENCE_SECONDS
    while logged_step(folder) < step:
        if child.wait(0) is not None or time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True
