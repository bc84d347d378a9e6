"""Scoring a task's questions: ours beside plain transformers, one row after another, on the same rows and weights.

    OMP_NUM_THREADS=1 python -m benchmarks.evaluation [NUMBER ...]   # writes benchmarks/results/evaluation.json

Numbers (from 1) choose among the cases; what an earlier call found for the others stays.

Both get the same token ids, and their scores are compared before anything is timed. The plain side asks what anyone would
write: one forward pass for a question whose options are single tokens, else one for each option, with the whole row. The
two take turns; what counts is the process's CPU time on one thread, the median of ratios within rounds.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROUNDS = 3
CLOSE = 1e-5  # of a sum over an option's tokens, in float32: nats, or relative where it is more than one
TARGET = 3.0
RESULTS = Path(__file__).parent / "results" / "evaluation.json"
DATA = Path(os.environ.get("DELTUNE_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
# a random Llama of 29 M weights, with the bundled model's tokenizer
SHAPE = dict(
    vocab_size=4096, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
    max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    model: str  # "random-29m" or "bundled"
    task: str
    file: str
    protocol: str
    shots: int
    count: int  # questions, neighbours in the file, so that they share what real ones share


MMLU, C3, LOGIQA = "mmlu/zero_shot_mmlu_val.json", "c3/c3-d-dev.json", "logiqa2/dev.txt"
CASES = (
    Case("MMLU, 5 shots, letters", "random-29m", "mmlu", MMLU, "letters", 5, 22),
    Case("MMLU, 0 shots, letters", "random-29m", "mmlu", MMLU, "letters", 0, 24),
    Case("MMLU, 0 shots, choices", "random-29m", "mmlu", MMLU, "likelihood", 0, 24),
    Case("LogiQA 2, 0 shots, choices", "random-29m", "logiqa2", LOGIQA, "likelihood", 0, 16),
    Case("C3-d, 0 shots, choices", "bundled", "c3-d", C3, "likelihood", 0, 40),
    Case("MMLU, 3 shots, letters", "bundled", "mmlu", MMLU, "letters", 3, 200),
    Case("MMLU, 0 shots, letters", "bundled", "mmlu", MMLU, "letters", 0, 200),
)


def questions(case: Case, tokenizer: Any, window: int) -> tuple[list[Any], Any]:
    """The case's questions in tokens, and the way they are asked. The first questions of each subject are its exemplars."""
    from deltune.evaluation.tasks.catalogue import TASKS
    from deltune.evaluation.tasks.run import Way, questions
    from deltune.evaluation.tasks.templates import template_named

    task = TASKS[case.task]
    items, seen, pool = [], {}, []
    for item in task.read(DATA / case.file):
        seen[item.group] = seen.get(item.group, 0) + 1
        (pool if seen[item.group] <= case.shots else items).append(item)
    way = Way(template_named(task.template), case.protocol, case.shots)
    return questions(items[: case.count], way, pool, tokenizer, window), way


def models(name: str, folder: Path) -> tuple[Any, Any, Any]:
    """(ours, plain, tokenizer): the same weights, loaded by each side's own means."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from deltune.commands import fast
    from deltune.models import folder as folders
    from deltune.models.config import ModelConfig
    from deltune.models.load import load, load_tokenizer

    tokenizer = load_tokenizer(ModelConfig(path="bundled"))
    path = folders.find("bundled", None, weights=True)
    if name != "bundled":
        path = folder / name
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(path)
    ours = load(ModelConfig(path=str(path)))
    fast.put(ours, adapted=False)
    return ours, AutoModelForCausalLM.from_pretrained(path).eval(), tokenizer


def plain(model: Any, asked: list[Any]) -> list[list[float]]:
    """Σ log p of each option, one row after another."""
    import torch

    found = []
    with torch.no_grad():
        for question in asked:
            if all(len(option) == 1 for option in question.options):
                log_p = model(torch.tensor([question.prompt])).logits[0, -1].log_softmax(-1)
                found.append([log_p[option[0]].item() for option in question.options])
                continue
            sums = []
            for option in question.options:
                ids, first = torch.tensor([question.prompt + option]), len(question.prompt)
                log_p = model(ids).logits[0, first - 1 : -1].log_softmax(-1)
                sums.append(log_p.gather(1, ids[0, first:, None]).sum().item())
            found.append(sums)
    return found


def measure(case: Case, folder: Path, rounds: int) -> dict[str, Any]:
    from deltune.evaluation.tasks.score import Request, Work, score, shares
    from deltune.models.head import describe

    ours, theirs, tokenizer = models(case.model, folder)
    asked, _ = questions(case, tokenizer, ours.config.max_position_embeddings)
    requests, work = [Request(question.prompt, question.options) for question in asked], Work()
    head = describe(ours)
    one, two = score(ours, requests, head=head, work=work), plain(theirs, asked)
    apart = max(abs(a - b) / max(1.0, abs(b)) for row, other in zip(one, two, strict=True) for a, b in zip(row, other, strict=True))
    if apart > CLOSE:
        sys.exit(f"{case.name}: scores differ by {apart:.2g}, so nothing was timed")
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    share = shares(ours)  # as the head, found out once in an evaluation, by six passes over at most 48 tokens
    sides = {"ours": lambda: score(ours, requests, head=head, share=share), "plain": lambda: plain(theirs, asked)}
    for turn in range(rounds):
        for side in ("ours", "plain") if turn % 2 else ("plain", "ours"):
            began = time.process_time()
            sides[side]()
            seconds[side].append(time.process_time() - began)
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    return {
        "case": case.name, "model": case.model, "questions": len(asked), "mean_prompt_tokens": statistics.mean(len(q.prompt) for q in asked),
        "options": sum(len(q.options) for q in asked), "largest_difference": apart,
        "tokens_of_rows_alone": sum(len(row) for q in asked for row in {tuple([*q.prompt, *option[:-1]]) for option in q.options}),
        "tokens_computed": work.computed, "seconds": seconds, "ratio": statistics.median(ratios), "target": TARGET, "met": statistics.median(ratios) >= TARGET,
    }  # fmt: skip


def main() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    chosen = [int(word) - 1 for word in sys.argv[1:]] or range(len(CASES))
    rows = {row["number"]: row for row in json.loads(RESULTS.read_text())["cases"]} if len(sys.argv) > 1 and RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for place in chosen:
            row = {"number": place + 1, **measure(CASES[place], Path(folder), ROUNDS), "load": os.getloadavg()[0]}
            rows[place + 1] = row
            print(f"{row['case']:28} {row['model']:11} {row['ratio']:5.2f} x   largest difference {row['largest_difference']:.1e}", flush=True)
    found = {
        "what": "CPU seconds of scoring, plain transformers one row after another over ours; one thread; median of ratios within rounds",
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "rounds": ROUNDS, "cases": [rows[number] for number in sorted(rows)],
    }  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
