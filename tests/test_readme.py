"""What the README shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deltune.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
SHELL = re.findall(r"```sh\n(.*?)```", README, re.S)


def test_the_python_blocks_run_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(PYTHON) == 2
    space: dict = {}
    for number, block in enumerate(PYTHON):
        exec(compile(block, f"README block {number}", "exec"), space)
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    assert space["outcome"].step == 20 and space["outcome"].adapter.is_dir()


def test_the_shown_complaint_is_the_real_one(capsys):
    shown = re.search(r"```\n\$ deltune ([^\n]*)\n(.*?)```", README, re.S)
    assert main(shown[1].split()) == 2
    assert capsys.readouterr().err.strip() == shown[2].strip()


def commands():
    for block in SHELL:
        for line in block.splitlines():
            words = line.split("#")[0].split()
            if words[:1] == ["deltune"]:
                yield words[1:]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_shown_command_has_words_that_are_understood(words, tmp_path, monkeypatch):
    """Config, run folder and data are made up around the command; its words must compose."""
    from deltune import settings

    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("model: bundled\ndata: {train: [chats.jsonl]}\n")
    run = Path("runs/my-run")
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text("{}")
    (run / "config.yaml").write_text(settings.load_run(["data=chats.jsonl"]).to_yaml())
    verb, rest = words[0], words[1:]
    if verb == "list":
        from deltune.commands.list import main

        assert main(rest) == 0
        return
    classes = {
        "init": settings.InitSettings, "preview": settings.PreviewSettings, "plan": settings.Run, "train": settings.Run,
        "chat": settings.ChatSettings, "eval": settings.EvalSettings, "merge": settings.MergeSettings,
    }  # fmt: skip
    file = next((Path(w) for w in rest if w.endswith(".yaml")), None)
    settings.load(classes[verb], [w for w in rest if not w.endswith(".yaml")], file)


def test_every_page_it_points_to_is_there():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (root / target).exists(), target
