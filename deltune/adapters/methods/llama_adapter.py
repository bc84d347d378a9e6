"""LLaMA-Adapter (arXiv:2303.16199): in the last layers each position also attends to learned vectors, behind a gate.

Legend: x is [batch, seq, width], the attention's input; P [n, width] are the learned vectors, g the gate of the layer;
q is [batch, heads, seq, head_dim], the layer's own queries with their positions; heads = kv_heads · group.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.hooks import RemovableHandle

from deltune.adapters import draw
from deltune.adapters.delta import Delta, PeftFormat
from deltune.adapters.layers import Site, kind_of
from deltune.adapters.whole import ModelDelta, WholeConfig, decoder, model_site, one_of, without
from deltune.adapters.wrapper import Beside, Wrapper, original, walk
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"llama_adapter": "LlamaAdapterConfig"}

METHODS = {
    "llama_adapter": {
        "choices": {"delta": "llama_adapter"},
        "paper": "arXiv:2303.16199",
        "formula": "attn(x) + W_o (g · softmax(q (W_k P)ᵀ/√h) W_v P), g = 0 at first",
        "small": {"adapter_len": 3},
        "note": "One gate a layer, as in the paper's formula and PEFT; the authors' code has one a head, through a tanh. By default in all but the first two layers (30 of 32 in the paper). Where the output projection has a bias it is not added a second time, as PEFT does, so that a closed gate is no change. The learned keys have no position, so a batch padded on the left needs its position_ids, which `generate` gives.",
    },
}

# Models whose queries are made as `queries` makes them: tests compare these with what the attention itself is given.
QUERIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "granite", "starcoder2")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LlamaAdapterConfig(WholeConfig):
    """Gated attention to learned vectors in the last layers (arXiv:2303.16199)."""

    delta: str = option("llama_adapter", "Parametrisation of the change.", choices=("llama_adapter",))
    adapter_len: int = option(10, "Number of learned vectors in each adapted layer.", gt=0)
    adapter_layers: int | None = option(None, "How many layers are adapted, counted from the last; null is all but the first two.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return LlamaAdapter


def _write(config: LlamaAdapterConfig) -> dict[str, Any]:
    return {"adapter_len": config.adapter_len, "adapter_layers": config.adapter_layers, "target_modules": "self_attn"}


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    target = fields.get("target_modules")
    if target not in (None, "self_attn"):
        raise AdapterError(f"target_modules is {target!r}; LLaMA-Adapter is read for self_attn")
    for name in ("adapter_len", "adapter_layers"):
        if not isinstance(fields.get(name), int):
            raise AdapterError(f"{name} is {fields.get(name)!r}; a number is expected")
    return {"adapter_len": fields["adapter_len"], "adapter_layers": fields["adapter_layers"]}


class Gated(Beside):
    """Adds what the running adapters attend to, to the output of an attention."""

    def hooks(self, host: nn.Module) -> list[RemovableHandle]:
        return [host.register_forward_hook(self.add_gated, with_kwargs=True)]

    def add_gated(self, host: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The attention's output with the gated ones added."""
        if not self.running:
            return None
        given = dict(zip(inspect.signature(host.forward).parameters, args, strict=False)) | kwargs
        x = given["hidden_states"]
        q = queries(host, x, given["position_embeddings"])
        heads = sum(self.adapters[name].attend(host, q, self.vectors(name, x.dtype)) for name in self.running)
        added = host.o_proj(heads.transpose(1, 2).reshape(*x.shape[:-1], -1))
        if host.o_proj.bias is not None:  # it is in the output already
            added = added - host.o_proj.bias.to(added.dtype)
        return (output[0] + added.to(output[0].dtype), *output[1:])

    def vectors(self, name: str, dtype: torch.dtype) -> Tensor:
        delta = self.adapters[name]
        rate = delta.config.dropout
        vectors = delta.adaption_prompt.to(dtype)
        return dropout(vectors, rate) if rate and self.training and name not in self.fixed else vectors


def queries(host: Any, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """[batch, heads, seq, head_dim]: the layer's own queries, by its own norm and rotation."""
    q = normed(host, "q_norm", host.q_proj(x).view(*x.shape[:-1], -1, host.head_dim)).transpose(1, 2)
    rotate = sys.modules[type(host).__module__].apply_rotary_pos_emb
    return rotate(q, q[:, :1], *rotary)[0]


def normed(host: Any, norm: str, vectors: Tensor) -> Tensor:
    """Vectors of heads [..., head_dim] through the layer's norm of them, where it has one."""
    return host._modules[norm](vectors) if norm in host._modules else vectors


class LlamaAdapter(ModelDelta):
    """The learned vectors and the gate of one layer. Unchanged at its start."""

    beside = Gated
    peft = PeftFormat(
        type="ADAPTION_PROMPT", write=_write, read=_read, fields=frozenset({"adapter_len", "adapter_layers"}),
        fits=lambda config: not config.dropout and not config.modules_to_save,
        lacks=frozenset({"exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias"}),
    )  # fmt: skip

    @classmethod
    def settled(cls, model: nn.Module, config: LlamaAdapterConfig) -> LlamaAdapterConfig:
        return without(config, adapter_layers=max(1, len(attentions(model)) - 2))

    @classmethod
    def find(cls, model: nn.Module, config: LlamaAdapterConfig) -> dict[str, nn.Module]:
        found = attentions(model)
        if config.adapter_layers > len(found):
            raise AdapterError(f"adapter_layers is {config.adapter_layers}, and the model has {len(found)} layers")
        return dict(list(found.items())[-config.adapter_layers :])

    @classmethod
    def site_of(cls, name: str, host: Any) -> Site:
        return model_site(name, original(host.q_proj).in_features, original(host.q_proj).weight)

    def build(self) -> None:
        self.adaption_prompt = nn.Parameter(torch.empty(1, self.config.adapter_len, self.site.n_in, **self.storage))
        self.adaption_gate = nn.Parameter(torch.empty(1, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.adaption_prompt.copy_(draw.normal(self.adaption_prompt.shape, 1.0, generator))
        self.adaption_gate.zero_()

    def attend(self, host: Any, q: Tensor, vectors: Tensor) -> Tensor:
        """g · softmax(q kᵀ · scale) v, [batch, heads, seq, head_dim]. Keys have no position."""
        batch, heads, seq, head_dim = q.shape
        k = normed(host, "k_norm", host.k_proj(vectors).view(self.config.adapter_len, -1, head_dim)).transpose(0, 1)
        v = host.v_proj(vectors).view(self.config.adapter_len, -1, head_dim).transpose(0, 1)  # [kv_heads, n, head_dim]
        grouped = q.reshape(batch, len(k), heads // len(k) * seq, head_dim)
        weights = (grouped @ k.to(q.dtype).transpose(1, 2) * host.scaling).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
        out = (self.adaption_gate * weights).to(q.dtype) @ v.to(q.dtype)
        return out.view(batch, heads, seq, head_dim)


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder's attention modules by full name, in their order. AdapterError if the method does not know them."""
    place, found = decoder(model, "LLaMA-Adapter")
    prefix = f"{place}." if place else ""
    named = {f"{prefix}{name}": module for name, module in walk(found) if not isinstance(module, Wrapper) and _is_attention(module)}
    if not named:
        raise AdapterError(f"LLaMA-Adapter reads the projections {', '.join(PROJECTIONS)} of each attention, and {type(found).__name__} has none with these")
    kind = found.config.model_type
    if kind not in QUERIES:
        raise AdapterError(f"LLaMA-Adapter knows how queries are made in {one_of(QUERIES)}; this model is of type {kind}")
    return named


def _is_attention(module: nn.Module) -> bool:
    return all(name in module._modules and kind_of(original(module._modules[name])) == "linear" for name in PROJECTIONS)
