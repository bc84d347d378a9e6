"""Adapters of a whole model instead of its layers: they act beside modules of it, their hosts, which stay as they are.

Which modules these are is the method's choice, so such a config has no targets. What acts on a host is a `Beside`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from deltune.adapters.config import AdapterConfig
from deltune.adapters.delta import Delta
from deltune.adapters.layers import Site
from deltune.adapters.wrapper import BESIDE, Beside, walk
from deltune.config.fields import option
from deltune.errors import AdapterError

ACCEPTS = ("input_ids", "inputs_embeds", "attention_mask", "past_key_values")  # what a decoder's forward must take


@dataclass(frozen=True)
class WholeConfig(AdapterConfig):
    """What methods that adapt a whole model have."""

    targets: list[str] | str = option("model", "The whole model: there are no layers to choose.", choices=("model",))
    dropout: float = option(0.0, "Dropout on the learned vectors while training.", ge=0, lt=1)
    magnitude: bool = option(False, "Not for a method that has no matrix.", choices=(False,))

    def problems(self) -> list[str]:
        excluded = ["exclude has no effect: the method adapts the whole model"] if self.exclude else []
        return excluded + super().problems()


class ModelDelta(Delta):
    """What a method adds at one host. `start` is handed the input embeddings' table as W [width, vocab].

    Subclasses write `find`, `build`, `reset`, and name the `Beside` that runs them.
    """

    kinds = ("model",)
    mergeable = False
    why_not_mergeable = "it adds to what the model reads, and changes no weight"
    beside: ClassVar[type[Beside]]

    @classmethod
    def settled(cls, model: nn.Module, config: Any) -> Any:
        """The config with what it leaves to the model filled in."""
        return config

    @classmethod
    def find(cls, model: nn.Module, config: Any) -> dict[str, nn.Module]:
        """The hosts by full name. Raises AdapterError for a model that has none."""
        raise NotImplementedError

    @classmethod
    def site_of(cls, name: str, host: nn.Module) -> Site:
        """What `build` may know of the host."""
        raise NotImplementedError


def host_of(delta: ModelDelta, module: nn.Module) -> Beside:
    """What acts beside this module for the delta's method, put there if there is nothing yet."""
    there = module._modules.get(BESIDE)
    return delta.beside(module) if there is None else there


def model_site(name: str, width: int, weight: nn.Parameter) -> Site:
    """The site of a host whose inputs and outputs are `width` wide; `weight` tells type and device."""
    return Site(name, "model", width, width, weight.dtype, weight.device, has_bias=False)


def decoder(model: nn.Module, method: str) -> tuple[str, Any]:
    """(name, module) of the part from token ids or embeddings to hidden states, of a Hugging Face causal language model."""
    import inspect

    if not hasattr(model, "get_decoder") or not hasattr(model, "config") or model.config.is_encoder_decoder:
        raise AdapterError(f"{method} adapts a Hugging Face decoder, and this model is a {type(model).__name__}")
    found = model.get_decoder()
    lacking = [name for name in ACCEPTS if name not in inspect.signature(found.forward).parameters]
    if lacking:
        raise AdapterError(f"{method} needs a decoder that takes {', '.join(lacking)}, and {type(found).__name__} does not")
    names = [name for name, module in walk(model) if module is found]
    if not names:
        raise AdapterError(f"{method} cannot reach the decoder, a {type(found).__name__}: an adapter trains it in full")
    return names[0], found


def without(config: Any, **fields: Any) -> Any:
    """The config with each of these fields that is None in it set."""
    return replace(config, **{name: value for name, value in fields.items() if getattr(config, name) is None})


def one_of(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" or {names[-1]}"
