"""What training costs, from a model's shape: FLOPs per token, bytes by part, and the peak of a device.

Notation: N = weights that multiply activations (head included, embedding lookup not), d = width, L = layers, s = tokens
in an example. A multiply-add is two FLOPs.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

# dense peak in TFLOP/s by a part of the device's name: (float32 as torch uses it by default, bfloat16 and float16)
KNOWN_PEAKS = {
    "B200": (75, 2250), "H200": (67, 989), "H100 PCIe": (51, 756), "H100": (67, 989), "A100": (19.5, 312), "L40S": (91.6, 362),
    "L4": (30.3, 121), "A10": (31.2, 125), "V100": (15.7, 125), "T4": (8.1, 65), "RTX 4090": (82.6, 165), "RTX 3090": (35.6, 71),
}  # fmt: skip


def flops_per_token(model: nn.Module, length: float) -> float:
    """FLOPs of one training step per token, forward and backward, recomputation not counted, as MFU has it.

    Forward 2N and causal attention 2·s·d·L; backward the same again for activations, and 2 per trained weight for its
    own gradient. Counts every weight of two or more dimensions that is not an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:  # tied to the embedding or not, it multiplies
        embeddings.discard(id(head.weight))
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in embeddings]
    weights = sum(p.numel() for p in matrices)
    trained = sum(p.numel() for p in matrices if p.requires_grad)
    return 4.0 * weights + 2.0 * trained + 2 * attention_flops_per_token(model.config, length)


def attention_flops_per_token(config: Any, length: float) -> float:
    """Forward FLOPs of causal attention per token: scores and weighted sum, over half of the square."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    return 2.0 * length * width * text.num_hidden_layers


def device_peak_flops(device: torch.device, precision: str) -> float:
    """Peak FLOP/s of one device: tabled by name for GPUs, else the rate of a matrix product timed here (0.2 s)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (single, half) in KNOWN_PEAKS.items():
            if part in name:
                return 1e12 * (single if precision == "fp32" else half)
    return measured_matmul_flops(device, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32))


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """FLOP/s of square matrix products, the best of several within a time."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == float("inf"):
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best
