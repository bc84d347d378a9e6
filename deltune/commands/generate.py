"""deltune generate [run=RUN | model=MODEL adapter=FOLDER] prompt=TEXT | file=FILE [out=FILE.jsonl] [key=value ...]

Answers. One prompt's answer goes to standard output and nothing else does. A file may be JSONL, JSON, CSV, Parquet
(columns prompt, messages, conversations, instruction, question, input or text) or text with a prompt a line; each row
becomes a line of `out`: {row, input, prediction, stopped_by, num_prompt_tokens, num_new_tokens}. The same command goes
on where an interrupted one ended; FILE.settings.json beside `out` says what the answers were made with.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from deltune.commands.open_model import Opened
    from deltune.commands.prompts import Prompt
    from deltune.data.read import File
    from deltune.settings import GenerateSettings

CHUNK = 4  # batches that are sorted by length together; answers are written in the order of the file
SECONDS_BETWEEN_LINES = 10.0
# settings that do not change what is answered; of the engine, the precision does
FREE = ("run", "out", "batch", "engine")


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
    from deltune.commands.open_model import opened
    from deltune.commands.prompts import read_prompts
    from deltune.log import logger

    files, prompts = read_prompts(settings.file)
    out = None if settings.out is None else Path(settings.out)
    done = set() if out is None else begin(out, settings, files, {prompt.row for prompt in prompts})
    left = [(number, prompt) for number, prompt in enumerate(prompts) if prompt.row not in done]
    if done:
        logger.info("%s: %d of %d rows are answered already", out, len(done), len(prompts))
    if left:
        with (
            opened(settings) as place,
            nullcontext(sys.stdout) if out is None else out.open("a", encoding="utf-8") as stream,
        ):
            answer_rows(place, settings, left, stream)
    if out is not None:
        logger.info("%d answers in %s", len(prompts), out)


def answer_rows(place: Opened, settings: GenerateSettings, rows: Sequence[tuple[int, Prompt]], out: TextIO) -> None:
    """A line for each (number, prompt), written chunk by chunk."""
    from deltune.commands.open_model import options_of
    from deltune.commands.prompts import PromptWriter, check_room
    from deltune.errors import DataError
    from deltune.log import logger
    from deltune.models.generation import context_window, generate

    writer, options = PromptWriter(settings, place.tokenizer), options_of(settings)
    ids = [written(writer, prompt) for _, prompt in rows]
    problems = list(check_room([prompt for _, prompt in rows], ids, context_window(place.model)))
    if problems:
        raise DataError("\n  ".join([f"{len(problems)} prompts leave no room for an answer:", *problems[:5]]))
    began = spoken = time.monotonic()
    size, num_tokens = settings.batch * CHUNK, 0
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        with place.engine.autocast():
            # a draw goes by the row's place in the file, so that an interrupted run draws what a whole one does
            answers = generate(
                place.model, place.tokenizer, ids[start : start + size], options, batch=settings.batch,
                numbers=[number for number, _ in chunk],
            )  # fmt: skip
        for (_, prompt), answer in zip(chunk, answers, strict=True):
            line = {
                "row": prompt.row, "input": prompt.value, "prediction": answer.text, "stopped_by": answer.stopped_by,
                "num_prompt_tokens": answer.num_prompt_tokens, "num_new_tokens": len(answer.ids),
            }  # fmt: skip
            print(json.dumps(line, ensure_ascii=False, default=str), file=out)  # str: dates of tables
            num_tokens += len(answer.ids)
        out.flush()
        if time.monotonic() - spoken > SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            num_done = start + len(chunk)
            seconds = (spoken - began) / num_done * (len(rows) - num_done)
            logger.info(
                "%d of %d answered, %.0f tokens/s, %.0f s left",
                num_done,
                len(rows),
                num_tokens / (spoken - began),
                seconds,
            )


def written(writer: Any, prompt: Prompt) -> list[int]:
    from deltune.errors import DataError

    try:
        return writer.conversation(prompt.conversation, prompt.format)
    except DataError as error:
        raise DataError(f"{prompt.row}: {error}") from None


# -- an output that goes on ---------------------------------------------------------------------------------------


def begin(out: Path, settings: GenerateSettings, files: Sequence[File], rows: set[str]) -> set[str]:
    """Rows that `out` holds answers to, made with these settings; what made them is written beside it.

    A last line that was cut short is taken off. Raises ConfigError or DataError if `out` belongs to something else.
    """
    from deltune.errors import ConfigError
    from deltune.weights import replacing

    record = out.with_suffix(".settings.json")
    identity = json.loads(json.dumps(_identity(settings, files)))
    try:
        if out.exists() and out.stat().st_size:
            _check_same(out, record, identity)
            return _answered(out, rows)
        out.parent.mkdir(parents=True, exist_ok=True)
        text = (json.dumps(identity, indent=1, ensure_ascii=False) + "\n").encode("utf-8")
        with replacing(record, len(text)) as temporary:
            temporary.write_bytes(text)
    except OSError as error:
        raise ConfigError(f"out={out}: {error.strerror}") from None
    return set()


def _identity(settings: GenerateSettings, files: Sequence[File]) -> dict[str, Any]:
    from deltune.commands.open_model import provenance
    from deltune.data.sources import digest

    return provenance(settings) | {"files": {file.path: digest(file) for file in files}}


def _check_same(out: Path, record: Path, identity: dict[str, Any]) -> None:
    from deltune.errors import ConfigError

    remedy = "What fits: another out, or that file removed."
    if not record.exists():
        raise ConfigError(
            f"out={out}: holds something already, and nothing says what made it ({record.name} is missing). {remedy}"
        )
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:
        raise ConfigError(f"out={out}: {record.name} is not JSON. {remedy}") from None
    old, new = (_deciding(one.get("settings", {})) for one in (before, identity))
    changed = [f"{key} was {old.get(key)!r} and is {value!r}" for key, value in new.items() if old.get(key) != value]
    changed += [f"other {part}" for part in ("model", "adapter", "files") if before.get(part) != identity[part]]
    if changed:
        raise ConfigError(f"out={out}: holds answers that were made otherwise: {'; '.join(changed)}. {remedy}")


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in FREE}
    return kept | {"engine.precision": settings.get("engine", {}).get("precision")}


def _answered(out: Path, rows: set[str]) -> set[str]:
    from deltune.errors import DataError
    from deltune.log import logger

    with out.open("rb+") as opened:
        content = opened.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logger.warning("%s: the last line was cut short and is answered again", out)
            opened.truncate(whole)
    done = set()
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)["row"]
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{out}:{number}: not an answer that deltune generate wrote. "
                "What fits: another out, or that file removed."
            ) from None
        if row not in rows or row in done:
            raise DataError(
                f"{out}:{number}: an answer to {row}, which "
                f"{'stands there twice' if row in done else 'is no row of the file'}. "
                "What fits: another out, or that file removed."
            )
        done.add(row)
    return done
