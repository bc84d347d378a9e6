"""What tells one base model from another: its tensors' names and shapes, and a sample of their values.

The sample is hashed once for every floating type that the stored weights can be rounded to, so that the same model
loaded in float32 and in bfloat16 is known to be the same. Quantised weights have a hash each, and the others one without
them: a model and its quantised form are compared by what both hold as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltune import weights
from deltune.adapters.adapted import Adapted
from deltune.adapters.layers import Stack
from deltune.adapters.wrapper import original, walk

SAMPLES = 64  # values read of each tensor
STRIDE = 0x9E3779B1  # a prime far from any layer width, so that samples fall into all rows and columns

# type of a stored weight -> the types it can be rounded to in one step
COARSER = {
    torch.float64: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
    torch.float16: (torch.float16,),
}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the model below its adapters, merged or not. A shared one comes under each of its names."""
    tensors: dict[str, Tensor] = {}
    for name, module in walk(model):
        layer = original(module)
        if isinstance(layer, Stack):  # its owner has come before it, and has it under this name
            tensors.update({name: module.originals()["weight"]} if isinstance(module, Adapted) else {})
            continue
        own = module.originals() if isinstance(module, Adapted) else layer.named_parameters(recurse=layer is not module)
        tensors.update({f"{name}.{leaf}".lstrip("."): parameter for leaf, parameter in dict(own).items()})
    return tensors


def identity(model: nn.Module, *, without: Collection[str] = ()) -> dict[str, Any]:
    """`class`, `num_parameters`, `shapes` (sha256) and `weights` (type name to sha256) of the base model, and of one that is
    quantised `quantised` (name to a hash); `weights` leaves these out, and those that are named in `without`."""
    unique = {id(tensor): (name, tensor.detach()) for name, tensor in reversed(base_tensors(model).items())}
    tensors = dict(sorted(unique.values(), key=lambda item: item[0]))
    shapes = json.dumps([[name, list(tensor.shape)] for name, tensor in tensors.items()])
    quantised = {name: _short_digest(tensor) for name, tensor in tensors.items() if weights.is_quantised(tensor)}
    left_out = {*quantised, *without}
    samples = [_sample(tensor) for name, tensor in tensors.items() if tensor.is_floating_point() and name not in left_out]
    common = [t for t in COARSER if all(t in COARSER.get(sample.dtype, ()) for sample in samples)]
    return {
        "class": type(model).__name__,
        "num_parameters": sum(tensor.numel() for tensor in tensors.values()),
        "shapes": hashlib.sha256(shapes.encode()).hexdigest(),
        "weights": {str(t).removeprefix("torch."): _digest(samples, t) for t in common},
        **({"quantised": quantised} if quantised else {}),
    }


def _short_digest(tensor: weights.QuantisedTensor) -> str:
    """Of a sample of a quantised weight's codes, which are the same whatever type it is computed in."""
    form = f"{tensor.kind} {tensor.block_size} {tensor.nested} ".encode()
    return hashlib.sha256(form + _sample(tensor.codes).numpy().tobytes()).hexdigest()[:16]


def _sample(tensor: Tensor) -> Tensor:
    count = min(SAMPLES, tensor.numel())
    places = torch.arange(count, dtype=torch.int64, device=tensor.device) * STRIDE % max(1, tensor.numel())
    return tensor.reshape(-1)[places].cpu()


def _digest(samples: list[Tensor], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(sample.to(dtype).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def difference(recorded: Mapping[str, Any], found: Mapping[str, Any], but: Collection[str] = ()) -> str | None:
    """How the base that an adapter was made on differs from this one; None if they are the same as far as can be told.
    Quantised weights named in `but` are not compared."""
    if recorded["shapes"] != found["shapes"]:
        return (
            f"it was a {recorded['class']} of {recorded['num_parameters']:,} parameters, and this is a {found['class']} of "
            f"{found['num_parameters']:,} with other tensors or shapes"
        )
    before, now = recorded.get("quantised", {}), found.get("quantised", {})
    if not set(now) <= set(before):
        return None  # what both hold as it is has no hash of its own
    common = [dtype for dtype in found["weights"] if dtype in recorded["weights"]]
    if common and all(recorded["weights"][dtype] != found["weights"][dtype] for dtype in common):
        return "it has the same shapes and other weights"
    both = [name for name in before if name in now and name not in but]
    # a few may differ by a device's rounding
    if both and sum(before[name] != now[name] for name in both) > len(both) / 2:
        return "it has the same shapes, and its quantised weights are others or quantised otherwise"
    return None
