"""What a model is shown: an item becomes text by a named template, a table of parts and no code.

Every newline belongs to the prompt and every space before an answer to the answer, since tokenizers join a space with
the word after it and a newline with what precedes. So a prompt never ends in a space, and `options` begin with the one
that belongs there. Whoever scores joins prompt + option as text, encodes the whole, and splits it by character offsets:
the option's tokens are those that end after the prompt does. Encoding the two apart gives other tokens.
"""

from __future__ import annotations

import difflib
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from deltune.config import check, yaml_file
from deltune.config.fields import option
from deltune.errors import ConfigError, DataError
from deltune.evaluation.tasks.item import Item

LETTERS = tuple(string.ascii_uppercase)
# what each part may name between braces
PLACEHOLDERS = {
    "header": {"subject"},
    "headless": set(),
    "context": {"context"},
    "question": {"question"},
    "listed": set(),
    "choice": {"label", "text"},
    "cue": set(),
    "solved": {"answer", "solution"},
    "between": set(),
    "frame": {"prompt", "cue"},
}


@dataclass(frozen=True)
class Template:
    """The parts of a prompt. A question is context + question + listed + a `choice` for each choice + cue; what an item
    has not is left out with its part, and the protocol `likelihood`, which compares whole choices, lists none."""

    help: str = option("", "what it is")
    header: str = option("", "once, before everything; {subject}: the item's group, with spaces for underscores")
    headless: str = option("", "the header of items without a group")
    context: str = option("{context}\n\n", "the passage or dialogue; empty: it is not shown")
    question: str = option("{question}", "the question")
    listed: str = option("", "before the list of choices")
    choice: str = option("\n{label}. {text}", "one choice; empty: choices are not listed")
    cue: str = option("\nAnswer:", "what asks for the answer")
    space: str = option(" ", "between the cue and the answer", choices=("", " "))
    solved: str = option("{answer}", "the answer as exemplars show it; {solution}: the worked answer")
    between: str = option("\n\n", "after each exemplar")
    frame: str = option("{prompt}{cue}", "around all of it; {prompt}: header, exemplars and question")
    labels: list[str] = option(list(LETTERS), "names of the choices, in order")
    trigger: str = option("", "generation: the answer is looked for after the first occurrence of this; empty: everywhere")
    reverse: bool = option(False, "generation: the last candidate counts instead of the first")
    cleaner: str = option("", "generation: a regular expression; only what its one group matches is looked at; empty: all")
    stop: list[str] = option(["\n\n"], "generation: texts that end an answer")
    max_new_tokens: int = option(64, "generation: longest answer, in tokens", gt=0)

    def problems(self) -> list[str]:
        found = []
        for part, allowed in PLACEHOLDERS.items():
            fits = ", ".join(f"{{{name}}}" for name in sorted(allowed)) or "no placeholder"
            try:
                names = {name for _, name in parts_of(getattr(self, part)) if name is not None}
            except ValueError as error:
                found.append(f"{part} is not a template ({error}); a brace of its own is written {{{{ or }}}}; {fits} may stand in it")
                continue
            if names - allowed:
                found.append(f"{part} names {', '.join(f'{{{name}}}' for name in sorted(names - allowed))}; {fits} may stand in it")
        if "{question}" not in self.question:
            found.append("question must hold {question}")
        if "{prompt}" not in self.frame:
            found.append("frame must hold {prompt}")
        if (self.cue if self.frame.endswith("{cue}") else self.frame).endswith(" "):
            found.append("cue ends in a space; the space before an answer is `space`, so that it is encoded with the answer")
        if self.frame.endswith("{cue}") and self.cue.endswith("\n") and self.space:
            found.append("space must be empty after a cue that ends its line")
        if len(set(self.labels)) < len(self.labels) or not all(self.labels):
            found.append("labels must be different, and none empty")
        try:
            if self.cleaner and re.compile(self.cleaner).groups != 1:
                found.append("cleaner must have one group (…)")
        except re.error as error:
            found.append(f"cleaner is not a regular expression: {error}")
        if not all(self.stop):
            found.append("stop holds an empty text, which would end every answer at once")
        return found


_YES_NO = ["yes", "no"]
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_PANDA_EN = "Answer the following question with the given context:\n\n\n\n"
_PANDA_ZH = "阅读下面的文章并从选项中选择的答案回答问题：\n\n\n\n"
_SUMS = dict(
    question="Question: {question}",
    solved="{solution}\n#### {answer}",
    stop=["\n\nQuestion:", "\nQuestion:"],
    max_new_tokens=400,  # the test split's own solutions have up to 309 tokens of Llama-2's vocabulary, half of them over 93
)

TEMPLATES: dict[str, Template] = {
    "plain": Template(help="the passage, the question, lettered choices, `Answer:`"),
    "alpaca": Template(
        help="the same inside Alpaca's frame, for models that were trained on it",
        frame=_ALPACA + "\n\n### Instruction:\n{prompt}\n\n### Response:\n",
        stop=["\n\n", "###"],
    ),
    "mmlu": Template(
        help="MMLU's own prompt as QLoRA's files have it, to the byte (two spaces after `about`)",
        header="The following are multiple choice questions (with answers) about  {subject}.\n\n",
        headless="The following are multiple choice questions (with answers).\n\n",
    ),
    "reclor": Template(
        help="PandaLLM's prompt for ReClor, to the byte at zero shots",
        header=_PANDA_EN,
        headless=_PANDA_EN,
        context="Context:\n{context}\n\n",
        question="Question:\n{question}\n\n",
        listed="Options:",
        choice="\n{label}: {text}",
        cue="\n\n\nThe answer is",
    ),
    "panda-zh": Template(
        help="PandaLLM's Chinese prompt for C3 and LogiQA, to the byte at zero shots (but a dialogue has a turn a line)",
        header=_PANDA_ZH,
        headless=_PANDA_ZH,
        context="{context}\n\n",
        question="问题：\n{question}\n\n",
        listed="选项：",
        choice="\n{label}: {text}",
        cue="\n\n\n本题的答案是：",
        space="",
    ),
    "zh": Template(
        help="a plain Chinese prompt with lettered choices",
        question="问题：{question}",
        choice="\n{label}. {text}",
        cue="\n答案：",
        space="",
    ),
    "zh-stems": Template(
        help="the same, choices called 甲, 乙, 丙, 丁",
        question="问题：{question}",
        choice="\n{label}、{text}",
        cue="\n答案：",
        space="",
        labels=list("甲乙丙丁戊己庚辛壬癸"),
    ),
    "yes-no": Template(
        help="a question to be answered yes or no; the facts that the data gives are not shown",
        context="",
        question="Question: {question}",
        choice="",
        labels=_YES_NO,
    ),
    "yes-no-facts": Template(
        help="the same, after the facts that decide it",
        context="Facts: {context}\n",
        question="Question: {question}",
        choice="",
        labels=_YES_NO,
    ),
    "gsm8k": Template(help="a sum; the number after `####`, as the data's own answers end", trigger="####", **_SUMS),
    "gsm8k-last": Template(help="a sum; the last number of the answer, however it ends", reverse=True, **_SUMS),
}


def template_named(name: str) -> Template:
    """A template of the table, or of a YAML or JSON file of the user's with Template's fields.

    In a file, `base: NAME` says which template all else comes from (default plain). ConfigError for anything unfit.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name).expanduser()
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        near = difflib.get_close_matches(name, TEMPLATES, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"template={name}: there are {', '.join(TEMPLATES)}, or a file .yaml or .json of your own.{meant}")
    given, _ = yaml_file.read(path)
    base = given.pop("base", "plain")
    if base not in TEMPLATES:
        raise ConfigError(f"base={base} ({path}): there are {', '.join(TEMPLATES)}.")
    return check.build(Template, {**vars(TEMPLATES[base]), **given}, str(path))


@cache
def parts_of(text: str) -> tuple[tuple[str, str | None], ...]:
    """(literal, name) pairs of a format string. ValueError for a brace without its partner."""
    return tuple((literal, name) for literal, name, _, _ in string.Formatter().parse(text))


def filled(part: str, **values: str) -> str:
    """Each `{name}` replaced by its value, which may hold braces itself."""
    return "".join(literal + ("" if name is None else values[name]) for literal, name in parts_of(part))


def label_of(item: Item, template: Template, place: int) -> str:
    """The label of a choice. DataError if the item has more choices than the template has labels."""
    if len(item.choices) > len(template.labels):
        raise DataError(
            f"{item.id}: {len(item.choices)} choices, and the template has {len(template.labels)} labels. "
            "What fits: a template with more labels."
        )
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
    if item.choices and template.choice and protocol != "likelihood":
        text += filled(template.listed)
        for place, choice in enumerate(item.choices):
            text += filled(template.choice, label=label_of(item, template, place), text=choice)
    return text


def solved(item: Item, template: Template, protocol: str) -> str:
    """One exemplar: the question, the cue and the right answer, worked out where the data has that."""
    answer = answer_text(item, template, protocol)
    worked = item.solution or "{solution}" not in template.solved
    shown = filled(template.solved, answer=answer, solution=item.solution) if worked else answer
    return asked(item, template, protocol) + filled(template.cue) + template.space + shown


def prompt(item: Item, template: Template, shots: Sequence[Item], protocol: str) -> str:
    """All text before the answer, exemplars in the order given; ends in no space."""
    text = filled(template.header, subject=item.group.replace("_", " ")) if item.group else filled(template.headless)
    for shot in shots:
        text += solved(shot, template, protocol) + filled(template.between)
    return filled(template.frame, prompt=text + asked(item, template, protocol), cue=filled(template.cue))


def options(item: Item, template: Template, protocol: str) -> list[str]:
    """The texts whose likelihood is compared, each with the space that belongs before it: labels, or whole choices.

    A few released rows have empty choices; what such a one says is the end of its line, so that it has a likelihood too.
    ConfigError for an open question, which has nothing to compare.
    """
    if not item.choices:
        raise ConfigError(f"{item.id} has no choices, so nothing can be compared. What fits: protocol=generation.")
    texts = item.choices if protocol == "likelihood" else [label_of(item, template, i) for i in range(len(item.choices))]
    space = "" if template.frame.endswith("\n") else template.space
    return [space + text if text.strip() else "\n" for text in texts]


def shots_for(item: Item, pool: Sequence[Item], k: int, seed: int) -> list[Item]:
    """k exemplars from `pool`, or as many as there are; never the item itself, by id or by content.

    Those of the item's own group come first, in the pool's order (the order of MMLU's dev files is part of its prompt);
    the others follow in an order drawn from the seed alone, so that items share one prefix wherever they can.
    """
    if k <= 0:
        return []
    same = [shot for shot in pool if shot.group == item.group and not same_question(shot, item)][:k] if item.group else []
    others: list[Item] = []
    for place in _order(len(pool), seed) if len(same) < k else ():
        shot = pool[place]
        if len(same) + len(others) < k and not (item.group and shot.group == item.group) and not same_question(shot, item):
            others.append(shot)
        if len(same) + len(others) == k:
            break
    return same + others


@cache
def _order(count: int, seed: int) -> tuple[int, ...]:
    places = list(range(count))
    random.Random(seed).shuffle(places)
    return tuple(places)


def same_question(one: Item, other: Item) -> bool:
    return one.id == other.id or one.content == other.content
