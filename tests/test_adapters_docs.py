"""docs/adapters.md does what it says: its Python and its commands run, one after the other."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.tiny import save_tiny

pytest.importorskip("peft")

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "adapters.md").read_text(encoding="utf-8")


def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    from deltune.commands.merge import main

    save_tiny(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "sh", "python", "python", "python", "python", "python", "python"]
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, "docs/adapters.md", "exec"), names)
        else:
            program, verb, *words = shlex.split(text)
            assert (program, verb) == ("deltune", "merge")
            assert main(words, None) == 0
    assert (tmp_path / "my-merged-model" / "model.safetensors").exists()
    assert names["theirs"].peft_config["default"].r == 8
    assert not any("adapters" in name for name, _ in names["model"].named_modules())
