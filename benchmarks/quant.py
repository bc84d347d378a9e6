"""What a quantised base costs and saves: a training step beside bfloat16, where its time goes, and memory while it is loaded.

    python -m benchmarks.quant [--rounds 5] [--parts memory speed] [--out benchmarks/results/quant.json]

Steps: the 120 M Llama of the other benchmarks with random weights, LoRA of rank 16 on every linear layer as a run has it
(layers computed together, norms lean), micro-batches of 4 x 256 and 2 x 64 tokens, forward, backward and AdamW, one
thread, the process's CPU time. Bases alternate within a round in shuffled order; a ratio is the median over rounds of
(base / bfloat16) of the same round. `nf4, torch alone` is as where bitsandbytes is not installed. The profile is torch's, of one step
on nf4 by what its operators themselves took. Memory: a model of 1.1 B parameters (22 layers of width 2048) drawn at
random, and 4 such layers read from bfloat16 files, each in a process of its own; bytes are anonymous memory of the process
beyond what it had when the load began, its peak read every 2 ms.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.work import Shape, make_model
from deltune import weights
from deltune.models.config import QUANTS, ModelConfig, QuantConfig
from deltune.weights import bnb

RANK, SIZES = 16, ((4, 256), (2, 64))
BASES = ("bfloat16", "nf4", "nf4, torch alone", "int8")
LARGE = Shape(hidden=2048, layers=22, inter=5632, vocab=32000, heads=32, kv_heads=4)  # 1.1 B


def quant_of(base: str) -> QuantConfig:
    name = base.partition(",")[0]
    return QuantConfig() if name == "bfloat16" else QUANTS.resolve(name)(name)


class Candidate:
    """The model on one base with its adapter, and the optimizer of what is trained."""

    def __init__(self, folder: Path, base: str):
        from deltune.adapters.attach import attach
        from deltune.adapters.config import named
        from deltune.commands import fast
        from deltune.models.load import load

        self.alone = base.endswith("alone")
        self.model = load(ModelConfig(path=str(folder)), quant=quant_of(base)).train()
        attach(self.model, named("lora", rank=RANK))
        fast.put(self.model, adapted=True)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(self, ids: torch.Tensor) -> None:
        own, bnb.dequantise_4bit = bnb.dequantise_4bit, (lambda *_: False) if self.alone else bnb.dequantise_4bit
        try:
            self.model(input_ids=ids, labels=ids).loss.backward()
        finally:
            bnb.dequantise_4bit = own
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self, ids: torch.Tensor) -> float:
        began = time.process_time()
        self.step(ids)
        return time.process_time() - began


def batch(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 1000, (rows, length), generator=torch.Generator().manual_seed(1))


def steps(candidates: dict[str, Candidate], rounds: int) -> dict[str, Any]:
    found, order = {}, random.Random(0)
    for rows, length in SIZES:
        ids = batch(rows, length)
        taken: list[dict[str, float]] = []
        for at in range(rounds + 1):  # the first warms up
            names = list(candidates)
            order.shuffle(names)
            measured = {name: candidates[name].seconds(ids) for name in names}
            taken += [measured] if at else []
        found[f"{rows} x {length}"] = {
            name: {
                "seconds": statistics.median(r[name] for r in taken),
                "ratio": statistics.median(r[name] / r["bfloat16"] for r in taken),
                "ratios": sorted(round(r[name] / r["bfloat16"], 3) for r in taken),
            } for name in candidates
        }  # fmt: skip
    return found


def profile(candidate: Candidate) -> dict[str, dict[str, float]]:
    """Shares of a step's time by kind of operator."""
    found = {}
    for rows, length in SIZES:
        ids = batch(rows, length)
        candidate.step(ids)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            candidate.step(ids)
        spent: dict[str, float] = {}
        for event in profiler.key_averages():
            kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "the rest")
            spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total
        whole = sum(spent.values())
        found[f"{rows} x {length}"] = {kind: round(time / whole, 3) for kind, time in sorted(spent.items(), key=lambda item: -item[1])}
    return found


KINDS = {
    "values from codes": ("bitsandbytes::",),
    "matrix products": ("aten::mm", "aten::addmm", "mkldnn", "aten::bmm", "aten::baddbmm"),
    "scales from codes, and lookups": ("aten::index_select",),
}


# -- memory, in a process of its own --------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measured_load(folder: Path, base: str, start: str) -> dict[str, float]:
    from deltune.models.load import load, load_tokenizer  # noqa: F401

    if base != "bfloat16":
        bnb.kernels()
    torch.set_num_threads(1)
    import transformers.models.llama.modeling_llama  # noqa: F401

    before, peak, ended = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.process_time()
    model = load(ModelConfig(path=str(folder), start=start, dtype="bfloat16"), quant=quant_of(base))
    seconds = time.process_time() - began
    after = anonymous_bytes()
    ended.set()
    watcher.join()
    codes = [p for p in model.parameters() if weights.is_quantised(p)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "quantised_parameters": sum(p.numel() for p in codes),
        "stored_bytes": sum(map(weights.stored_bytes, model.parameters())),
        "bytes_per_quantised_parameter": sum(map(weights.stored_bytes, codes)) / sum(p.numel() for p in codes) if codes else None,
        "largest_layer_bytes": max((p.numel() * p.element_size() for p in codes), default=0),
        "resident_after": after - before, "resident_at_peak": max(peak, after) - before, "cpu_seconds": seconds,
    }  # fmt: skip


def in_a_process(folder: Path, base: str, start: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-m", "benchmarks.quant", "--load", str(folder), base, start], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["memory", "speed"], choices=("memory", "speed"), help="other parts keep an earlier result")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quant.json"))
    parser.add_argument("--load", nargs=3, metavar=("FOLDER", "BASE", "START"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        folder, base, start = arguments.load
        print(json.dumps(measured_load(Path(folder), base, start)))
        return
    torch.set_num_threads(1)
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {}
    for part in arguments.parts:
        before = machine.load()
        with tempfile.TemporaryDirectory() as folder:
            result[part] = (memory if part == "memory" else speed)(Path(folder), arguments.rounds)
        result[part] |= {"machine": machine.describe(), "load": [before, machine.load()], "bitsandbytes": bnb.kernels() is not None}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({part: result[part]}, indent=1), flush=True)


def speed(folder: Path, rounds: int) -> dict[str, Any]:
    make_model(folder, Shape(), "bfloat16")
    candidates = {base: Candidate(folder, base) for base in BASES}
    return {"steps": steps(candidates, rounds), "profile of nf4": profile(candidates["nf4"])}


def memory(folder: Path, rounds: int) -> dict[str, Any]:
    """Bytes are exact, or as the system counts them: no rounds are needed."""
    from transformers import LlamaConfig

    large, read = folder / "large", folder / "read"
    LlamaConfig(
        vocab_size=LARGE.vocab, hidden_size=LARGE.hidden, intermediate_size=LARGE.inter, num_hidden_layers=LARGE.layers, num_attention_heads=LARGE.heads,
        num_key_value_heads=LARGE.kv_heads, tie_word_embeddings=False, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(large)  # fmt: skip
    make_model(read, replace(LARGE, layers=4), "bfloat16")
    return {
        "1.1 B drawn, nf4": in_a_process(large, "nf4", "random"),
        **{f"4 layers read, {base}": in_a_process(read, base, "pretrained") for base in ("bfloat16", "nf4")},
    }


if __name__ == "__main__":
    main()
