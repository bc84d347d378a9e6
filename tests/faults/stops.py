"""Asked to stop: SIGTERM, SIGINT or SIGUSR1 at a random step saves and exits with 128 + the signal; a second one leaves at once."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.faults.lab import FINAL_NAME, Lab, Row, logged_step, newest_step, said, wait_for_step

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
MOST_PER_RUN = 3


def stopped_well(task: Any, code: int | None, signum: int, text: str) -> str | None:
    """What is wrong with how a run answered one signal."""
    if code == 0 and (task.path / FINAL_NAME).exists():
        return None  # it came when the last step was done
    if code != 128 + signum:
        return f"{signal.Signals(signum).name} ended it with {code}: {text[-1200:]}"
    done, safe = logged_step(task.path), newest_step(task.path)
    return None if done == safe else f"step {done} was done, step {safe} was saved"


def one_signal(lab: Lab, count: int, seed: int = 0) -> Row:
    """Up to three signals a run, each at a random step and a random moment within it."""
    chance = random.Random(seed)
    row = Row("SIGTERM, SIGINT or SIGUSR1 at a random step")
    slowest = 0.0
    while row.trials < count:
        task = lab.task(every=11, eval_every=100, step_seconds=0.004)  # few saves that no signal asked for
        reference = lab.reference(replace(task, step_seconds=0.0))
        signals, problem = 0, None
        while signals < min(MOST_PER_RUN, count - row.trials) and problem is None:
            child = lab.start(task)
            if not wait_for_step(child, task.path, logged_step(task.path) + chance.randrange(1, 7)):
                break
            time.sleep(chance.uniform(0.0, 0.02))
            signum, began = chance.choice(SIGNALS), time.monotonic()
            if not child.send(signum):
                break
            code = child.wait()
            slowest = max(slowest, time.monotonic() - began)
            signals += 1
            problem = stopped_well(task, code, signum, said(task))
        problem = problem or lab.to_the_end(task, reference, older_may_stay=True)
        for _ in range(signals):
            row.count(problem)
        if problem is None:
            lab.forget(task)
    row.note = f"slowest took {slowest:.2f} s from signal to exit"
    return row


def second_signal(lab: Lab, count: int, seed: int = 0) -> Row:
    """The second signal comes while the first one's save is under way. It must not wait for the save."""
    chance = random.Random(seed)
    row = Row("a second signal during the save")
    for _ in range(count):
        task = lab.task(every=6, eval_every=100)
        reference = lab.reference(task)
        child = lab.start(replace(task, sync_seconds=0.15))
        problem = None if wait_for_step(child, task.path, 6) else f"ended early: {said(task)[-800:]}"
        if problem is None:
            first = chance.choice(SIGNALS)
            child.send(first)
            time.sleep(chance.uniform(0.05, 1.0))
            child.send(chance.choice(SIGNALS))
            code = child.wait()
            if code != 128 + first or "asked again" not in said(task) or newest_step(task.path):
                problem = f"after the second signal: {code}, step {newest_step(task.path)} saved: {said(task)[-800:]}"
        problem = problem or lab.to_the_end(task, reference)
        row.count(problem)
    return row


def grace_over(lab: Lab, count: int) -> Row:
    """A step that takes longer than the grace period is given up."""
    row = Row("the grace period ends before the step does")
    for number in range(count):
        task = lab.task(every=2)
        reference = lab.reference(task)
        child = lab.start(replace(task, step_seconds=1.0, grace_seconds=0.2))
        signum = SIGNALS[number % len(SIGNALS)]
        problem = None
        if not wait_for_step(child, task.path, 2):
            problem = f"ended early: {said(task)[-800:]}"
        else:
            time.sleep(0.3)  # into the third step
            child.send(signum)
            code = child.wait()
            if code != 128 + signum or "the grace period is over" not in said(task):
                problem = f"ended with {code}: {said(task)[-800:]}"
        problem = problem or lab.to_the_end(task, reference)
        row.count(problem)
    return row


def run(lab: Lab, scale: float) -> Iterator[Row]:
    """All rows of this file."""
    yield one_signal(lab, round(100 * scale))
    yield second_signal(lab, max(1, round(20 * scale)))
    yield grace_over(lab, max(1, round(6 * scale)))
