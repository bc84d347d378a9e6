"""The corpus of the base model: mixes prose and chats into rows of about one training length. Row i depends on (seed, i) only.

A row is `{"text": ...}`, texts one after the other, or `{"messages": [...]}`, a chat of one or of several tasks.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from recipes.base_model.prose import PROSE
from recipes.base_model.skills import SKILLS
from recipes.base_model.talk import TALK, Messages, chat
from recipes.base_model.words import Draw

TASKS = SKILLS | TALK
SEED = 1
DIGEST_ROWS = 1000  # that many rows tell one generator from another
TEXT_SHARE = 0.3
FOCUS = 10  # words of a kind in one row
ROW_CHARACTERS = 780  # about 220 tokens


def conversation(draw: Draw) -> Messages:
    """One task: a question with its answer, or a few turns that belong together."""
    task = draw.weighted(TASKS)
    return chat(*task(draw)) if task in SKILLS else task(draw)


def row(seed: int, index: int) -> dict:
    """Row `index` of the corpus of this seed."""
    draw = Draw(f"{seed}/{index}", FOCUS)
    if draw.chance(TEXT_SHARE):
        parts = [draw.weighted(PROSE)(draw)]
        while sum(map(len, parts)) < ROW_CHARACTERS:
            parts.append(draw.weighted(PROSE)(draw))
        return {"text": "\n\n".join(parts)}
    messages = conversation(draw)
    # a system message speaks of its own chat, so such a chat stays alone
    limit = 0 if draw.chance(0.1) or messages[0]["role"] == "system" else ROW_CHARACTERS
    while sum(len(message["content"]) + 12 for message in messages) < limit:
        more = conversation(draw)
        if more[0]["role"] != "system":
            messages += more
    return {"messages": messages}


def rows(seed: int, count: int) -> Iterator[dict]:
    return (row(seed, index) for index in range(count))


def digest(seed: int, count: int) -> str:
    """sha256 over the first `count` rows as they are written."""
    hashed = hashlib.sha256()
    for one in rows(seed, count):
        hashed.update(line(one).encode())
    return hashed.hexdigest()


def line(one: dict) -> str:
    return json.dumps(one, ensure_ascii=False) + "\n"


def write(folder: Path, seed: int, count: int) -> tuple[Path, Path]:
    """Write texts.jsonl and chats.jsonl, `count` rows together."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "texts.jsonl", folder / "chats.jsonl"
    with paths[0].open("w", encoding="utf-8") as texts, paths[1].open("w", encoding="utf-8") as chats:
        for one in rows(seed, count):
            (texts if "text" in one else chats).write(line(one))
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=50_000)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.seed, arguments.rows)
