"""`make base-model`: corpus, tokenizer, training by Deltune itself, measurement, installation. Every step starts from seeds alone.

Each step leaves its files below build/base_model, so that a build that was interrupted goes on: the corpus is cheap
to write again, and the training run resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from recipes.base_model import card, corpus, demo_task, measure, tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORK = Path("build/base_model")  # train.yaml names it too; both are relative to the root of the repository
CONFIG = Path(__file__).with_name("train.yaml")
MODEL = ROOT / "deltune" / "models" / "bundled"
TASK = ROOT / "deltune" / "data" / "bundled"

SEED, NUM_ROWS = corpus.SEED, 30_000
EVAL_SEED, NUM_EVAL_ROWS = 2, 400
TOKENIZER_ROWS = 6_000
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    # 1 / sqrt(hidden_size): with transformers' 0.02 attention begins flat in so narrow a model, and copying is learned late
    "initializer_range": 0.07,
}


def write_start(folder: Path) -> None:
    """config.json and the tokenizer: what training needs of a model whose weights are drawn."""
    from transformers import GenerationConfig, LlamaConfig

    made = tokenizer.build(corpus.rows(SEED, TOKENIZER_ROWS))
    ids = {"pad_token_id": made.pad_token_id, "bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
    made.save_pretrained(folder)
    LlamaConfig(vocab_size=len(made), architectures=["LlamaForCausalLM"], **SHAPE, **ids).save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)


def train() -> Any:
    """The run of train.yaml; its outcome."""
    import deltune

    return deltune.train(CONFIG)


def install(trained: Path, folder: Path) -> None:
    """Store the weights as bfloat16, half the bytes; config.json says float32, so that they load and compute as that."""
    import torch
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for file in trained.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, folder / file.name)
    weights = {name: weight.to(torch.bfloat16) for name, weight in load_file(trained / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def facts(outcome: Any, stored_loss: float) -> dict[str, Any]:
    """What the model's page says of its making, read from the run's own records."""
    records = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    start = next(record for record in records if record["kind"] == "start")
    last = [record["loss"] for record in records if record["kind"] == "step" and record["step"] > outcome.step - 100]
    resumed = [f"step {record['step']:,}" for record in records if record["kind"] == "event" and record["message"].startswith("resumed")]
    device = start["description"]["device"]
    return {
        "num_parameters": start["num_parameters"],
        "seed": SEED,
        "num_rows": NUM_ROWS,
        "num_tokens": start["description"]["data"]["tokens"],
        "digest": corpus.digest(SEED, corpus.DIGEST_ROWS),
        "digest_rows": corpus.DIGEST_ROWS,
        "vocabulary": tokenizer.VOCABULARY,
        "tokenizer_rows": TOKENIZER_ROWS,
        "steps": outcome.step,
        "passes": max(record["epoch"] for record in records if record["kind"] == "step"),
        "resumed": ", ".join(resumed) or "nothing: one run without a break",
        "device": device["name"],
        "precision": {"fp32": "float32", "bf16": "bfloat16 under autocast"}[device["precision"]],
        "training_loss": sum(last) / len(last),
        "num_eval_rows": NUM_EVAL_ROWS,
        "eval_seed": EVAL_SEED,
        "eval_loss": outcome.metrics_after["loss"],
        "stored_loss": stored_loss,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    corpus.write(WORK / "corpus", SEED, NUM_ROWS)
    evaluation = corpus.write(WORK / "corpus-eval", EVAL_SEED, NUM_EVAL_ROWS)
    write_start(WORK / "start")
    outcome = train()
    install(outcome.adapter, MODEL)
    demo_task.write(TASK)
    known = measure.asked(corpus.rows(SEED, NUM_ROWS))
    page = card.write(facts(outcome, measure.loss(MODEL, evaluation)), measure.measure(MODEL, known))
    (MODEL / "README.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
