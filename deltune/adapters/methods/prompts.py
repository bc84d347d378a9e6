"""Prompt tuning, P-tuning and prefix tuning: learned vectors in front of the text. No weight changes, so none merges.

Legend: n is the number of learned positions, d the width of the embeddings; a layer's keys and values are [kv, head].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deltune.adapters import draw
from deltune.adapters.delta import Delta, PeftFormat
from deltune.adapters.layers import Site, kind_of
from deltune.adapters.prompts import Prompt, refuse_recomputing
from deltune.adapters.whole import WholeConfig, without
from deltune.adapters.wrapper import original, walk
from deltune.config.fields import option
from deltune.errors import AdapterError

DELTAS = {"prompt_tuning": "PromptTuningConfig", "p_tuning": "PTuningConfig", "prefix_tuning": "PrefixTuningConfig"}

METHODS = {
    "prompt_tuning": {
        "choices": {"delta": "prompt_tuning"},
        "paper": "arXiv:2104.08691",
        "formula": "f([P; E(x)]), P [n, d] trained",
        "start": 1.0,
        "small": {"num_virtual_tokens": 3},
        "note": "Any prompt changes the function, so there is no start that leaves it as it was. The paper's default is 100 tokens and finds little gain beyond 20, which is the default here. Its random start is uniform within ±0.5, PEFT's is normal with deviation 1; starting from embeddings of the vocabulary did better in the paper and is the default. Positions count from the mask, so padding on the left changes no answer; PEFT's differ there.",
    },
    "p_tuning": {
        "choices": {"delta": "p_tuning"},
        "paper": "arXiv:2103.10385",
        "formula": "f([g(P); E(x)]), P [n, d] and an MLP or LSTM g trained",
        "start": 1.0,
        "small": {"num_virtual_tokens": 3},
        "note": "Saved, and read back, as the plain vectors g(P): the encoder is gone, and training goes on without it. The paper's encoder is an LSTM with an MLP; the MLP alone is the default, as in PEFT, since an LSTM as wide as the embeddings of a large model has hundreds of millions of parameters.",
    },
    "prefix_tuning": {
        "choices": {"delta": "prefix_tuning"},
        "paper": "arXiv:2101.00190",
        "formula": "softmax(q [P_K; K]ᵀ/√h) [P_V; V] in every layer, P [n, 2·L·kv·h] trained",
        "start": 1.5,
        "small": {"num_virtual_tokens": 3},
        "note": "With projection=true P is an MLP of n vectors, as in the paper; saved, and read back, as the plain keys and values. Refused with gradient checkpointing, which takes the cache from the layers.",
    },
}


@dataclass(frozen=True)
class PromptTuningConfig(WholeConfig):
    """Soft tokens in front of the embeddings (arXiv:2104.08691)."""

    delta: str = option("prompt_tuning", "Parametrisation of the change.", choices=("prompt_tuning",))
    num_virtual_tokens: int = option(20, "Number of soft tokens; each takes a position of the context.", gt=0)
    init: str = option("sample_vocab", "Start: sample_vocab: embeddings of tokens drawn from the vocabulary; text: of init_text's or init_ids' tokens, over and over; random: uniform within ±0.5.", choices=("sample_vocab", "text", "random"))
    init_text: str | None = option(None, "Text that init=text starts from.")
    init_tokenizer: str | None = option(None, "Folder or hub id of the tokenizer for init_text; null is the model's own.")
    init_ids: list[int] = option([], "Token ids that init=text starts from, instead of a text.")

    @staticmethod
    def delta_class() -> type[Delta]:
        return PromptTuning

    def problems(self) -> list[str]:
        found = super().problems()
        if self.init == "text" and not (self.init_text or self.init_ids):
            found.append("init=text needs init_text or init_ids")
        if self.init != "text" and (self.init_text or self.init_tokenizer or self.init_ids):
            found.append(f"init={self.init} has no use for init_text, init_tokenizer and init_ids; say init=text")
        if len(self.init_ids) > self.num_virtual_tokens:
            found.append(f"init_ids has {len(self.init_ids)} tokens and num_virtual_tokens is {self.num_virtual_tokens}, so some would be left out")
        return found


@dataclass(frozen=True)
class PTuningConfig(WholeConfig):
    """Soft tokens from a small encoder (arXiv:2103.10385)."""

    delta: str = option("p_tuning", "Parametrisation of the change.", choices=("p_tuning",))
    num_virtual_tokens: int = option(20, "Number of soft tokens; each takes a position of the context.", gt=0)
    encoder: str = option("mlp", "mlp: three linear layers with ReLU; lstm: a bidirectional LSTM, then two linear layers with ReLU.", choices=("mlp", "lstm"))
    encoder_hidden_size: int | None = option(None, "Width of the encoder; null is the embeddings'.", gt=0)
    encoder_num_layers: int = option(2, "Number of layers of the LSTM.", gt=0)
    encoder_dropout: float = option(0.0, "Dropout between the layers of the LSTM while training.", ge=0, lt=1)

    @staticmethod
    def delta_class() -> type[Delta]:
        return PTuning

    def problems(self) -> list[str]:
        found = super().problems()
        if self.encoder == "mlp" and (self.encoder_num_layers != 2 or self.encoder_dropout):
            found.append("encoder_num_layers and encoder_dropout are the LSTM's, and encoder=mlp has none")
        return found


@dataclass(frozen=True)
class PrefixTuningConfig(WholeConfig):
    """Keys and values in front of every layer's own (arXiv:2101.00190)."""

    delta: str = option("prefix_tuning", "Parametrisation of the change.", choices=("prefix_tuning",))
    num_virtual_tokens: int = option(20, "Number of prefix positions; each takes a position of the context.", gt=0)
    projection: bool = option(False, "Make the prefix with an MLP, tanh in the middle, of n learned vectors.")
    encoder_hidden_size: int | None = option(None, "Width of the MLP; null is that of a layer's keys.", gt=0)

    @staticmethod
    def delta_class() -> type[Delta]:
        return PrefixTuning

    def problems(self) -> list[str]:
        unused = self.encoder_hidden_size is not None and not self.projection
        return super().problems() + ["encoder_hidden_size is the MLP's, and projection is false"] * unused


# ---------------------------------------------------------------- PEFT's fields

EMBEDDINGS = "prompt_embeddings"  # the one tensor in PEFT's file
# what PEFT's config of a prompt does not have
LACKS = frozenset({"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias"})
# shapes, which the tensors tell
SHAPES = frozenset({"num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"})
ONE_STACK = {"num_transformer_submodules": 1}  # a decoder; an encoder with a decoder has two


def _num(fields: Mapping[str, Any]) -> int:
    value = fields.get("num_virtual_tokens")
    if not isinstance(value, int):
        raise AdapterError(f"num_virtual_tokens is {value!r}; a number is expected")
    return value


def _plain(config: WholeConfig) -> bool:
    return not config.dropout and not config.modules_to_save


def _format(kind: str, write: Any, read: Any, fields: set[str]) -> PeftFormat:
    return PeftFormat(type=kind, write=write, read=read, fields=SHAPES | fields, harmless=ONE_STACK, fits=_plain, lacks=LACKS)


def _write_prompt(config: PromptTuningConfig) -> dict[str, Any]:
    told = config.init == "text" and config.init_text and config.init_tokenizer  # PEFT wants both, or another start
    start = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": config.init_text, "tokenizer_name_or_path": config.init_tokenizer}
    other = {"prompt_tuning_init": "SAMPLE_VOCAB" if config.init == "sample_vocab" else "RANDOM"}
    return {"num_virtual_tokens": config.num_virtual_tokens, **(start if told else other)}


def _read_prompt(fields: Mapping[str, Any]) -> dict[str, Any]:
    # how it was started has no effect any more; to tell a text again would need its tokenizer
    sampled = fields.get("prompt_tuning_init") == "SAMPLE_VOCAB"
    return {"num_virtual_tokens": _num(fields), "init": "sample_vocab" if sampled else "random"}


def _write_encoder(config: PTuningConfig) -> dict[str, Any]:
    return {
        "num_virtual_tokens": config.num_virtual_tokens, "encoder_reparameterization_type": config.encoder.upper(),
        "encoder_hidden_size": config.encoder_hidden_size, "encoder_num_layers": config.encoder_num_layers,
        "encoder_dropout": config.encoder_dropout,
    }  # fmt: skip


def _read_encoder(fields: Mapping[str, Any]) -> dict[str, Any]:
    kind = fields.get("encoder_reparameterization_type", "MLP")
    if kind not in ("MLP", "LSTM"):
        raise AdapterError(f"encoder_reparameterization_type is {kind!r}; MLP and LSTM are known")
    lstm = {"encoder_num_layers": fields.get("encoder_num_layers", 2), "encoder_dropout": fields.get("encoder_dropout", 0.0)} if kind == "LSTM" else {}
    return {"num_virtual_tokens": _num(fields), "encoder": kind.lower(), "encoder_hidden_size": fields.get("encoder_hidden_size"), **lstm}


def _write_prefix(config: PrefixTuningConfig) -> dict[str, Any]:
    return {
        "num_virtual_tokens": config.num_virtual_tokens, "prefix_projection": config.projection,
        "encoder_hidden_size": config.encoder_hidden_size,
    }  # fmt: skip


def _read_prefix(fields: Mapping[str, Any]) -> dict[str, Any]:
    projection = bool(fields.get("prefix_projection"))
    width = {"encoder_hidden_size": fields.get("encoder_hidden_size")} if projection else {}
    return {"num_virtual_tokens": _num(fields), "projection": projection, **width}


# ---------------------------------------------------------------- the methods


class PromptTuning(Prompt):
    """n trained embeddings."""

    method = "prompt tuning"
    peft = _format("PROMPT_TUNING", _write_prompt, _read_prompt, {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"})

    @classmethod
    def settled(cls, model: nn.Module, config: PromptTuningConfig) -> PromptTuningConfig:
        """A text becomes its ids, which are saved: reading an adapter needs no tokenizer."""
        if not config.init_text or config.init_ids:
            return config
        from transformers import AutoTokenizer

        path = config.init_tokenizer or (model.config.name_or_path if hasattr(model, "config") else "")
        if not path:
            raise AdapterError("init_text needs a tokenizer, and the model does not say where it is from; set init_tokenizer")
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise AdapterError(f"init_tokenizer: no tokenizer in {path}: {error}") from None
        ids = [int(i) for i in tokenizer(config.init_text, add_special_tokens=False)["input_ids"]]
        if not 0 < len(ids) <= config.num_virtual_tokens:
            raise AdapterError(f"init_text has {len(ids)} tokens and num_virtual_tokens is {config.num_virtual_tokens}; it takes 1 to as many")
        return replace(config, init_ids=ids, init_tokenizer=path)

    def build(self) -> None:
        self.num_soft = self.config.num_virtual_tokens
        self.tokens = nn.Parameter(torch.empty(self.num_soft, self.site.n_in, **self.storage))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.tokens.copy_(draw.uniform(self.tokens.shape, 0.5, generator))

    @property
    def starts_from_base(self) -> bool:
        return self.config.init != "random"

    @torch.no_grad()
    def start(self, W: Tensor, generator: torch.Generator) -> None:
        given, vocab = self.config.init_ids, W.shape[1]
        if any(not 0 <= i < vocab for i in given):
            raise AdapterError(f"init_ids: {next(i for i in given if not 0 <= i < vocab)} is no token id; the vocabulary has {vocab}")
        if given:
            ids = torch.tensor([given[i % len(given)] for i in range(self.num_soft)])
        else:
            ids = torch.randint(vocab, (self.num_soft,), generator=generator)
        self.tokens.copy_(W[:, ids.to(W.device)].T)

    def soft(self) -> Tensor:
        return self.tokens

    def leaves(self) -> dict[str, str]:
        return {"tokens": EMBEDDINGS}


class Encoded(Prompt):
    """Learned vectors that an encoder turns into the prompt. In the file, and after reading one, only its output is left."""

    encoder: nn.Module | None

    def encoded(self) -> Tensor:
        """The prompt as the file holds it."""
        raise NotImplementedError

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        self.tokens.copy_(draw.normal(self.tokens.shape, 1.0, generator))
        for module in self.encoder.modules() if self.encoder is not None else ():
            if isinstance(module, nn.Linear):
                module.weight.copy_(draw.kaiming(module.weight.shape, generator))
                module.bias.copy_(draw.uniform(module.bias.shape, module.in_features**-0.5, generator))
            elif isinstance(module, nn.LSTM):
                for parameter in module.parameters():
                    parameter.copy_(draw.uniform(parameter.shape, module.hidden_size**-0.5, generator))

    def to_file(self) -> dict[str, Tensor]:
        return {EMBEDDINGS: self.encoded().detach()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.encoder = None
        self.tokens = nn.Parameter(tensors[EMBEDDINGS].to(self.tokens))

    def leaves(self) -> dict[str, str]:
        return {} if self.encoder is not None else {"tokens": EMBEDDINGS}


class PTuning(Encoded):
    """n trained vectors through a trained encoder."""

    method = "P-tuning"
    peft = _format(
        "P_TUNING", _write_encoder, _read_encoder,
        {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"},
    )  # fmt: skip

    @classmethod
    def settled(cls, model: nn.Module, config: PTuningConfig) -> PTuningConfig:
        return without(config, encoder_hidden_size=next(iter(cls.find(model, config).values())).config.get_text_config().hidden_size)

    def build(self) -> None:
        config, width, hidden = self.config, self.site.n_in, self.config.encoder_hidden_size
        self.num_soft = config.num_virtual_tokens
        self.tokens = nn.Parameter(torch.empty(self.num_soft, width, **self.storage))
        if config.encoder == "lstm":
            self.encoder = Lstm(width, hidden, config.encoder_num_layers, config.encoder_dropout, self.storage)
        else:
            sizes = (width, hidden, hidden, width)
            self.encoder = perceptron(sizes, nn.ReLU, self.storage)

    def encoded(self) -> Tensor:
        return self.tokens if self.encoder is None else self.encoder(self.tokens)

    def soft(self) -> Tensor:
        return self.encoded()


class PrefixTuning(Encoded):
    """n trained keys and values in every layer, or n trained vectors that an MLP makes them of."""

    method = "prefix tuning"
    peft = _format("PREFIX_TUNING", _write_prefix, _read_prefix, {"prefix_projection", "encoder_hidden_size", "init_weights"})

    @classmethod
    def settled(cls, model: nn.Module, config: PrefixTuningConfig) -> PrefixTuningConfig:
        if not config.projection:
            return config
        site = next(cls.site_of(name, host) for name, host in cls.find(model, config).items())
        return without(config, encoder_hidden_size=site.num_kv_heads * site.head_dim)

    @classmethod
    def find(cls, model: nn.Module, config: PrefixTuningConfig) -> dict[str, nn.Module]:
        found = super().find(model, config)
        for host in found.values():
            refuse_recomputing(host)
        return found

    @classmethod
    def site_of(cls, name: str, host: Any) -> Site:
        return cached_site(super().site_of(name, host), host)

    def build(self) -> None:
        site, config = self.site, self.config
        self.num_prefix = config.num_virtual_tokens
        keys = site.num_kv_heads * site.head_dim
        whole = 2 * site.num_layers * keys
        self.tokens = nn.Parameter(torch.empty(self.num_prefix, keys if config.projection else whole, **self.storage))
        self.encoder = perceptron((keys, config.encoder_hidden_size, whole), nn.Tanh, self.storage) if config.projection else None

    def encoded(self) -> Tensor:
        return self.tokens if self.encoder is None else self.encoder(self.tokens)

    def prefix(self) -> Tensor:
        site = self.site
        whole = self.encoded().view(self.num_prefix, site.num_layers, 2, site.num_kv_heads, site.head_dim)
        return whole.permute(1, 2, 3, 0, 4)


# ---------------------------------------------------------------- their parts


@dataclass(frozen=True)
class CachedSite(Site):
    """A decoder and the shape of its keys and values, which is one for all layers."""

    num_layers: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0


def cached_site(site: Site, host: Any) -> CachedSite:
    """Raises AdapterError for a decoder whose layers do not all keep keys and values of one shape."""
    config = host.config.get_text_config()
    heads = config.num_attention_heads
    kv = config.num_key_value_heads if hasattr(config, "num_key_value_heads") and config.num_key_value_heads else heads
    head_dim = config.head_dim if hasattr(config, "head_dim") and config.head_dim else config.hidden_size // heads
    others = {kind for kind in config.layer_types if not kind.endswith("attention") or "linear" in kind} if hasattr(config, "layer_types") and config.layer_types else set()
    if others or (hasattr(config, "kv_lora_rank") and config.kv_lora_rank):
        what = f"layers of type {', '.join(sorted(others))}" if others else "compressed keys and values"
        raise AdapterError(f"prefix tuning needs keys and values in every layer, and this model has {what}")
    for name, module in walk(host):
        layer = original(module)
        if name.rpartition(".")[2] in ("k_proj", "v_proj") and kind_of(layer) == "linear" and layer.out_features != kv * head_dim:
            raise AdapterError(f"prefix tuning needs one shape of keys and values in all layers: {name} makes {layer.out_features}, and the config says {kv} heads of {head_dim}")
    return CachedSite(**vars(site), num_layers=config.num_hidden_layers, num_kv_heads=kv, head_dim=head_dim)


def perceptron(sizes: tuple[int, ...], between: type[nn.Module], storage: dict[str, Any]) -> nn.Sequential:
    """Linear layers of these widths, with this function between them."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [between()] if layers else []
        layers.append(nn.Linear(n_in, n_out, **storage))
    return nn.Sequential(*layers)


class Lstm(nn.Module):
    """[n, width] through a bidirectional LSTM and an MLP of two layers."""

    def __init__(self, width: int, hidden: int, num_layers: int, dropout: float, storage: dict[str, Any]):
        super().__init__()
        between = dropout if num_layers > 1 else 0.0
        self.lstm = nn.LSTM(width, hidden, num_layers, dropout=between, bidirectional=True, batch_first=True, **storage)
        self.mlp = perceptron((2 * hidden, 2 * hidden, width), nn.ReLU, storage)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.mlp(self.lstm(tokens[None])[0][0])
