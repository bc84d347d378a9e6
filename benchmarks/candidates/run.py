"""The process of one candidate: `python -m benchmarks.candidates.run KIND SPEC`, SPEC a JSON object.

folder: the model and the adapters; rows: the folder of rows.json and train.jsonl; dtype, micro_batch, length, rank, device, memory
(measure peaks); adapter: which of the adapters; and what the kind itself takes.
"""

from __future__ import annotations

import importlib
import json
import sys
import time

from benchmarks.memory import CudaPeak, ResidentPeak, give_back_at_once
from benchmarks.pipe import Pacer

KINDS = {
    "ours": "ours", "peft": "peft_loop", "trainer": "peft_trainer", "trl": "trl_sft", "litgpt": "litgpt_loop",
    "unsloth": "unsloth_loop",
}  # fmt: skip


class CudaClock:
    """Seconds on the card so far, by events; reading it waits for the card."""

    def __init__(self):
        import torch

        self.begin = torch.cuda.Event(enable_timing=True)
        self.begin.record()

    def __call__(self) -> float:
        import torch

        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return self.begin.elapsed_time(now) / 1e3


def main() -> None:
    kind, spec = sys.argv[1], json.loads(sys.argv[2])
    pacer = Pacer()

    def work() -> None:
        began = time.process_time()
        import torch

        torch.set_num_threads(1)
        cuda = spec.get("device") == "cuda"
        if cuda:
            pacer.clock, pacer.rest = CudaClock(), torch.cuda.empty_cache
        if spec.get("memory"):
            pacer.peak = CudaPeak() if cuda else ResidentPeak()
            give_back_at_once()
        importlib.import_module(f"benchmarks.candidates.{KINDS[kind]}").train(pacer, spec, began)

    pacer.guarded(work)


if __name__ == "__main__":
    main()
