"""`segment`: causal attention for transformers' models in which the documents of a packed row never meet, and no square
mask is made where the mask follows a rule. What it does not know it leaves to a dense mask; it never guesses.

Shapes: query [batch, heads, seq, head], key and value [batch, key heads, seq, head]; the output [batch, seq, heads, head].
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.errors import ModelError
from deltune.models import causal as node

NAME = "segment"


def register() -> None:
    """Make `segment` known to transformers. Again is harmless."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, segment_mask)


def unsupported(model_class: type) -> str:
    """Why models of a transformers class cannot run this attention; empty where they can."""
    if not getattr(model_class, "_supports_attention_backend", False):
        return f"{model_class.__name__} computes attention by itself and not through transformers' interface"
    return ""


# -- masks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A causal mask by its rule, which goes through a model in the mask's place."""

    window: int | None  # a query sees itself and this many keys less one before it; None: all
    packed: bool  # position ids say that rows hold several documents, which the dense form keeps apart
    make: Callable[[], Tensor]
    simple: bool = True  # False: within a document there is more to it, which only the dense form knows

    def dense(self) -> Tensor:
        """bool [batch, 1, seq, seq]"""
        return self.make()


def segment_mask(**asked: Any) -> Tensor | Rule | None:
    """transformers' mask interface: None for plain causal attention, a Rule where one fits, else the dense mask that
    `sdpa` would get. Padding on the right needs no mask: no real token comes after it."""
    from transformers.masking_utils import sdpa_mask

    same = asked["q_length"] == asked["kv_length"] and not _moved(asked.get("q_offset", 0)) and not asked.get("kv_offset", 0)
    found = None
    # while torch.compile traces, a row's structure must be data, or every new one would be compiled anew
    if same and not asked.get("use_vmap") and not torch.compiler.is_compiling():
        found = _rule(asked.get("mask_function"))
    padding = asked.get("attention_mask")
    if found is None or (padding is not None and (padding.shape[-1] != asked["kv_length"] or not _on_the_right(padding))):
        return sdpa_mask(**asked)
    window, packed, simple = found
    if window is not None and window >= asked["kv_length"]:
        window = None
    if window is None and not packed:
        return None if asked.get("allow_is_causal_skip", True) else sdpa_mask(**asked)
    return Rule(window, packed, functools.partial(sdpa_mask, **asked), simple)


def _moved(offset: int | Tensor) -> bool:
    return isinstance(offset, Tensor) or offset != 0


def _on_the_right(padding: Tensor) -> bool:
    """Whether all padding of a mask [batch, seq] comes after the tokens, as in all batches of training."""
    if padding.is_meta:
        return True
    return not bool((padding[:, 1:] > padding[:, :-1]).any())


def _rule(mask_function: Callable | None) -> tuple[int | None, bool, bool] | None:
    """Rule's window, packed and simple of one of transformers' mask functions, told by what it was made of; None for others.

    It gets functions only, and a mask of numbers says too little, so their makers are looked for in the closures.
    """
    from transformers import masking_utils as masks

    if mask_function is masks.causal_mask_function:
        return None, False, True
    parts = _captured(mask_function, masks.and_masks).get("mask_functions", ())
    if len(parts) != 2:
        return None
    window = _captured(parts[0], masks.sliding_window_overlay).get("sliding_window")
    if isinstance(window, int) and parts[1] is masks.causal_mask_function:
        return window, False, True
    if _captured(parts[0], masks.packed_sequence_mask_function):
        inner = _rule(_captured(parts[1], masks.remap_positions_for_packed_sequence).get("mask_function"))
        return (inner[0], True, True) if inner else (None, True, False)
    return None


def _captured(function: Any, maker: Callable) -> dict[str, Any]:
    """What a function that `maker` returned holds; empty if another made it."""
    code = getattr(function, "__code__", None)
    made_by = getattr(function, "__qualname__", "").removesuffix("." + getattr(function, "__name__", ""))
    if code is None or function.__module__ != maker.__module__ or made_by != f"{maker.__qualname__}.<locals>":
        return {}
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))


# -- attention --------------------------------------------------------------------------------------------------


def segment_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | Rule | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface. `cu_seq_lens_q` [documents + 1] says where the documents of a packed row begin,
    as for flash attention; without it, position ids that restart do, by a dense mask.

    Softmax runs in float32 at least, of scores capped as `softcap` says, beside a sink per head (`s_aux` [heads]).
    """
    length, rule = query.shape[2], attention_mask if isinstance(attention_mask, Rule) else None
    causal = rule is not None or (attention_mask is None and length > 1 and (is_causal if is_causal is not None else getattr(module, "is_causal", True)))
    starts = _starts(cu_seq_lens_q, query, key)
    if _WATCHERS:
        _WATCHERS[-1].append((starts is not None, rule is not None and rule.packed))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    known = others.get("position_bias") is None and others.get("cache") is None and not others.get("output_attentions")
    if known and length == key.shape[2] and (attention_mask is None or (rule is not None and rule.simple)):
        if starts is None and not (rule is not None and rule.packed):
            starts = (0, length)
        if starts is not None:
            window = None if rule is None else rule.window
            return _by_document(query, key, value, starts, cu_seq_lens_q, scale, causal, window, dropout, softcap, s_aux), None
    mask = rule.dense() if rule is not None else attention_mask
    if starts is not None:
        mask = _apart(mask, starts, causal, query)
    if softcap is not None or s_aux is not None or others.get("output_attentions"):
        return dense_attention(query, key, value, _causal(query, key) if mask is None and causal else mask, scale, dropout, softcap, s_aux)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=causal and mask is None, **others)


def _starts(cu_seq_lens: Tensor | None, query: Tensor, key: Tensor) -> tuple[int, ...] | None:
    """Where documents begin, and the end; None where the rows are not packed. Read from the device once per batch."""
    if cu_seq_lens is None:
        return None
    starts = vars(cu_seq_lens).get("starts")
    if starts is None:
        if cu_seq_lens.is_meta:  # no numbers: documents of like length, which cost what others of their mean do
            count = len(cu_seq_lens) - 1
            starts = tuple(query.shape[2] * i // count for i in range(count + 1))
        else:
            starts = tuple(cu_seq_lens.tolist())
        cu_seq_lens.starts = starts
    if query.shape[0] != 1 or not starts[-1] == query.shape[2] == key.shape[2]:
        raise ModelError(
            f"packed documents end at {starts[-1]}, but queries are {list(query.shape)} and keys {list(key.shape)}: a packed "
            "batch is one row [1, tokens] without a cache."
        )
    return starts


def _by_document(
    query: Tensor, key: Tensor, value: Tensor, starts: tuple[int, ...], bounds: Tensor | None, scale: float, causal: bool,
    window: int | None, dropout: float, softcap: float | None, sinks: Tensor | None,
) -> Tensor:
    """Each document by itself, in every row. `starts` counts along seq; `bounds` are the same numbers on the device, if any."""
    kind = query.device.type
    where = "cpu" if kind == "meta" else kind  # a dry run stands for a real one
    if torch.is_autocast_enabled(where):  # as torch's own attention does
        query, key, value = (t.to(torch.get_autocast_dtype(where)) for t in (query, key, value))
    longest = max(end - begin for begin, end in itertools.pairwise(starts))
    if softcap is None and sinks is None and not dropout:
        if causal and (window is None or window >= longest) and node.quicker(query, key, value, starts):
            return node.attend(query, key, value, starts, scale)
        if kind == "cuda" and query.dtype in (torch.bfloat16, torch.float16) and bounds is not None and query.shape[-1] == value.shape[-1] <= 256:
            return _on_cuda(query, key, value, bounds, longest, scale, causal, window)
    parts = []
    for begin, end in itertools.pairwise(starts):
        q, k, v = (t[:, :, begin:end] for t in (query, key, value))
        narrow = window if window is not None and window < end - begin else None
        if softcap is not None or sinks is not None:
            mask = _causal(q, k, narrow) if causal else None
            parts.append(dense_attention(q, k, v, mask, scale, dropout, softcap, sinks)[0])
            continue
        mask = _causal(q, k, narrow) if narrow is not None else None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
        parts.append(out.transpose(1, 2))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0].contiguous()


def _on_cuda(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, causal: bool, window: int | None
) -> Tensor:
    """A packed row by torch's variable-length kernel."""
    from torch.nn.attention.varlen import varlen_attn

    bounds = bounds.to(torch.int32)
    sides = (-1 if window is None else window - 1, 0) if causal else (-1, -1)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [tokens, heads, head]
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=sides, enable_gqa=k.shape[1] != q.shape[1])[None]


def _causal(query: Tensor, key: Tensor, window: int | None = None) -> Tensor:
    """bool [queries, keys], the last query at the last key."""
    lengths = query.shape[2], key.shape[2]
    seen = torch.ones(lengths, dtype=torch.bool, device=query.device).tril(lengths[1] - lengths[0])
    return seen if window is None else seen.triu(lengths[1] - lengths[0] - window + 1)


def _apart(mask: Tensor | None, starts: tuple[int, ...], causal: bool, query: Tensor) -> Tensor:
    """A mask that also keeps documents apart: bool or additive [..., seq, seq], as it was."""
    lengths = torch.tensor([end - begin for begin, end in itertools.pairwise(starts)], device=query.device)
    documents = torch.repeat_interleave(torch.arange(len(starts) - 1, device=query.device), lengths, output_size=starts[-1])
    same = documents[:, None] == documents
    if mask is None:
        return same.tril() if causal else same
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula written out, for what torch's kernels do not know. `mask` is bool or is added to the scores.

    Also returns the probabilities [batch, heads, queries, keys], after dropout.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        probabilities = torch.softmax(scores, -1, dtype=wide)
    else:
        beside = sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        probabilities = torch.softmax(torch.cat([scores.to(wide), beside], -1), -1)[..., :-1]
    probabilities = F.dropout(probabilities.to(query.dtype), dropout) if dropout else probabilities.to(query.dtype)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


# -- whether packing is safe ------------------------------------------------------------------------------------

_WATCHERS: list[list[tuple[bool, bool]]] = []  # of each attention call: documents by number, documents by mask
PROBE = (3, 4)  # lengths of two documents in one row


def keeps_documents_apart(model: nn.Module) -> str:
    """Why documents of a packed row could see each other in a Hugging Face causal language model; empty if they cannot.

    The model runs once on a row of two short documents. With weights, the gradient of one document's logits by the
    other's embeddings must be zero to the bit, both ways. On the meta device every layer must have called attention,
    and been told of the documents. Convolutions and the like beside attention are found by either.
    """
    implementation = model.config.get_text_config()._attn_implementation
    if implementation.startswith("flash") and next(model.parameters()).device.type != "cuda":
        return f"attention {implementation} does not run on this device"
    was_training, generators = model.training, torch.random.get_rng_state()
    model.eval()
    try:
        return _leak_on_meta(model, implementation) if next(model.parameters()).is_meta else _leak(model)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, ModelError) as error:
        reason = " ".join(str(error).split())[:200]
        return f"{type(model).__name__} does not take a packed row ({type(error).__name__}: {reason})"
    finally:
        model.train(was_training)
        torch.random.set_rng_state(generators)


def packed_inputs(lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a model for one row of documents of these lengths, made of the first tokens there are."""
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cpu")
    positions = torch.cat([torch.arange(n, device="cpu") for n in lengths])[None]
    return {
        "input_ids": torch.arange(sum(lengths), device=device)[None], "position_ids": positions.to(device),
        "attention_mask": None, "use_cache": False, "cu_seq_lens_q": starts.to(device), "cu_seq_lens_k": starts.to(device),
        "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip


def _leak(model: nn.Module) -> str:
    first, embedded = PROBE[0], []

    def cut(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[-1]

    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            logits = model(**packed_inputs(PROBE, next(model.parameters()).device)).logits.float()
    finally:
        hook.remove()
    if logits.shape[1] != sum(PROBE) or len(embedded) != 1 or embedded[0].shape[:2] != logits.shape[:2]:
        return f"{type(model).__name__} adds tokens of its own to a row"
    weights = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
    for own, other in ((slice(0, first), slice(first, None)), (slice(first, None), slice(0, first))):
        gradient = torch.autograd.grad((logits[:, own] * weights).sum(), embedded[0], retain_graph=True)[0]
        if not gradient[:, own].any():
            return f"{type(model).__name__}: no gradient tells which tokens see which"
        if gradient[:, other].any():
            return f"{type(model).__name__} mixes the documents of a row with attention {model.config.get_text_config()._attn_implementation}"
    return ""


def _leak_on_meta(model: nn.Module, implementation: str) -> str:
    from torch.overrides import TorchFunctionMode

    class Packed(TorchFunctionMode):
        """transformers asks whether all positions rise, and whether the pad token is there. They do not, and it is not.
        Products grouped by expert have no shapes but those in bfloat16."""

        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func in (Tensor.__bool__, Tensor.__contains__) and args[0].is_meta:
                return False
            if getattr(func, "__name__", "").endswith("grouped_mm"):
                return func(*(t.bfloat16() for t in args[:2]), *args[2:], **(kwargs or {})).to(args[0].dtype)
            return func(*args, **(kwargs or {}))

    if reason := unsupported(type(model)):
        return reason
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd) and module.kernel_size != (1,) * len(module.kernel_size):
            return f"{name} is a convolution, which reaches over the bounds of documents"
    register()
    calls: list[tuple[bool, bool]] = []
    _WATCHERS.append(calls)
    model.set_attn_implementation(NAME)
    try:
        with torch.device("meta"), Packed(), torch.no_grad():
            logits = model(**packed_inputs(PROBE, torch.device("meta"))).logits
    finally:
        _WATCHERS.pop()
        model.set_attn_implementation(implementation)
    if logits.shape[1] != sum(PROBE):
        return f"{type(model).__name__} adds tokens of its own to a row"
    layers = model.config.get_text_config().num_hidden_layers
    if len(calls) < layers:
        return f"{type(model).__name__}: {layers - len(calls)} of {layers} layers mix tokens by something else than attention"
    told = [by_number if implementation == NAME else by_mask for by_number, by_mask in calls]
    return "" if all(told) else f"{type(model).__name__}: {told.count(False)} attention layers are not told of the documents"
