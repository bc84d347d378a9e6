"""The worked example of docs/add-a-method.md is a method like any other, made by writing one file."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from deltune.adapters import config, methods
from deltune.adapters.attach import attach
from tests import test_adapters_methods as suite

PAGE = Path(__file__).parent.parent / "docs" / "add-a-method.md"


@pytest.fixture
def svf(tmp_path):
    """The page's file in a folder of its own, discovered; gone afterwards."""
    before = [dict(table) for table in (config.DELTAS, config.METHODS, config.ADAPTERS.named)]
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "svf.py").write_text(code, encoding="utf-8")
    methods.__path__.append(str(tmp_path / "more"))
    config.discover()
    yield "svf"
    methods.__path__.remove(str(tmp_path / "more"))
    for table, was in zip((config.DELTAS, config.METHODS, config.ADAPTERS.named), before, strict=True):
        table.clear()
        table.update(was)


def test_the_pages_method_passes_the_whole_suite(svf, tmp_path):
    ran = 0
    for name, test in inspect.getmembers(suite, inspect.isfunction):
        wanted = inspect.signature(test).parameters
        if not name.startswith("test_") or "method" not in wanted or "cannot_merge" in name:
            continue
        for number, values in enumerate(given(test)):
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            test(**{"method": svf, **({"tmp_path": folder} if "tmp_path" in wanted else {}), **values})
            ran += 1
    assert ran >= 15


def given(test):
    """The other parameters of a test, as its marks give them."""
    for mark in test.pytestmark:
        names, rows = mark.args
        if mark.name == "parametrize" and names != "method":
            return [dict(zip(names, row, strict=True)) for row in rows]
    return [{}]


def test_it_is_what_the_paper_says(svf):
    model = suite.shaken(attach(suite.model_of(torch.float64), suite.config_of(svf, targets=["linear"], dtype="auto")))
    delta = suite.deltas_of(model)["linear"]
    W = model.linear.base_layer.weight.detach()
    U, sigma, Vt = torch.linalg.svd(W)
    factors = torch.ones_like(sigma)
    factors[:4] = delta.z.detach()
    paper = sum(sigma[i] * factors[i] * torch.outer(U[:, i], Vt[i]) for i in range(len(sigma)))
    assert (W + delta.delta(W) - paper).abs().max() < 1e-12


def test_the_command_line_knows_it(svf, tmp_path):
    from deltune.errors import ConfigError
    from deltune.settings import load_run

    assert load_run(["adapter=svf", "adapter.rank=3"]).adapter.rank == 3
    with pytest.raises(ConfigError, match=r"adapter\.rnk=3.*adapter\.rank"):
        load_run(["adapter=svf", "adapter.rnk=3"])
    with pytest.raises(ConfigError, match=r"at least|above 0"):
        load_run(["adapter=svf", "adapter.rank=0"])
