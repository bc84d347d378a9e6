"""The console: plain lines away from a terminal, a bar on one, and neither hurt by what users' text holds."""

import io
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deltune.training.callbacks import EvalRecord
from deltune.training.config import LogConfig
from deltune.training.console import Console
from tests import recorded_run as made

ROOT = Path(__file__).resolve().parent.parent
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def tell(console: Console, folder: Path, *, start_step: int = 0, last: int = 200, **changes) -> None:
    console.on_start(made.info(folder, start_step=start_step, **changes))
    made.play([console], folder, start_step + 1, last)
    console.on_end(made.outcome(folder, last))


def lines_of(tmp_path, **changes) -> list[str]:
    stream = io.StringIO()
    tell(Console(LogConfig(lines_every_seconds=0.0), stream), tmp_path, **changes)
    return stream.getvalue().splitlines()


def test_the_head_says_what_will_be_trained(tmp_path):
    head = lines_of(tmp_path, start_step=120)[:7]
    assert head == [
        "Deltune 0.1.0: words",
        "  model       bundled (LlamaForCausalLM, float32)",
        "  parameters  90,112 trainable of 3.39M (2.7 %)",
        "  data        2,000 examples (84,210 tokens, 12,034 trained), 200 for evaluation",
        "  steps       200, going on after 120",
        "  device      CPU, 2 threads",
        f"  folder      {tmp_path}",
    ]


def test_a_head_without_facts_is_shorter(tmp_path):
    assert lines_of(tmp_path, description={})[:4] == [
        "Deltune: words",
        "  parameters  90,112 trainable of 3.39M (2.7 %)",
        "  steps       200",
        f"  folder      {tmp_path}",
    ]


def test_a_plain_line_has_the_numbers_of_its_step(tmp_path):
    record = made.step_record(120)
    [line] = [line for line in lines_of(tmp_path) if line.startswith("step 120/200  loss")]
    pattern = r"step 120/200  loss (\S+)  lr (\S+)  grad (\S+)  (\S+)k tok/s  432 MB  ETA \d:\d\d"
    loss, lr, grad, speed = map(float, re.fullmatch(pattern, line).groups())
    assert loss == pytest.approx(record.loss, abs=5e-5)
    assert lr == pytest.approx(record.lr, rel=0.05)
    assert grad == pytest.approx(record.grad_norm, rel=5e-3)
    assert speed * 1000 == pytest.approx(record.tokens_per_second, rel=5e-3)


def test_remaining_time_on_the_line_is_steps_left_times_their_seconds(tmp_path):
    stream = io.StringIO()
    console = Console(LogConfig(lines_every_seconds=0.0), stream)
    console.on_start(made.info(tmp_path, config={"eval": {"every": 50}}))
    console.on_eval(EvalRecord(0, {"loss": 1.0}, False, seconds=30.0))
    for step in range(1, 41):
        console.on_step(made.step_record(step, seconds=3.0))
    # 160 steps of 3 s and evaluations of 30 s at 50, 100, 150 and 200
    assert stream.getvalue().splitlines()[-1].endswith("ETA 10:00")


def test_lines_keep_their_distance_in_time(tmp_path, monkeypatch):
    from deltune.training import console as module

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    console = Console(LogConfig(lines_every_seconds=5.0), stream)
    console.on_start(made.info(tmp_path))
    for step in range(1, 201):
        now[0] += 0.6
        console.on_step(made.step_record(step))
    steps = [int(m[1]) for m in re.finditer(r"^step (\d+)/", stream.getvalue(), re.M)]
    assert steps == [*range(1, 200, 9), 200]  # 9 steps of 0.6 s are the first that take 5 s; the last is always there


def test_evaluations_saves_and_events_have_lines(tmp_path):
    stream = io.StringIO()
    console = Console(LogConfig(), stream)
    console.on_start(made.info(tmp_path))
    console.on_eval(made.eval_record(40))
    console.on_save(40, tmp_path / "checkpoints" / "step-00000040")
    console.on_event(41, "step 41: loss nan; skipped")
    assert stream.getvalue().splitlines()[-3:] == [
        "step 40/200  evaluation: loss 1.766  perplexity 5.845  token accuracy 59.9 %  exact match 8.7 %  (best so far)",
        "step 40/200  saved checkpoints/step-00000040",
        "step 41: loss nan; skipped",
    ]


def test_the_end_is_a_table_before_and_after(tmp_path):
    assert lines_of(tmp_path)[-6:] == [
        "done at step 200 in 13 s (best at step 200)",
        "metric          before   after",
        "loss              4.18  0.1281",
        "perplexity       65.37   1.137",
        "token accuracy   5.0 %  97.1 %",
        "exact match      0.0 %  90.6 %",
    ]


def test_lines_carry_no_escape_codes_and_users_text_cannot_bring_any(tmp_path):
    stream = io.StringIO()
    console = Console(LogConfig(), stream)
    console.on_start(made.info(tmp_path, name="\x1b[31mred\nrun"))
    console.on_event(1, "\x1b]0;title\x07")
    assert "\x1b" not in stream.getvalue() and "\x07" not in stream.getvalue()
    assert "␛[31mred run" in stream.getvalue()


def test_progress_off_says_nothing(tmp_path):
    stream = Terminal()
    tell(Console(LogConfig(progress="off"), stream), tmp_path)
    assert stream.getvalue() == ""


def test_other_ranks_say_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    stream = Terminal()
    tell(Console(LogConfig(), stream), tmp_path)
    assert stream.getvalue() == ""


# -- the bar ----------------------------------------------------------------------------------------------------


def bar_of(tmp_path, monkeypatch, width: int = 100, **changes) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    from deltune.training import console as module

    monkeypatch.setattr(module, "REDRAW_SECONDS", 0.0)
    stream = Terminal()
    tell(Console(LogConfig(), stream), tmp_path, **changes)
    return ANSI.sub("", stream.getvalue()).replace("\r", "\n")


def test_the_bar_shows_smoothed_loss_speed_memory_and_eta(tmp_path, monkeypatch):
    text = bar_of(tmp_path, monkeypatch)
    [line] = {line.strip() for line in text.splitlines() if " 119/200  " in line}
    assert re.search(r"━ 119/200  loss 0\.\d{4}  [\d.]+k tok/s  432 MB  ETA \d:\d\d$", line)
    weights = [0.9 ** (119 - step) for step in range(1, 120)]
    mean = sum(w * made.step_record(step).loss for w, step in zip(weights, range(1, 120), strict=True)) / sum(weights)
    assert f"loss {mean:.4f}" in line


def test_evaluations_scroll_above_the_bar_and_the_table_ends_it(tmp_path, monkeypatch):
    text = bar_of(tmp_path, monkeypatch, width=120)
    assert "step 80/200  evaluation: loss 0.773" in text
    assert text.rstrip().splitlines()[-1].split() == ["exact", "match", "0.0", "%", "90.6", "%"]


@pytest.mark.parametrize("width", [40, 60])
def test_a_narrow_terminal_keeps_loss_and_eta(tmp_path, monkeypatch, width):
    text = bar_of(tmp_path, monkeypatch, width=width)
    shown = [line for line in text.splitlines() if " 119/200  " in line]
    assert shown and all(len(line.rstrip()) <= width for line in shown)
    assert all("loss 0." in line and "ETA " in line for line in shown)


def test_markup_in_users_text_is_only_text(tmp_path, monkeypatch):
    assert "[bold]run[/]" in bar_of(tmp_path, monkeypatch, name="[bold]run[/]")


def test_the_cursor_comes_back(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for ended in (True, False):
        stream = Terminal()
        console = Console(LogConfig(), stream)
        console.on_start(made.info(tmp_path))
        made.play([console], tmp_path, 1, 3)
        assert stream.getvalue().count("\x1b[?25l") == 1
        console.on_end(made.outcome(tmp_path)) if ended else console.close()
        assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l")


def test_a_dumb_terminal_gets_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    tell(Console(LogConfig(), stream), tmp_path)
    assert "\x1b" not in stream.getvalue()


# -- streams that fail ------------------------------------------------------------------------------------------


def python(code: str, **options) -> subprocess.Popen:
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    return subprocess.Popen([sys.executable, "-c", start + textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


RUN = """
    from pathlib import Path
    from tests import recorded_run as made
    from deltune.training.config import LogConfig
    from deltune.training.console import Console
    console = Console(LogConfig(lines_every_seconds=0.0))
    console.on_start(made.info(Path("."), name="naïve – 日本"))
    made.play([console], Path("."), 1, 200)
    console.on_end(made.outcome(Path(".")))
    print("the end", file=sys.stderr)
"""


def test_a_reader_who_leaves_does_not_end_the_run():
    process = python(RUN)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read().decode() == "the end\n"
    process.stderr.close()
    assert process.wait(timeout=60) == 0


def test_an_encoding_without_the_signs_does_not_end_the_run():
    import os

    out, err = python(RUN, env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}).communicate(timeout=60)
    assert err.decode() == "the end\n"
    assert out.decode("ascii").startswith("Deltune 0.1.0: na?ve ? ??")
