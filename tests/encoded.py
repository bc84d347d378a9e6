"""Rows to examples and back to text, for tests of the data room: what is trained stands between guillemets."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

from deltune.data.config import DataConfig
from deltune.data.prepare import Prepared, prepare


def write_rows(path: Path, rows: list) -> str:
    """JSON lines; the path as text."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(path: Path | str, tokenizer, *, folder: Path | None = None, **settings) -> Prepared:
    """A file through the one way in, without a cache unless asked for."""
    return prepare(DataConfig(**({"train": [str(path)], "cache": None} | settings)), tokenizer, folder=folder)


def marked(example, tokenizer) -> str:
    """The text of an example with «trained» parts marked; every token is decoded, special ones too."""
    found = ""
    for trained, group in groupby(zip(example.ids, example.labels, strict=True), key=lambda pair: pair[1] != -100):
        text = tokenizer.decode([int(i) for i, _ in group], skip_special_tokens=False)
        found += f"«{text}»" if trained else text
    return found


def all_marked(data, tokenizer) -> list[str]:
    return [marked(data[i], tokenizer) for i in range(len(data))]
