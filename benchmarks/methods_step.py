"""One training step of every method beside one of plain LoRA, and one of PEFT's own form of it, alternating in one run.

    python -m benchmarks.methods_step [--dtype bfloat16] [--rounds 3] [--only lora dora] [--out benchmarks/results/methods_step_bfloat16.json]

A random Llama of two wide layers without much around them (width 768, 6 rows of 128 tokens, as many tokens as the width:
the ratio of 4096 tokens on a model 4096 wide), one thread, rank 16 where a method has a rank, else its own defaults. A
step is forward, backward and AdamW on what the method trains. Time is the process's CPU time, so that other work on the
machine counts for little; a ratio is the median over rounds of (method / LoRA, or method / PEFT's, of the same round),
and the order within a round is shuffled. PEFT's is read from the file that ours wrote, moved off its start, and its loss
must be ours: a case that fails this ends the run. Memory is the peak of what one step allocates beyond what stood before
it, and what it holds for the backward pass, relative to LoRA. Attach is the time to put the adapter on, in seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import io
import json
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RANK = 16
ROWS, LENGTH = 6, 128
LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 2, 768, 2048, 1024
# Methods of PEFT's that cannot be timed beside ours, and why
NOT_COMPARED = {
    "boft": "PEFT without its CUDA extension has one butterfly factor",
    "p_tuning": "PEFT reads prompts for inference alone",
    "prefix_tuning": "PEFT reads prompts for inference alone",
    "prompt_tuning": "PEFT reads prompts for inference alone",
}
# of the loss; what the losses of two ways to round differ by in a short type
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def make_model(dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(dtype).train()


def config_of(method: str) -> Any:
    from deltune.adapters.config import METHODS, named

    config = named(method, **METHODS[method].example)
    names = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, rank=RANK) if "rank" in names else config


class Candidate:
    """A model with an adapter on it, and the optimizer of what is trained."""

    def __init__(self, model: nn.Module):
        from deltune.adapters.attach import extra_loss

        self.model, self.extra_loss = model, extra_loss
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.num_trained = sum(p.numel() for p in self.parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))

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

    @torch.no_grad()
    def loss(self) -> float:
        """Without dropout and noise."""
        self.model.eval()
        loss = float(self.model(input_ids=self.ids, labels=self.ids).loss)
        self.model.train()
        return loss

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


def ours(method: str, dtype: torch.dtype) -> tuple[Candidate, float]:
    """Our method as a run has it, with layers computed together where they can be, moved off its start; and the seconds that
    it took to attach."""
    from deltune.adapters.attach import attach, trainable
    from deltune.adapters.fused import fuse

    model = make_model(dtype)
    began = time.process_time()
    attach(model, config_of(method))
    seconds = time.process_time() - began
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    fuse(model)
    return Candidate(model), seconds


def theirs(method: str, candidate: Candidate, dtype: torch.dtype) -> Candidate | None:
    """PEFT's form of one of ours, with the same tensors and PEFT's own defaults; None where there is none to compare with."""
    import peft

    from deltune.adapters.attach import adapters
    from deltune.adapters.files import save_adapter
    from deltune.adapters.files.peft import OWN, form_for

    if method in NOT_COMPARED or form_for(adapters(candidate.model)["default"]).type.startswith(OWN):
        return None
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # bars of progress
        save_adapter(candidate.model, folder)
        model = peft.PeftModel.from_pretrained(make_model(dtype), folder, is_trainable=True).train()
    return Candidate(model)


class Live(TorchDispatchMode):
    """Counts the bytes of storages that operations make and that still live, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _has_storage(t)}
        for tensor in tree_leaves(result):
            if _has_storage(tensor):
                self.count(tensor.untyped_storage(), given)
        return result

    def count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
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


def timed(candidates: Mapping[str, Candidate], rounds: int, order: random.Random) -> list[dict[str, float]]:
    """Seconds of a step of each candidate, for each round."""
    found = []
    for _ in range(rounds):
        names = order.sample(sorted(candidates), len(candidates))
        found.append({name: candidates[name].seconds() for name in names})
    return found


def ratio(times: Iterable[Mapping[str, float]], one: str, other: str) -> float:
    return round(statistics.median(seconds[one] / seconds[other] for seconds in times), 4)


def row(method: str, dtype: torch.dtype, rounds: int, lora: Candidate, lora_memory: tuple[int, int], order: random.Random) -> dict[str, float]:
    """What is measured of one method."""
    candidate, attach_seconds = ours(method, dtype)
    candidates = {"lora": lora, "ours": candidate}
    peers = theirs(method, candidate, dtype)
    found: dict[str, float] = {}
    if peers is not None:
        candidates["peft"] = peers
        losses = candidate.loss(), peers.loss()
        found["loss_difference"] = abs(losses[0] / losses[1] - 1)
        if not found["loss_difference"] <= TOLERANCE[dtype]:
            raise SystemExit(f"{method}: our loss is {losses[0]:.7f} and PEFT's {losses[1]:.7f}: not the same function")
    for other in candidates.values():
        other.step()  # allocates what later steps find
    times = timed(candidates, rounds, order)
    peak, held = candidate.memory()
    pairs = [seconds["ours"] / seconds["lora"] for seconds in times]
    found |= {"time": ratio(times, "ours", "lora"), "time_low": round(min(pairs), 4), "time_high": round(max(pairs), 4)}
    if peers is not None:
        found |= {"peft_time": ratio(times, "ours", "peft"), "peft_to_lora": ratio(times, "peft", "lora")}
    return found | {
        "peak_memory": round(peak / lora_memory[0], 4),
        "held_memory": round(held / lora_memory[1], 4),
        "trained": candidate.num_trained,
        "attach_seconds": round(attach_seconds, 3),
        "lora_seconds": round(statistics.median(seconds["lora"] for seconds in times), 4),
    }


def told(method: str, found: Mapping[str, float]) -> str:
    peft = f"{found['peft_time']:5.2f} x PEFT's ({found['peft_to_lora']:.2f})" if "peft_time" in found else " " * 22
    return (
        f"{method:18} {found['time']:5.2f} x LoRA ({found['time_low']:.2f}..{found['time_high']:.2f})  {peft}  peak {found['peak_memory']:5.2f}  "
        f"held {found['held_memory']:5.2f}  trained {found['trained']:>10,}  attach {found['attach_seconds']:6.2f} s"
    )


def measure(methods: list[str], rounds: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    lora, _ = ours("lora", dtype)
    lora.step()
    lora_memory, order = lora.memory(), random.Random(0)
    rows: dict[str, dict[str, float]] = {}
    for method in methods:
        rows[method] = row(method, dtype, rounds, lora, lora_memory, order)
        print(told(method, rows[method]), flush=True)
        gc.collect()  # a model and its adapters refer to each other
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # the heap keeps what was freed in it otherwise, some GB after ten methods
    return rows


def main() -> None:
    from deltune.adapters.config import METHODS, named

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, help="A JSON file; with --only the other methods in it stay. The catalogue reads results/methods_step_DTYPE.json.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    methods = options.only or [name for name in sorted(METHODS) if not named(name).schedule]
    began = time.perf_counter()
    rows = measure(methods, options.rounds, getattr(torch, options.dtype))
    result = {
        "setting": {
            "dtype": options.dtype, "rank": RANK, "rows": ROWS, "length": LENGTH, "layers": LAYERS, "hidden": HIDDEN, "threads": 1,
            "rounds": options.rounds, "processor": platform.processor() or platform.machine(), "torch": torch.__version__,
        },
        "methods": rows,
    }
    slower = sorted(name for name, found in rows.items() if found.get("peft_time", 0) > 1)
    print(
        f"median {statistics.median(found['time'] for found in rows.values()):.2f} x LoRA, largest {max(found['time'] for found in rows.values()):.2f}; "
        f"slower than PEFT's: {', '.join(slower) or 'none'}; {time.perf_counter() - began:.0f} s; {result['setting']}", file=sys.stderr,
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.only and options.out.exists():  # some methods measured anew; the others stay
            result["methods"] = dict(sorted({**json.loads(options.out.read_text())["methods"], **rows}.items()))
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
