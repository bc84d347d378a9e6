"""Head and loss, forward and backward: with whole logits and in chunks, alternating in one process, in process CPU time.

    python -m benchmarks.loss [--rounds 7] [--chunk-mb 32]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from deltune.models import cross_entropy
from deltune.models.cross_entropy import Tail, linear_cross_entropy

# rows, width, vocab, type, whether the head is trained, softcap, bf16 autocast
CASES = [
    (1024, 768, 32000, torch.bfloat16, False, None, False),
    (1024, 768, 32000, torch.bfloat16, True, None, False),
    (1024, 768, 32000, torch.bfloat16, False, 30.0, False),
    (1024, 768, 32000, torch.float32, False, None, False),
    (1024, 768, 32000, torch.float32, True, None, False),
    (1024, 768, 32000, torch.float32, False, None, True),
    (512, 1024, 128256, torch.bfloat16, False, None, False),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--chunk-mb", type=int, default=cross_entropy.CHUNK_BYTES["cpu"] >> 20)
    words = parser.parse_args()
    cross_entropy.CHUNK_BYTES["cpu"] = words.chunk_mb << 20
    torch.set_num_threads(1)
    print(f"{'rows x width x vocab':>22}  {'type':>9}  {'head':>7}  {'softcap':>7}  {'whole ms':>8}  {'chunks ms':>9}  ratio")
    for rows, width, vocab, dtype, trained, softcap, autocast in CASES:
        whole, chunks = milliseconds(steps(rows, width, vocab, dtype, trained, Tail(softcap=softcap), autocast), words.rounds)
        name = str(dtype).removeprefix("torch.") if not autocast else "autocast"
        print(
            f"{f'{rows} x {width} x {vocab}':>22}  {name:>9}  {'trained' if trained else 'frozen':>7}  {softcap or '-':>7}"
            f"  {whole:8.0f}  {chunks:9.0f}  {chunks / whole:.2f}",
            flush=True,
        )


def steps(rows: int, width: int, vocab: int, dtype: torch.dtype, trained: bool, tail: Tail, autocast: bool) -> list[Callable[[], None]]:
    """The two steps, on the same tensors."""
    torch.manual_seed(0)
    states = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab, width)).to(dtype).requires_grad_(trained)
    targets = torch.randint(0, vocab, (rows,))

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            states.grad = weight.grad = None
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                found = loss()
            (found / rows).backward()

        return run

    def whole() -> torch.Tensor:
        return F.cross_entropy(tail(F.linear(states, weight)).float(), targets, reduction="sum")

    return [step(whole), step(lambda: linear_cross_entropy(states, weight, None, targets, tail))]


def milliseconds(candidates: list[Callable[[], None]], rounds: int) -> list[float]:
    """Medians of CPU time, the candidates taking turns; a first round warms up."""
    taken: list[list[float]] = [[] for _ in candidates]
    for number in range(rounds + 1):
        for times, run in zip(taken, candidates, strict=True):
            began = time.process_time()
            run()
            if number:
                times.append(1e3 * (time.process_time() - began))
    return [statistics.median(times) for times in taken]


if __name__ == "__main__":
    main()
