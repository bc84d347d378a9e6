"""A plain model folder written anew with its linear layers in 4 or 8 bits, in the form that transformers reads through
bitsandbytes. A file at a time, so that no more than one of its files is in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import nn

from deltune.errors import ModelError
from deltune.models import quantise
from deltune.models.config import EightBit, FourBit, ModelConfig
from deltune.weights import bnb_files, dequantised, is_quantised, read_tensors, write_tensors

INDEX = "model.safetensors.index.json"


@torch.no_grad()
def write(folder: Path, out: Path, quant: EightBit) -> float:
    """Write `folder` into the new folder `out`, quantised. Returns ‖Q(W) - W‖ / ‖W‖ over all that was rounded.

    Raises ModelError for layers that are stored as [in, out], which that form has no word for.
    """
    from deltune.models.load import empty

    model = empty(ModelConfig(path=str(folder)), fast=False)
    chosen = quantise.layers(model, quant)
    turned = next((name for name, module in chosen.items() if not isinstance(module, nn.Linear)), None)
    if turned is not None:
        raise ModelError(f"{turned} is stored as [in, out], and bitsandbytes' files hold [out, in] alone, so the merged model cannot be stored quantised. What fits: requantise=none")
    lost = whole = 0.0
    names: dict[str, str] = {}
    num_bytes = 0
    out.mkdir(parents=True)
    for file in sorted(folder.iterdir()):
        if file.suffix != ".safetensors":
            if file.name != INDEX:
                shutil.copy2(file, out / file.name)
            continue
        written = {}
        for name, tensor in read_tensors(file).items():
            module = chosen.get(name.removesuffix(".weight"))
            if module is None:
                written[name] = tensor
                continue
            codes = quantise.codes_of(tensor, module, quant).data
            assert is_quantised(codes)
            lost += (dequantised(codes, torch.float32) - tensor.float()).double().square().sum().item()
            whole += tensor.double().square().sum().item()
            written |= bnb_files.in_file(name, codes)
        write_tensors(out / file.name, written)
        names |= dict.fromkeys(written, file.name)
        num_bytes += sum(tensor.nbytes for tensor in written.values())
    if (folder / INDEX).exists():
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(names.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    plain = sorted(name for name, module in model.named_modules() if type(module) is nn.Linear and name not in chosen)
    dtype = str(model.dtype).removeprefix("torch.")
    config["quantization_config"] = bnb_files.in_config(quant.name, isinstance(quant, FourBit) and quant.double, dtype, plain)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return (lost / whole) ** 0.5 if whole else 0.0
