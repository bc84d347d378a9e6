"""What training costs and what a device can do: FLOPs per token by closed form, and the rates of known devices.

Notation: N = weights that multiply activations (head included, embedding lookup not), d = width of attention, L = layers,
s = tokens in an example. A multiply-add is two FLOPs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltune.models.dry_run import Kernel

# -- FLOPs ------------------------------------------------------------------------------------------------------


def flops_per_token(model: nn.Module, length: float) -> float:
    """FLOPs of one training step per token, forward and backward, recomputation not counted, as MFU has it.

    Forward 2N, and 2·s·d·L of causal attention (half of the square). Backward 2 per weight and the attention twice for
    the gradient of activations, in every layer from the lowest trained one on, and 2 per trained weight for its own
    gradient. Of a mixture of experts only those count that a token visits. Works on the meta device too.
    """
    weights = _multiplying(model)
    lowest = min((_layer(name) for name, p in model.named_parameters() if p.requires_grad), default=float("inf"))
    forward = sum(2.0 * n for _, n, _ in weights)
    backward = sum(2.0 * n for name, n, _ in weights if _layer(name) >= lowest)
    backward += sum(2.0 * n for _, n, trained in weights if trained)
    text = model.config.get_text_config()
    reached = max(0, text.num_hidden_layers - max(0, lowest)) / text.num_hidden_layers
    return forward + backward + (1 + 2 * reached) * attention_flops_per_token(model.config, length)


def attention_flops_per_token(config: Any, length: float) -> float:
    """Forward FLOPs of causal attention per token: scores and weighted sum, over half of the square."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    return 2.0 * length * width * text.num_hidden_layers


def _multiplying(model: nn.Module) -> list[tuple[str, float, bool]]:
    """(name, number of weights that each token meets, whether it is trained) of every matrix but embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:  # tied to the embedding or not, it multiplies
        embeddings.discard(id(head.weight))
    visited = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    found = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in embeddings:
            continue
        is_head = head is not None and parameter is head.weight
        stacked = parameter.ndim == 3 and ".experts." in name  # [experts, out, in]
        share = visited / parameter.shape[0] if stacked and visited else 1.0
        found.append(("lm_head" if is_head else name, parameter.numel() * share, parameter.requires_grad))
    return found


def _layer(name: str) -> float:
    """The number of the block that a parameter is in; embeddings lie below all of them, the rest above."""
    number = re.search(r"\.(\d+)\.", name)
    if number:
        return int(number[1])
    return -1 if re.search(r"embed|wte|wpe", name) else float("inf")


# -- devices ----------------------------------------------------------------------------------------------------

# by a part of the device's name: dense peaks in TFLOP/s of float32 (as torch uses it by default, without TF32), bfloat16
# and float16 (tensor cores, float32 sums), then memory in GB/s; from the vendors' data sheets
KNOWN_DEVICES = {
    "B200": (75, 2250, 2250, 8000),
    "GH200": (67, 989, 989, 4000),
    "H200": (67, 989, 989, 4800),
    "H100 PCIe": (51, 756, 756, 2000),
    "H100 NVL": (60, 835, 835, 3900),
    "H100": (67, 989, 989, 3350),
    "H800": (67, 989, 989, 3350),
    "A100": (19.5, 312, 312, 1935),
    "A800": (19.5, 312, 312, 1935),
    "L40S": (91.6, 362, 362, 864),
    "L40": (90.5, 181, 181, 864),
    "L4": (30.3, 121, 121, 300),
    "A10G": (35, 70, 70, 600),
    "A10": (31.2, 125, 125, 600),
    "A30": (10.3, 165, 165, 933),
    "A40": (37.4, 149.7, 149.7, 696),
    "RTX A6000": (38.7, 154.8, 154.8, 768),
    "RTX 6000 Ada": (91.1, 364, 364, 960),
    "RTX 5090": (104.8, 209.5, 209.5, 1792),
    "RTX 4090": (82.6, 165, 165, 1008),
    "RTX 4080": (48.7, 97.5, 97.5, 717),
    "RTX 3090": (35.6, 71, 71, 936),
    "RTX 3080": (29.8, 59.5, 59.5, 760),
    "V100": (15.7, 15.7, 125, 900),
    "T4": (8.1, 8.1, 65, 320),
    "MI325X": (163.4, 1307, 1307, 6000),
    "MI300X": (163.4, 1307, 1307, 5300),
}
ORDER = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ATTAINED = 0.7  # of a tabled peak, by large products and plain kernels alike


def arithmetic(precision: str, weights: torch.dtype) -> torch.dtype:
    """The type that matrices are multiplied in: the weights' own with fp32, else autocast's."""
    return weights if precision == "fp32" else PRECISIONS[precision]


def device_peak_flops(device: torch.device, dtype: torch.dtype | str) -> float:
    """Peak FLOP/s of one device in a type or engine precision: tabled by name for GPUs, else a product timed here (0.2 s)."""
    dtype = PRECISIONS[dtype] if isinstance(dtype, str) else dtype
    known = _known(device)
    if known is not None and dtype in ORDER:
        return 1e12 * known[ORDER.index(dtype)]
    return measured_matmul_flops(device, dtype)


def _known(device: torch.device) -> tuple[float, ...] | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rates for part, rates in KNOWN_DEVICES.items() if re.search(rf"\b{part}\b", name)), None)


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """FLOP/s of square matrix products, the best of several within a time."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / _best_seconds(lambda: (a @ a)[0, 0].item(), seconds)


def _best_seconds(action: Callable[[], Any], seconds: float, at_least: int = 5) -> float:
    """The shortest time of an action, tried for so many seconds: what else the machine does only makes it longer."""
    found, deadline = [], time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(found) < at_least:
        began = time.perf_counter()
        action()
        found.append(time.perf_counter() - began)
    return min(found)


@dataclass(frozen=True)
class Speed:
    """What a device sustains. `origin` says where the figures are from."""

    flops: dict[torch.dtype, float]  # per second
    bytes_per_second: float
    seconds_per_kernel: float  # until the next one can start, however small
    overlaps: bool  # kernels are queued by the CPU while the device works
    origin: str

    def seconds(self, kernels: Iterable[Kernel]) -> float:
        """Each kernel takes the longer of its arithmetic and its memory traffic (the roofline)."""
        kernels = list(kernels)
        slowest = min(self.flops.values())
        work = sum(max(k.flops / self.flops.get(k.dtype, slowest), k.num_bytes / self.bytes_per_second) for k in kernels)
        starts = len(kernels) * self.seconds_per_kernel
        return max(work, starts) if self.overlaps else work + starts


def device_speed(device: torch.device, dtypes: Iterable[torch.dtype]) -> Speed:
    """The sustained rates of a device in these types: tabled and discounted for known GPUs, else measured (about 0.5 s)."""
    seconds_per_kernel = _seconds_per_kernel()
    known = _known(device)
    if known is not None:
        flops = {dtype: 1e12 * ATTAINED * rate for dtype, rate in zip(ORDER, known[:3], strict=True)}
        origin = f"{ATTAINED:.0%} of the data sheet of {torch.cuda.get_device_name(device)}"
        return Speed(flops, 1e9 * ATTAINED * known[3], seconds_per_kernel, True, origin)
    flops = {dtype: measured_matmul_flops(device, dtype) for dtype in set(dtypes)}
    rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}" for dtype, rate in flops.items())
    bandwidth = _measured_bandwidth(device)
    origin = f"measured here just now: {rates}, {bandwidth / 1e9:.0f} GB/s"
    return Speed(flops, bandwidth, seconds_per_kernel, device.type != "cpu", origin)


def _measured_bandwidth(device: torch.device, num_bytes: int = 1 << 25) -> float:
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        target[0].item()

    return 2 * num_bytes / _best_seconds(copy, 0.1)


PYTHON = 4  # the time that a model's own Python takes around an operation, in operations that have nothing to compute


def _seconds_per_kernel(number: int = 200) -> float:
    """What Python, torch and autograd spend on an operation of a model, however small it is."""
    x = torch.ones(8, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(number):
            y = y * 1.0
        y.sum().backward()

    return PYTHON * _best_seconds(chain, 0.05) / (2 * number)
