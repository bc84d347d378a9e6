"""`deltune preview` shows exactly what the trainer gets, and nothing that data could do to a terminal."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from deltune.cli import main
from tests.encoded import marked, prepared, write_rows
from tests.tiny import tiny_tokenizer

ROWS = [{"question": f"q{i}", "answer": "a" * (1 + 13 * i), "id": i} for i in range(9)]


@pytest.fixture
def file(tmp_path):
    return write_rows(tmp_path / "a.jsonl", ROWS)


def shown(capsys, *words):
    code = main(["preview", *words])
    out, err = capsys.readouterr()
    return code, out, err


def body_of(out, number):
    """The text under an example's heading."""
    return re.search(rf"^Example {number} · .*\n((?:.*\n)*?)(?=\n(?:Example|Lengths))", out, re.M).group(1)


def test_shown_tokens_are_the_trainer_s(capsys, tiny_folder, file):
    _, out, _ = shown(capsys, f"model={tiny_folder}", f"data={file}", "rows=3", "start=2")
    tokenizer = tiny_tokenizer()
    data = prepared(file, tokenizer).train
    for i in (2, 3, 4):
        expected = marked(data[i], tokenizer).replace("«", "[[").replace("»", "]]").replace("<s>", "{<s>}").replace("</s>", "{</s>}")
        assert body_of(out, i) == expected + "\n"
        assert f"Example {i} · {file}:{i + 1} · {len(data[i].ids)} tokens, {data.num_trained[i]} trained" in out
    assert "Example 5" not in out and "Example 1 " not in out


def test_counts_and_what_was_recognised(capsys, tiny_folder, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [*ROWS, {"question": "q", "answer": ""}])
    _, out, err = shown(capsys, f"model={tiny_folder}", f"data={file}", "data.on_bad=skip", "data.max_length=100", "data.eval_size=2")
    report = prepared(file, tiny_tokenizer(), on_bad="skip", max_length=100, eval_size=2).report
    assert "format input_output (input=question, output=answer), template chat; columns not used: id" in out
    assert f"rows 10: 7 used, 1 rejected, 0 over the limits, 2 held out for evaluation; {report.truncated} truncated" in out
    share = 100 * report.trained_tokens / report.tokens
    assert f"examples 7: {report.tokens} tokens, {report.trained_tokens} trained ({share:.1f} %)" in out
    assert f"{file}:10: answer is empty" in err
    _, out, _ = shown(capsys, f"model={tiny_folder}", f"data={file}", "data.on_bad=skip", "data.eval_size=2", "part=eval")
    assert "Evaluation data" in out and "rows 2: 2 used" in out


def test_the_histogram_counts_every_example(capsys, tiny_folder, file):
    _, out, _ = shown(capsys, f"model={tiny_folder}", f"data={file}")
    bars = re.findall(r"^ +(\d+)-(\d+) +(#*) +(\d+)$", out, re.M)
    lengths = prepared(file, tiny_tokenizer()).train.lengths
    assert len(bars) >= 3
    for low, high, bar, count in bars:
        assert int(count) == sum(int(low) <= n <= int(high) for n in lengths)
        assert bool(bar) == (count != "0")
    assert sum(int(bar[3]) for bar in bars) == len(lengths)


def test_colour_carries_the_same_text(capsys, tiny_folder, file):
    words = (f"model={tiny_folder}", f"data={file}", "rows=2")
    _, plain, _ = shown(capsys, *words, "color=never")
    _, colored, _ = shown(capsys, *words, "color=always")
    assert "\x1b[" in colored and "\x1b[" not in plain
    text = re.sub(r"\x1b\[[\d;]*m", "", colored)
    assert text == re.sub(r"\[\[|\]\]|\{(?=</?s>)|(?<=s>)\}", "", plain)
    green = "".join(re.findall(r"\x1b\[[^m]*32m([^\x1b]*)", colored))
    assert "a" * (1 + 13) in green and "q1" not in green


def test_control_characters_of_data_are_written_out(capsys, tiny_folder, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "\x1b]0;title\x07\u202eabc", "completion": "漢\u2028字\x1b[31m"}])
    _, out, _ = shown(capsys, f"model={tiny_folder}", f"data={file}")
    assert "\\x1b]0;title\\x07\\u202eabc" in out and "漢\\u2028字\\x1b[31m" in out
    assert not set("\x1b\x07\u202e\u2028") & set(out)


def test_streams_are_shown_too(capsys, tiny_folder, file):
    _, out, _ = shown(capsys, f"model={tiny_folder}", f"data={file}", "data.streaming=true", "data.shuffle=false", "rows=2", "start=1")
    assert "so far, the data being streamed" in out and f"Example 1 · {file}:2" in out and f"Example 2 · {file}:3" in out


@pytest.mark.parametrize(
    ("words", "reason"),
    [(["start=9"], "there are 9 examples"), (["part=eval"], "there is no evaluation data"), (["data.format=alpaca"], "lacks 'instruction'")],
)
def test_faults_are_one_message(capsys, tiny_folder, file, words, reason):
    code, _, err = shown(capsys, f"model={tiny_folder}", f"data={file}", *words)
    assert code == 2 and reason in err and "Traceback" not in err


def test_output_that_cannot_be_encoded_is_escaped(tiny_folder, tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "漢", "completion": "é"}])
    code = "import sys; from deltune.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {"PYTHONIOENCODING": "ascii", "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "preview", f"model={tiny_folder}", f"data={file}", "data.cache=null"],
        capture_output=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\\u6f22" in done.stdout
    assert b"torch" not in done.stderr


def test_no_weights_are_read(capsys, tiny_folder, tmp_path, file):
    import shutil

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    code, out, _ = shown(capsys, f"model={folder}", f"data={file}")
    assert code == 0 and "Example 0" in out


# -- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    ["train.micro_batch=3", "train.accumulate=2"], ["train.micro_batch_tokens=256", "data.max_length=200", "train.accumulate=2"],
    ["train.micro_batch=3", "data.batching=padded"], ["train.micro_batch=3", "data.batching=padded", "data.streaming=true", "train.steps=9"],
])
def test_a_step_is_shown_with_the_documents_that_the_trainer_puts_together(capsys, tiny_folder, file, words, tmp_path):
    """Told from outside: a step of the caller's own notes what it is handed."""
    import deltune
    from deltune.training.loss import causal_lm_step

    handed = []

    def forward_step(model, batch):
        handed.append(batch)
        return causal_lm_step(model, batch)

    packed = [] if any("batching" in word for word in words) else ["data.batching=packed"]
    common = [f"model={tiny_folder}", f"data={file}", *words, *packed]
    quiet = ["log.progress=off", "log.report=false", "log.sinks=[]", "eval.samples=0", f"output={tmp_path}", "name=r"]
    per_step = 2 if "train.accumulate=2" in words else 1
    deltune.train([*common, *quiet], forward_step=forward_step)
    code, out, _ = shown(capsys, *common, "step=2")
    assert code == 0 and ("batches: packed" in out) == bool(packed)
    parts = re.split(r"^Micro-batch ", out, flags=re.M)[1:]
    batches = handed[per_step : 2 * per_step]
    assert len(parts) == len(batches) > 0
    for part, batch in zip(parts, batches, strict=True):
        assert re.findall(r"^Document \d+ · (.*) · positions", part, re.M) == batch.rows
        assert part.count(" x ") and f"{batch.num_tokens} tokens, {batch.num_trained_tokens} trained" in part
        borders = [tuple(map(int, found)) for found in re.findall(r"positions (\d+)-(\d+),", part)]
        if batch.segments is None:
            assert all(start == 0 for start, _ in borders) and "padding" in part
        else:
            assert borders == [(a, b - 1) for a, b in zip(batch.segments, batch.segments[1:], strict=False)]


def test_a_step_past_the_end_is_refused(capsys, tiny_folder, file):
    code, _, err = shown(capsys, f"model={tiny_folder}", f"data={file}", "train.micro_batch=3", "step=4")
    assert code == 2 and "step=4: the run has 3 steps" in err
    code, _, err = shown(capsys, f"model={tiny_folder}", f"data={file}", "step=1", "rows=5")
    assert code == 2 and "rows" in err
