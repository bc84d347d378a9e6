"""docs/runs.md says what is: its code runs, and every field, file, sink and key that exists is in it."""

import os
import re
from pathlib import Path

from deltune.training import metrics
from deltune.training.sinks import SINKS, STEP_SCALARS
from tests import recorded_run as made

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "runs.md").read_text(encoding="utf-8")


def test_the_code_runs(tmp_path, monkeypatch):
    folder = made.write_run(tmp_path / "runs" / "words", steps=40)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 3
    found: dict = {}
    for block in blocks:
        exec(compile(block, "docs/runs.md", "exec"), found)
    assert found["loss"][0] == (1, made.step_record(1).loss) and len(found["loss"]) == 40
    callback = found["BestLoss"]()
    made.play([callback], tmp_path, 1, 40)
    assert callback.best == min(made.step_record(step).loss for step in range(1, 41))
    assert {"loss.png", "report.html", "README.md"} <= set(os.listdir(folder))


def test_every_kind_of_line_and_field_is_told(tmp_path):
    folder = made.write_run(tmp_path, steps=40)
    file = metrics.MetricsFile(folder / "metrics.jsonl")
    file.on_start(made.info(folder, start_step=40))
    file.on_event(40, "resumed")
    file.on_end(made.outcome(folder, 40))
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", TEXT, re.M))
    lines = metrics.read(file.path)
    assert {line["kind"] for line in lines} == {"start", "step", "eval", "save", "event", "end"}
    for line in lines:
        told = set(re.findall(r"`(\w+)`", rows[line["kind"]]))
        assert set(line) - {"kind", "time"} <= told


def test_every_sink_scalar_and_timing_field_is_told():
    for name in (*STEP_SCALARS, *metrics.TIMING):
        assert f"`{name}`" in TEXT
    for name, sink in SINKS.items():
        assert f"| `{name}` |" in TEXT
        assert sink.install == name or f"pip install '{sink.install}'" in TEXT
