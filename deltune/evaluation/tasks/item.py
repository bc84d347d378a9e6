"""A question as every task's reader gives it, and a task as the catalogue lists it: plain values, so that prompts,
scoring and metrics know no file format."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROTOCOLS = ("letters", "likelihood", "generation")
MEANS = ("micro", "macro")


@dataclass(frozen=True)
class Item:
    """One question. `id` is "<file stem>:<number>" with numbers from 1: the same in every run, unique in its task."""

    id: str
    group: str  # subject or sub-set; "" if the task has none
    context: str  # passage or dialogue; "" if there is none
    question: str
    choices: tuple[str, ...]  # () where the answer is open
    answer: int | tuple[str, ...]  # place in choices, or all texts that count as right
    solution: str = ""  # the worked answer without its final line, which exemplars show; "" if the data has none

    @property
    def content(self) -> tuple:
        """What is asked. Two items with equal content are the same question, whatever file each came from."""
        return self.context, self.question, tuple(sorted(self.choices))


@dataclass(frozen=True)
class Task:
    """One line of the catalogue.

    `read` takes a file or folder in any of the released layouts and raises DataError with file:line. `exemplars` takes
    the same path and gives the solved questions that the data brings for it ([] if none): a sibling split, or those
    inside the rows.
    """

    name: str
    help: str
    read: Callable[[Path], list[Item]]
    template: str  # default name in templates.TEMPLATES
    protocols: tuple[str, ...]  # of PROTOCOLS; the first is the default
    mean: str  # of MEANS: over questions, or the unweighted mean over groups
    language: str  # "en" or "zh"
    exemplars: Callable[[Path], list[Item]]
    files: tuple[str, ...]  # of a folder, the first of these that is there is asked
    train: str  # beside it, where exemplars come from


def permuted(item: Item, seed: int) -> Item:
    """The item with its choices in an order drawn from (seed, id), its answer moved along; open questions as they are.

    Choices that speak of others by place ("both A and B", "all of the above") lose their sense; that is in the data.
    """
    if not item.choices:
        return item
    order = list(range(len(item.choices)))
    random.Random(f"{seed}:{item.id}").shuffle(order)
    return dataclasses.replace(item, choices=tuple(item.choices[i] for i in order), answer=order.index(item.answer))
