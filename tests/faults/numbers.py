"""Numbers that break: noticed at that step, named, no update made, and what the policy promises comes out to the bit.

The independent measure of `skip` and `rollback` is a run that was told beforehand to leave out the bad step's update.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from deltune.training.checkpoints import CheckpointStore
from tests.faults.lab import Evidence, Lab, Row, evidence, newest_step

STEPS = (1, 8, 16)
KINDS = ("batch", "gradient", "weight")


def named(kind: str, step: int, text: str) -> str | None:
    """What a message leaves out of what a user needs: the step, and the rows with a module or a parameter."""
    pattern = {
        "batch": r"the first output that is not finite is that of layers\.1\.mlp, on rows rows\.jsonl:\d+",
        "gradient": r"the first gradient that is not is that of \S+; rows rows\.jsonl:\d+",
        "weight": r"the weight layers\.\d\S+ holds values that are not finite",
    }[kind]
    if not re.search(rf"step {step}: loss .*no update was made: .*{pattern}", text):
        return f"step {step} and {pattern!r} are not in: {text[-800:]}"
    return None


def saved_weights_are_finite(task: Any) -> str | None:
    """The newest checkpoint is whole and holds finite numbers only; none at all is fine before the first step."""
    snapshot, complaints = CheckpointStore(task.path / "checkpoints", 3).newest()
    if snapshot is None:
        return "; ".join(complaints) or None
    bad = [n for part in ("trainable", "optimizer") for n, t in snapshot.tensors[part].items() if not torch.isfinite(t).all()]
    return f"not finite in the checkpoint of step {snapshot.step}: {bad[:3]}" if bad else None


def stop(lab: Lab, kind: str, step: int, variant: str) -> str | None:
    """Policy stop: exit code 3; started again without the fault, the run ends as one that never had it."""
    task = lab.task(variant=variant)
    reference = lab.reference(task)
    code, text = lab.run(replace(task, poison=(kind, step)))
    if code != 3 or "Traceback" in text:
        return f"ended with {code}: {text[-1000:]}"
    problem = named(kind, step, text) or saved_weights_are_finite(task)
    if problem is None and newest_step(task.path) >= step:
        problem = f"step {newest_step(task.path)} was saved"
    if problem is None and kind != "weight" and newest_step(task.path) != step - 1:
        problem = f"step {step - 1} was good and is not saved, but step {newest_step(task.path)}"
    return problem or lab.to_the_end(task, reference)


def without_update(lab: Lab, step: int, variant: str) -> Evidence:
    """A run that leaves out one step's update and knows it from the start."""
    return lab.reference(lab.task(variant=variant, given_up=(step,)))


def go_on(lab: Lab, kind: str, step: int, variant: str, policy: str) -> str | None:
    """Policies skip and rollback: the run ends, with the weights of a run without that update, all finite."""
    task = lab.task(variant=variant, nonfinite=policy)
    code, text = lab.run(replace(task, poison=(kind, step)))
    if policy == "skip" and kind == "weight":
        # a broken weight cannot be skipped: it stops, and nothing broken is saved
        return (None if code == 3 else f"ended with {code}: {text[-800:]}") or named(kind, step, text) or saved_weights_are_finite(task)
    if code != 0:
        return f"ended with {code}: {text[-1000:]}"
    found, expected = dict(evidence(task.path).final), dict(without_update(lab, step, variant).final)
    if found["weights"] != expected["weights"]:
        return "the weights are not those of a run without that update"
    return named(kind, step, text) or saved_weights_are_finite(task)


def poisoned(lab: Lab, steps: tuple[int, ...], variants: tuple[str, ...]) -> Iterator[Row]:
    for policy in ("stop", "skip", "rollback"):
        row = Row(f"NaN in batch, gradient or weight, policy {policy}", listed=True)
        for variant in variants:
            for kind in KINDS:
                for step in steps:
                    act = stop(lab, kind, step, variant) if policy == "stop" else go_on(lab, kind, step, variant, policy)
                    row.count(act and f"{variant}, {kind}, step {step}: {act}")
        yield row


def huge_rate(lab: Lab, rates: tuple[float, ...] = (1e9, 1e30, 1e39)) -> Row:
    """The first update makes the weights useless or infinite, and a save follows each: nothing infinite is saved."""
    row = Row(f"a learning rate of {', '.join(f'{lr:g}' for lr in rates)}", listed=True)
    for lr in rates:
        for policy in ("stop", "skip", "rollback"):
            task = lab.task(lr=lr, nonfinite=policy, every=1)
            code, text = lab.run(task)
            problem = saved_weights_are_finite(task)
            if "Traceback" in text or code not in (0, 3):
                problem = f"ended with {code}: {text[-1000:]}"
            if code == 3 and not re.search(r"step \d+: (loss .*no update was made|its update made the weight \S+ infinite)", text):
                problem = f"the step is not named: {text[-800:]}"
            row.count(problem and f"lr {lr:g}, policy {policy}: {problem}", refused=code == 3)
    return row


def run(lab: Lab, scale: float) -> Iterator[Row]:
    """All rows of this file."""
    yield from poisoned(lab, STEPS if scale >= 0.5 else STEPS[1:2], ("full", "lora") if scale >= 0.5 else ("full",))
    yield huge_rate(lab)
