"""The examples of docs/generate.md run as they stand."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest

from deltune import LoraConfig, attach, cli, save_adapter
from tests.tiny import save_tiny, tiny_model

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "generate.md").read_text(encoding="utf-8")


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """The files that the page speaks of."""
    save_tiny(tmp_path / "my-model")
    save_adapter(attach(tiny_model(), LoraConfig(rank=2)), tmp_path / "my-adapter")
    for name in ("easy", "hard"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is a delta?"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_run_and_leave_what_the_page_says(workplace, monkeypatch, capsys):
    commands = [line for example in examples("bash") for line in example.strip().split("\n")]
    assert len(commands) == 4
    for line in commands:
        before, _, command = line.rpartition(" | ")
        if before:
            said = shlex.split(before)
            assert said[0] == "printf"
            monkeypatch.setattr("sys.stdin", io.StringIO(said[1].replace("\\n", "\n")))
        words = shlex.split(command)
        assert words[0] == "deltune"
        assert cli.main(words[1:]) == 0, capsys.readouterr().err
    assert [m["role"] for m in json.loads((workplace / "talk.jsonl").read_text())["messages"]] == ["system", *("user", "assistant") * 2]
    assert set(json.loads((workplace / "results" / "metrics.json").read_text())["sources"]) == {"easy.jsonl", "hard.jsonl"}
    shown = json.loads(examples("json")[0])
    line = json.loads((workplace / "answers.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert list(line) == list(shown)
    assert (line["row"], line["input"]) == (shown["row"], shown["input"])
    prediction = json.loads((workplace / "results" / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert all(f"`{key}`" in PAGE for key in prediction)


def test_python_runs(workplace, capsys):
    (example,) = examples("python")
    exec(compile(example, "docs/generate.md", "exec"), {})
    assert len(capsys.readouterr().out) > 20
