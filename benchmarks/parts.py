"""The cases that are not a training step against a peer: all methods (C9), PiSSA's start (C10), merging (C11), start-up (C14).

Each part measured by `python -m benchmarks.parts NAME FOLDER` in a process of its own prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.memory import ResidentPeak
from benchmarks.pipe import CALM, RETURNS_MEMORY
from benchmarks.work import MERGED, TOY, make_model

Row = dict[str, Any]


def row(what: str, measured: float | None, target: float, *, at_least: bool, peer: str = "", **facts: Any) -> Row:
    """A row of the table of targets, as measure.verdict makes it."""
    met = None if measured is None else (measured >= target if at_least else measured <= target)
    return {"what": what, "ours": "ours", "peer": peer, "measured": measured, "target": target, "at_least": at_least, "met": met, **facts}


def told(words: list[str], *, python: str = sys.executable, memory: bool = False, timeout: float = 900) -> dict[str, Any]:
    """What a process says in its last line of output. Raises CalledProcessError."""
    environment = {**os.environ, **CALM, **(RETURNS_MEMORY if memory else {})}
    done = subprocess.run([python, *words], check=True, capture_output=True, text=True, env=environment, timeout=timeout)
    return json.loads(done.stdout.strip().splitlines()[-1])


def part(name: str, *words: str, python: str = sys.executable, memory: bool = False) -> dict[str, Any]:
    return told(["-m", "benchmarks.parts", name, *words], python=python, memory=memory)


# -- C9 ---------------------------------------------------------------------------------------------------------


def methods(rounds: int, toy: bool) -> tuple[list[Row], dict[str, Any]]:
    """Every method beside plain LoRA, by methods_step."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "methods.json"
        words = [sys.executable, "-m", "benchmarks.methods_step", "--rounds", str(rounds), "--out", str(out)]
        words += ["--only", "lora", "dora"] if toy else []
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **CALM})
        measured = json.loads(out.read_text())
    times = {name: values["time"] for name, values in measured["methods"].items()}
    worst = max(times, key=times.get)
    rows = [
        row("time, median over methods", statistics.median(times.values()), 1.08, at_least=False, peer="ours, LoRA"),
        row(f"time, slowest method ({worst})", times[worst], 1.5, at_least=False, peer="ours, LoRA"),
    ]
    against = {name: values["peft_time"] for name, values in measured["methods"].items() if values.get("peft_time")}
    if against:  # ours over PEFT's own form of the method, where methods_step has it
        slowest = max(against, key=against.get)
        rows.append(row(f"time, worst against PEFT's own ({slowest})", against[slowest], 1.0, at_least=False, peer="peft"))
    return rows, measured


# -- C10 --------------------------------------------------------------------------------------------------------


def planted(size: int) -> Any:
    """A weight with a falling head of known singular vectors, and noise."""
    import torch

    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(size, 32, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(size, 32, generator=generator))[0]
    return U * (size**0.5 / torch.arange(1, 33)) @ V.T + 0.02 * torch.randn(size, size, generator=generator) / 4


def pissa(size: int = 4096, rank: int = 16) -> dict[str, Any]:
    """Seconds of CPU time of the full decomposition, of PEFT's niter_4 and of ours; distances to the true rank-16 part."""
    import torch

    from deltune.adapters.init.svd import largest

    torch.set_num_threads(1)
    W = planted(size)
    began = time.process_time()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    full = time.process_time() - began
    true = (U[:, :rank] * S[:rank]) @ Vh[:rank]

    def error(U: Any, S: Any, V: Any) -> float:
        return float(((U * S) @ V.T - true).norm() / true.norm())

    # what PEFT calls for init_lora_weights="pissa_niter_4"
    theirs = [_timed(lambda: torch.svd_lowrank(W, q=rank, niter=4)) for _ in range(3)]
    ours = [_timed(lambda: largest(W, rank, torch.Generator().manual_seed(0))) for _ in range(3)]
    return {
        "full_seconds": full, "peft_seconds": statistics.median(s for s, _ in theirs), "seconds": statistics.median(s for s, _ in ours),
        "peft_error": error(*theirs[-1][1]), "error": error(*ours[-1][1]),
    }  # fmt: skip


def _timed(work: Any) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def pissa_rows(toy: bool) -> tuple[list[Row], dict[str, Any]]:
    found = part("pissa", *(["256"] if toy else []))
    return [
        row("speed, against the full SVD", found["full_seconds"] / found["seconds"], 80, at_least=True, peer="full SVD"),
        row("time, against PEFT's niter_4", found["seconds"] / found["peft_seconds"], 1.0, at_least=False, peer="peft"),
        row("relative error of the rank-16 part", found["error"], 0.005, at_least=False, peer="full SVD"),
    ], found


# -- C11 --------------------------------------------------------------------------------------------------------


def merge_ours(folder: str) -> dict[str, Any]:
    import torch

    from deltune.adapters.attach import merge
    from deltune.adapters.files import load_adapter
    from deltune.models.config import ModelConfig
    from deltune.models.load import load

    torch.set_num_threads(1)
    model = load(ModelConfig(path=folder))
    load_adapter(model, Path(folder) / "adapter-lora")
    return _merged(model, lambda: merge(model))


def merge_peft(folder: str) -> dict[str, Any]:
    import torch

    from benchmarks.candidates.peft_loop import load

    torch.set_num_threads(1)
    model = load({"folder": folder, "dtype": "bfloat16", "adapter": "lora"})
    return _merged(model, model.merge_and_unload)


def _merged(model: Any, merge: Any) -> dict[str, Any]:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():  # a file's mapped pages would be copied as they are first written to, and counted
            parameter.data = parameter.data.clone()
    peak = ResidentPeak()
    peak.start()
    seconds, model = _timed(merge)
    transient = peak.stop()
    weight = model.model.layers[0].mlp.down_proj.weight
    return {"seconds": seconds, "transient_mb": transient / 1e6, "digest": float(weight.double().abs().sum()), "block_mb": weight.numel() * 4 / 1e6,
            "finite": bool(torch.isfinite(weight).all())}  # fmt: skip


def merge_rows(toy: bool) -> tuple[list[Row], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), TOY if toy else MERGED, "bfloat16")
        subprocess.run([sys.executable, "-m", "benchmarks.candidates.ours", folder, "16", "lora"], check=True, env={**os.environ, **CALM}, stdout=subprocess.DEVNULL)
        _fill_b(Path(folder) / "adapter-lora" / "adapter_model.safetensors")
        rounds = [(part("merge_ours", folder), part("merge_peft", folder, python=str(peers.PYTHON))) for _ in range(3)]
        calm = part("merge_ours", folder, memory=True)  # freed memory goes back, which costs time
    ours, theirs = rounds[-1]
    if abs(ours["digest"] - theirs["digest"]) > 1e-4 * theirs["digest"]:
        raise ValueError(f"the merged weights differ: {ours['digest']} and {theirs['digest']}")
    ratio = statistics.median(t["seconds"] / o["seconds"] for o, t in rounds)
    block = ours["block_mb"]  # one weight in float32, the most that a row block can be
    return [
        row("speed, against PEFT's merge_and_unload", ratio, 8, at_least=True, peer="peft"),
        row("transient MB, within one row block in float32", calm["transient_mb"], round(block, 1), at_least=False, peer="one block"),
    ], {"ours": ours, "peft": theirs, "transient_mb": calm["transient_mb"]}


def _fill_b(file: Path) -> None:
    """A fresh adapter's B is zero, which would merge to nothing."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    generator = torch.Generator().manual_seed(0)
    save_file({n: torch.randn(t.shape, generator=generator) / 64 if "lora_B" in n else t for n, t in tensors.items()}, file, {"format": "pt"})
    (file.parent / "deltune.json").unlink(missing_ok=True)  # it holds the digest of the file that was


# -- C14 --------------------------------------------------------------------------------------------------------


IMPORT = "import torch, time; began = time.process_time(); import {}; print(time.process_time() - began)"


def startup_rows(timed: dict[str, Any]) -> tuple[list[Row], dict[str, Any]]:
    """`timed` is C1's table: first steps and steady steps were measured there. Imports are measured here, three times each."""
    imports = {
        "ours": statistics.median(told(["-c", IMPORT.format("deltune; deltune.train")]) for _ in range(3)),
        "peft": statistics.median(told(["-c", IMPORT.format("peft")], python=str(peers.PYTHON)) for _ in range(3)),
    }  # fmt: skip
    rows = [row("seconds of import beyond torch", imports["ours"], 0.3, at_least=False, peer="torch", peft=imports["peft"])]
    if "ours" in timed:
        mine = timed["ours"]
        rows.append(row("time, first step over a steady one", mine["first_step_seconds"] / mine["seconds_per_step"], 1.1, at_least=False, peer="steady step"))
    return rows, {"import_seconds": imports}


def main() -> None:
    name, words = sys.argv[1], sys.argv[2:]
    found = pissa(*map(int, words)) if name == "pissa" else {"merge_ours": merge_ours, "merge_peft": merge_peft}[name](*words)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
