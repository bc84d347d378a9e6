"""Fixtures for all tests: no network, few threads, real data by path."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data. Where it is absent a test is skipped with this reason; CI fails on such a skip."""
    folder = Path(os.environ.get("DELTUNE_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "README.md").exists():
        message = f"real data not found at {folder}; set DELTUNE_REAL_DATA"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A model folder with weights and tokenizer, shared by the session; do not write into it."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def any_machine(monkeypatch):
    """engine.precision=auto comes out alike on every machine, as on one without bfloat16 instructions; tests of auto put
    another in its place."""
    monkeypatch.setattr("deltune.engines.precision.multiplies_bfloat16", lambda device: False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tokenised data of tests stays out of the user's cache."""
    monkeypatch.setenv("DELTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
