"""Quantised bases: every linear layer but the head is put into codes as soon as it is read or drawn, so that no more than
one of them is there in full; and the weights as they were, for starts that look at them."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltune.errors import DeltuneError, ModelError
from deltune.models.config import EightBit, FourBit, QuantConfig
from deltune.weights import is_quantised, quantise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "deltune"  # the name under which transformers knows `_quantiser`


def layers(model: PreTrainedModel, quant: EightBit) -> dict[str, nn.Module]:
    """The linear layers to be quantised, by name: not the head, none whose weight is tied or is to stay in float32, and
    none that `quant.skip` names. ModelError for a pattern of it that names no linear layer."""
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear or _is_turned(module)}
    for pattern in quant.skip:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise ModelError(f"quant.skip: pattern {pattern!r} matches no linear layer. There are: {', '.join(list(linear)[:8])}, …")
    head = model.get_output_embeddings()
    tied = {name.rpartition(".")[0] for pair in (model.all_tied_weights_keys or {}).items() for name in pair}
    wide = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return {
        name: module for name, module in linear.items()
        if module is not head and name not in tied and not wide & set(name.split(".")) and not any(fnmatchcase(name, pattern) for pattern in quant.skip)
    }  # fmt: skip


def _is_turned(module: nn.Module) -> bool:
    """GPT-2's linear layers, which hold their weight as [in, out]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def codes_of(weight: Tensor, module: nn.Module, quant: EightBit) -> nn.Parameter:
    """A layer's weight in codes, frozen. What GPT-2 holds as [in, out] is quantised as [out, in] too, and turned."""
    double, block_size = (quant.double, quant.block_size) if isinstance(quant, FourBit) else (False, 64)
    turned = _is_turned(module)
    codes = quantise(weight.T.contiguous() if turned else weight, quant.name, block_size=block_size, double=double)
    return nn.Parameter(codes.T if turned else codes, requires_grad=False)


def compute_in(model: nn.Module, quant: QuantConfig) -> None:
    """Have quantised layers compute in `quant.compute_dtype`, if it is not auto."""
    if not isinstance(quant, EightBit) or quant.compute_dtype == "auto":
        return
    for module in model.modules():
        weight = module._parameters.get("weight")
        if is_quantised(weight):
            module.weight = nn.Parameter(weight.detach().to(getattr(torch, quant.compute_dtype)), requires_grad=False)


def while_drawn(model: PreTrainedModel, quant: EightBit) -> None:
    """Draw the weights of a model whose memory is there and unfilled, and quantise each block before the next is drawn: some
    blocks draw their layers' weights again when these are done."""
    chosen = layers(model, quant)
    blocks = {id(block) for modules in model.modules() if isinstance(modules, nn.ModuleList) for block in modules}

    def put(module: nn.Module) -> None:
        for layer in module.modules():
            if layer in chosen.values() and not is_quantised(layer.weight):
                layer.weight = codes_of(layer.weight, layer, quant)

    def drawing(draw: Callable[..., None]) -> Callable[..., None]:
        def drawn(module: nn.Module, *rest: Any) -> None:
            draw(module, *rest)
            if id(module) in blocks:
                put(module)

        return drawn

    models = [module for module in model.modules() if hasattr(module, "_initialize_weights")]
    for part in models:
        part._initialize_weights = drawing(part._initialize_weights)
    try:
        model.initialize_weights()
    finally:
        for part in models:
            del part._initialize_weights
    put(model)
    model.tie_weights()


def on_meta(model: PreTrainedModel, quant: EightBit) -> None:
    """Give a model on the meta device weights of the shapes that it would have in codes."""
    for module in layers(model, quant).values():
        module.weight = codes_of(module.weight, module, quant)


def while_read(quant: EightBit) -> Any:
    """What transformers' `from_pretrained` is to be given as `quantization_config`, so that it quantises as it reads."""
    config, _ = _quantiser()
    return config(quant)


def forget_reader(model: PreTrainedModel) -> list[tuple[str, torch.Size, torch.Size]]:
    """Take off what transformers wrote on a model that `while_read` quantised: to everything else it is a plain model.
    Returns weights of another shape than the model's: name, shape in the file, shape in the model. Raises DeltuneError for
    values that cannot be quantised."""
    mismatched, unfit = model.hf_quantizer.mismatched, model.hf_quantizer.unfit
    if unfit:
        raise DeltuneError(unfit[0])
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
            del module.config._is_quantized
    return mismatched


@cache
def _quantiser() -> tuple[type, type]:
    """A quantiser as transformers wants them, and its config, put into its tables. With one that works while it loads,
    transformers reads one tensor at a time."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class ToCodes(ConversionOps):
        def __init__(self, reader: Reader):
            self.reader = reader

        def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Tensor]:
            result = {}
            for name, value in input_dict.items():
                weight = value[0] if isinstance(value, list) else value
                module = self.reader.chosen[name.rpartition(".")[0]]
                if weight.shape != module.weight.shape:  # transformers compares no shape of what it hands over here
                    self.reader.mismatched.append((name, weight.shape, module.weight.shape))
                    weight = torch.zeros(module.weight.shape, dtype=weight.dtype)
                try:
                    result[name] = codes_of(weight, module, self.reader.quantization_config.quant)
                except DeltuneError as error:  # transformers would tell no more than that there was one
                    self.reader.unfit.append(f"{name}: {error}")
                    result[name] = weight
            return result

    class Reader(HfQuantizer):
        requires_calibration = False

        def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
            self.mismatched: list[tuple[str, torch.Size, torch.Size]] = []
            self.unfit: list[str] = []
            self.chosen = layers(model, self.quantization_config.quant)

        def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
            name, _, kind = param_name.rpartition(".")
            return kind == "weight" and name in self.chosen

        def get_quantize_ops(self) -> ToCodes:
            return ToCodes(self)

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    class Config(QuantizationConfigMixin):
        def __init__(self, quant: EightBit):
            self.quant_method, self.quant = METHOD, quant

    return register_quantization_config(METHOD)(Config), register_quantizer(METHOD)(Reader)


def whereabouts(files: list[Path]) -> dict[str, Path]:
    """Which file holds a tensor, by the tensor's name."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def from_files(model: PreTrainedModel, layer: str, files: dict[str, Path], where: str) -> Tensor:
    """The weight [out, in] of a layer of `model`, which may be on the meta device, in the model's type. Raises ModelError."""
    from safetensors import safe_open

    module, prefix = model.get_submodule(layer), f"{model.base_model_prefix}."
    names = [f"{layer}.weight", f"{layer}.weight".removeprefix(prefix), f"{prefix}{layer}.weight"]  # a base model's files lack the prefix
    name = next((name for name in names if name in files), None)
    if name is None:
        raise ModelError(f"{where}: no tensor {names[0]} in the weight files: the layer's weight is made of others when the model is loaded, so it cannot be read alone")
    with safe_open(files[name], framework="pt") as tensors:
        weight = tensors.get_tensor(name)
    return (weight.T.contiguous() if _is_turned(module) else weight).to(model.dtype)
