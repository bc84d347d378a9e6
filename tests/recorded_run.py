"""A run folder made by the real callbacks from invented numbers, so that report and card are tested without training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from deltune.config import yaml_file
from deltune.training.callbacks import EvalRecord, Outcome, RunInfo, Sample, StepRecord
from deltune.training.metrics import MetricsFile

CONFIG = {
    "name": "words",
    "seed": 42,
    "model": {"path": "bundled", "dtype": "auto"},
    "data": {"train": ["words.jsonl"], "mode": "sft", "max_length": 256},
    "adapter": {"delta": "lora", "rank": 8, "alpha": 16.0, "targets": "all-linear"},
    "optim": {"name": "adamw", "lr": 0.002, "weight_decay": 0.0},
    "schedule": {"name": "cosine", "warmup": 0.03},
    "engine": {"name": "single", "precision": "fp32"},
    "train": {"steps": 200, "micro_batch": 8, "accumulate": 2},
    "eval": {"every": 40},
    "log": {"every": 1},
}
# as commands.describe_run makes it
DESCRIPTION = {
    "model": {"path": "bundled", "architecture": "LlamaForCausalLM", "dtype": "float32", "sha256": {"config.json": "ab" * 32}},
    "data": {
        "rows": 2003, "used": 2000, "rejected": 3, "overlong": 0, "truncated": 0, "examples": 2000, "tokens": 84_210,
        "trained_tokens": 12_034, "largest_id": 511, "notes": {"the answer was cut": 7}, "held_out": 0, "streaming": False,
        "sources": [{"name": "words.jsonl", "format": "alpaca", "template": "chat", "weight": 1.0, "num_files": 1, "unused_columns": ["id"], "counts": {}}],
        "evaluation": {
            "rows": 200, "used": 200, "rejected": 0, "overlong": 0, "truncated": 0, "examples": 200, "tokens": 8_423,
            "trained_tokens": 1_201, "notes": {}, "held_out": 0, "streaming": False, "sources": [], "evaluation": None,
        },
    },
    "device": {"name": "CPU, 2 threads", "processes": 1},
    "versions": {"deltune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
    "fingerprint": {"train": "cd" * 32, "eval": "ef" * 32},
}  # fmt: skip
TABLE = [
    {"module": "attention", "tensors": 32, "trainable": 40_960, "total": 983_040},
    {"module": "mlp", "tensors": 24, "trainable": 49_152, "total": 1_622_016},
    {"module": "embedding", "tensors": 1, "trainable": 0, "total": 786_432},
]


def info(folder: Path, *, num_steps: int = 200, start_step: int = 0, **changes) -> RunInfo:
    fields = dict(
        folder=folder, name="words", num_steps=num_steps, start_step=start_step, num_trainable=90_112, num_parameters=3_391_488,
        config=CONFIG, parameter_table=TABLE, flops_per_token=2e7, peak_flops=1e11, description=DESCRIPTION,
    )  # fmt: skip
    return RunInfo(**(fields | changes))


def step_record(step: int, **changes) -> StepRecord:
    """A step whose numbers are a pure function of its number, as those of a resumed run are."""
    noise = random.Random(step)
    loss = 0.05 + 4.2 * math.exp(-step / 45) * noise.uniform(0.85, 1.15)
    lr = 2e-3 * min(1.0, step / 6) * (0.55 + 0.45 * math.cos(math.pi * step / 200))
    tokens, seconds = noise.randint(600, 760), noise.uniform(0.05, 0.06)
    fields = dict(
        step=step, epoch=step / 125, loss=loss, grad_norm=0.4 + loss * noise.uniform(0.4, 0.6), lr=lr,
        num_trained_tokens=tokens // 7, num_tokens=tokens, seconds=seconds, data_seconds=seconds / 50, tokens_per_second=tokens / seconds,
        peak_memory_bytes=412_000_000 + 1_000_000 * min(step, 20), flops=2e7 * tokens, mfu=2e7 * tokens / seconds / 1e12,
    )  # fmt: skip
    return StepRecord(**(fields | changes))


def eval_record(step: int) -> EvalRecord:
    loss = 0.08 + 4.1 * math.exp(-step / 45)
    metrics = {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": 1 - loss / 4.4, "exact_match": max(0.0, 0.97 - loss / 2)}
    return EvalRecord(step, metrics, is_best=True, seconds=0.4)


def outcome(folder: Path, step: int = 200, **changes) -> Outcome:
    fields = dict(
        folder=folder, step=step, stopped_by="completed", metrics_before=eval_record(0).metrics, metrics_after=eval_record(step).metrics,
        best_step=step, best_metric=eval_record(step).metrics["loss"], seconds=13.4,
    )  # fmt: skip
    return Outcome(**(fields | changes))


SAMPLES = [
    Sample("Reverse the word: planet", "tenalp", "The planet the planet is the", "tenalp"),
    Sample("Write each letter twice:\nsun", "ssuunn", "sun\nsun\nsun", "ssuunm"),
]


def play(callbacks, folder: Path, first: int, last: int, *, eval_every: int = 40, save_every: int = 40) -> None:
    """Tell callbacks of the steps `first` to `last` as the loop does."""
    for step in range(first, last + 1):
        for callback in callbacks:
            callback.on_step(step_record(step))
            if step % eval_every == 0:
                callback.on_eval(eval_record(step))
            if step % save_every == 0:
                callback.on_save(step, folder / "checkpoints" / f"step-{step:08d}")


def write_run(folder: Path, *, steps: int = 200, samples=SAMPLES, config=CONFIG, finished: bool = True, **changes) -> Path:
    """The folder of a run; `changes` are fields of its RunInfo."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml_file.write(config), encoding="utf-8")
    (folder / "adapter").mkdir(exist_ok=True)
    records = MetricsFile(folder / "metrics.jsonl")
    records.on_start(info(folder, num_steps=steps, **changes))
    records.on_eval(eval_record(0))
    play([records], folder, 1, steps)
    if finished:
        ending = outcome(folder, steps)
        records.on_end(ending)
        facts = {name: getattr(ending, name) for name in ("step", "stopped_by", "best_step", "best_metric", "metrics_before", "metrics_after", "seconds")}
        (folder / "completed.json").write_text(json.dumps(facts | {"loss_chain": "12" * 32}), encoding="utf-8")
    records.close()
    (folder / "samples.json").write_text(json.dumps([vars(s) for s in samples]), encoding="utf-8")
    return folder
