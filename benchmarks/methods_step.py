"""One training step of every method beside one of plain LoRA, alternating in one run: time and memory, as ratios.

    python -m benchmarks.methods_step [--rounds 5] [--only lora dora] [--dtype float32] [--out benchmarks/results/methods_step.json]

A 12-layer random Llama of about 45M parameters, 4 rows of 128 tokens, one thread, rank 16 where a method has a rank,
else its own defaults. A step is forward, backward and AdamW on what the method trains. Time is the process's CPU time,
so that other work on the machine counts for little; the ratio is the median over rounds of (method / LoRA of the same
round). Memory is the peak of what one step allocates beyond what stood before it, and what it holds for the backward pass.
Attach is the time to put the adapter on, in seconds.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

RANK = 16
ROWS, LENGTH = 4, 128


def make_model(dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def config_of(method: str) -> Any:
    from deltune.adapters.config import METHODS, named

    config = named(method, **METHODS[method].example)
    names = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, rank=RANK) if "rank" in names else config


class Candidate:
    """A model with one method on it, and the optimizer of what it trains."""

    def __init__(self, method: str, dtype: torch.dtype):
        from deltune.adapters.attach import attach, extra_loss, trainable

        self.model = make_model(dtype)
        self.extra_loss = extra_loss
        began = time.process_time()
        attach(self.model, config_of(method))
        self.attach_seconds = time.process_time() - began
        self.parameters = list(trainable(self.model).values())
        self.num_trained = sum(p.numel() for p in self.parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, 4096, (ROWS, LENGTH), generator=generator)

    def forward_backward(self) -> None:
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        extra = self.extra_loss(self.model)
        (loss if extra is None else loss + extra).backward()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        began = time.process_time()
        self.step()
        return time.process_time() - began

    def memory(self) -> tuple[int, int]:
        """(peak bytes beyond what stood before, bytes held for the backward pass) of one forward and backward."""
        own = {t.untyped_storage().data_ptr() for t in [*self.model.parameters(), *self.model.buffers()]}
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        del loss
        with Live() as live:
            self.forward_backward()
        self.optimizer.zero_grad(set_to_none=True)
        return live.peak, sum(held.values())


class Live(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of storages that operations make and that still live, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _has_storage(t)}
        for tensor in torch.utils._pytree.tree_leaves(result):
            if _has_storage(tensor):
                self.count(tensor.untyped_storage(), given)
        return result

    def count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        import weakref

        key = storage._cdata
        if key in self.known or key in given:
            return
        size = storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(key=key, size=size):
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def _has_storage(value: Any) -> bool:
    """Sparse tensors have none of their own: the parts that they are made of were counted when they were made."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


def measure(methods: list[str], rounds: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Per method: the ratios to LoRA, what it trains, and its attach time."""
    lora = Candidate("lora", dtype)
    lora.step()
    peak, held = lora.memory()
    rows: dict[str, dict[str, float]] = {}
    for method in methods:
        other = Candidate(method, dtype)
        other.step()
        pairs = []
        for number in range(rounds):
            pair = (lora, other) if number % 2 else (other, lora)
            times = {id(candidate): candidate.seconds() for candidate in pair}
            pairs.append((times[id(lora)], times[id(other)]))
        own_peak, own_held = other.memory()
        rows[method] = {
            "time": statistics.median(theirs / ours for ours, theirs in pairs),
            "time_low": min(theirs / ours for ours, theirs in pairs),
            "time_high": max(theirs / ours for ours, theirs in pairs),
            "peak_memory": own_peak / peak,
            "held_memory": own_held / held,
            "trained": other.num_trained,
            "attach_seconds": round(other.attach_seconds, 3),
            "lora_seconds": round(statistics.median(ours for ours, _ in pairs), 4),
        }
        row = rows[method]
        print(
            f"{method:18} time {row['time']:6.2f} ({row['time_low']:.2f}..{row['time_high']:.2f})  peak {row['peak_memory']:6.2f}  "
            f"held {row['held_memory']:6.2f}  trained {row['trained']:>10,}  attach {row['attach_seconds']:6.2f} s", flush=True,
        )
        del other
        gc.collect()  # a model and its adapters refer to each other
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # the heap keeps what was freed in it otherwise, some GB after ten methods
    return rows


def main() -> None:
    from deltune.adapters.config import METHODS, named

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    methods = options.only or [name for name in sorted(METHODS) if not named(name).schedule]
    rows = measure(methods, options.rounds, getattr(torch, options.dtype))
    result = {
        "setting": {
            "dtype": options.dtype, "rank": RANK, "rows": ROWS, "length": LENGTH, "layers": 12, "hidden": 512, "threads": 1,
            "rounds": options.rounds, "processor": platform.processor() or platform.machine(), "torch": torch.__version__,
        },
        "methods": rows,
    }
    print(f"median over methods: {statistics.median(row['time'] for row in rows.values()):.2f}; {result['setting']}", file=sys.stderr)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.only and options.out.exists():  # some methods measured anew; the others stay
            result["methods"] = dict(sorted({**json.loads(options.out.read_text())["methods"], **rows}.items()))
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
