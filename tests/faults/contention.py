"""Two starts of one run: exactly one works, the other says who does; a dead owner's lock is taken over."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from dataclasses import replace

from tests.faults.lab import Lab, Row, said, wait_for_step


def starters(lab: Lab, count: int, num_starters: int = 2, seed: int = 0) -> Row:
    """Several processes in one folder within 0 to 200 ms."""
    chance = random.Random(seed)
    row = Row(f"{num_starters} runs started in one folder within 0-200 ms")
    for _ in range(count):
        task = lab.task()
        reference = lab.reference(task)
        logs = [f"{task.log}.{i}" for i in range(num_starters)]
        children = []
        for log in logs:
            children.append(lab.start(replace(task, log=log, step_seconds=0.02)))
            time.sleep(chance.uniform(0.0, 0.2 / (num_starters - 1)))
        codes = [child.wait() for child in children]
        row.count(one_worked(lab, task, children, codes, logs, reference))
    return row


def one_worked(lab, task, children, codes, logs, reference) -> str | None:
    """What is wrong with how several starts in one folder ended."""
    texts = [said(replace(task, log=log)) for log in logs]
    if sorted(codes) != [0] + [2] * (len(codes) - 1):
        return f"exit codes {codes}: {[text[-600:] for text in texts]}"
    owner = children[codes.index(0)]
    for code, text in zip(codes, texts, strict=True):
        if code == 2 and not re.search(rf'another run is working .*("pid": {owner.pid}\b|it has just started)', text):
            return f"the owner {owner.pid} is not named: {text[-600:]}"
        if code == 2 and "step 1\n" in text:
            return "the one that was refused had made a step"
    from tests.faults.lab import difference

    return difference(task.path, reference)


def stale_lock(lab: Lab, count: int, seed: int = 0) -> Row:
    """The owner is killed with -9, and the next start comes at once."""
    chance = random.Random(seed)
    row = Row("the lock of a run killed with -9")
    for _ in range(count):
        task = lab.task()
        reference = lab.reference(task)
        child = lab.start(replace(task, step_seconds=0.02))
        wait_for_step(child, task.path, chance.randrange(1, 8))
        child.kill()
        row.count(lab.to_the_end(task, reference))
    return row


def lock_outlives_no_child(lab: Lab) -> Row:
    """A run's own child process that lives on, as a data loader's may, does not keep the folder."""
    row = Row("the owner is killed and a process that it forked lives on", listed=True)
    task = lab.task()
    reference = lab.reference(task)
    child = lab.start(replace(task, step_seconds=0.02, forks=True))
    wait_for_step(child, task.path, 2)
    child.kill()
    row.count(lab.to_the_end(task, reference))
    return row


def run(lab: Lab, scale: float) -> Iterator[Row]:
    """All rows of this file."""
    yield starters(lab, max(1, round(50 * scale)))
    yield starters(lab, max(1, round(10 * scale)), num_starters=5, seed=1)
    yield stale_lock(lab, max(1, round(20 * scale)))
    yield lock_outlives_no_child(lab)
