"""What `deltune plan` foretold of a run, kept in the run's folder, and what the run then found: both figures and the error.

A run that was planned with the same settings compares itself at its end. One that was not has nothing to compare: to try
it out costs seconds, which plan may take and a run may not.
"""

from __future__ import annotations

import json
import math
import statistics
from typing import TYPE_CHECKING, Any

from deltune.commands.run_folder import flatten

if TYPE_CHECKING:
    from deltune.commands.plan import Plan
    from deltune.settings import Run
    from deltune.training.loop import Loop

FILE = "plan.json"
ELSEWHERE = ("name", "output", "resume", "log", "checkpoint", "eval")  # settings that no step depends on
LEAST = 3  # steps of a run that is compared: the first one is left out, since it makes kernels and the optimizer's state


def write(run: Run, plan: Plan) -> None:
    """Keep what a trial has told, if there was one."""
    from deltune.training.storage import write_json

    if plan.trial is None:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / FILE, {"seconds_per_step": plan.trial.step, "peak_memory_bytes": plan.trial.peak, "settings": settings(run)})


def settings(run: Run) -> dict[str, Any]:
    """Those that a step depends on, as JSON values."""
    return {key: value for key, value in json.loads(json.dumps(flatten(run.to_dict()))).items() if key.split(".")[0] not in ELSEWHERE}


def compared(run: Run, loop: Loop) -> dict[str, dict[str, float]]:
    """{"seconds_per_step" and "peak_memory_bytes": {foretold, found, error}}, error as a share of what was found; {} where
    this run was not planned, or has made too few steps in this process.

    Seconds are the mean of all steps but this process's first. Memory is the largest resident size (on a GPU: allocated)
    from the first step to the last, with the evaluations and checkpoints in between.
    """
    file = run.folder / FILE
    if not file.exists() or len(loop.seconds) < LEAST or loop.engine.world_size > 1:
        return {}
    told = json.loads(file.read_text(encoding="utf-8"))
    if told["settings"] != settings(run):
        return {}
    found = {"seconds_per_step": statistics.fmean(loop.seconds[1:]), "peak_memory_bytes": float(loop.peak_memory)}
    return {
        name: {"foretold": told[name], "found": value, "error": told[name] / value - 1}
        for name, value in found.items()
        if told[name] is not None and value > 0 and math.isfinite(value)
    }


def text(comparison: dict[str, dict[str, float]]) -> str:
    """The comparison in a line."""
    from deltune.training.display import duration, memory

    written = {"seconds_per_step": ("a step", duration), "peak_memory_bytes": ("peak memory", memory)}
    parts = [
        f"{written[name][0]} {written[name][1](one['found'])}, foretold {written[name][1](one['foretold'])} ({one['error']:+.1%})"
        for name, one in comparison.items()
    ]
    return "as planned? " + "; ".join(parts)
