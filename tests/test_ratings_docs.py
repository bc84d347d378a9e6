"""docs/ratings.md and docs/statistics.md say what is: their commands have these keys, and their output is what is printed."""

from __future__ import annotations

import re
import shlex

import pytest

from deltune import settings
from deltune.cli import VERBS
from deltune.commands.ratings import main
from deltune.evaluation.text_metrics import RANKS, TEXT_METRICS
from tests.conftest import ROOT

RATINGS, STATISTICS = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("ratings.md", "statistics.md"))
COMMANDS = [shlex.split(line)[1:] for page in (RATINGS, STATISTICS) for block in re.findall(r"```sh\n(.*?)```", page, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_are_understood(words):
    settings.load(getattr(settings, VERBS[words[0]][1]), words[1:])


def test_what_is_shown_is_what_is_printed(real_data, capsys):
    assert main([f"files=[{real_data / 'ratings' / 'vicuna_relative_gpt35'}]"]) == 0
    assert capsys.readouterr().out == re.search(r"```\n(320 .*?)```", RATINGS, re.S)[1]


def test_every_metric_is_told():
    rows = " ".join(re.findall(r"^\| (`.*?`) \|", STATISTICS, re.M))
    assert set(re.findall(r"`([a-z_0-9]+)`", rows)) >= set(TEXT_METRICS)
    assert all(f"`recall@{k}`" in rows or f"`@{k}`" in STATISTICS for k in RANKS)
