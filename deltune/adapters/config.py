"""The `adapter` section: what every method has. Light to import; a method's own fields live beside its formula."""

from __future__ import annotations

from dataclasses import dataclass

from deltune.config.fields import Choice, option


@dataclass(frozen=True)
class AdapterConfig:
    """Where an adapter goes. Methods add their own fields."""

    method: str = option(help="Adaptation method.")
    targets: list[str] | str = option("all-linear", "Modules to adapt: `all-linear` (every linear layer but the output head), module name endings, full names, or one regular expression over the full name.")
    exclude: list[str] = option([], "Module name endings or full names never adapted.")
    modules_to_save: list[str] = option([], "Modules trained in full beside the adapter and saved with it, e.g. lm_head.")
    dtype: str = option("float32", "Storage type of the adapter's weights; they compute in the type of the activations.", choices=("float32", "bfloat16", "float16", "auto"))


# name -> dataclass of the method's hyperparameters
METHODS = {"lora": "deltune.adapters.methods.lora:LoraConfig"}

ADAPTERS = Choice("method", METHODS, default="lora", optional=True, help="Adaptation method and where it goes; null trains the model's own weights.")
