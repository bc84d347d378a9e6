"""Which parameters of a model move, by name pattern, and the table of how many do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from deltune.errors import ModelError


def select_trainable(model: nn.Module, enable: Sequence[str] = (), disable: Sequence[str] = ()) -> list[str]:
    """Let exactly the parameters move whose name matches a pattern of `enable` (empty: all) and none of `disable`.

    `*` and `?` match any text, dots included. A parameter that has two names (tied embeddings) goes by either, and
    `disable` wins. Returns the names; raises ModelError for a pattern that matches nothing and for an empty selection.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_patterns("model.enable", enable, parameters)
    _check_patterns("model.disable", disable, parameters)
    frozen = {id(p) for name, p in parameters.items() if _matches(name, disable)}
    chosen = {id(p) for name, p in parameters.items() if not enable or _matches(name, enable)} - frozen
    if not chosen:
        raise ModelError(
            f"model.enable={list(enable)} and model.disable={list(disable)} leave no parameter to train, of "
            f"{len(parameters)}."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_patterns(key: str, patterns: Sequence[str], names: Any) -> None:
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        # a pattern without its wildcards is the text that was meant to be in the name
        text = pattern.replace("*", "").replace("?", "")
        near = [name for name in names if text and text in name][:3]
        near = near or difflib.get_close_matches(pattern, list(names), n=3, cutoff=0.3) or list(names)[:3]
        hint = f" Without the exact ends it would be *{text}*." if text and any(text in name for name in names) else ""
        raise ModelError(f"{key}: pattern {pattern!r} matches no parameter. Nearest names: {', '.join(near)}.{hint}")


ORDER = ("embedding", "attention", "mlp", "norm", "head")


def parameter_table(model: nn.Module) -> list[dict[str, Any]]:
    """Rows {module, tensors, trainable, total}: parameters by the kind of module that they belong to, each one once.

    A kind is attention, mlp, norm, embedding, head, or else the class that owns the parameter.
    """
    rows: dict[str, dict[str, Any]] = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        kind = _kind(name, modules)
        row = rows.setdefault(kind, {"module": kind, "tensors": 0, "trainable": 0, "total": 0})
        row["tensors"] += 1
        row["total"] += parameter.numel()
        row["trainable"] += parameter.numel() if parameter.requires_grad else 0
    return sorted(
        rows.values(),
        key=lambda row: (ORDER.index(row["module"]) if row["module"] in ORDER else len(ORDER), row["module"]),
    )


def _kind(name: str, modules: dict[str, nn.Module]) -> str:
    """By the class names on the way from the parameter to the root; the nearest telling one decides."""
    path = name.split(".")[:-1]
    if "lm_head" in path or "embed_out" in path:
        return "head"
    for length in range(len(path), 0, -1):
        module = modules[".".join(path[:length])]
        kind = _kind_of_class(type(module).__name__)
        if kind is not None:
            return kind
    return type(modules[".".join(path)]).__name__


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return _kind_of_class(type(module).__name__) == "norm"


def _kind_of_class(name: str) -> str | None:
    """Kind by the words that transformers' class names are made of."""
    lowered = name.lower()
    if "norm" in lowered:
        return "norm"
    if "embedding" in lowered:
        return "embedding"
    if "attention" in lowered or "attn" in lowered:
        return "attention"
    if any(word in lowered for word in ("mlp", "feedforward", "expert", "moe")):
        return "mlp"
    return None
