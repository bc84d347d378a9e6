"""Memory of a step in bytes: the most that was resident (or allocated on the card) during it, beyond what was before it and in all."""

from __future__ import annotations

from pathlib import Path


def give_back_at_once() -> None:
    """glibc keeps nothing that is freed in this process from here on, so that a peak is one of live tensors."""
    import ctypes

    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    for option, value in ((mmap_threshold, 65536), (trim_threshold, 65536), (top_pad, 0)):
        ctypes.CDLL(None).mallopt(option, value)


class ResidentPeak:
    """By the kernel's own high-water mark, which writing 5 to clear_refs sets back. Linux only."""

    def start(self) -> None:
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = resident("VmRSS")

    def stop(self) -> tuple[int, int]:
        peak = resident("VmHWM")
        return peak - self.before, peak


class CudaPeak:
    def start(self) -> None:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def stop(self) -> tuple[int, int]:
        import torch

        peak = torch.cuda.max_memory_allocated()
        return peak - self.before, peak


def resident(field: str) -> int:
    """A field of /proc/self/status that is in kB, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
