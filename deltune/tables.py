"""A model's two tables, a row for each token: its input embeddings and its output head. Only this file lengthens them.

A table is [rows, dim]. New rows are zeros, whoever makes them: what they start as is written by whoever trains them, so
that a base lengthened again elsewhere is the same base, and an adapter's rows added to it are exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deltune.errors import ModelError


def tables(model: nn.Module) -> tuple[nn.Module, nn.Module | None]:
    """(input embeddings, output head) of a Hugging Face model; no head where it names none. Either may stand in a wrapper."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embedding is None:
        raise ModelError(f"the model, a {type(model).__name__}, does not say which module embeds its input, so it can be given no more tokens")
    return embedding, model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def tied(embedding: nn.Module, head: nn.Module | None) -> bool:
    """Whether one tensor is both tables."""
    return head is not None and head.weight is embedding.weight


def kept(model: nn.Module) -> Callable[[], None]:
    """A call that gives a model back the tables that it has now."""
    if not hasattr(model, "get_input_embeddings") or model.get_input_embeddings() is None:
        return lambda: None
    embedding, head = tables(model)
    before: list[tuple[object, str, object]] = []
    for module, names in ((embedding, ("weight", "num_embeddings")), (head, ("weight", "out_features", "bias"))):
        before += [(module, name, getattr(module, name)) for name in names if hasattr(module, name)]
    before += [(holder, "vocab_size", vars(holder)["vocab_size"]) for holder in _sized(model)]

    def give_back() -> None:
        for holder, name, value in before:
            if getattr(holder, name) is not value:
                setattr(holder, name, value)

    return give_back


@torch.no_grad()
def lengthen(model: nn.Module, size: int) -> None:
    """Give both tables `size` rows, in place, and have the config say so.

    New rows are zeros. A head's bias gets the mean of its old values in new places: the log-probability that a token has
    before anything is known of it. Ties stay. Raises ModelError where a table is none that can be lengthened, or is
    quantised, or has more rows already.
    """
    embedding, head = tables(model)
    _check(model, embedding, head, size)
    was_tied = tied(embedding, head)
    embedding.weight = _longer(embedding.weight, size)
    embedding.num_embeddings = size
    if head is not None:
        head.weight = embedding.weight if was_tied else _longer(head.weight, size)
        head.out_features = size
        if head.bias is not None:
            head.bias = _longer(head.bias, size, 0.0 if head.bias.is_meta else float(head.bias.double().mean()))
    for holder in _sized(model):
        holder.vocab_size = size


def _check(model: nn.Module, embedding: nn.Module, head: nn.Module | None, size: int) -> None:
    for what, module, kind in (("input embedding", embedding, nn.Embedding), ("output head", head, nn.Linear)):
        if module is None:
            continue
        if not isinstance(module, kind):
            raise ModelError(f"the {what} is a {type(module).__name__}, which cannot be given more rows: that goes before any adapter, and for {kind.__name__}")
        if type(module.weight.detach()) is not Tensor:
            raise ModelError(
                f"the {what} cannot be given more rows, for its weight is quantised. What fits: a base whose embeddings and head are "
                "as they were, as quant=nf4 leaves it"
            )
        if len(module.weight) > size:
            raise ModelError(f"the {what} has {len(module.weight)} rows already, more than {size}")
    if head is not None and len(head.weight) != len(embedding.weight):
        raise ModelError(f"the input embeddings have {len(embedding.weight)} rows and the output head {len(head.weight)}: it is not told which rows a new token gets")
    other = next((name for name, m in model.named_modules() if isinstance(m, nn.Embedding) and "token" in name and m is not embedding), None)
    if other is not None:
        raise ModelError(f"{other} is another table by token, which new tokens would need rows of too; this model can be given none")


def _longer(parameter: nn.Parameter, size: int, value: float = 0.0) -> nn.Parameter:
    longer = torch.full((size, *parameter.shape[1:]), value, dtype=parameter.dtype, device=parameter.device)
    longer[: len(parameter)] = parameter
    return nn.Parameter(longer, requires_grad=parameter.requires_grad)


def _sized(model: nn.Module) -> list[object]:
    """The configs and modules of a model that say how many tokens there are."""
    config = getattr(model, "config", None)
    configs = [] if config is None else [config, config.get_text_config()]
    return [holder for holder in (*model.modules(), *configs) if isinstance(vars(holder).get("vocab_size"), int)]
