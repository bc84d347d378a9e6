"""docs/data.md does what it says: every row gives the text shown below it, every setting is one."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from deltune.data.config import DataConfig
from deltune.data.prepare import prepare
from deltune.errors import DataError
from deltune.settings import PreviewSettings, load
from tests.encoded import all_marked
from tests.test_data_templates import CHATML, tokenizer_with

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(.*)\n((?:.*\n)*?)```$", PAGE, re.M)
ROWS = [(first, second) for first, second in pairwise(BLOCKS) if first[0] == "jsonl"]


def settings_of(words: str) -> dict:
    fields = re.search(r"fields=(\{.*?\})", words)
    rest = words.replace(fields.group(0), "") if fields else words
    found = {name: yaml.safe_load(f'"{value}"') for name, value in (word.split("=", 1) for word in shlex.split(rest))}
    found |= {"max_length": int(found["max_length"])} if "max_length" in found else {}
    found |= {"train_on_source": found["train_on_source"] == "true"} if "train_on_source" in found else {}
    return found | ({"fields": yaml.safe_load(fields.group(1).replace(":", ": "))} if fields else {})


def test_the_page_has_only_blocks_that_are_tested():
    assert len(ROWS) > 10
    assert [kind for kind, _, _ in BLOCKS if kind not in ("jsonl", "trained", "error", "yaml")] == []
    assert all(second[0] in ("trained", "error") for _, second in ROWS)
    assert len(ROWS) == sum(kind in ("trained", "error") for kind, _, _ in BLOCKS)


@pytest.mark.parametrize(("rows", "result"), ROWS, ids=[f"{i}-{second[0]}" for i, (_, second) in enumerate(ROWS)])
def test_rows_give_what_is_shown(tmp_path, rows, result):
    (tmp_path / "a.jsonl").write_text(rows[2], encoding="utf-8")
    config = DataConfig(train=[str(tmp_path / "a.jsonl")], cache=None, **settings_of(rows[1] + result[1]))
    tokenizer = tokenizer_with(CHATML)
    if result[0] == "error":
        with pytest.raises(DataError) as error:
            prepare(config, tokenizer)
        assert result[2].strip() in str(error.value)
    else:
        (text,) = all_marked(prepare(config, tokenizer).train, tokenizer)
        assert text.replace("«", "[[").replace("»", "]]").strip("\n") == result[2].strip("\n")


@pytest.mark.parametrize("block", [body for kind, _, body in BLOCKS if kind == "yaml"])
def test_settings_are_accepted(block):
    mapping = yaml.safe_load(block)
    assert load(PreviewSettings, mapping=mapping).data != DataConfig()


def test_every_setting_it_names_exists():
    named = set(re.findall(r"`data\.(\w+)", PAGE))
    assert named and named <= set(DataConfig.__dataclass_fields__)
