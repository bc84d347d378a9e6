"""Quantised weights as bitsandbytes names and packs them in a file, for programs that read its files. It is not needed for it."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from deltune.weights import codes as coding
from deltune.weights.quantised import QuantisedTensor


def in_file(name: str, weight: QuantisedTensor) -> dict[str, Tensor]:
    """The tensors of a linear layer's weight [out, in] called `name` (…weight), by their names."""
    if weight.kind == "int8":
        layer = name.removesuffix("weight")
        return {name: weight.codes, f"{layer}SCB": weight.scales, f"{layer}weight_format": torch.tensor(0, dtype=torch.uint8)}
    state: dict[str, Any] = {
        "quant_type": weight.kind, "blocksize": weight.block_size, "dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape),
    }  # fmt: skip
    tensors = {name: weight.codes.unsqueeze(1), f"{name}.absmax": weight.scales, f"{name}.quant_map": coding.levels(weight.kind)}
    if weight.nested:
        tensors |= {f"{name}.nested_absmax": weight.scales_of_scales, f"{name}.nested_quant_map": coding.dynamic_levels()}
        state |= {"nested_blocksize": coding.SCALES_BLOCK, "nested_dtype": "float32", "nested_offset": weight.mean.item()}
    packed = json.dumps(state).encode()
    return tensors | {f"{name}.quant_state.bitsandbytes__{weight.kind}": torch.frombuffer(bytearray(packed), dtype=torch.uint8)}


def in_config(kind: str, double: bool, dtype: str, skipped: list[str]) -> dict[str, Any]:
    """`quantization_config` of transformers' config.json. `dtype` is computed in; `skipped` are linear layers that stay plain."""
    eight = kind == "int8"
    config = {"quant_method": "bitsandbytes", "load_in_8bit": eight, "load_in_4bit": not eight, "llm_int8_skip_modules": skipped}
    if eight:
        return config
    return config | {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double, "bnb_4bit_compute_dtype": dtype, "bnb_4bit_quant_storage": "uint8"}
