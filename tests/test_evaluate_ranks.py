"""Two processes measure what one does: every example once, odd counts included, and each rank has the whole result."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest


def measure() -> dict:
    """On this rank's share of nine examples."""
    import numpy as np

    from deltune.data.dataset import Example
    from deltune.data.pack import pad
    from deltune.engines.build import build
    from deltune.engines.config import DDP, Single
    from deltune.evaluation.exact import exact_match
    from deltune.evaluation.lm import evaluate, evaluate_by_source
    from deltune.models.generation import GenerateOptions
    from tests.test_generate_model import chatty
    from tests.tiny import tiny_tokenizer

    engine = build(DDP(device="cpu") if "RANK" in os.environ else Single(device="cpu"))
    draw, examples = np.random.default_rng(0), []
    for number in range(9):
        ids = draw.integers(0, 256, 6 + 2 * number).astype(np.int32)
        labels = np.where(np.arange(len(ids)) < 3 + number, -100, ids)
        examples.append(Example(ids, labels, f"part{number % 2}.jsonl:{number + 1}"))
    batches = [pad(examples[i : i + 1], 258) for i in range(engine.rank, 9, engine.world_size)]
    model, tokenizer = engine.place(chatty()), tiny_tokenizer()

    def own(model, batch):
        return model(batch.input_ids).logits.sum() * 0 + batch.num_trained_tokens, {"one": 1.0}

    found = {
        "all": evaluate(model, batches),
        "own": evaluate(model, batches, forward=own),
        "sources": evaluate_by_source(model, batches)[1],
        "exact": exact_match(model, tokenizer, examples, GenerateOptions(max_new_tokens=5, temperature=1.0)),
    }
    engine.close()
    return json.loads(json.dumps(found))


def test_two_ranks_measure_what_one_does(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in ("0", "1"):
        command = [sys.executable, "-m", "tests.test_evaluate_ranks", str(tmp_path / rank)]
        ranks.append(subprocess.Popen(command, env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        assert process.wait(120) == 0, process.stderr.read()[-3000:]
        process.stderr.close()
    one, first, second = measure(), *(json.loads((tmp_path / rank).read_text()) for rank in ("0", "1"))
    assert first == second
    assert first["exact"] == one["exact"]
    assert first["all"] == pytest.approx(one["all"], rel=1e-6) and one["all"]["num_examples"] == 9
    assert first["own"] == pytest.approx(one["own"], rel=1e-6) and one["own"]["one"] == one["own"]["loss"] == 1.0
    for name in ("part0.jsonl", "part1.jsonl"):
        assert first["sources"][name] == pytest.approx(one["sources"][name], rel=1e-6)


if __name__ == "__main__":
    with open(sys.argv[1], "w") as out:
        json.dump(measure(), out)
