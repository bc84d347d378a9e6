"""`deltune preview`: examples token by token as the trainer will see them, from the same code and the same cache. Loads no weights.

What the terminal shows is text only: control characters inside the data are written out, never sent.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltune import log
from deltune.errors import DataError

if TYPE_CHECKING:
    from deltune.data.dataset import Dataset, Example
    from deltune.data.pack import Batch
    from deltune.data.prepare import DataReport
    from deltune.settings import PreviewSettings

STYLES = {"trained": "bold green", "special": "magenta", "special trained": "bold black on green", "head": "bold", "bar": "cyan", "": ""}
NUM_BARS, BAR_WIDTH = 12, 40


class Span(NamedTuple):
    """Text in one style, a key of STYLES."""

    text: str
    style: str = ""


def main(words: list[str], file: Path | None) -> int:
    """The verb."""
    from deltune.data.prepare import prepare
    from deltune.models.load import load_tokenizer
    from deltune.settings import PreviewSettings, load

    settings = load(PreviewSettings, words, file)
    log.set_up()
    tokenizer = load_tokenizer(settings.model)
    prepared = prepare(settings.data, tokenizer)
    lines = page(settings, tokenizer, prepared) if settings.step is None else step_page(settings, tokenizer, prepared)
    write(list(lines), color=settings.color)
    return 0


def page(settings: PreviewSettings, tokenizer: Any, prepared: Any) -> Iterator[list[Span]]:
    """The preview, line by line."""
    from deltune.data.dataset import Dataset

    data, report = prepared.train, prepared.report
    if settings.part == "eval":
        if prepared.evaluation is None:
            raise DataError("part=eval: there is no evaluation data; give data.eval or data.eval_size")
        data, report = prepared.evaluation, prepared.report.evaluation
    first = settings.start
    if isinstance(data, Dataset):
        if first >= len(data):
            raise DataError(f"start={first}: there are {len(data)} examples, counted from 0")
        examples = [data[i] for i in range(first, min(first + settings.rows, len(data)))]
    else:
        examples = data.take(first + settings.rows)[first:]
    yield from summary(settings.part, report, tokenizer)
    for number, example in enumerate(examples, first):
        yield []
        yield from shown_example(number, example, tokenizer)
    if isinstance(data, Dataset):
        yield []
        yield from histogram(data, settings.data.max_length)


def step_page(settings: PreviewSettings, tokenizer: Any, prepared: Any) -> Iterator[list[Span]]:
    """The batches of an optimizer step as the model gets them, with the documents of each, line by line."""
    from deltune.commands import batching
    from deltune.data.dataset import Dataset
    from deltune.models.load import empty

    assert settings.step is not None
    chosen = batching.settled(settings.data, empty(settings.model), tokens=settings.train.micro_batch_tokens)
    loader = batching.loader(settings, prepared.train, chosen.name, tokenizer.pad_token_id)
    for i in range(0 if isinstance(prepared.train, Dataset) else settings.step - 1):
        loader.step(i)  # a stream is read from its beginning
    batches = loader.step(settings.step - 1)
    if not batches:
        raise DataError(f"step={settings.step}: the run has {loader.num_steps(settings.train.epochs or 1.0)} steps")
    yield from summary("train", prepared.report, tokenizer)
    yield [Span(f"  batches: {chosen}")]
    for number, batch in enumerate(batches):
        yield []
        yield [Span(f"Micro-batch {number} of step {settings.step} · {shape_of(batch, settings.train.micro_batch_tokens)}", "head")]
        for document, (start, example) in enumerate(documents(batch)):
            trained = int((example.labels[1:] != -100).sum())
            yield [Span(f"Document {document} · {visible(example.row)} · positions {start}-{start + len(example.ids) - 1}, {trained} trained", "bar")]
            yield spans(example, tokenizer)


def shape_of(batch: Batch, capacity: int | None) -> str:
    """Rows, tokens, and what of the room is empty."""
    rows, seq = batch.input_ids.shape
    text = f"{rows} x {seq} positions, {len(batch.rows)} documents, {batch.num_tokens} tokens, {batch.num_trained_tokens} trained"
    if batch.segments is None:
        return f"{text}, {1 - batch.num_tokens / batch.input_ids.numel():.0%} padding"
    return text if capacity is None else f"{text}, {1 - batch.num_tokens / capacity:.1%} of {capacity} left over"


def documents(batch: Batch) -> Iterator[tuple[int, Example]]:
    """Where each example of a batch begins in its row, and its tokens and labels as the model and the loss get them."""
    from deltune.data.dataset import Example

    row_of = batch.row_of_tokens()
    for index, row in enumerate(batch.rows):
        mine = row_of == index if batch.attention_mask is None else (row_of == index) & (batch.attention_mask == 1)
        start = int(mine.nonzero()[0, 1])
        yield start, Example(batch.input_ids[mine].numpy(), batch.labels[mine].numpy(), row)


def summary(part: str, report: DataReport, tokenizer: Any) -> Iterator[list[Span]]:
    """How rows were read, and what became of them."""
    counts = report.counts
    yield [Span(f"{'Training' if part == 'train' else 'Evaluation'} data", "head")]
    for source in report.sources:
        unused = f"; columns not used: {', '.join(source.unused_columns)}" if source.unused_columns else ""
        weight = f"; weight {source.weight:g}" if source.weight != 1 else ""
        yield [Span(f"  {visible(source.name)}: format {source.format}, template {source.template}{weight}{visible(unused)}")]
    rows = [f"{counts.used:,} used", f"{counts.rejected:,} rejected", f"{counts.overlong:,} over the limits"]
    if report.held_out:
        rows.append(f"{report.held_out:,} held out for evaluation")
    so_far = " so far, the data being streamed" if report.streaming else ""
    yield [Span(f"  rows {counts.rows:,}{so_far}: {', '.join(rows)}; {counts.truncated:,} truncated")]
    share = 100 * counts.trained_tokens / max(1, counts.tokens)
    yield [Span(f"  examples {counts.examples:,}: {counts.tokens:,} tokens, {counts.trained_tokens:,} trained ({share:.1f} %)")]
    for note, num_rows in counts.notes.items():
        yield [Span(f"  note: {note} ({num_rows:,} rows)")]
    yield [Span("  "), *legend(tokenizer)]


def legend(tokenizer: Any) -> list[Span]:
    eos = visible(tokenizer.eos_token)
    return [Span("trained", "trained"), Span(", not trained, "), Span(eos, "special trained"), Span(" EOS trained, "), Span(eos, "special"), Span(" EOS not trained")]


def shown_example(number: int, example: Example, tokenizer: Any) -> Iterator[list[Span]]:
    """A heading, then the text in spans."""
    num_trained = int((example.labels != -100).sum())
    yield [Span(f"Example {number} · {visible(example.row)} · {len(example.ids)} tokens, {num_trained} trained", "head")]
    yield spans(example, tokenizer)


def spans(example: Example, tokenizer: Any) -> list[Span]:
    """The example's text, cut where training begins or ends and around special tokens. Neighbouring tokens are decoded
    together, since a character may be made of several."""
    specials = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    kinds = [(int(i) in specials, bool(label != -100)) for i, label in zip(example.ids, example.labels, strict=True)]
    borders = [0, *(k for k in range(1, len(kinds)) if kinds[k] != kinds[k - 1] or kinds[k][0]), len(kinds)]
    found = []
    for start, stop in pairwise(borders):
        special, trained = kinds[start]
        text = visible(tokenizer.decode(example.ids[start:stop].tolist(), skip_special_tokens=False))
        style = " ".join(name for name, on in (("special", special), ("trained", trained)) if on)
        found.append(Span(text, style))
    return found


def visible(text: str) -> str:
    """Text with control characters written out, line feeds and tabs apart."""
    from deltune.data.read import printable

    return printable(text, keep="\n\t")


def histogram(data: Dataset, max_length: int) -> Iterator[list[Span]]:
    """How many examples have how many tokens."""
    lengths = data.lengths
    middle = np.percentile(lengths, [50, 90])
    yield [Span("Lengths", "head"), Span(f" in tokens: half of the examples up to {middle[0]:.0f}, nine in ten up to {middle[1]:.0f}, longest {lengths.max()}, data.max_length {max_length}")]
    width = _nice(int(lengths.max()) / NUM_BARS)
    counts = np.bincount((lengths - 1) // width)
    digits, most = len(str(len(counts) * width)), counts.max()
    for i, count in enumerate(counts.tolist()):
        if not counts[: i + 1].any():
            continue  # shorter than the shortest
        bar = "#" * math.ceil(BAR_WIDTH * count / most)
        yield [Span(f"  {i * width + 1:>{digits}}-{(i + 1) * width:<{digits}} "), Span(f"{bar:<{BAR_WIDTH}}", "bar"), Span(f" {count:,}")]


def _nice(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 ..."""
    power = 10 ** math.floor(math.log10(max(width, 1)))
    return int(next(power * step for step in (1, 2, 5, 10) if power * step >= width))


def write(lines: Sequence[Sequence[Span]], *, color: str) -> None:
    """To standard output: in colour on a terminal, else with brackets around what is trained."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    colored = color == "always" or (color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    if not colored:
        for line in lines:
            print(bracketed(line))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stdout, force_terminal=True, highlight=False, soft_wrap=True)
    for line in lines:
        console.print(Text.assemble(*((span.text, STYLES[span.style]) for span in line)))


def bracketed(line: Sequence[Span]) -> str:
    """A line without colour: [[trained]] and {special tokens}."""
    found, inside = "", False
    for span in line:
        trained = "trained" in span.style
        if trained != inside:
            found, inside = found + ("[[" if trained else "]]"), trained
        found += f"{{{span.text}}}" if "special" in span.style else span.text
    return found + ("]]" if inside else "")
