"""The benchmark's processes: the protocol with a candidate made for the test, and ours beside PEFT from end to end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import peers, suite
from benchmarks.cases import Case
from benchmarks.measure import Candidate, Target
from benchmarks.nursery import Nursery
from benchmarks.pipe import CALM, Fault, Process

FAKE = """
from benchmarks.pipe import Pacer
pacer = Pacer()
def work():
    print("a library's chatter, which is no answer")
    pacer.ready(before_first_step=0.5)
    for step in range(4):
        pacer.ended(loss=float(step), tokens=10)
    raise ValueError("the fifth step breaks")
pacer.guarded(work)
"""


@pytest.fixture
def fake(tmp_path):
    process = Process([sys.executable, "-c", FAKE], tmp_path / "log", patience=60)
    yield process
    process.end()


def test_steps_are_done_when_they_are_asked_for(fake):
    assert fake.hear()["before_first_step"] == 0.5
    assert fake.steps(1)["losses"] == [0.0]
    answer = fake.steps(2)
    assert answer["losses"] == [1.0, 2.0] and answer["tokens"] == 20
    assert answer["cpu"] >= 0 and answer["wall"] > 0
    assert "chatter" in fake.log.read_text()


def test_a_fault_arrives_with_its_own_words(fake):
    fake.hear()
    with pytest.raises(Fault, match="ValueError: the fifth step breaks"):
        fake.steps(5)


def test_a_process_that_dies_says_its_last_line(tmp_path):
    process = Process([sys.executable, "-c", "import sys; sys.exit('no such thing')"], tmp_path / "log")
    with pytest.raises(Fault, match="status 1: no such thing"):
        process.hear()
    process.end()


def test_a_silent_process_is_not_waited_for(tmp_path):
    process = Process([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", patience=0.5)
    with pytest.raises(Fault, match="status -9"):
        process.hear()
    process.end()


@pytest.fixture
def nursery(tmp_path):
    (tmp_path / "fake_candidate.py").write_text(FAKE)
    (tmp_path / "fake_end.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(3)")
    paths = f"{Path(__file__).parent.parent}:{tmp_path}"
    with open(tmp_path / "nursery.log", "w") as log:
        found = Nursery(sys.executable, None, log, {**CALM, "PYTHONPATH": paths})
    yield found
    found.close()


def test_a_forked_process_is_like_one_that_was_started(nursery, tmp_path):
    processes = [Process(["fake_candidate"], tmp_path / f"log{at}", nursery=nursery, patience=60) for at in range(2)]
    for process in processes:
        assert process.hear()["before_first_step"] == 0.5
        assert process.steps(2)["losses"] == [0.0, 1.0]
        assert "chatter" in process.log.read_text()
    with pytest.raises(Fault, match="ValueError: the fifth step breaks"):
        processes[0].steps(3)
    processes[1].end()
    assert processes[1].child.returncode == 0
    assert nursery.cpu_of_ended > 0


def test_a_forked_process_has_its_words_and_its_status(nursery, tmp_path):
    with open(tmp_path / "log", "w") as errors:
        child = nursery.fork(["fake_end", "a", "b"], errors)
    assert child.stdout.read() == "['a', 'b']\n"
    assert child.wait() == 3


def test_a_forked_process_that_is_silent_is_not_waited_for(nursery, tmp_path):
    (tmp_path / "fake_sleep.py").write_text("import time; time.sleep(60)")
    process = Process(["fake_sleep"], tmp_path / "log", nursery=nursery, patience=0.5)
    with pytest.raises(Fault, match="status -9"):
        process.hear()
    process.end()


def run_toy(monkeypatch, candidates: dict, targets: tuple = (), **changes) -> dict:
    """A case with the peers in this interpreter, which has PEFT."""
    pytest.importorskip("peft")
    monkeypatch.setattr(peers, "PYTHON", Path(sys.executable))
    peers.absent.cache_clear()
    runner = suite.Suite(toy=True, cuda=False, rounds=1)
    try:
        record = runner.run("T", Case("toy", candidates, targets, **changes))
        assert runner.cpu_seconds() > 0
        return record
    finally:
        runner.close()
        peers.absent.cache_clear()


def test_ours_and_peft_train_alike_from_end_to_end(monkeypatch):
    candidates = {"ours": Candidate("ours"), "peft": Candidate("peft")}
    record = run_toy(monkeypatch, candidates, (Target("speed", "ours", "peft", 1.0),), dtype="float32", rows="lognormal", micro_batch=4)
    assert record["failed"] == []
    assert record["absent"] == {}
    assert len(record["candidates"]["ours"]["losses"]) == 2  # of the first step and of one round
    assert record["loss_distance"]["ours"] < 1e-5
    assert record["targets"][0]["measured"] > 0
    assert record["candidates"]["ours"]["useful_tokens_per_second"] > 0


def test_a_model_that_is_drawn_is_quantised_and_its_peak_counted(monkeypatch):
    candidates = {"ours": Candidate("ours", {"config": {"quant": {"name": "nf4"}}}, equal_to=None)}
    targets = (Target("peak", "ours", "a card", 40.0), Target("tokens", "ours", "a card", 64.0))
    record = run_toy(monkeypatch, candidates, targets, drawn=True, memory=True, micro_batch=1)
    assert record["failed"] == [] and record["absent"] == {}
    assert 0.1 < record["targets"][0]["measured"] < 40
    assert record["targets"][1]["met"] is True
    assert record["candidates"]["ours"]["transient_mb"] > 0


def test_other_losses_fail_the_case_and_a_broken_peer_is_absent(monkeypatch, tmp_path):
    say = "from benchmarks.pipe import Pacer\np = Pacer()\ndef work():\n    p.ready()\n    while True:\n        {}\np.guarded(work)"
    programs = {"ours": "p.ended(2.0, 10)", "peft": "p.ended(1.0, 10)", "broken": "raise ValueError('no such attention')"}

    def start(self, label, candidate, case, model, rows):
        return Process([sys.executable, "-c", say.format(programs[label])], tmp_path / label, patience=60)

    monkeypatch.setattr(suite.Suite, "start", start)
    monkeypatch.setattr(suite.Suite, "model", lambda self, case: tmp_path)
    monkeypatch.setattr(peers, "absent", lambda kind: None)
    runner = suite.Suite(toy=True, cuda=False, rounds=2)
    candidates = {"ours": Candidate("ours"), "peft": Candidate("peft"), "broken": Candidate("peft", equal_to=None)}
    record = runner.run("T", Case("toy", candidates, dtype="float32"))
    runner.close()
    assert record["failed"] == ["ours and peft differ by 1.0e+00 (limit 1.0e-05)"]
    assert record["absent"] == {"broken": "ValueError: no such attention"}
    assert set(record["candidates"]) == {"ours", "peft"}
