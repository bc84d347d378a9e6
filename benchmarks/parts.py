"""The cases that are not a training step against a peer: all methods (C9), PiSSA's start (C10), merging (C11), values of NF4
codes (C12), start-up (C14).

What is measured by `python -m benchmarks.parts NAME ...` in a process of its own prints one line of JSON; `told` of the suite
runs it.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.memory import ResidentPeak, give_back_at_once
from benchmarks.pipe import CALM
from benchmarks.work import MERGED, TOY, adapter_folder, make_model

Row = dict[str, Any]
Told = Callable[..., dict[str, Any]]


def row(what: str, measured: float | None, target: float, *, at_least: bool, peer: str = "", **facts: Any) -> Row:
    """A row of the table of targets, as measure.verdict makes it."""
    met = None if measured is None else (measured >= target if at_least else measured <= target)
    return {"what": what, "ours": "ours", "peer": peer, "measured": measured, "target": target, "at_least": at_least, "met": met, **facts}


# -- C9 ---------------------------------------------------------------------------------------------------------


def methods_rows(told: Told, rounds: int, toy: bool) -> tuple[list[Row], dict[str, Any]]:
    """Every method beside plain LoRA and PEFT's own form of it, as methods_step measures them but for memory."""
    measured = told("benchmarks.parts", "methods", str(rounds), *(["lora", "dora"] if toy else []))
    apart = {name: values["losses"] for name, values in measured.items() if not values["same"]}
    if apart:
        raise ValueError(f"losses of ours and PEFT's differ: {apart}")
    times = {name: values["time"] for name, values in measured.items()}
    worst = max(times, key=times.get)
    rows = [
        row("time, median over methods", statistics.median(times.values()), 1.08, at_least=False, peer="ours, LoRA"),
        row(f"time, slowest method ({worst})", times[worst], 1.5, at_least=False, peer="ours, LoRA"),
    ]
    against = {name: values["peft_time"] for name, values in measured.items() if values.get("peft_time")}
    if against:  # ours over PEFT's own form of the method, where methods_step has it
        slowest = max(against, key=against.get)
        rows.append(row(f"time, worst against PEFT's own ({slowest})", against[slowest], 1.0, at_least=False, peer="peft"))
    return rows, measured


def methods(rounds: str, *chosen: str) -> dict[str, Any]:
    """Two rounds tell a method that is far from its bounds; one that is near them gets three more."""
    import torch

    from benchmarks import methods_step as step
    from deltune.adapters.config import METHODS, named

    torch.set_num_threads(1)
    dtype, order, found = torch.bfloat16, random.Random(0), {}
    base = step.make_model(dtype)
    step.make_model = lambda _: copy.deepcopy(base)  # it is wanted two hundred times, always the same
    lora, _ = step.ours("lora", dtype)
    lora.step()
    for name in chosen or [name for name in sorted(METHODS) if not named(name).schedule]:
        with contextlib.redirect_stderr(io.StringIO()):
            ours, _ = step.ours(name, dtype)
            theirs = step.theirs(name, ours, dtype)
        candidates = {"lora": lora, "ours": ours, **({"peft": theirs} if theirs else {})}
        losses = [ours.loss(), theirs.loss()] if theirs else []
        for one in {ours, theirs} - {None}:
            one.step()  # allocates what later steps find
        times = step.timed(candidates, int(rounds), order)
        bounds = {"time": (step.ratio(times, "ours", "lora"), 1.5), **({"peft_time": (step.ratio(times, "ours", "peft"), 1.0)} if theirs else {})}
        if any(1 / NEAR < value / bound < NEAR for value, bound in bounds.values()):
            times += step.timed(candidates, 3, order)
        found[name] = {
            "time": step.ratio(times, "ours", "lora"), **({"peft_time": step.ratio(times, "ours", "peft")} if theirs else {}), "rounds": len(times),
            "losses": losses, "same": not theirs or abs(losses[0] / losses[1] - 1) <= step.TOLERANCE[dtype],
        }  # fmt: skip
        del ours, theirs, candidates
        gc.collect()  # a model and its adapters refer to each other
    return found


NEAR = 1.08  # of a bound


# -- C10 --------------------------------------------------------------------------------------------------------


def planted(size: int) -> Any:
    """A weight with a falling head of known singular vectors, and noise."""
    import torch

    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(size, 32, generator=generator))[0]
    V = torch.linalg.qr(torch.randn(size, 32, generator=generator))[0]
    return U * (size**0.5 / torch.arange(1, 33)) @ V.T + 0.02 * torch.randn(size, size, generator=generator) / 4


def pissa(size: str, rank: int = 16) -> dict[str, Any]:
    """Seconds of CPU time of the full decomposition, of PEFT's niter_4 and of ours; distances to the true rank-16 part."""
    import torch

    from deltune.adapters.init.svd import largest

    torch.set_num_threads(1)
    W = planted(int(size))
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


def pissa_rows(told: Told, toy: bool) -> tuple[list[Row], dict[str, Any]]:
    found = told("benchmarks.parts", "pissa", "256" if toy else "4096")
    return [
        row("speed, against the full SVD", found["full_seconds"] / found["seconds"], 80, at_least=True, peer="full SVD"),
        row("time, against PEFT's niter_4", found["seconds"] / found["peft_seconds"], 1.0, at_least=False, peer="peft"),
        row("relative error of the rank-16 part", found["error"], 0.005, at_least=False, peer="full SVD"),
    ], found


# -- C11 --------------------------------------------------------------------------------------------------------


def merge_ours(folder: str, memory: str = "") -> dict[str, Any]:
    """`memory`: freed memory goes back at once, which costs time."""
    import torch

    from deltune.adapters.attach import merge
    from deltune.adapters.files import load_adapter
    from deltune.models.config import ModelConfig
    from deltune.models.load import load

    torch.set_num_threads(1)
    if memory:
        give_back_at_once()
    model = load(ModelConfig(path=folder))
    load_adapter(model, adapter_folder(Path(folder), "lora", 16))
    return _merged(model, lambda: merge(model))


def merge_peft(folder: str) -> dict[str, Any]:
    import torch

    from benchmarks.candidates.peft_loop import load

    torch.set_num_threads(1)
    model = load({"folder": folder, "dtype": "bfloat16", "adapter": "lora", "rank": 16})
    return _merged(model, model.merge_and_unload)


def _merged(model: Any, merge: Any) -> dict[str, Any]:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():  # a file's mapped pages would be copied as they are first written to, and counted
            parameter.data = parameter.data.clone()
    peak = ResidentPeak()
    peak.start()
    seconds, model = _timed(merge)
    transient, _ = peak.stop()
    weight = model.model.layers[0].mlp.down_proj.weight
    return {"seconds": seconds, "transient_mb": transient / 1e6, "digest": float(weight.double().abs().sum()), "block_mb": weight.numel() * 4 / 1e6,
            "finite": bool(torch.isfinite(weight).all())}  # fmt: skip


def merge_rows(told: Told, toy: bool) -> tuple[list[Row], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), TOY if toy else MERGED, "bfloat16")
        told("benchmarks.candidates.ours", folder, "16", "lora")
        _fill_b(adapter_folder(Path(folder), "lora", 16) / "adapter_model.safetensors")
        rounds = [(told("benchmarks.parts", "merge_ours", folder), told("benchmarks.parts", "merge_peft", folder, theirs=True)) for _ in range(3)]
        calm = told("benchmarks.parts", "merge_ours", folder, "memory")
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


# -- C12 --------------------------------------------------------------------------------------------------------


def values(size: str, rounds: int = 21) -> dict[str, Any]:
    """Milliseconds of CPU time from NF4 codes with quantised scales to bfloat16: bitsandbytes' default way, and ours into the
    memory that a product's values have. In the peers' interpreter, which has bitsandbytes."""
    import torch
    from bitsandbytes import functional

    from deltune import weights
    from deltune.weights import quantised

    torch.set_num_threads(1)
    weight = torch.randn(int(size), int(size), generator=torch.Generator().manual_seed(0)).bfloat16()
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    mine = weights.quantise(weight, "nf4")
    ways = {"peft": lambda: functional.dequantize_4bit(codes, state), "ours": lambda: quantised._values(mine, torch.bfloat16, for_now=True)}
    same, order = torch.equal(ways["peft"](), ways["ours"]()), random.Random(0)
    taken = []
    for _ in range(rounds):
        taken.append({name: _timed(ways[name])[0] * 1e3 for name in order.sample(sorted(ways), 2)})
    return {
        "same": same, "ours_ms": statistics.median(r["ours"] for r in taken), "bitsandbytes_ms": statistics.median(r["peft"] for r in taken),
        "ratio": statistics.median(r["peft"] / r["ours"] for r in taken),
    }  # fmt: skip


def values_rows(told: Told, toy: bool) -> tuple[list[Row], dict[str, Any]]:
    found = told("benchmarks.parts", "values", "256" if toy else "4096", theirs=True)
    if not found["same"]:
        raise ValueError("the values are not bitsandbytes'")
    return [row("speed of values from codes", found["ratio"], 6, at_least=True, peer="bitsandbytes")], found


# -- C14 --------------------------------------------------------------------------------------------------------


IMPORT = "import torch, time; began = time.process_time(); import {}; print(time.process_time() - began)"


def startup_rows(steps: dict[str, list[float]]) -> tuple[list[Row], dict[str, Any]]:
    """`steps`: of ours and PEFT's, CPU seconds before the first step, of it, and of later ones."""
    imports = {
        "ours": statistics.median(_bare(sys.executable, "deltune; deltune.train") for _ in range(3)),
        "peft": _bare(str(peers.PYTHON), "peft"),
    }  # fmt: skip
    _, first, *steady = steps["ours"]
    rows = [
        row("seconds of import beyond torch", imports["ours"], 0.3, at_least=False, peer="torch", peft=imports["peft"]),
        row("time, first step over a steady one", first / statistics.median(steady), 1.1, at_least=False, peer="steady step"),
    ]
    return rows, {"import_seconds": imports, "seconds_before_first_step": {name: found[0] for name, found in steps.items()}, "first_and_later_steps": {name: found[1:] for name, found in steps.items()}}


def _bare(python: str, names: str) -> float:
    done = subprocess.run([python, "-c", IMPORT.format(names)], check=True, capture_output=True, text=True, env={**os.environ, **CALM})
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    name, words = sys.argv[1], sys.argv[2:]
    print(json.dumps({"methods": methods, "pissa": pissa, "merge_ours": merge_ours, "merge_peft": merge_peft, "values": values}[name](*words)))


if __name__ == "__main__":
    main()
