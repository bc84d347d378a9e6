"""Prompts as training would have written them: rows of a file become conversations, and conversations the tokens that
stand before an answer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deltune.data.config import DataConfig
from deltune.data.conversation import BadRow, Conversation, Message, keys_of
from deltune.data.formats import ROLES, Schema
from deltune.errors import DataError
from deltune.log import logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltune.data.read import File
    from deltune.settings import Generation

# stands where an answer will be, so that a prompt is read and written by what reads and writes training rows
ANSWER = "x"
SHOWN = 5  # bad rows listed

# column that makes a row a prompt -> (format that it is read as, role of the column, role of the answer)
COLUMNS = {
    "prompt": ("prompt_completion", "prompt", "completion"),
    "messages": ("messages", "messages", None),
    "conversations": ("sharegpt", "conversations", None),
    "instruction": ("alpaca", "instruction", "output"),
    "question": ("input_output", "input", "output"),
    "query": ("input_output", "input", "output"),
    "input": ("input_output", "input", "output"),
    "text": ("prompt_completion", "prompt", "completion"),
}
# the same for entries of conversations: format -> (key of the speaker, key of the text, the assistant's name)
ENTRIES = {"messages": ("role", "content", "assistant"), "sharegpt": ("from", "value", "gpt")}
ASSISTANTS = ("assistant", "gpt", "model", "bot", "chatgpt")


class Prompt(NamedTuple):
    """A row of a file of prompts."""

    row: str  # file:line
    value: dict[str, Any]  # as read
    conversation: Conversation  # ends in what is to be answered
    format: str
    reference: str | None = None  # the answer that the row has, if it has one


def read_prompts(path: str) -> tuple[list[File], list[Prompt]]:
    """The files that `path` stands for and the prompts in them. DataError lists the first rows that hold none."""
    from deltune.data.read import read
    from deltune.data.sources import resolve

    files = [file for source in resolve([path], "file") for file in source.files]
    prompts, faults = [], []
    for file in files:
        for record in read(file):
            try:
                if record.fault:
                    raise BadRow(record.fault)
                prompts.append(Prompt(file.where(record.number), record.value, *parse(record.value), reference_of(record.value)))
            except BadRow as error:
                faults.append(f"{file.where(record.number)}: {error}")
                if len(faults) == SHOWN:
                    break
    if faults:
        raise DataError("rows that hold no prompt:\n  " + "\n  ".join(faults))
    if not prompts:
        raise DataError(f"file={path}: holds no rows")
    return files, prompts


def parse(row: Any) -> tuple[Conversation, str]:
    """(conversation up to what is to be answered, its format), without an answer that the row has. Raises BadRow."""
    if not isinstance(row, Mapping):
        raise BadRow("the row is not an object")
    column = next((name for name in COLUMNS if row.get(name) is not None), None)
    if column is None:
        raise BadRow(f"no prompt; keys found: {keys_of(row)}; a prompt is one of {', '.join(COLUMNS)}")
    format, role, answer = COLUMNS[column]
    if answer is None:
        entries = row[column]
        if not isinstance(entries, list) or not entries or not isinstance(entries[0], Mapping):
            raise BadRow(f"{column} must be a list of messages")
        format = "messages" if "role" in entries[0] else "sharegpt"
        values = {_column(format): _ask_again(entries, format)}
    else:
        if not str(row[column]).strip():
            raise BadRow(f"{column} is empty")
        values = {role: row[column], answer: ANSWER}
    required, optional = ROLES[format]
    values |= {name: row[name] for name in optional if name in row}
    (conversation,) = Schema(format, {name: name for name in (*required, *optional)}).conversations(values)
    return dataclasses.replace(conversation, messages=conversation.messages[:-1]), format


def reference_of(row: Mapping[str, Any]) -> str | None:
    """The answer that stands in a row from which `parse` takes a prompt; None where there is none."""
    column = next(name for name in COLUMNS if row.get(name) is not None)
    answer = COLUMNS[column][2]
    if answer is not None:
        return str(row[answer]) if row.get(answer) is not None else None
    last = row[column][-1]
    speaker, text, _ = ENTRIES["messages" if "role" in row[column][0] else "sharegpt"]
    return str(last.get(text, "")) if isinstance(last, Mapping) and last.get(speaker) in ASSISTANTS else None


def sampled(prompts: Sequence[Prompt], count: int | None, stratify: str | None, seed: int) -> list[int]:
    """Places of `count` prompts in their order, drawn by seed; with `stratify` each value of that column keeps its share
    (largest remainders). DataError where there are too few, or a row lacks the column."""
    if count is None:
        return list(range(len(prompts)))
    if count > len(prompts):
        raise DataError(f"sample={count}: there are {len(prompts)} rows")
    groups: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        if stratify is not None and stratify not in prompt.value:
            raise DataError(f"{prompt.row}: no column {stratify}, which stratify names; keys found: {keys_of(prompt.value)}")
        groups.setdefault("" if stratify is None else str(prompt.value[stratify]), []).append(place)
    shares = {value: count * len(places) / len(prompts) for value, places in groups.items()}
    sizes = {value: int(share) for value, share in shares.items()}
    left = sorted(groups, key=lambda value: (sizes[value] - shares[value], value))
    for value in left[: count - sum(sizes.values())]:
        sizes[value] += 1
    return sorted(place for value, places in groups.items() for place in random.Random(f"{seed}:{value}").sample(places, sizes[value]))


def _column(format: str) -> str:
    return "messages" if format == "messages" else "conversations"


def _ask_again(entries: Sequence[Any], format: str) -> list[Any]:
    """The entries with the placeholder in the place of the assistant's last words, if these end the conversation."""
    speaker, text, assistant = ENTRIES[format]
    kept = list(entries)
    while kept and isinstance(kept[-1], Mapping) and kept[-1].get(speaker) in ASSISTANTS:
        kept.pop()
    return [*kept, {speaker: assistant, text: ANSWER}]


@dataclass(frozen=True)
class _Encoded:
    """An encoded conversation in the shape of a data set's example."""

    ids: Any
    labels: Any
    row: str = "prompt"


class PromptWriter:
    """Conversations to token ids, with the template and the prompt parts of `settings`.

    A conversation is encoded as a training row that ends in some answer, and the answer's tokens are taken off again:
    so what the model is asked is by construction what it was trained on.
    """

    def __init__(self, settings: Generation, tokenizer: PreTrainedTokenizerBase):
        template = settings.template
        if template == "auto" and not tokenizer.chat_template:
            template = trained_template(settings)
        self.tokenizer = tokenizer
        self.config = DataConfig(
            template=template, system=settings.system, meta_prompt=settings.meta_prompt, prefix=settings.prefix,
            postfix=settings.postfix, max_length=2**30,
        )  # fmt: skip
        self._encoders: dict[str, Any] = {}

    def messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of {"role", "content"} turns up to where the answer begins."""
        return self.conversation(Conversation(tuple(Message(m["role"], m["content"]) for m in messages)), "messages")

    def conversation(self, conversation: Conversation, format: str) -> list[int]:
        """The same for a conversation that was read from a row of this format. Raises DataError."""
        import numpy as np

        from deltune.data.encode import Encoder
        from deltune.evaluation.exact import split

        if format not in self._encoders:
            self._encoders[format] = Encoder(self.config, self.tokenizer, format)
        turns = tuple(dataclasses.replace(message, train=False) for message in conversation.messages)
        asked = dataclasses.replace(conversation, messages=(*turns, Message("assistant", ANSWER, train=True)))
        ((examples, _),) = self._encoders[format].encode([[asked]])
        if isinstance(examples, BadRow):
            raise examples
        last = examples[-1]
        return split(_Encoded(last.ids, np.where(last.trained, last.ids, -100)))[0]


def trained_template(settings: Generation) -> str:
    """Without a chat template `auto` goes by the rows: the frame that the run's own rows were written in, if one."""
    from deltune.training import metrics

    run = Path(settings.run) if settings.run else Path(settings.adapter).parent if settings.adapter else None
    if run is None or not (run / metrics.FILE).is_file():
        return "auto"
    starts = [line for line in metrics.read(run / metrics.FILE) if line["kind"] == "start"]
    sources = starts[-1]["description"].get("data", {}).get("sources", []) if starts else []
    used = sorted({source["template"] for source in sources})
    if len(used) > 1:
        logger.warning(
            "%s was trained on prompts written in several ways (%s); template=NAME chooses one", run, ", ".join(used)
        )
    return used[0] if len(used) == 1 and used[0] in ("alpaca", "plain") else "auto"


def check_room(prompts: Sequence[Prompt], ids: Sequence[list[int]], window: int | None) -> Iterator[str]:
    """A line for each prompt that fills the context window."""
    for prompt, one in zip(prompts, ids, strict=True):
        if window is not None and len(one) >= window:
            yield f"{prompt.row}: the prompt has {len(one)} tokens, and the model's context window is {window}"
