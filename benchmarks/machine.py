"""The machine as a result needs it: processor, features, versions, load, commit, and how fast it multiplies matrices.

No path and no host name: a result can be shown to anyone.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
PACKAGES = ("torch", "transformers", "numpy", "peft")


def describe(cuda: bool = False) -> dict[str, Any]:
    model, flags = _processor()
    machine = {
        "processor": model, "features": [f for f in FEATURES if f in flags], "cores": os.cpu_count(), "system": platform.system(),
        "python": platform.python_version(), "commit": _commit(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)},
    }  # fmt: skip
    if cuda:
        import torch

        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            machine["card"] = {"name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    return machine


def load() -> list[float]:
    """The load averages of 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def gemm_flops(dtype: str, device: str = "cpu", size: int | None = None) -> float:
    """FLOP/s of a square matrix product in this type: the median of some, one thread of CPU time, or the card's events."""
    import torch

    torch.set_num_threads(1)
    size = size or (4096 if device == "cuda" else 1024)
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    rates = []
    for _ in range(8):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            a @ a
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        else:
            began = time.process_time()
            a @ a
            seconds = time.process_time() - began
        rates.append(2 * size**3 / max(seconds, 1e-9))
    return statistics.median(rates[2:])


def _processor() -> tuple[str, set[str]]:
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.processor() or platform.machine(), set()
    fields = dict(line.split(":", 1) for line in file.read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())


def _commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        return found.stdout.strip() or None
    except OSError:
        return None


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
