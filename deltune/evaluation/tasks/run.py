"""Puts a task's items to a model and gives each its prediction: by letter logits, option likelihood or generation.

What an item is answered depends on the model, the item and the way it is asked, never on batches, ranks or on where an
interrupted evaluation went on. Items go in rounds, each shared out over the ranks and gathered on all of them, so that
answers can be kept as they come.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltune import dist
from deltune.errors import ConfigError, DataError, NumericsError
from deltune.evaluation.tasks.extract import extract
from deltune.evaluation.tasks.item import Item
from deltune.evaluation.tasks.score import Request, Work, score, shares
from deltune.evaluation.tasks.templates import Template, options, prompt, shots_for
from deltune.models.generation import GenerateOptions, generate
from deltune.models.head import Head

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LIKELIHOODS = ("sum", "tokens", "bytes")
TAIL = 32  # characters of a prompt, at least, that are encoded again with each option: no token reaches over so many
ROUND_TOKENS = 1 << 15  # that a rank computes between two times that answers are gathered and kept


@dataclass(frozen=True)
class Way:
    """How items are asked. `likelihood` says by what an option's log-probability is divided before they are compared."""

    template: Template
    protocol: str
    shots: int = 0
    likelihood: str = "sum"  # of LIKELIHOODS: nothing, its tokens, or its bytes in UTF-8
    max_new_tokens: int = 64
    seed: int = 42  # of exemplars from other groups


@dataclass(frozen=True)
class Question:
    """An item as the model reads it."""

    item: Item
    prompt: list[int]
    options: list[list[int]]  # [] where an answer is generated
    num_bytes: list[int]
    num_shots: int
    num_cut: int  # tokens that the context window had no room for, from the beginning


@dataclass(frozen=True)
class Prediction:
    """What the model said to one item, and whether it is right."""

    id: str
    group: str
    protocol: str
    prediction: int | str | None  # None: no answer was found in the text
    answer: int | list[str]
    correct: bool
    scores: list[float] | None = None  # log-probability of each option, in nats; of letters among themselves
    num_tokens: list[int] | None = None  # of each option, for likelihoods by length
    num_bytes: list[int] | None = None
    text: str | None = None  # generated


# -- questions --------------------------------------------------------------------------------------------------


def questions(
    items: Sequence[Item], way: Way, pool: Sequence[Item], tokenizer: PreTrainedTokenizerBase, window: int | None
) -> list[Question]:
    """Each item as token ids, with exemplars from `pool`.

    Where the window (`context_window`) has no room for a prompt, exemplars are left out, the first ones first, and then
    the beginning of the question. DataError for an item that has no prompt, ConfigError for one that the protocol does
    not fit.
    """
    reserved = way.max_new_tokens if way.protocol == "generation" else 0
    if window is not None and reserved >= window:
        raise ConfigError(f"max_new_tokens={reserved} leaves no room for a question in the model's window of {window} tokens")
    shots = [shots_for(item, pool, way.shots, way.seed) for item in items]
    found = _encoded(items, shots, way, tokenizer)
    if window is None:
        return found
    for place, question in enumerate(found):
        while question.num_shots and _length(question) + reserved > window:
            shots[place] = shots[place][1:]
            question = _encoded([items[place]], [shots[place]], way, tokenizer)[0]
        found[place] = _cut(question, window - reserved)
    return found


def _encoded(items: Sequence[Item], shots: Sequence[Sequence[Item]], way: Way, tokenizer: Any) -> list[Question]:
    """Prompt and options split where the tokens of all that may follow the prompt begin to differ from the prompt's own."""
    befores = [prompt(item, way.template, exemplars, way.protocol) for item, exemplars in zip(items, shots, strict=True)]
    afters = [[] if way.protocol == "generation" else options(item, way.template, way.protocol) for item in items]
    begin = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    found = []
    for item, exemplars, after, (own, whole) in zip(items, shots, afters, _tokens(befores, afters, tokenizer), strict=True):
        # a token that an option shares with the end of the prompt belongs to the options: all are then compared from there
        first = min((_common(own, one) for one in whole), default=len(own))
        if len(begin) + first == 0 or any(len(one) == first for one in whole):
            raise DataError(f"{item.id}: the prompt or one of its options has no token of its own.")
        num_bytes = [len(option.encode()) for option in after]
        found.append(Question(item, begin + own[:first], [one[first:] for one in whole], num_bytes, len(exemplars), 0))
    return found


def _tokens(befores: Sequence[str], afters: Sequence[Sequence[str]], tokenizer: Any) -> Iterator[tuple[list[int], list[list[int]]]]:
    """(tokens of the prompt, tokens of the prompt with each option) of each item, encoded as one text.

    Of a long prompt only its last lines are encoded again with each option, where these by themselves have the tokens
    that they have in it.
    """
    tails = [before[_last_lines(before) :] if len(after) > 1 else before for before, after in zip(befores, afters, strict=True)]
    texts = [*befores, *tails, *(tail + option for tail, after in zip(tails, afters, strict=True) for option in after)]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    count = len(befores)
    ends = iter(ids[2 * count :])
    for own, tail, before, after in zip(ids[:count], ids[count : 2 * count], befores, afters, strict=True):
        first, following = len(own) - len(tail), [next(ends) for _ in after]
        if first and own[first:] != tail:
            first, following = 0, tokenizer([before + option for option in after], add_special_tokens=False, verbose=False)["input_ids"]
        yield own, [own[:first] + one for one in following]


def _last_lines(text: str) -> int:
    """Where the last lines of a text begin that together have TAIL characters; 0 where there are no others."""
    return text.rfind("\n", 0, max(0, len(text) - TAIL)) + 1


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with, by halves: slices are compared quickly."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _length(question: Question) -> int:
    """Positions of the model's window that the question takes; the last token of an option needs none."""
    return len(question.prompt) + max((len(option) - 1 for option in question.options), default=0)


def _cut(question: Question, room: int) -> Question:
    """The question without the beginning that there is no room for; a BOS stays."""
    over = _length(question) - room
    if over <= 0:
        return question
    kept = question.prompt[:1] + question.prompt[1 + over :]
    if over >= len(question.prompt) - 1:
        raise DataError(f"{question.item.id}: its options alone have more tokens than the model's window of {room}.")
    return Question(question.item, kept, question.options, question.num_bytes, question.num_shots, over)


# -- answers ----------------------------------------------------------------------------------------------------


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Question], way: Way, *, head: Head | None = None,
    batch: int = 8, autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    done: Collection[str] = (), work: Work | None = None,
) -> Iterator[list[Prediction]]:  # fmt: skip
    """Predictions of all questions whose id is not `done`, a round at a time, the same on every rank.

    `head` describes the model's head (`models.head.describe`) and spares logits. `work` is added to on each rank.
    Raises NumericsError where the model's scores are not numbers.
    """
    order = sorted((question for question in asked if question.item.id not in done), key=lambda one: one.prompt)
    with autocast():
        share = way.protocol != "generation" and bool(order) and shares(model)
    for places in _rounds(_costs(order, way, share), dist.world_size()):
        mine = order[places[dist.rank()]]
        if way.protocol == "generation":
            made = _generated(model, tokenizer, mine, way, batch, autocast)
        else:
            requests = [Request(question.prompt, question.options) for question in mine]
            sums = score(model, requests, head=head, batch=batch, share=share, autocast=autocast, work=work)
            made = [_chosen(question, way, found) for question, found in zip(mine, sums, strict=True)]
        yield [prediction for part in dist.gather_objects(made) for prediction in part]


def _costs(order: Sequence[Question], way: Way, share: bool) -> list[int]:
    """Tokens that each question takes after the one before it."""
    before: Sequence[Sequence[int]] = [[], *(question.prompt for question in order)]
    return [
        len(question.prompt) - (_common(last, question.prompt) if share else 0)
        + (sum(len(option) - 1 for option in question.options) if question.options else way.max_new_tokens)
        for last, question in zip(before, order, strict=False)
    ]  # fmt: skip


def _rounds(costs: Sequence[int], ranks: int) -> Iterator[list[slice]]:
    """For each round the places of each rank: neighbours stay together, since they share most, and shares cost alike."""
    ends = [0, *itertools.accumulate(costs)]
    place = 0
    while place < len(costs):
        bounds = [place]
        for rank in range(ranks):
            wanted = ends[place] + ROUND_TOKENS * (rank + 1)
            bounds.append(next((i for i in range(bounds[-1] + (rank == 0), len(ends)) if ends[i] >= wanted), len(costs)))
        if bounds[-1] == len(costs):  # the last round: what is left, in even shares
            left = ends[-1] - ends[place]
            bounds = [place]
            for rank in range(ranks):
                wanted = ends[place] + left * (rank + 1) / ranks
                bounds.append(next(i for i in range(bounds[-1], len(ends)) if ends[i] >= wanted))
        yield [slice(first, last) for first, last in itertools.pairwise(bounds)]
        place = bounds[-1]


def _chosen(question: Question, way: Way, sums: list[float]) -> Prediction:
    """The option with the highest score, the first of equals."""
    item = question.item
    if any(math.isnan(value) for value in sums):
        raise NumericsError(f"the model's scores for {item.id} are not numbers (NaN)")
    if way.protocol == "letters":
        top = max(sums)
        total = top + math.log(sum(math.exp(value - top) for value in sums))
        sums = [value - total for value in sums]
    num_tokens = [len(option) for option in question.options]
    best = place_of_best(sums, num_tokens, question.num_bytes, "sum" if way.protocol == "letters" else way.likelihood)
    lengths = (None, None) if way.protocol == "letters" else (num_tokens, question.num_bytes)
    return Prediction(item.id, item.group, way.protocol, best, item.answer, best == item.answer, sums, *lengths)


def place_of_best(sums: Sequence[float], num_tokens: Sequence[int], num_bytes: Sequence[int], likelihood: str) -> int:
    """The option whose log-probability, divided as `likelihood` says, is the highest."""
    divisors = {"sum": [1] * len(sums), "tokens": num_tokens, "bytes": num_bytes}[likelihood]
    values = [value / divisor for value, divisor in zip(sums, divisors, strict=True)]
    return values.index(max(values))


def _generated(
    model: nn.Module, tokenizer: Any, asked: Sequence[Question], way: Way, batch: int, autocast: Callable[[], contextlib.AbstractContextManager]
) -> list[Prediction]:
    choice = GenerateOptions(max_new_tokens=way.max_new_tokens, stop=tuple(way.template.stop))
    with autocast():
        texts = generate(model, tokenizer, [question.prompt for question in asked], choice, batch=batch)
    made = []
    for question, generated in zip(asked, texts, strict=True):
        item = question.item
        found = extract(generated.text, item, way.template)
        right = found == item.answer if isinstance(item.answer, int) else found in item.answer
        wanted = item.answer if isinstance(item.answer, int) else list(item.answer)
        made.append(Prediction(item.id, item.group, way.protocol, found, wanted, right, text=generated.text))
    return made

