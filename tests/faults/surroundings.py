"""What must not matter to the numbers: clock, locale, hash seed, home, current folder, threads of the environment, start again elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.faults.lab import ROOT, Lab, Row, difference, said, wait_for_step

ENVIRONMENTS: dict[str, tuple[dict[str, str], Path]] = {
    "TZ east": ({"TZ": "Pacific/Kiritimati"}, ROOT),
    "TZ west": ({"TZ": "Etc/GMT+12"}, ROOT),
    "PYTHONHASHSEED=1": ({"PYTHONHASHSEED": "1"}, ROOT),
    "PYTHONHASHSEED=4242": ({"PYTHONHASHSEED": "4242"}, ROOT),
    "LC_ALL=C without UTF-8 mode": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, ROOT),
    "no home that can be written": ({"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}, ROOT),
    "another current folder": ({}, Path("/")),
    "OMP_NUM_THREADS=2 under engine.threads=1": ({"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}, ROOT),
    "PYTHONOPTIMIZE=1": ({"PYTHONOPTIMIZE": "1"}, ROOT),
}


def each(lab: Lab) -> Row:
    """A run killed in the plain environment and taken up in another, and a whole run in each."""
    row = Row("time zone, locale, hash seed, home, current folder, OMP_NUM_THREADS", listed=True)
    for name, (environment, folder) in ENVIRONMENTS.items():
        task = lab.task()
        reference = lab.reference(task)
        code = lab.start_fresh(task, environment=environment, folder=folder).wait()
        problem = difference(task.path, reference) if code == 0 else f"ended with {code}: {said(task)[-1000:]}"
        row.count(problem and f"{name}: {problem}")
        task = lab.task(step_seconds=0.01)
        child = lab.start(task)
        wait_for_step(child, task.path, 7)
        child.kill()
        code = lab.start_fresh(task, environment=environment, folder=folder).wait()
        problem = difference(task.path, reference) if code == 0 else f"ended with {code}: {said(task)[-1000:]}"
        row.count(problem and f"taken up under {name}: {problem}")
    return row


def run(lab: Lab, scale: float) -> Iterator[Row]:
    """All rows of this file."""
    yield each(lab)
