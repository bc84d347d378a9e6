"""Transient memory: the most that was resident (or allocated on the card) during a step, beyond what was before it. Bytes."""

from __future__ import annotations

from pathlib import Path


class ResidentPeak:
    """By the kernel's own high-water mark, which writing 5 to clear_refs sets back. Linux only."""

    def start(self) -> None:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = resident("VmRSS")

    def stop(self) -> int:
        return resident("VmHWM") - self.before


class CudaPeak:
    def start(self) -> None:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def stop(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() - self.before


def resident(field: str) -> int:
    """A field of /proc/self/status that is in kB, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
