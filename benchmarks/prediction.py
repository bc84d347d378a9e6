"""What `deltune plan` foretells of time and memory, against what a short run then finds: 20 settings, their errors, a table.

Each is planned with its trial, then trained in a process of its own, on one thread. Seconds are of process CPU time, so
that other work on the machine counts less; memory is the run's own largest resident size. Nothing is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, work

FOLDER = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- prediction: written by benchmarks.prediction -->", "<!-- prediction: end -->"
STEPS = 16
WITHIN = 0.10
SHAPES = {
    "2M": work.Shape(hidden=192, layers=4, inter=512, vocab=4096, heads=6, kv_heads=6, positions=1024),
    "30M": work.Shape(hidden=512, layers=8, inter=1408, vocab=8000, heads=8, kv_heads=8),
    "60M deep": work.Shape(hidden=512, layers=16, inter=1408, vocab=8000, heads=8, kv_heads=8),
    "120M": work.Shape(),
}
# model, rows (even lengths, or "mixed" as instruction data have them), settings
CASES: tuple[tuple[str, int | str, str], ...] = (
    ("2M", "mixed", "adapter=lora train.micro_batch=8"),
    ("2M", "mixed", "adapter=lora train.micro_batch=8 fast=off"),
    ("2M", 256, "adapter=ia3 train.micro_batch=8 engine.precision=fp32"),
    ("2M", "mixed", "adapter=null train.micro_batch=4 train.accumulate=2"),
    ("30M", "mixed", "adapter=lora train.micro_batch=4"),
    ("30M", "mixed", "adapter=lora adapter.rank=64 train.micro_batch=4"),
    ("30M", "mixed", "adapter=lora train.micro_batch=4 data.batching=padded"),
    ("30M", "mixed", "adapter=lora train.micro_batch=4 engine.precision=fp32 model.dtype=float32"),
    ("30M", "mixed", "adapter=lora train.micro_batch=4 model.gradient_checkpointing=full"),
    ("30M", "mixed", "adapter=lora train.micro_batch=2 train.accumulate=8"),
    ("30M", "mixed", "adapter=dora train.micro_batch=4"),
    ("30M", "mixed", "adapter=ia3 train.micro_batch=4"),
    ("30M", 512, "adapter=lora train.micro_batch=1"),
    ("30M", 256, "adapter=dora train.micro_batch=4 engine.precision=fp32 model.dtype=float32"),
    ("30M", 256, "adapter=lora train.micro_batch=4 fast=off"),
    ("30M", "mixed", "adapter=null train.micro_batch=2"),
    ("30M", "mixed", "adapter=null train.micro_batch=2 engine.precision=fp32 model.dtype=float32 model.gradient_checkpointing=full"),
    ("60M deep", "mixed", "adapter=lora train.micro_batch=8"),
    ("60M deep", 512, "adapter=lora train.micro_batch=4 model.gradient_checkpointing=full"),
    ("120M", "mixed", "adapter=lora train.micro_batch=4"),
    ("120M", 512, "adapter=lora train.micro_batch=2"),
    ("120M", "mixed", "adapter=dora train.micro_batch=2 model.gradient_checkpointing=selective"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of settings, from 0; no page is written then")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.train:
        return trained(Path(asked.train))
    os.environ["OMP_NUM_THREADS"] = "1"  # of every process that is started from here
    began, load = time.perf_counter(), machine.load()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder))
        for i in range(len(CASES)) if asked.only is None else asked.only:
            rows.append(compared(i, Path(folder)))
            print(line(rows[-1]), flush=True)
    publish(rows, began, load, written=asked.only is None)


def publish(rows: list[dict[str, Any]], began: float, load: list[float], *, written: bool) -> None:
    """The result for the console, and if it is of all settings as JSON and as the page's table."""
    result = {"machine": machine.describe(), "load_before": load, "load_after": machine.load(), "took": time.perf_counter() - began, "rows": rows, **summary(rows)}
    print(told(result))
    if written:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / "prediction.json").write_text(json.dumps(result, indent=1) + "\n")
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


def make_models(folder: Path) -> None:
    for name, shape in SHAPES.items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        work.make_model(place, shape, "bfloat16")
        for length in {length for model, length, _ in CASES if model == name}:
            (place / str(length)).mkdir()
            chosen = work.lognormal_rows(256, shape.vocab) if length == "mixed" else work.even_rows(64, int(length), shape.vocab)
            work.write_rows(place / str(length), chosen)


def words_of(i: int, folder: Path) -> list[str]:
    model, length, settings = CASES[i]
    place = folder / model.replace(" ", "-")
    return [
        f"model={place}", f"data={place / str(length) / 'train.jsonl'}", f"output={folder / 'runs'}", f"name=case-{i}", f"train.steps={STEPS}",
        "train.epochs=null", "data.max_length=512", "data.eval_size=0", "eval.samples=0", "log.progress=off", "log.report=false", *settings.split(),
    ]  # fmt: skip


def compared(i: int, folder: Path) -> dict[str, Any]:
    """One setting: foretold, found, and the errors as shares of what was found."""
    from deltune.commands import plan
    from deltune.settings import load_run

    run = load_run(words_of(i, folder), None)
    planned = plan.make(run, trial=True, clock="process_time")
    file = folder / f"case-{i}.yaml"
    file.write_text(run.to_yaml())
    done = subprocess.run([sys.executable, "-m", "benchmarks.prediction", "--train", str(file)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    told_by = planned.trial
    seconds = planned.time.step if told_by is None else told_by.step
    peak = planned.memory.most if told_by is None or told_by.peak is None else told_by.peak
    model, length, settings = CASES[i]
    return {
        "model": model, "rows": length, "settings": settings, "batching": planned.shapes.batching, "recompute": planned.recompute,
        "from": planned.not_tried or told_by.told(), "seconds": {"foretold": seconds, "found": found["seconds"], "error": seconds / found["seconds"] - 1},
        "memory": {"foretold": peak, "found": found["memory"], "error": peak / found["memory"] - 1}, "wall_seconds_found": found["wall"],
    }  # fmt: skip


def trained(file: Path) -> None:
    """The run; its mean step and its peak on standard output."""
    import deltune
    from deltune.settings import load_run
    from deltune.training.callbacks import Callback

    class Clock(Callback):
        def on_start(self, info: Any) -> None:
            self.at, self.wall, self.peak = [time.process_time()], [], 0

        def on_step(self, record: Any) -> None:
            self.at.append(time.process_time())
            self.wall.append(record.seconds)
            self.peak = record.peak_memory_bytes

    clock = Clock()
    deltune.train(load_run([], file), callbacks=[clock])
    print(json.dumps({"seconds": (clock.at[-1] - clock.at[1]) / (len(clock.at) - 2), "wall": statistics.fmean(clock.wall[1:]), "memory": clock.peak}))


# -- what is told of it -----------------------------------------------------------------------------------------


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each quantity the number within 10 %, the median and the largest error in size."""
    found = {}
    for name in ("seconds", "memory"):
        errors = sorted(abs(row[name]["error"]) for row in rows)
        found[name] = {"within": sum(error <= WITHIN for error in errors), "of": len(errors), "median": statistics.median(errors), "worst": errors[-1]}
    return found


def line(row: dict[str, Any]) -> str:
    seconds, memory = row["seconds"], row["memory"]
    return (
        f"| {row['model']} | {row['rows']} | {row['settings'].replace('train.', '').replace('model.', '')} | {seconds['foretold']:.3f} | {seconds['found']:.3f} | {seconds['error']:+.0%} "
        f"| {memory['foretold'] / 1e6:.0f} | {memory['found'] / 1e6:.0f} | {memory['error']:+.0%} |"
    )


def told(result: dict[str, Any]) -> str:
    parts = [
        f"{what}: {one['within']} of {one['of']} within 10 %, median error {one['median']:.1%}, worst {one['worst']:.0%}"
        for what, one in (("Time", result["seconds"]), ("memory", result["memory"]))
    ]
    return "; ".join(parts) + "."


def with_table(page: str, result: dict[str, Any]) -> str:
    """The page with the table between its marks."""
    head = "| model | rows | settings | s a step, foretold | found | error | MB, foretold | found | error |\n|---|---|---|---|---|---|---|---|---|"
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = "\n".join(line(row) for row in result["rows"])
    return f"{before}{BEGIN}\n{told(result)}\n\n{head}\n{rows}\n{END}{after}"


if __name__ == "__main__":
    main()
