"""The same by the door that users take: `deltune train` and `deltune launch`, with a Hugging Face model, LoRA and real files."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults.lab import PATIENCE_SECONDS, ROOT, Lab, Row, leftovers, logged_step, newest_step

MOST_PER_RUN = 3
Words = dict[str, str]

PLAIN: Words = {
    "adapter": "lora", "adapter.rank": "4", "adapter.dropout": "0.1", "train.steps": "24", "train.micro_batch": "2",
    "train.accumulate": "2", "checkpoint.every": "3", "eval.every": "5", "eval.samples": "2", "eval.max_new_tokens": "4",
    "engine.threads": "1", "engine.device": "cpu", "log.peak_tflops": "1", "data.cache": "null",
}  # fmt: skip
STREAMED = PLAIN | {"data.streaming": "true", "data.stream_block": "16"}
FULL = {k: v for k, v in PLAIN.items() if "adapter" not in k} | {"adapter": "null", "model.gradient_checkpointing": "true"}
LONG = PLAIN | {"train.steps": "200", "checkpoint.every": "1000", "eval.every": "null"}


@dataclass
class Command:
    """`deltune train ...` in a run folder of its own."""

    place: Path
    words: list[str]
    processes: int = 1

    @property
    def folder(self) -> Path:
        return self.place / "runs" / "run"

    def start(self) -> subprocess.Popen:
        verb = ["train"] if self.processes == 1 else ["launch", "-n", str(self.processes), "train", "engine=ddp"]
        words = [sys.executable, "-m", "deltune.cli", *verb, *self.words, f"output={self.place / 'runs'}", "name=run"]
        with open(self.place / "log.txt", "ab") as log:
            return subprocess.Popen(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def said(self) -> str:
        return (self.place / "log.txt").read_text(encoding="utf-8", errors="replace")

    def owner(self) -> int | None:
        """The process that holds the folder: rank 0."""
        text = (self.folder / ".lock").read_text() if (self.folder / ".lock").exists() else ""
        return json.loads(text)["pid"] if text else None


def kill_all(process: subprocess.Popen) -> bool:
    """kill -9 to the process and all that it started; whether it was still running."""
    if process.poll() is not None:
        return False
    # the launcher's processes have sessions of their own
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family)
    process.wait()
    return True


def material(lab: Lab) -> list[str]:
    """A tiny model folder and a data file, made once; the words that name them."""
    from tests.tiny import save_tiny

    model, rows, held_out = (lab.folder / name for name in ("model", "rows.jsonl", "held-out.jsonl"))
    if not model.exists():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        save_tiny(model)
        chance = random.Random(0)
        sums = [(chance.randrange(100), chance.randrange(100)) for _ in range(80)]
        lines = [json.dumps({"prompt": f"{a}+{b}=", "completion": str(a + b)}) for a, b in sums]
        rows.write_text("\n".join(lines[:70]) + "\n")
        held_out.write_text("\n".join(lines[70:]) + "\n")
    return [f"model={model}", f"data={rows}", f"data.eval={held_out}"]


def command(lab: Lab, words: Words = PLAIN, processes: int = 1) -> Command:
    place = Path(lab.task().folder).parent.parent
    return Command(place, [*material(lab), *(f"{key}={value}" for key, value in words.items())], processes)


def traces(folder: Path) -> dict[str, object]:
    """What two equal runs have in common: curves, evaluations, the ending's numbers, the adapter's bytes."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ending = json.loads((folder / "completed.json").read_text(encoding="utf-8"))
    return {
        "curve": [(x["step"], x["loss"].hex(), x["grad_norm"].hex()) for x in lines if x["kind"] == "step"],
        "evaluations": [(x["step"], x["metrics"]) for x in lines if x["kind"] == "eval"],
        "ending": {k: v for k, v in ending.items() if k != "seconds"},
        "weights": [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*/*model.safetensors"))],
        "samples": json.loads((folder / "samples.json").read_text(encoding="utf-8")),
        "checkpoints": sorted(p.name for p in (folder / "checkpoints").iterdir()),
        "files": sorted(p.name for p in folder.iterdir()),
        "left lying about": leftovers(folder),
    }


def to_the_end(run: Command, reference: dict[str, object]) -> str | None:
    code = run.start().wait(PATIENCE_SECONDS)
    if code != 0:
        return f"going on ends with {code}: {run.said()[-1500:]}"
    if "Traceback" in run.said():
        return f"a traceback: {run.said()[-3000:]}"
    found = traces(run.folder)
    wrong = next((name for name in reference if found[name] != reference[name]), None)
    return wrong and f"{wrong} differs: {str(found[wrong])[:400]} where it should be {str(reference[wrong])[:400]}"


def undisturbed(lab: Lab, words: Words = PLAIN, processes: int = 1) -> tuple[dict[str, object], float]:
    """What a run without faults leaves, and its seconds from the lock to the end."""
    run = command(lab, words, processes)
    process = run.start()
    wait_for(lambda: (run.folder / ".lock").exists(), process)
    began = time.monotonic()
    assert process.wait() == 0, run.said()[-3000:]
    return traces(run.folder), time.monotonic() - began


def wait_for(condition, process: subprocess.Popen) -> bool:
    """Whether it came true before the process ended."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.002)
    return True


def kills(lab: Lab, name: str, count: int, words: Words = PLAIN, processes: int = 1, seed: int = 0) -> Row:
    """kill -9 to all processes at a random moment between the lock and the end, report and export included."""
    chance = random.Random(seed)
    row = Row(f"kill -9, {name}")
    reference, seconds = undisturbed(lab, words, processes)
    while row.trials < count:
        run = command(lab, words, processes)
        done, problem = 0, None
        while done < min(MOST_PER_RUN, count - row.trials):
            process = run.start()
            wait_for(lambda run=run: run.owner() is not None, process)
            time.sleep(chance.uniform(0.0, seconds))
            if not kill_all(process):
                problem = f"ended with {process.returncode} by itself: {run.said()[-1500:]}" if process.returncode else None
                break
            done += 1
        problem = problem or to_the_end(run, reference)
        for _ in range(max(done, problem is not None)):
            row.count(problem)
    return row


def signals(lab: Lab, count: int, processes: int = 1, seed: int = 0) -> Row:
    """A signal to the process that the user started: exit code 128 + n, the last step saved, nothing lost."""
    chance = random.Random(seed)
    choices = (signal.SIGTERM, signal.SIGINT) if processes > 1 else (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    row = Row(f"signals, {'deltune train' if processes == 1 else f'deltune launch -n {processes}'}")
    reference, _ = undisturbed(lab, LONG, processes)
    del reference["checkpoints"]  # a stop leaves one more
    for number in range(count):
        run = command(lab, LONG, processes)
        process = run.start()
        target, signum = chance.randrange(1, 150), choices[number % len(choices)]
        problem = None
        if not wait_for(lambda run=run, target=target: logged_step(run.folder) >= target, process):
            problem = f"ended early: {run.said()[-1000:]}"
        else:
            process.send_signal(signum)
            code = process.wait(PATIENCE_SECONDS)
            if code != 128 + signum or newest_step(run.folder) != logged_step(run.folder):
                problem = f"{signum.name}: {code}, step {newest_step(run.folder)} of {logged_step(run.folder)} saved: {run.said()[-800:]}"
        problem = problem or to_the_end(run, reference)
        row.count(problem)
    return row


def one_rank_dies(lab: Lab, count: int, seed: int = 0) -> Row:
    """kill -9 to rank 0 alone: the other rank and the launcher end by themselves."""
    chance = random.Random(seed)
    row = Row("kill -9 of rank 0, deltune launch -n 2")
    reference, seconds = undisturbed(lab, processes=2)
    while row.trials < count:
        run = command(lab, processes=2)
        process = run.start()
        wait_for(lambda run=run: run.owner() is not None, process)
        time.sleep(chance.uniform(0.0, seconds))
        owner = run.owner()
        if owner is None or process.poll() is not None:
            continue
        os.kill(owner, signal.SIGKILL)
        problem = None
        try:
            code = process.wait(PATIENCE_SECONDS)
            problem = None if code != 0 and "ended with exit code 137" in run.said() else f"ended with {code}: {run.said()[-800:]}"
        except subprocess.TimeoutExpired:
            problem = "the launcher waits for a dead process"
            kill_all(process)
        row.count(problem or to_the_end(run, reference))
    return row


def two_at_once(lab: Lab, count: int) -> Row:
    """The second start names the first one's process and ends with 2."""
    row = Row("two `deltune train` in one folder")
    reference, _ = undisturbed(lab)
    for _ in range(count):
        run = command(lab)
        pair = [run.start(), run.start()]
        codes = sorted(process.wait(PATIENCE_SECONDS) for process in pair)
        problem = None if codes == [0, 2] and "another run is working in this folder" in run.said() else f"{codes}: {run.said()[-800:]}"
        row.count(problem or to_the_end(run, reference))
    return row


def run(lab: Lab, scale: float) -> Iterator[Row]:
    """All rows of this file."""
    yield kills(lab, "deltune train, LoRA", round(15 * scale))
    yield kills(lab, "deltune train, LoRA, streamed data", round(9 * scale), STREAMED, seed=1)
    yield kills(lab, "deltune train, all weights, gradient checkpointing", round(6 * scale), FULL, seed=2)
    yield kills(lab, "deltune launch -n 2", round(6 * scale), processes=2, seed=3)
    yield one_rank_dies(lab, round(4 * scale))
    yield signals(lab, round(6 * scale))
    yield signals(lab, round(4 * scale), processes=2)
    yield two_at_once(lab, round(4 * scale))
