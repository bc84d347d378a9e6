"""metrics.jsonl: what is written reads back to the same bits, and a resumed run leaves the file of one never stopped."""

import json
import math
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deltune.errors import CheckpointError
from deltune.training import metrics, records
from deltune.training.callbacks import EvalRecord
from deltune.training.metrics import MetricsFile
from tests import recorded_run as made

ROOT = Path(__file__).resolve().parent.parent


def started(folder: Path, **changes) -> MetricsFile:
    file = MetricsFile(folder / "metrics.jsonl")
    file.on_start(made.info(folder, **changes))
    return file


def timeless(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in metrics.TIMING} for line in lines]


def test_numbers_read_back_to_the_same_bits(tmp_path):
    values = [0.1, 1 / 3, 1e-310, 5e-324, 1.7976931348623157e308, -0.0, 2.0**-1074 * 3, math.nan, math.inf, -math.inf]
    file = started(tmp_path)
    for i, value in enumerate(values, 1):
        file.on_step(made.step_record(i, loss=value, extra={"aux": value}))
    lines = [line for line in metrics.read(file.path) if line["kind"] == "step"]
    assert [line["loss"].hex() for line in lines] == [v.hex() for v in values]
    assert [line["extra"]["aux"].hex() for line in lines] == [v.hex() for v in values]


def test_every_line_is_strict_json(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    file = started(tmp_path, description={"odd": [math.nan, {"deep": math.inf}], "bad text": "\ud800"})
    file.on_step(made.step_record(1, loss=math.nan, grad_norm=-math.inf))
    file.on_event(1, "loss nan\nsecond line")
    for line in file.path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=refuse)
    assert len(file.path.read_text().splitlines()) == 3


def test_a_message_that_reads_nan_stays_text(tmp_path):
    file = started(tmp_path, description={"note": "inf"})
    file.on_event(0, "nan")
    assert metrics.read(file.path)[-1]["message"] == "nan"
    assert metrics.read(file.path)[0]["description"] == {"note": "inf"}


def test_scalars_of_numpy_and_torch_are_written_as_numbers(tmp_path):
    import numpy as np
    import torch

    file = started(tmp_path)
    file.on_eval(EvalRecord(0, {"loss": np.float32(0.5), "mine": torch.tensor(0.25)}, False, 0.0))
    assert metrics.read(file.path)[-1]["metrics"] == {"loss": 0.5, "mine": 0.25}


def test_each_line_is_in_the_file_before_the_callback_returns(tmp_path):
    file = started(tmp_path)
    sizes = []
    for step in range(1, 6):
        file.on_step(made.step_record(step))
        sizes.append(len(metrics.read(file.path)))
    assert sizes == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("killed_at", [41, 57, 80, 119])
def test_a_resumed_run_leaves_the_file_of_one_never_stopped(tmp_path, killed_at):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    file = started(whole)
    file.on_eval(made.eval_record(0))
    made.play([file], whole, 1, 120)
    file.on_end(made.outcome(whole, 120))

    first = started(cut)
    first.on_eval(made.eval_record(0))
    made.play([first], cut, 1, killed_at)
    first.close()
    with open(cut / "metrics.jsonl", "a") as torn:
        torn.write('{"kind": "step", "step": 12')
    saved = killed_at // 40 * 40
    second = started(cut, start_step=saved)
    made.play([second], cut, saved + 1, 120)
    second.on_end(made.outcome(cut, 120))

    assert timeless(metrics.read(cut / "metrics.jsonl")) == timeless(metrics.read(whole / "metrics.jsonl"))


def test_a_run_killed_before_its_first_checkpoint_keeps_its_first_evaluation(tmp_path):
    first = started(tmp_path)
    first.on_eval(made.eval_record(0))
    made.play([first], tmp_path, 1, 7)
    first.close()
    second = started(tmp_path)
    made.play([second], tmp_path, 1, 2)
    kept = [(line["kind"], line.get("step")) for line in metrics.read(second.path)]
    assert kept == [("start", None), ("eval", 0), ("step", 1), ("step", 2)]


def test_truncation_keeps_lines_as_they_are_and_drops_later_ones(tmp_path):
    made.write_run(tmp_path, steps=100)
    path = tmp_path / "metrics.jsonl"
    before = path.read_text().splitlines()
    metrics.truncate_after(path, 60)
    after = path.read_text().splitlines()
    steps = [json.loads(line).get("step", 0) for line in before]
    expected = [line for line, step in zip(before, steps, strict=True) if step <= 60 and '"kind": "end"' not in line]
    assert after == expected
    assert len(after) < len(before)
    metrics.truncate_after(path, 60)
    assert path.read_text().splitlines() == after


def test_a_completed_run_that_goes_on_has_one_end(tmp_path):
    made.write_run(tmp_path, steps=80)
    file = started(tmp_path, num_steps=120, start_step=80)
    made.play([file], tmp_path, 81, 120)
    file.on_end(made.outcome(tmp_path, 120))
    lines = metrics.read(file.path)
    assert [line["kind"] for line in lines].count("end") == 1
    assert [line["kind"] for line in lines].count("start") == 1
    assert lines[0]["num_steps"] == 120


@pytest.mark.parametrize("tail", ["{", '{"kind": "step", "st', '{"kind": "step"}', "\0\0\0\0", "42", "\x80"])
def test_only_a_last_line_cut_short_is_forgiven(tmp_path, tail):
    file = started(tmp_path)
    made.play([file], tmp_path, 1, 3)
    whole = metrics.read(file.path)
    with open(file.path, "ab") as torn:
        torn.write(tail.encode("latin-1"))
    assert metrics.read(file.path) == whole
    with open(file.path, "ab") as torn:
        torn.write(b"\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:5: not a line"):
        metrics.read(file.path)


def test_a_folder_without_metrics_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: not found; is this a run folder"):
        records.read(tmp_path)


def test_other_versions_after_a_resume_are_an_event(tmp_path):
    file = started(tmp_path)
    made.play([file], tmp_path, 1, 5)
    newer = made.DESCRIPTION | {"versions": made.DESCRIPTION["versions"] | {"torch": "2.14.0"}}
    second = started(tmp_path, start_step=5, description=newer)
    events = [line for line in metrics.read(second.path) if line["kind"] == "event"]
    assert [e["message"] for e in events] == ["resumed with other versions: torch 2.13.0 -> 2.14.0"]


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    file = started(tmp_path)
    made.play([file], tmp_path, 1, 3)
    file.on_end(made.outcome(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_message_and_leaves_no_torn_line(tmp_path):
    """A file size limit stands in for the full disk: the kernel refuses the write in the same place."""
    code = textwrap.dedent(f"""
        import resource, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from tests import recorded_run as made
        from deltune.errors import DeltuneError
        from deltune.training.metrics import MetricsFile
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        folder = Path({str(tmp_path)!r})
        file = MetricsFile(folder / "metrics.jsonl")
        file.on_start(made.info(folder))
        size = file.path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, size + 1000))
        try:
            made.play([file], folder, 1, 50)
        except DeltuneError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "metrics.jsonl" in done.stdout and "free some space" in done.stdout, done.stderr
    data = (tmp_path / "metrics.jsonl").read_bytes()
    assert data.endswith(b"\n")
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")[1:]] == [1, 2]


def test_steps_done_again_after_a_rollback_replace_the_first_try(tmp_path):
    file = started(tmp_path)
    made.play([file], tmp_path, 1, 10)
    for step in range(7, 13):
        file.on_step(made.step_record(step, loss=float(step)))
    run = records.read(tmp_path)
    assert run.curve("loss")[0] == list(range(1, 13))
    assert run.curve("loss")[1][6:] == [7.0, 8.0, 9.0, 10.0, 11.0, 12.0]


def test_totals_are_sums_over_steps_and_rates_are_sums_over_seconds(tmp_path):
    file = started(tmp_path)
    file.on_step(made.step_record(1, num_tokens=100, num_trained_tokens=10, seconds=1.0, flops=5.0, mfu=0.1, peak_memory_bytes=7))
    file.on_step(made.step_record(2, num_tokens=500, num_trained_tokens=20, seconds=3.0, flops=7.0, mfu=0.5, peak_memory_bytes=5))
    totals = records.read(tmp_path).totals()
    assert (totals.num_tokens, totals.num_trained_tokens, totals.seconds) == (600, 30, 4.0)
    assert totals.tokens_per_second == 150.0  # 600 / 4, not the mean of 100 and 166.7
    assert totals.mfu == pytest.approx(0.4)  # (0.1 * 1 + 0.5 * 3) / 4
    assert (totals.peak_memory_bytes, totals.flops) == (7, 12.0)


def test_a_run_that_still_goes_on_takes_its_metrics_from_evaluations(tmp_path):
    made.write_run(tmp_path, steps=100, finished=False)
    run = records.read(tmp_path)
    assert run.outcome == {}
    assert run.metrics_before == made.eval_record(0).metrics
    assert run.metrics_after == made.eval_record(80).metrics
    assert run.last_step == 100


def test_a_kill_between_two_lines_loses_none(tmp_path):
    """kill -9 right after a step: every step told is in the file."""
    code = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from tests import recorded_run as made
        from deltune.training.metrics import MetricsFile
        folder = Path({str(tmp_path)!r})
        file = MetricsFile(folder / "metrics.jsonl")
        file.on_start(made.info(folder))
        made.play([file], folder, 1, 33)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl") if line["kind"] == "step"] == list(range(1, 34))
