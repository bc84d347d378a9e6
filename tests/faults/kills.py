"""kill -9: at random moments, at every call of a save, and of one process of two.

A kill leaves the disk as the last finished call left it, so killing before, half way through and after every call
visits every state that a kill can leave.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.faults.lab import Child, Lab, Row, difference, leftovers, newest_step, said

MOST_PER_RUN = 5


def random_kills(lab: Lab, count: int, what: str = "all weights", *, fresh: bool = False, seed: int = 0, **settings: Any) -> Row:
    """Kill at uniformly random times, start again, at most five times a run; `count` kills in all."""
    chance = random.Random(seed)
    row = Row(f"kill -9 at a random moment, {what}")
    inside_a_save = runs = 0
    start = lab.start_fresh if fresh else lab.start
    while row.trials < count:
        task = lab.task(**settings)
        reference = lab.reference(task)
        length, runs = length_of_run(lab, task, fresh), runs + 1
        kills, problem = 0, None
        while kills < min(MOST_PER_RUN, count - row.trials) and problem is None:
            child = start(task)
            time.sleep(chance.uniform(0.0, length))
            if not child.kill():
                code = child.wait()
                problem = None if code == 0 else f"ended with {code} by itself: {said(task)[-1500:]}"
                break
            kills += 1
            inside_a_save += any(name.startswith("checkpoints/") for name in leftovers(task.path))
        problem = problem or lab.to_the_end(task, reference)
        for _ in range(max(kills, problem is not None)):
            row.count(problem)
        if problem is None:
            lab.forget(task)
    row.note = f"{runs} runs, {inside_a_save} kills inside a save"
    return row


_lengths: dict[Any, float] = {}


def length_of_run(lab: Lab, task: Any, fresh: bool) -> float:
    """Seconds from the start of the process to its end."""
    key = (replace(task, folder="", log=""), fresh)
    if key not in _lengths:
        own = replace(lab.task(), **{k: v for k, v in vars(task).items() if k not in ("folder", "log")})
        began = time.monotonic()
        (lab.start_fresh if fresh else lab.start)(own).wait()
        _lengths[key] = time.monotonic() - began
        lab.forget(own)
    return _lengths[key]


# -- inside a save ----------------------------------------------------------------------------------------------

SHORT = {"steps": 6, "every": 2, "eval_every": 4, "limit": 2, "accumulate": 1}


def calls_of(lab: Lab, prepare: Any) -> list[tuple[str, str, bool]]:
    """All calls by which a run changes its folder: (kind, path, whether it can be done by half)."""
    task = prepare(lab)
    out = task.path.parent.parent / "calls.json"
    code, text = lab.run(replace(task, journal=str(out)))
    assert code == 0, text
    return [tuple(call) for call in json.loads(out.read_text())]


def points(calls: list[tuple[str, str, bool]]) -> Iterator[tuple[int, str]]:
    """Every state that a kill can leave: before each call, after it, and half way where it writes."""
    for number, (_, _, divisible) in enumerate(calls):
        yield number, "before"
        if divisible:
            yield number, "half"
        yield number, "after"


def a_fresh_run(lab: Lab) -> Any:
    """Lock, first checkpoint, best checkpoint, rotation, last checkpoint."""
    return lab.task(**SHORT)


def a_run_that_takes_up(lab: Lab) -> Any:
    """The folder of a run that was killed in its third save, with half a line in its metrics and a checkpoint that
    has rotted: going on means to clean, to fall back, to cut the metrics, and to set the rotten one aside."""
    task = lab.task(**SHORT)
    child = lab.start(replace(task, kill_at=(number_of(lab, ".step-00000006.tmp/optimizer.safetensors"), "half")))
    assert child.wait() == -signal.SIGKILL
    (task.path / "checkpoints" / ".step-00000001.trash").mkdir()
    (task.path / "checkpoints" / ".step-00000001.trash" / "state.json").write_text("{}")
    with open(task.path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "step", "step": 6, "lo')
    rotten = task.path / "checkpoints" / "step-00000004" / "trainable.safetensors"
    data = bytearray(rotten.read_bytes())
    data[-1] ^= 1
    rotten.write_bytes(data)
    return task


_numbers: dict[str, int] = {}


def number_of(lab: Lab, path: str) -> int:
    """The number of the call of a fresh run that writes this file of a checkpoint."""
    if path not in _numbers:
        folder, _, name = path.rpartition("/")
        calls = calls_of(lab, a_fresh_run)
        _numbers[path] = next(
            i for i, (kind, where, _) in enumerate(calls) if kind == "save_file" and folder in where and name in where
        )
    return _numbers[path]


def kill_at_every_call(lab: Lab, name: str, prepare: Any, *, only: Any = None) -> Row:
    """Exhaustive: one run per point. `only(number, kind, path, phase)` picks among them."""
    row = Row(f"kill -9 at every call of {name}", listed=only is None)
    calls = calls_of(lab, prepare)
    reference = lab.reference(lab.task(**SHORT))
    for number, phase in points(calls):
        kind, path, _ = calls[number]
        if only is not None and not only(number, kind, path, phase):
            continue
        task = prepare(lab)
        code = lab.start(replace(task, kill_at=(number, phase))).wait()
        problem = f"ended with {code} before it came to the call" if code != -signal.SIGKILL else lab.to_the_end(task, reference)
        row.count(problem and f"{phase} {kind} {path} (call {number}): {problem}")
        if problem is None:
            lab.forget(task)
    row.note = f"{len(calls)} calls"
    return row


# -- two processes ----------------------------------------------------------------------------------------------


def start_pair(lab: Lab, task: Any) -> list[Child]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [lab.start(replace(task, rank=rank, world=2, port=port)) for rank in range(2)]


def pair_to_the_end(lab: Lab, task: Any) -> tuple[list[int | None], str]:
    before = said(task)
    codes = [child.wait() for child in start_pair(lab, task)]
    return codes, said(task).removeprefix(before)


def kill_one_of_two(lab: Lab, count: int, seed: int = 0) -> Row:
    """Two processes over gloo; one of them, or both, killed at a random moment. The one left must end by itself."""
    row = Row("kill -9 of one or both of two gloo processes")
    settings = {"accumulate": 1}
    straight = lab.task(**settings)
    began = time.monotonic()
    codes, text = pair_to_the_end(lab, straight)
    assert codes == [0, 0], text
    length = time.monotonic() - began
    from tests.faults.lab import evidence

    reference = evidence(straight.path)
    chance = random.Random(seed)
    while row.trials < count:
        task = lab.task(**settings)
        pair = start_pair(lab, task)
        time.sleep(chance.uniform(0.0, length))
        victims = chance.choice([[0], [1], [0, 1]])
        found = [pair[i].kill() for i in victims]
        ends = [child.wait() for child in pair]
        if not any(found):
            continue
        problem = None
        if None in ends:
            problem = f"a process waits for its dead peer: {ends}"
            for child in pair:
                child.kill()
        else:
            codes, text = pair_to_the_end(lab, task)
            problem = f"going on ends with {codes}: {text[-1500:]}" if codes != [0, 0] else difference(task.path, reference)
        row.count(problem and f"killed {victims} at step {newest_step(task.path)}: {problem}")
        if problem is None:
            lab.forget(task)
    return row


def run(lab: Lab, scale: float) -> Iterator[Row]:
    """All rows of this file. At scale 1: 300 random kills and more, and every call."""
    yield random_kills(lab, round(300 * scale))
    yield random_kills(lab, round(60 * scale), "LoRA", variant="lora", seed=1)
    yield random_kills(lab, round(30 * scale), "a step skipped", nonfinite="skip", poison=("gradient", 8), seed=2)
    yield random_kills(lab, round(30 * scale), "a step rolled back", nonfinite="rollback", poison=("batch", 8), seed=3)
    yield random_kills(lab, round(30 * scale), "each start from nothing", fresh=True, seed=4)
    stride = max(1, round(1 / scale))
    for name, prepare in (("a run", a_fresh_run), ("a run that takes up a damaged folder", a_run_that_takes_up)):
        only = None if stride == 1 else lambda number, kind, path, phase: number % stride == 0
        yield kill_at_every_call(lab, name, prepare, only=only)
    yield kill_one_of_two(lab, round(30 * scale))
