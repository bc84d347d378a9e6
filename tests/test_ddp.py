"""Two processes are one: the same losses, gradients and weights, odd counts included; and none waits for a dead peer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest


def start(out, world: int, settings: dict) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if world > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "tests.ranks", str(out), json.dumps(settings)]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    return processes


def run(out, world: int, **settings) -> list[dict]:
    processes = start(out, world, settings)
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    return [json.loads((out.parent / f"{out.name}.{rank}").read_text()) for rank in range(world)]


@pytest.mark.parametrize("settings", [
    {"rows": 37, "micro_batch": 2}, {"rows": 11, "micro_batch": 3},
    {"rows": 37, "micro_batch_tokens": 40, "batching": "packed", "shuffle": True},
])
def test_two_ranks_give_the_curve_of_one(tmp_path, settings):
    one = run(tmp_path / "one", 1, steps=6, accumulate=2, **settings)[0]
    two = run(tmp_path / "two", 2, steps=6, accumulate=1, **settings)
    assert two[0] == two[1]  # every rank has the same numbers and the same weights
    for a, b in zip(one["records"], two[0]["records"], strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    assert one["weights"] == pytest.approx(two[0]["weights"], rel=1e-6)


@pytest.mark.parametrize("optim", ["adamw", "paged_adamw_8bit"])
def test_two_ranks_save_once_and_resume_bit_for_bit(tmp_path, optim):
    straight = run(tmp_path / "straight", 2, steps=6, shuffle=True, optim=optim)
    settings = {"shuffle": True, "every": 2, "folder": str(tmp_path / "run"), "optim": optim}
    first = run(tmp_path / "first", 2, steps=4, **settings)
    assert first[0]["written"] == ["step-00000002", "step-00000004"]
    second = run(tmp_path / "second", 2, steps=6, **settings)
    assert first[0]["records"] + second[0]["records"] == straight[0]["records"]
    assert second[0]["weights"] == straight[0]["weights"]
    if optim != "adamw":
        return
    alone = run(tmp_path / "alone", 1, steps=7, accumulate=2, **settings)  # another number of processes goes on
    assert [r[0] for r in alone[0]["records"]] == [7]


def test_a_rank_that_dies_ends_the_other(tmp_path):
    processes = start(tmp_path / "out", 2, {"steps": 500, "die_at": 3})
    codes = [process.wait(timeout=100) for process in processes]
    assert codes[1] == -9 and codes[0] != 0


def test_processes_end_with_a_launcher_that_is_killed(tmp_path, tiny_folder):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    words = ["engine=ddp", f"model={tiny_folder}", f"data={rows}", "train.steps=1000000", f"output={tmp_path}", "name=r", "eval.samples=0"]
    # the launcher's own group, so that whatever is left of it can be found
    launcher = subprocess.Popen(
        [sys.executable, "-m", "deltune.cli", "launch", "-n", "2", "train", *words],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    children: list[int] = []
    while len(children) < 2 or not (tmp_path / "r" / "metrics.jsonl").exists():
        assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.1)
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True).stdout.split()
        children = [int(pid) for pid in found]
    launcher.kill()
    launcher.wait()
    for _ in range(300):
        if not any(_runs(pid) for pid in children):
            return
        time.sleep(0.1)
    pytest.fail(f"{[pid for pid in children if _runs(pid)]} outlived their launcher")


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
