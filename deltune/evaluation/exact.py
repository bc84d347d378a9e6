"""Exact match: the model answers each prompt, and the answer either is the reference or is not.

The prompt is every token before the answer as it was tokenised for training, so that nothing is rendered anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deltune import dist
from deltune.errors import DataError
from deltune.evaluation.statistics import wilson_interval
from deltune.models.generation import GenerateOptions, context_window, generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORE = -100


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Sequence[Any],
    options: GenerateOptions | None = None,
    *,
    limit: int | None = None,
    batch: int = 8,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(score, answers) on the first `limit` examples, shared out over the ranks and gathered on all of them.

    The score holds exact_match, n, the ends of its Wilson interval (`low`, `high`) and `num_too_long`: references
    with more tokens than max_new_tokens, which cannot be matched. Each answer holds row, prompt, reference,
    prediction, match, stopped_by. Texts are compared without white space around them. Of a conversation the last
    answer is asked for. Raises DataError for an example without prompt or answer.
    """
    options = options or GenerateOptions()
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if count == 0:
        raise DataError("the evaluation data has no examples to answer.")
    places = range(dist.rank(), count, dist.world_size())
    tasks = [split(dataset[place]) for place in places]
    window = context_window(model)
    for place, (prompt, _) in zip(places, tasks, strict=True):
        if window is not None and len(prompt) >= window:
            raise DataError(
                f"{dataset[place].row}: the prompt has {len(prompt)} tokens and the model's context window "
                f"{window}. What fits: data.max_source_length below that."
            )
    generated = generate(model, tokenizer, [prompt for prompt, _ in tasks], options, batch=batch, numbers=list(places))
    answers = []
    for place, (prompt, reference), answer in zip(places, tasks, generated, strict=True):
        wanted = tokenizer.decode(reference, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        entry = {
            "row": dataset[place].row,
            "prompt": tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False),
            "reference": wanted,
            "prediction": answer.text.strip(),
            "match": answer.text.strip() == wanted,
            "stopped_by": answer.stopped_by,
        }
        answers.append((place, len(reference) > options.max_new_tokens, entry))
    everything = sorted((one for part in dist.gather_objects(answers) for one in part), key=lambda one: one[0])
    matches = sum(entry["match"] for _, _, entry in everything)
    low, high = wilson_interval(matches, count)
    too_long = sum(long for _, long, _ in everything)
    score = {"exact_match": matches / count, "n": count, "low": low, "high": high, "num_too_long": too_long}
    return score, [entry for _, _, entry in everything]


def split(example: Any) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) of an example: the answer is its last run of trained tokens, the prompt what precedes."""
    trained = np.flatnonzero(np.asarray(example.labels) != IGNORE)
    if len(trained) == 0:
        raise DataError(f"{example.row}: no token is trained, so there is no answer to compare with.")
    breaks = np.flatnonzero(np.diff(trained) > 1)
    start = int(trained[breaks[-1] + 1] if len(breaks) else trained[0])
    if start == 0:
        raise DataError(
            f"{example.row}: trained from its first token, so there is no prompt to answer. Exact match needs "
            "data.mode=sft and data.train_on_source=false."
        )
    ids = [int(i) for i in example.ids]
    return ids[:start], ids[start : int(trained[-1]) + 1]
