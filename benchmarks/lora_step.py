"""One LoRA step of Deltune against PEFT with the Hugging Face Trainer: same weights, data, settings; alternating in one run.

    python -m benchmarks.lora_step [--rounds 7] [--steps 2] [--dtype float32] [--out benchmarks/results/lora_step.json]

Each candidate lives in a process of its own and does some steps when told to, in an order shuffled every round, so
that whatever else the machine does hits all alike. Losses must agree before any time counts. Ratios are what to read.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

CANDIDATES = ("deltune", "peft+trainer")
RANK, ALPHA, LR = 16, 32, 1e-4


def make_model_folder(folder: Path, dtype: str) -> None:
    """A random Llama of about 27M parameters: hidden 512, 6 layers, vocabulary 8192."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=2048, tie_word_embeddings=False, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)


def make_rows(count: int, longest: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of instruction-like length: log-normal, half of each row trained."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        length = min(max(int(chance.lognormvariate(4.6, 0.5)), 16), longest)
        ids = [chance.randrange(3, 8192) for _ in range(length)]
        rows.append((ids, [-100] * (length // 2) + ids[length // 2 :]))
    return rows


def run_deltune(pipe, folder: str, rows, micro_batch: int, num_steps: int) -> None:
    import numpy as np

    from deltune.adapters.attach import attach
    from deltune.adapters.files import save_adapter
    from deltune.adapters.methods.lora import LoraConfig
    from deltune.data.dataset import Example
    from deltune.data.loader import Loader
    from deltune.engines.config import Single
    from deltune.engines.engine import Engine
    from deltune.models.config import ModelConfig
    from deltune.models.load import load
    from deltune.optim.build import build_optimizer
    from deltune.optim.config import AdamW
    from deltune.optim.groups import parameter_groups
    from deltune.training.callbacks import Callback, RunInfo
    from deltune.training.config import CheckpointConfig, EvalConfig, TrainConfig
    from deltune.training.loop import Loop

    class List(list):
        lengths = np.array([len(ids) for ids, _ in rows], np.int32)
        fingerprint = "bench"

    data = List(Example(np.array(i, np.int32), np.array(x, np.int32), str(n)) for n, (i, x) in enumerate(rows))
    model = load(ModelConfig(path=folder))
    attach(model, LoraConfig(rank=RANK, alpha=ALPHA))
    if not (Path(folder) / "adapter").exists():
        save_adapter(model, Path(folder) / "adapter")
    config = AdamW(lr=LR)
    losses: list[float] = []

    class Keep(Callback):
        def on_step(self, record):
            losses.append(record.loss)

    model.train()
    loop = Loop(
        model,
        loader=Loader(data, micro_batch=micro_batch, accumulate=1, rank=0, world_size=1, seed=0, shuffle=False, pad_id=0, num_examples=None),
        optimizer=build_optimizer(parameter_groups(model.named_parameters(), config), config), schedule=lambda step: 1.0,
        engine=Engine(Single(device="cpu")), info=RunInfo(Path("."), "bench", num_steps, 0, 1, 1, {}),
        train=TrainConfig(steps=num_steps, micro_batch=micro_batch), eval=EvalConfig(), checkpoint=CheckpointConfig(),
        max_grad_norm=1.0, callbacks=[Keep()],
    )
    serve(pipe, loop._one_step, losses)


def run_peft_trainer(pipe, folder: str, rows, micro_batch: int, num_steps: int) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model = PeftModel.from_pretrained(model, Path(folder) / "adapter", is_trainable=True)
    losses: list[float] = []

    def collate(batch):
        width = max(len(ids) for ids, _ in batch)
        pad = lambda values, fill: [v + [fill] * (width - len(v)) for v in values]  # noqa: E731
        return {
            "input_ids": torch.tensor(pad([i for i, _ in batch], 0)),
            "labels": torch.tensor(pad([x for _, x in batch], -100)),
            "attention_mask": torch.tensor(pad([[1] * len(i) for i, _ in batch], 0)),
        }

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(rows)

    class Paced(TrainerCallback):
        """Does one step whenever the parent asks; a step is timed from its begin to the next one's."""

        def __init__(self):
            self.left, self.began = 0, None

        def on_step_begin(self, args, state, control, **kwargs):
            if self.left == 0:
                if self.began is not None:
                    answer(pipe, self.began, losses)
                self.left = pipe.recv()
                if self.left == 0:
                    raise SystemExit
                self.began = (time.process_time(), time.perf_counter())
            self.left -= 1

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=num_steps, per_device_train_batch_size=micro_batch, learning_rate=LR,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1, save_strategy="no",
        report_to=[], optim="adamw_torch_fused", disable_tqdm=True, remove_unused_columns=False, use_cpu=True, seed=0,
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Paced()])
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()


def serve(pipe, one_step, losses) -> None:
    """Do as many steps as the parent asks for, again and again; 0 ends."""
    while count := pipe.recv():
        began = (time.process_time(), time.perf_counter())
        for _ in range(count):
            one_step()
        answer(pipe, began, losses)


def answer(pipe, began, losses) -> None:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pipe.send((time.process_time() - began[0], time.perf_counter() - began[1], peak, list(losses)))


def child(name: str, pipe, folder: str, rows, micro_batch: int, num_steps: int) -> None:
    import torch

    torch.set_num_threads(1)
    {"deltune": run_deltune, "peft+trainer": run_peft_trainer}[name](pipe, folder, rows, micro_batch, num_steps)


def measure(rounds: int, steps: int, dtype: str, micro_batch: int, longest: int) -> dict:
    """Medians over rounds, as a table of candidates."""
    context = mp.get_context("spawn")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    num_steps = (rounds + 1) * steps + 1
    rows = make_rows(micro_batch * (num_steps + 1), longest)
    results: dict[str, dict] = {name: {"cpu": [], "wall": [], "peak": 0, "losses": []} for name in CANDIDATES}
    with tempfile.TemporaryDirectory() as folder:
        make_model_folder(Path(folder), dtype)
        pipes, children = {}, []
        for name in CANDIDATES:
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=child, args=(name, theirs, folder, rows, micro_batch, num_steps), daemon=True)
            process.start()
            children.append(process)
            pipes[name].send(steps)  # warm-up, and the first candidate writes the adapter that the second reads
            pipes[name].recv()
        chance = random.Random(0)
        for _ in range(rounds):
            for name in chance.sample(CANDIDATES, len(CANDIDATES)):
                pipes[name].send(steps)
                cpu, wall, peak, losses = pipes[name].recv()
                results[name]["cpu"].append(cpu)
                results[name]["wall"].append(wall)
                results[name]["peak"], results[name]["losses"] = peak, losses
        for name in CANDIDATES:
            pipes[name].send(0)
        for process in children:
            process.join(timeout=20)
    tokens = [sum(len(i) for i, _ in rows[r * steps * micro_batch : (r + 1) * steps * micro_batch]) for r in range(1, rounds + 1)]
    table = {
        name: {
            "tokens_per_second": statistics.median(t / s for t, s in zip(tokens, r["cpu"], strict=True)),
            "tokens_per_second_wall": statistics.median(t / s for t, s in zip(tokens, r["wall"], strict=True)),
            "peak_memory_mb": r["peak"] / 1e6,
        }
        for name, r in results.items()
    }
    first, second = (results[name]["losses"] for name in CANDIDATES)
    worst = max(abs(a - b) / abs(b) for a, b in zip(first, second, strict=False))
    ratios = [p / o for o, p in zip(results["deltune"]["cpu"], results["peft+trainer"]["cpu"], strict=True)]
    return {"table": table, "speed_ratio": statistics.median(ratios), "speed_ratios": ratios, "worst_loss_difference": worst,
            "memory_ratio": table["deltune"]["peak_memory_mb"] / table["peft+trainer"]["peak_memory_mb"]}  # fmt: skip


def main() -> None:
    import peft
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = measure(options.rounds, options.steps, options.dtype, options.micro_batch, options.longest)
    result["setting"] = {
        "dtype": options.dtype, "micro_batch": options.micro_batch, "longest": options.longest, "rank": RANK, "threads": 1,
        "rounds": options.rounds, "processor": platform.processor() or platform.machine(), "torch": torch.__version__,
        "transformers": transformers.__version__, "peft": peft.__version__,
    }  # fmt: skip
    tolerance = 1e-4 if options.dtype == "float32" else 2e-2  # the Trainer logs rounded losses
    print(f"{'':14} {'tokens/s (CPU time)':>20} {'tokens/s (wall)':>16} {'peak memory':>12}")
    for name, row in result["table"].items():
        print(f"{name:14} {row['tokens_per_second']:20,.0f} {row['tokens_per_second_wall']:16,.0f} {row['peak_memory_mb']:9,.0f} MB")
    print(f"losses agree to {result['worst_loss_difference']:.1e} (limit {tolerance:.0e})")
    print(f"speed, Deltune / PEFT+Trainer: {result['speed_ratio']:.3f}   memory: {result['memory_ratio']:.3f}   {result['setting']}")
    if result["worst_loss_difference"] > tolerance:
        raise SystemExit("the losses differ, so the times mean nothing")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
