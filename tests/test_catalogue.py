"""docs/methods.md is what the code says of its methods."""

from __future__ import annotations

import re

import pytest

from deltune.adapters.config import METHODS
from deltune.commands import catalogue
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def page():
    return catalogue.page()


def test_the_page_is_what_the_code_writes(page):
    """If this fails: `make docs`, then look at the difference."""
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == page


def test_every_method_has_a_row_with_every_cell_filled(page):
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    assert rows.keys() == METHODS.keys()
    for name, row in rows.items():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]
        assert len(cells) == 10 and all(cells), name


def test_loras_count_is_the_papers(page):
    # r·(in + out) for q, k, v, o, gate, up, down of 32 blocks, r = 8
    widths = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
    count = 32 * 8 * sum(i + o for i, o in widths)
    assert re.search(rf"^\| `lora` \|.*\| {count:,} \|", page, re.MULTILINE)
