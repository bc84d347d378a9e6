"""Reading an adapter whose base had more tokens: a base without them is given their rows first.

How many can be read off what PEFT's files hold too. Every row must then come from the file; none is guessed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltune.adapters.files.peft import PREFIX, TOKENS, saved_names
from deltune.adapters.targets import ends_with
from deltune.adapters.wrapper import walk
from deltune.errors import AdapterError
from deltune.tables import kept, lengthen, tables, tied


def undone_if_it_fails(load: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Have a function that loads onto a model, and raises, leave the model's tables as they were."""

    @functools.wraps(load)
    def loading(model: nn.Module, *arguments: Any, **named: Any) -> nn.Module:
        give_back = kept(model)
        try:
            return load(model, *arguments, **named)
        except BaseException:
            give_back()
            raise

    return loading


@torch.no_grad()
def give_rows(model: nn.Module, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Lengthen the model's tables to what an adapter's file holds, if that is more. AdapterError if it lacks some of the rows.

    New rows are zeros below an adapter that trains them. Where the file has the base's table itself, as PEFT writes it
    after a resize, they are that table's.
    """
    if not hasattr(model, "get_input_embeddings") or model.get_input_embeddings() is None:
        return
    embedding, head = tables(model)
    rows = len(embedding.weight)
    own = [embedding] if head is None or tied(embedding, head) else [embedding, head]
    names = {id(module): name for name, module in walk(model)}
    places = {names[id(table)]: table for table in own if id(table) in names}
    held = {place: _rows_of(place, table is embedding, fields, tensors) for place, table in places.items()}
    size = max((max(ids) + 1 for ids in held.values() if ids), default=0)
    if size <= rows:
        return
    for place, ids in held.items():
        lacking = sorted(set(range(rows, size)) - ids)
        if lacking:
            raise AdapterError(
                f"{place}: the adapter was made on a base with {size} tokens or more, this one has {rows}, and the file lacks the row of "
                f"token {lacking[0]}. What fits: the base that it was made on, as it was after it had been resized"
            )
    lengthen(model, size)
    copies = saved_names(fields)
    for place, table in places.items():
        table_of_base = tensors.get(f"{PREFIX}{place}.weight")
        if table_of_base is not None and not any(ends_with(place, ending) for ending in copies):
            table.weight[rows:] = table_of_base[rows:].to(table.weight)


def _rows_of(place: str, is_input: bool, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> set[int]:
    """The rows of a table that a file holds."""
    whole = tensors.get(f"{PREFIX}{place}.weight")
    found = set() if whole is None else set(range(len(whole)))
    given, targets = fields.get(TOKENS), [place] if is_input else []
    if fields.get("token_indices"):  # PEFT's method of that name
        given, targets = fields["token_indices"], fields.get("target_modules") or targets
    chosen = given if isinstance(given, dict) else dict.fromkeys(targets if isinstance(targets, list) else [targets], given or [])
    for ending, ids in chosen.items():
        if ends_with(place, ending) and isinstance(ids, list) and all(isinstance(i, int) for i in ids):
            found.update(ids)
    return found
