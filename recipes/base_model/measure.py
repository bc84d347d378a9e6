"""What the base model can do: greedy answers to drawn tasks, held to the computed ones. Tasks with several right answers are left out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipes.base_model import corpus
from recipes.base_model.talk import Messages, chat, request, write
from recipes.base_model.words import Draw

OPEN_ENDED = (request, write)
NUM_PROMPTS = 24
MAX_DRAWS = 2000  # a task with few prompts runs out of new ones
LOSS_BATCH = 16


class Score(NamedTuple):
    """One task's result."""

    task: str
    exact_match: float
    num_prompts: int
    num_new: int  # prompts that the training corpus does not hold


def prompts(task, count: int = NUM_PROMPTS) -> list[Messages]:
    """Up to `count` chats of one task with different prompts."""
    found: dict[str, Messages] = {}
    for index in range(MAX_DRAWS):
        draw = Draw(f"measure/{task.__name__}/{index}")
        messages = chat(*task(draw)) if task in corpus.SKILLS else task(draw)
        found.setdefault(_key(messages), messages)
        if len(found) == count:
            break
    return list(found.values())


def asked(rows: Iterable[dict]) -> set[str]:
    """What users say anywhere in these rows."""
    return {m["content"] for row in rows for m in row.get("messages", ()) if m["role"] == "user"}


def _key(messages: Messages) -> str:
    return json.dumps([message["content"] for message in messages if message["role"] != "assistant"])


def loaded(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    from deltune.models.config import ModelConfig
    from deltune.models.load import load, load_tokenizer

    config = ModelConfig(path=str(folder))
    return load(config), load_tokenizer(config)


def loss(folder: Path, files: Sequence[Path]) -> float:
    """Nats per token of the rows in `files`, every token counted, in float32."""
    from deltune.data.config import DataConfig
    from deltune.data.pack import pad
    from deltune.data.prepare import prepare
    from deltune.evaluation.lm import evaluate

    model, tokenizer = loaded(folder)
    data = prepare(DataConfig(train=[str(file) for file in files], mode="pretrain", max_length=512, cache=None), tokenizer).train
    batches = (
        pad([data[index] for index in range(start, min(start + LOSS_BATCH, len(data)))], tokenizer.pad_token_id)
        for start in range(0, len(data), LOSS_BATCH)
    )
    return evaluate(model, batches)["loss"]


def measure(folder: Path, known: set[str]) -> list[Score]:
    """Exact match of the model in `folder` on every task, `known` being the questions of its training corpus."""
    from deltune.data.config import DataConfig
    from deltune.data.prepare import prepare
    from deltune.evaluation.exact import exact_match
    from deltune.models.generation import GenerateOptions

    model, tokenizer = loaded(folder)
    scores = []
    with tempfile.TemporaryDirectory() as name:
        for task in corpus.TASKS:
            if task in OPEN_ENDED:
                continue
            chats = prompts(task)
            file = Path(name) / f"{task.__name__}.jsonl"
            file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in chats), encoding="utf-8")
            data = prepare(DataConfig(train=[str(file)], max_length=512, cache=None), tokenizer).train
            score, _ = exact_match(model, tokenizer, data, GenerateOptions(max_new_tokens=100), batch=NUM_PROMPTS)
            num_new = sum(any(m["content"] not in known for m in one if m["role"] == "user") for one in chats)
            scores.append(Score(task.__name__, score["exact_match"], len(chats), num_new))
    return scores
