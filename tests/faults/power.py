"""The power goes: what was not synced may be gone. Simulated before every call, under two models of a forgetful disk."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace

from tests.faults.kills import SHORT, a_fresh_run, calls_of
from tests.faults.lab import Lab, Row, newest_step

MODELS = {
    "strict": "bytes and names only as of the last fsync of file and folder",
    "loose": "all names, bytes only as of the file's last fsync",
}


def power_cut(lab: Lab, model: str, stride: int = 1) -> Row:
    """At every call: what is left goes on to the same end, and holds the newest checkpoint that the run was told of."""
    row = Row(f"power cut, {model}: {MODELS[model]}", listed=stride == 1)
    calls = calls_of(lab, a_fresh_run)
    reference = lab.reference(lab.task(**SHORT))
    for number in range(0, len(calls), stride):
        task = a_fresh_run(lab)
        after = task.path.parent.parent / "after"
        code = lab.start(replace(task, cut_at=(number, model, str(after)))).wait()
        problem = None if code == -signal.SIGKILL else f"ended with {code} before it came to the call"
        if problem is None:
            promised, found = int(after.with_suffix(".saved").read_text()), newest_step(after / task.path.name)
            problem = f"the checkpoint of step {promised} was promised, step {found} is there" if found < promised else None
        if problem is None:
            problem = lab.to_the_end(
                replace(task, folder=str(after / task.path.name)), reference, older_may_stay=True
            )
        kind, path, _ = calls[number]
        row.count(problem and f"before {kind} {path} (call {number}): {problem}")
        if problem is None:
            lab.forget(task)
    row.note = f"{len(calls)} calls"
    return row


def run(lab: Lab, scale: float) -> Iterator[Row]:
    """All rows of this file."""
    for model in MODELS:
        yield power_cut(lab, model, max(1, round(1 / scale)))
