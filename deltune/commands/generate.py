"""deltune generate [run=RUN | model=MODEL adapter=FOLDER] prompt=TEXT | file=FILE [out=FILE] [key=value ...]

Answers. One prompt's answer goes to standard output and nothing else does. A file may be JSONL, JSON, CSV, Parquet
(columns prompt, messages, conversations, instruction, question, input or text) or text with a prompt a line; each row
becomes a line of `out`: {row, input, prediction, stopped_by, num_prompt_tokens, num_new_tokens}, with `repeat` one for
each answer. The same command goes on where an interrupted one ended; FILE.settings.json beside `out` says what the
answers were made with. An `out` of another kind than JSONL is written from FILE.jsonl once all are there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

if TYPE_CHECKING:
    from deltune.commands.open_model import Opened
    from deltune.commands.prompts import Prompt
    from deltune.models.generation import Generated
    from deltune.settings import GenerateSettings

CHUNK = 4  # batches that are sorted by length together; answers are written in the order of the file
SECONDS_BETWEEN_LINES = 10.0


def main(words: list[str], file: Path | None = None) -> int:
    from deltune import log
    from deltune.settings import GenerateSettings, load

    settings = load(GenerateSettings, words, file)
    log.set_up()
    if settings.prompt is not None:
        answer_one(settings, sys.stdout)
    else:
        answer_file(settings)
    return 0


def answer_one(settings: GenerateSettings, out: TextIO) -> None:
    """Write the answer to settings.prompt as it comes."""
    from deltune.commands.open_model import opened, options_of
    from deltune.commands.prompts import PromptWriter
    from deltune.errors import ConfigError
    from deltune.models.generation import stream

    if not settings.prompt.strip():
        raise ConfigError("prompt is empty")
    with opened(settings) as place:
        ids = PromptWriter(settings, place.tokenizer).messages([{"role": "user", "content": settings.prompt}])
        with place.engine.autocast():
            for piece in stream(place.model, place.tokenizer, ids, options_of(settings)):
                print(piece, end="", file=out, flush=True)
        print(file=out)


def answer_file(settings: GenerateSettings) -> None:
    """Answer every row of settings.file that has no answer in settings.out yet."""
    from deltune.commands.answers import begin, write_table
    from deltune.commands.open_model import opened
    from deltune.commands.prompts import read_prompts, sampled
    from deltune.log import logger

    files, prompts = read_prompts(settings.file)
    places = sampled(prompts, settings.sample, settings.stratify, settings.seed)
    asked = [Asked(prompts[i], i, k, adapter_of(settings, prompts[i])) for i in places for k in range(settings.repeat)]
    out = None if settings.out is None else Path(settings.out).with_suffix(".jsonl")
    done = set() if out is None else begin(out, settings, files, {one.key for one in asked})
    left = [one for one in asked if one.key not in done]
    if done:
        logger.info("%s: %d of %d rows are answered already", out, len(done), len(asked))
    if left:
        with (
            opened(settings) as place,
            nullcontext(sys.stdout) if out is None else out.open("a", encoding="utf-8") as stream,
        ):
            answer_rows(place, settings, left, stream)
    if out is not None:
        if settings.out != str(out):
            write_table(out, Path(settings.out))
        logger.info("%d answers in %s%s", len(asked), settings.out, matches(out))


class Asked(NamedTuple):
    """An answer that is wanted."""

    prompt: Prompt
    place: int  # of its row in the file
    turn: int  # of so many answers to the row
    adapter: str | None  # None is the base model

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt.row, self.turn

    @property
    def number(self) -> str:
        """What a draw goes by, so that an interrupted run draws what a whole one does."""
        return f"{self.place}.{self.turn}" if self.turn else str(self.place)


def adapter_of(settings: GenerateSettings, prompt: Prompt) -> str | None:
    """The adapter by which a row is answered: the one that it names, else the one that all are."""
    from deltune.errors import DataError

    default = None if settings.adapter is None else "default"
    if not settings.adapters:
        return default
    name = prompt.value.get("adapter", default)
    known = [*settings.adapters, *([default] if default else [])]
    if name is not None and name not in known:
        raise DataError(f"{prompt.row}: adapter {name!r} is none of {', '.join(known)}")
    return name


@contextmanager
def answering(place: Opened, name: str | None) -> Iterator[None]:
    """The model with one of its adapters, or without any."""
    from deltune.adapters.attach import adapters, disabled, switch

    if not adapters(place.model):
        yield
    elif name is None:
        with disabled(place.model):
            yield
    else:
        switch(place.model, name)
        yield


def load_others(place: Opened, settings: GenerateSettings) -> None:
    """Put the further adapters on the model, at rest."""
    from deltune.adapters.files import load_adapter
    from deltune.commands.open_model import originals_of

    for name, folder in settings.adapters.items():
        load_adapter(place.model, folder, name=name, originals=originals_of(settings))
    if settings.adapters:
        place.engine.place(place.model).requires_grad_(False)


def answer_rows(place: Opened, settings: GenerateSettings, rows: Sequence[Asked], out: TextIO) -> None:
    """A line for each, written chunk by chunk; rows of one adapter come together."""
    from deltune.commands.open_model import options_of
    from deltune.commands.prompts import PromptWriter, check_room
    from deltune.errors import DataError
    from deltune.log import logger
    from deltune.models.generation import context_window, generate

    load_others(place, settings)
    names = [None, "default", *settings.adapters]
    rows = sorted(rows, key=lambda one: names.index(one.adapter))  # in their order otherwise
    writer, options = PromptWriter(settings, place.tokenizer), options_of(settings)
    ids = [written(writer, one.prompt) for one in rows]
    problems = list(check_room([one.prompt for one in rows], ids, context_window(place.model)))
    if problems:
        raise DataError("\n  ".join([f"{len(problems)} prompts leave no room for an answer:", *problems[:5]]))
    began = spoken = time.monotonic()
    num_done = num_tokens = 0
    for start, end in chunks(rows, settings.batch * CHUNK):
        chunk = rows[start:end]
        with place.engine.autocast(), answering(place, chunk[0].adapter):
            answers = generate(
                place.model, place.tokenizer, ids[start:end], options, batch=settings.batch, numbers=[one.number for one in chunk],
            )  # fmt: skip
        for one, answer in zip(chunk, answers, strict=True):
            print(json.dumps(line_of(one, answer, settings), ensure_ascii=False, default=str), file=out)  # str: dates of tables
            num_tokens += len(answer.ids)
        out.flush()
        num_done += len(chunk)
        if time.monotonic() - spoken > SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            seconds = (spoken - began) / num_done * (len(rows) - num_done)
            logger.info("%d of %d answered, %.0f tokens/s, %.0f s left", num_done, len(rows), num_tokens / (spoken - began), seconds)


def chunks(rows: Sequence[Asked], size: int) -> Iterator[tuple[int, int]]:
    """Borders of parts of at most so many rows, each of one adapter."""
    start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and end - start < size and rows[end].adapter == rows[start].adapter:
            end += 1
        yield start, end
        start = end


def line_of(one: Asked, answer: Generated, settings: GenerateSettings) -> dict[str, Any]:
    line: dict[str, Any] = {"row": one.prompt.row}
    if settings.repeat > 1:
        line["turn"] = one.turn
    if settings.adapters:
        line["adapter"] = one.adapter
    line |= {"input": one.prompt.value, "prediction": answer.text}
    if one.prompt.reference is not None:
        line["reference"] = one.prompt.reference
    return line | {"stopped_by": answer.stopped_by, "num_prompt_tokens": answer.num_prompt_tokens, "num_new_tokens": len(answer.ids)}


def matches(out: Path) -> str:
    """In words, how many answers are their rows' references; nothing where a row has none."""
    from deltune.evaluation.statistics import proportion

    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    if not all("reference" in line for line in lines):
        return ""
    right = sum(line["prediction"].strip() == line["reference"].strip() for line in lines)
    score = proportion(right, len(lines))
    return f"; {right} of them are the reference: {score.value:.1%} (95 % interval {score.low:.1%} to {score.high:.1%})"


def written(writer: Any, prompt: Prompt) -> list[int]:
    from deltune.errors import DataError

    try:
        return writer.conversation(prompt.conversation, prompt.format)
    except DataError as error:
        raise DataError(f"{prompt.row}: {error}") from None
