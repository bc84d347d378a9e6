"""Arithmetic on a weight as it lies in memory. Sums are formed in float32 or wider and rounded once to the weight's own
type; what reads a weight takes it as it is stored, quantised too, a block of rows at a time."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deltune.weights.quantised import check_writable, dequantised, is_quantised

BLOCK_ELEMENTS = 1 << 22  # of a device: a float32 block of 16 MiB is large enough for full speed, small beside any weight
BLOCK_ELEMENTS_CPU = 1 << 18  # of the CPU: a block of 1 MiB stays in the cache (a merge in bfloat16: 0.19 s against 0.26 s)


def float_view(weight: Tensor) -> Tensor:
    """The weight's values in float32 (float64 stays): the weight itself where it is that already, else a copy. No gradient."""
    return dequantised(weight, _sum_type(weight))


def _sum_type(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@torch.no_grad()
def add_to_weight(weight: Tensor, delta: Tensor, carried: Tensor | None = None) -> None:
    """weight ← weight + delta [out, in], in place; the sum is formed in float32 and rounded once.

    `carried`, like the weight, is what rounding took from it before: it is added, and left holding what it takes now.
    """
    check_writable(weight)
    dtype = _sum_type(weight, delta)
    for rows in row_blocks(weight):
        whole = weight[rows].to(dtype) + delta[rows].to(dtype)
        if carried is not None:
            whole += carried[rows].to(dtype)
        weight[rows].copy_(whole)
        if carried is not None:
            carried[rows].copy_(whole - weight[rows].to(dtype))


@torch.no_grad()
def add_product_to_weight(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """weight ← weight + scale · left [out, r] @ right [r, in], in place, without a whole out×in temporary.

    The sum is formed in float32 or wider and rounded once. A bfloat16 weight on a CPU that multiplies bfloat16 is passed
    over once, with no temporary at all: the kernel sums in float32, and the factors go in as parts in bfloat16 that hold
    them whole.
    """
    check_writable(weight)
    dtype = _sum_type(weight, left, right)
    if dtype == weight.dtype:
        weight.addmm_(left.to(dtype), right.to(dtype), alpha=scale)
        return
    if not weight.is_contiguous() and weight.T.is_contiguous():
        weight, left, right = weight.T, right.T, left.T
    if _sums_bfloat16_in_float32(weight) and dtype == torch.float32:
        (b0, b1, b2), (a0, a1, a2) = _in_bfloat16(left.to(dtype) * scale), _in_bfloat16(right.to(dtype))
        # what is left out is smaller than a float32's last bit
        weight.addmm_(torch.cat([b0, b1, b0, b2, b1, b0], 1), torch.cat([a0, a0, a1, a0, a1, a2], 0))
        return
    right = right.to(dtype)
    for rows in row_blocks(weight):
        block = weight[rows].to(dtype, copy=True)
        weight[rows].copy_(block.addmm_(left[rows].to(dtype), right, alpha=scale))


def _in_bfloat16(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three bfloat16 tensors whose sum a float32 tensor is: each takes the next 8 of its 24 bits."""
    first = tensor.to(torch.bfloat16)
    second = (tensor - first).to(torch.bfloat16)
    return first, second, (tensor - first - second).to(torch.bfloat16)


def _sums_bfloat16_in_float32(weight: Tensor) -> bool:
    """Whether `weight.addmm_` is oneDNN's, which adds to the weight before it rounds; torch's own kernel may not."""
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous() and multiplies_bfloat16("cpu")


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether a device multiplies bfloat16 faster than float32, by its own instructions: CUDA from compute capability 8.0
    on, CPUs for which oneDNN has them (avx512_bf16, amx_bf16, Arm's), Apple's GPUs where torch multiplies it."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and _cpu_multiplies_bfloat16()
    return device.type == "mps" and torch.backends.mps.is_macos_or_newer(14, 0)


def _cpu_multiplies_bfloat16() -> bool:
    # oneDNN's own answer is yes for plain AVX-512 too, where it multiplies bfloat16 in float32 and no faster
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@torch.no_grad()
def store_as(module: nn.Module, dtype: torch.dtype, *, but: Sequence[str] = ()) -> None:
    """Round every floating parameter of a module to a type, one at a time; ties stay. Buffers, and parameters in whose name
    one of `but` is a part, keep theirs. Quantised weights keep their codes and give their values in that type."""
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point() or set(but) & set(name.split(".")):
            continue
        if is_quantised(parameter):
            owner, _, place = name.rpartition(".")
            setattr(module.get_submodule(owner), place, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
        else:
            parameter.data = parameter.data.to(dtype)


def row_squares(weight: Tensor) -> Tensor:
    """‖W‖² of each row [out], in float32 or wider."""
    dtype = _sum_type(weight)
    return torch.cat([torch.linalg.vector_norm(dequantised(weight[rows], dtype), dim=1) for rows in row_blocks(weight)]).square()


def row_products(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Σ_j W_ij (left @ right)_ij of each row i [out], without anything of the weight's size."""
    dtype = _sum_type(weight, left, right)
    left, right = left.to(dtype), right.to(dtype)
    return torch.cat([((dequantised(weight[rows], dtype) @ right.T) * left[rows]).sum(1) for rows in row_blocks(weight)])


def row_blocks(weight: Tensor) -> list[slice]:
    """Slices of a weight's first dimension, each of which is a block of about BLOCK_ELEMENTS values (CPU: _CPU)."""
    if weight.ndim < 2:
        return [slice(None)]
    elements = BLOCK_ELEMENTS_CPU if weight.device.type == "cpu" else BLOCK_ELEMENTS
    step = max(1, elements // max(1, weight.shape[1:].numel()))
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]


def snapshot(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Set a layer's stored tensors aside and give it copies of them to write on.

    A tensor that is tied to another layer stays as it is there. `restore` undoes this bit for bit.
    """
    saved = {name: parameter for name, parameter in layer.named_parameters(recurse=False)}
    for name, parameter in saved.items():
        setattr(layer, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    return saved


def restore(layer: nn.Module, saved: Mapping[str, nn.Parameter]) -> None:
    """Give a layer back the tensors that `snapshot` set aside."""
    for name, parameter in saved.items():
        setattr(layer, name, parameter)
