"""What a model is shown: an item becomes text by a named template, a table of parts and no code.

Every newline belongs to the prompt and every space before an answer to the answer, since tokenizers join a space with
the word after it and a newline with what precedes. So a prompt never ends in a space, and `options` begin with the one
that belongs there. Whoever scores joins prompt + option as text, encodes the whole, and splits it by character offsets:
the option's tokens are those that end after the prompt does. Encoding the two apart gives other tokens.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from deltune.errors import ConfigError, DataError
from deltune.evaluation.tasks.item import Item

LETTERS = tuple(string.ascii_uppercase)


@dataclass(frozen=True)
class Template:
    """The parts of a prompt, in their order; `{name}` stands for a value, `{{` for a brace.

    A question is context + question + one `choice` for each choice + cue; what an item has not is left out with its
    part. Under the protocol `likelihood`, which compares whole choices, the choices are not listed.
    """

    help: str = ""
    header: str = ""  # once, before everything; {subject}: the group with spaces for underscores
    headless: str = ""  # the header of items without a group
    context: str = "{context}\n\n"
    question: str = "{question}"
    choice: str = "\n{label}. {text}"
    cue: str = "\nAnswer:"
    space: str = " "  # between the cue and the answer
    solved: str = "{answer}"  # the answer as exemplars show it; {solution}: the worked answer, where there is one
    between: str = "\n\n"  # after each exemplar
    frame: str = "{prompt}{cue}"  # around header, exemplars and question
    labels: tuple[str, ...] = LETTERS
    trigger: str = ""  # generation: the answer is looked for after its first occurrence; "" for everywhere
    reverse: bool = False  # generation: the last candidate counts, not the first
    cleaner: str = "choice"  # generation: name in extract.CLEANERS
    stop: tuple[str, ...] = ("\n\n",)  # generation: texts that end an answer


TEMPLATES: dict[str, Template] = {
    "mmlu": Template(
        help="MMLU's own prompt in the form of QLoRA's files, to the byte (two spaces after `about`)",
        header="The following are multiple choice questions (with answers) about  {subject}.\n\n",
        headless="The following are multiple choice questions (with answers).\n\n",
    ),
    "plain": Template(help="the passage, the question, lettered options, `Answer:`"),
}


@cache
def parts_of(text: str) -> tuple[tuple[str, str | None], ...]:
    """(literal, name) pairs of a format string."""
    return tuple((literal, name) for literal, name, _, _ in string.Formatter().parse(text))


def filled(text: str, /, **values: str) -> str:
    """Each `{name}` replaced by its value, which may hold braces itself. KeyError for a name without a value."""
    return "".join(literal + ("" if name is None else values[name]) for literal, name in parts_of(text))


def label_of(item: Item, template: Template, place: int) -> str:
    """The label of a choice. DataError if the template has fewer labels than the item choices."""
    if len(item.choices) > len(template.labels):
        raise DataError(f"{item.id}: {len(item.choices)} choices, and the template has {len(template.labels)} labels.")
    return template.labels[place]


def answer_text(item: Item, template: Template, protocol: str) -> str:
    """The right answer as the model should give it: a label, the choice itself (likelihood), or the first right text."""
    if not item.choices:
        return item.answer[0]
    return item.choices[item.answer] if protocol == "likelihood" else label_of(item, template, item.answer)


def asked(item: Item, template: Template, protocol: str) -> str:
    """One question without its cue."""
    text = filled(template.context, context=item.context) if item.context else ""
    text += filled(template.question, question=item.question)
    if protocol != "likelihood":
        for place, choice in enumerate(item.choices):
            text += filled(template.choice, label=label_of(item, template, place), text=choice)
    return text


def solved(item: Item, template: Template, protocol: str) -> str:
    """One exemplar: the question, the cue and the right answer."""
    answer = answer_text(item, template, protocol)
    if "{solution}" in template.solved and not item.solution:
        shown = answer
    else:
        shown = filled(template.solved, answer=answer, solution=item.solution)
    return asked(item, template, protocol) + template.cue + template.space + shown


def prompt(item: Item, template: Template, shots: Sequence[Item], protocol: str) -> str:
    """All text before the answer, exemplars in the order given; ends in no space."""
    subject = item.group.replace("_", " ")
    text = filled(template.header, subject=subject) if item.group else template.headless
    for shot in shots:
        text += solved(shot, template, protocol) + template.between
    text += asked(item, template, protocol)
    return filled(template.frame, prompt=text, cue=template.cue)


def options(item: Item, template: Template, protocol: str) -> list[str]:
    """The texts whose likelihood is compared, each with the space that belongs before it: labels, or whole choices.

    ConfigError for an open question, which has nothing to compare.
    """
    if not item.choices:
        raise ConfigError(f"{item.id} has no choices, so nothing can be compared. What fits: protocol=generation.")
    texts = item.choices if protocol == "likelihood" else [label_of(item, template, i) for i in range(len(item.choices))]
    space = "" if template.frame.endswith("\n") else template.space
    return [space + text for text in texts]


def shots_for(item: Item, pool: Sequence[Item], k: int, seed: int) -> list[Item]:
    """k exemplars from `pool`, or as many as there are; never the item itself, by id or by content.

    Those of the item's own group come first, in the pool's order (the order of MMLU's dev files is part of its prompt);
    the others follow in an order drawn from the seed alone, so that all items of a group share one prefix.
    """
    if k <= 0:
        return []
    same = [shot for shot in pool if item.group and shot.group == item.group and not same_question(shot, item)][:k]
    if len(same) == k:
        return same
    others, wanted = [], k - len(same)
    for place in random.Random(seed).sample(range(len(pool)), len(pool)):
        if len(others) == wanted:
            break
        shot = pool[place]
        if not (item.group and shot.group == item.group) and not same_question(shot, item):
            others.append(shot)
    return same + others


def same_question(one: Item, other: Item) -> bool:
    return one.id == other.id or one.content == other.content
