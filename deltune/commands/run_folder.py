"""The folder of a run before it starts: locked, told apart from another run's, and known for complete if it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from deltune import dist
from deltune.errors import CheckpointError
from deltune.log import logger

if TYPE_CHECKING:
    from deltune.settings import Run
    from deltune.training.callbacks import Outcome

# A resumed run may differ from its first start in these and still be the same run.
MAY_CHANGE = ("log", "checkpoint", "resume", "output", "name", "train.steps", "train.epochs", "train.nonfinite",
              "train.max_nonfinite", "engine", "eval", "data.cache")  # fmt: skip


@contextmanager
def owned(run: Run) -> Iterator[None]:
    """Hold the run folder's lock on rank 0, and make sure that what is in it belongs to this run."""
    from deltune.training.lock import FolderLock
    from deltune.training.storage import write_text

    lock = FolderLock(run.folder)

    def enter() -> None:
        lock.acquire()
        check_same_run(run)
        write_text(run.folder / "config.yaml", run.to_yaml())

    try:
        dist.on_main(enter)
        yield
    finally:
        lock.release()


def check_same_run(run: Run) -> None:
    """CheckpointError if the folder holds another run, or one that this start may not touch."""
    from deltune.settings import load_run

    saved = run.folder / "config.yaml"
    started = saved.exists() and ((run.folder / "checkpoints").exists() or (run.folder / "metrics.jsonl").exists())
    if run.resume == "must" and not (run.folder / "checkpoints").exists():
        raise CheckpointError(f"{run.folder}: resume=must, but there is no checkpoint. What fits: resume=auto to start afresh.")
    if not started:
        return
    if run.resume == "never":
        raise CheckpointError(
            f"{run.folder}: already holds a run. What fits: resume=auto goes on with it, name=... makes another, "
            "or remove the folder yourself."
        )
    old, new = flatten(load_run([], saved).to_dict()), flatten(run.to_dict())
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and not k.startswith(MAY_CHANGE)]
    if changed:
        lines = [f"  {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in changed[:10]]
        raise CheckpointError(
            f"{run.folder}: holds a run with other settings, which this one cannot go on with:\n" + "\n".join(lines)
            + "\nWhat fits: the same settings, or another name=..."
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def completed(run: Run) -> Outcome | None:
    """The outcome of a run that has ended, unless it is now asked for more steps than it made."""
    from deltune.training.callbacks import Outcome

    file = run.folder / "completed.json"
    if not dist.on_main(file.exists):
        return None
    facts = json.loads(file.read_text(encoding="utf-8"))
    if facts["num_steps_asked"] != [run.train.steps, run.train.epochs]:
        return None
    if dist.is_main() and run.log.report and not (run.folder / "report.html").exists():
        from deltune.commands.train import write_report_files

        write_report_files(run.folder)  # a run killed between its end and its report
    logger.info("%s is complete (step %d). Another name=... makes another run.", run.folder, facts["step"])
    return Outcome(
        folder=run.folder, step=facts["step"], stopped_by="already_complete", best_step=facts["best_step"],
        best_metric=facts["best_metric"], metrics_before=facts["metrics_before"], metrics_after=facts["metrics_after"],
        adapter=run.folder / run.result, seconds=facts["seconds"],
    )
