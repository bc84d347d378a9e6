"""What moves in a run's model: its adapter, or chosen parameters of its own, with the rows of new tokens among them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deltune.log import logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from deltune.adapters.config import AdapterConfig
    from deltune.models.vocabulary import Growth
    from deltune.settings import Run


def set_moving(run: Run, model: PreTrainedModel) -> None:
    """Attach the run's adapter, or choose the model's own parameters, and start the rows of new tokens. On the meta device
    there is nothing to start."""
    from deltune.commands.open_model import originals_of
    from deltune.models.load import new_vocabulary
    from deltune.models.select import select_trainable

    new = new_vocabulary(run.model)
    if run.adapter is None:
        select_trainable(model, run.model.enable, run.model.disable)
    else:
        from deltune.adapters.attach import attach

        config = run.adapter if new is None else with_rows(run.adapter, model, new.ids)
        attach(model, config, seed=run.seed, originals=originals_of(run))
    if new is not None and model.device.type != "meta":
        start(run, model, new)


def with_rows(config: AdapterConfig, model: PreTrainedModel, ids: Sequence[int]) -> AdapterConfig:
    """The config with these rows of both tables among what it trains; a table that is trained in full has them already."""
    from deltune.adapters.targets import ends_with, inside
    from deltune.adapters.tokens import for_rows
    from deltune.adapters.wrapper import walk

    rows = for_rows(model, ids)
    if config.delta == "trainable_tokens":
        targets = config.targets if isinstance(rows, list) else list(rows)
        return replace(config, targets=targets, token_indices=sorted({*config.token_indices, *ids}))
    saved = [name for name, _ in walk(model) if any(ends_with(name, ending) for ending in config.modules_to_save)]
    given = config.trainable_token_indices
    if isinstance(rows, list) and isinstance(given, list):
        embedding = next(name for name, module in walk(model) if module is model.get_input_embeddings())
        whole = any(inside(embedding, other) for other in saved)
        return config if whole else replace(config, trainable_token_indices=sorted({*given, *rows}))
    if isinstance(rows, list):
        rows = {name: rows for name, module in walk(model) if module is model.get_input_embeddings()}
    own = given if isinstance(given, dict) else {next(iter(rows)): given}
    for place in [place for place in rows if not any(inside(place, other) for other in saved)]:
        same = next((ending for ending in own if ends_with(place, ending)), place)
        own = {**own, same: sorted({*own.get(same, []), *rows[place]})}
    return replace(config, trainable_token_indices={place: ids for place, ids in own.items() if ids})


def start(run: Run, model: PreTrainedModel, new: Growth) -> None:
    """Fill the new rows: of the base where it is trained itself, else of the adapter."""
    from deltune.adapters.tokens import set_rows
    from deltune.adapters.wrapper import original
    from deltune.models.vocabulary import starts
    from deltune.tables import tables, tied

    embedding, head = tables(model)
    pairs = [("input", embedding)] if tied(embedding, head) or head is None else [("input", embedding), ("head", head)]
    for name, table in pairs:
        rows = starts(new, original(table).weight.detach(), run.model.new_rows, name=name, seed=run.seed)
        if run.adapter is not None:
            set_rows(model, table, new.ids, rows)
            continue
        if not table.weight.requires_grad:
            logger.warning("rows of new tokens stay as they start: model.enable and model.disable freeze the %s", "input embeddings" if name == "input" else "output head")
        table.weight.data[list(new.ids)] = rows.to(table.weight)
    logger.info("%d rows for %d new tokens, which start by model.new_rows=%s; the model has %d rows now", len(new.ids), len(new.texts), run.model.new_rows, new.size)


def record(run: Run) -> None:
    """Write down which tokens the run adds; CheckpointError if it has begun with others, as a file of them may have changed."""
    from deltune.errors import CheckpointError
    from deltune.models.load import new_vocabulary
    from deltune.weights import replacing

    new = new_vocabulary(run.model)
    if new is None:
        return
    now = {str(i): text for i, text in sorted(new.texts.items())}
    file = run.folder / "new_tokens.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        other = next((i for i in sorted({*before, *now}, key=int) if before.get(i) != now.get(i)), None)
        if other is not None:
            raise CheckpointError(
                f"{run.folder}: holds a run with other new tokens: id {other} is {before.get(other)!r} there, {now.get(other)!r} now. "
                "What fits: the same tokens, or another name=..."
            )
        return
    text = (json.dumps(now, indent=0, ensure_ascii=False) + "\n").encode("utf-8")
    with replacing(file, len(text)) as temporary:
        temporary.write_bytes(text)


def save_tokenizer(run: Run, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Put the tokenizer beside an adapter where it is not the base's own, so that the folder is all there is to load."""
    if run.model.has_new_rows:
        tokenizer.save_pretrained(folder)
