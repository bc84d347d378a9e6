"""The one way from the `data` section to examples: sources, schemas, tokens, and a report of what became of every row."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from deltune import dist
from deltune.data import cache
from deltune.data.config import DataConfig
from deltune.data.dataset import Counts, Dataset, Part, PartWriter, Reject
from deltune.data.detect import FIRST_ROWS, detect
from deltune.data.encode import ENCODING, Encoder, tokenizer_digest
from deltune.data.formats import DOCUMENTS, Schema
from deltune.data.mix import mixes, problems
from deltune.data.order import HELD_OUT, Group, Permutation, key
from deltune.data.read import File, Record, read
from deltune.data.rows import LOOK_AHEAD, SHOWN, RejectLog, count, outcomes, refusal, stops, warn
from deltune.data.sources import SourceFiles, digest, resolve
from deltune.data.stream import Stream, StreamSource
from deltune.errors import DataError
from deltune.log import logger

_SECONDS_BETWEEN_LINES = 10.0


@dataclass
class SourceReport:
    """How one entry of data.train or data.eval is read, and what became of its rows."""

    name: str
    format: str  # with renamed columns, e.g. input_output (input=question, output=answer)
    template: str
    weight: float
    num_files: int
    unused_columns: list[str]
    counts: Counts = field(default_factory=Counts)


@dataclass
class DataReport:
    """What became of the rows: rows = used + rejected + overlong + held_out. Token counts are of the examples that this
    set holds; of a stream, of what has been read so far."""

    counts: Counts
    sources: list[SourceReport]
    held_out: int = 0
    streaming: bool = False
    evaluation: DataReport | None = None

    rows = property(lambda self: self.counts.rows)
    used = property(lambda self: self.counts.used)
    examples = property(lambda self: self.counts.examples)
    tokens = property(lambda self: self.counts.tokens)
    trained_tokens = property(lambda self: self.counts.trained_tokens)
    rejected = property(lambda self: self.counts.rejected)
    overlong = property(lambda self: self.counts.overlong)
    truncated = property(lambda self: self.counts.truncated)
    largest_id = property(lambda self: self.counts.largest_id)
    notes = property(lambda self: self.counts.notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for records and cards."""
        body = asdict(self.counts) | {"held_out": self.held_out, "streaming": self.streaming}
        body["sources"] = [asdict(s) for s in self.sources]
        body["evaluation"] = self.evaluation.to_dict() if self.evaluation else None
        return body


@dataclass
class Prepared:
    """What training reads."""

    train: Dataset | Stream
    evaluation: Dataset | None
    report: DataReport


@dataclass(frozen=True)
class _Source:
    """A source whose schema is known."""

    files: SourceFiles
    schema: Schema
    encoder: Encoder
    report: SourceReport


def prepare(config: DataConfig, tokenizer: Any, *, folder: Path | None = None) -> Prepared:
    """Read, check and tokenise all data of a run; rejects.jsonl and rejects-eval.jsonl go to `folder`.

    Raises DataError for files, rows and settings that cannot be used, and where no token at all would be trained.
    """
    _check(config)
    unmixed = replace(config, mix_by=None)  # what is evaluated on is seen once, whatever its task
    writes = folder is not None and dist.is_main()
    train_log, eval_log = (RejectLog(folder / name if writes else None) for name in ("rejects.jsonl", "rejects-eval.jsonl"))  # type: ignore[operator]
    train_sources = [_open(s, config, tokenizer) for s in resolve(config.train, "data.train")]
    eval_sources = [_open(s, unmixed, tokenizer) for s in resolve(config.eval, "data.eval")]
    if config.streaming:
        train: Dataset | Stream = Stream(
            [StreamSource(s.files, s.schema, s.encoder, s.report.counts) for s in train_sources], config, train_log
        )
        report = DataReport(train.counts, [s.report for s in train_sources], streaming=True)
    else:
        train, report = _dataset(train_sources, config, tokenizer, config.read_nums, "data.train", train_log)
    evaluation = None
    if eval_sources:
        evaluation, report.evaluation = _dataset(eval_sources, unmixed, tokenizer, config.eval_read_nums, "data.eval", eval_log)
        if isinstance(train, Dataset):
            _warn_of_shared_files(train, evaluation)
    elif config.eval_size and isinstance(train, Dataset):
        train, evaluation = _hold_out(train, config, report)
    if isinstance(train, Dataset) and mixes(config):
        train = train.mixed(config, [s.report.weight for s in train_sources])
    return Prepared(train, evaluation, report)


def _check(config: DataConfig) -> None:
    """Pairs of settings that cannot both be meant."""
    if not config.train:
        raise DataError("data.train is empty: name a file, a folder or `bundled`")
    if config.eval and config.eval_size:
        raise DataError("data.eval names evaluation data, so data.eval_size has nothing to hold out; leave one of them out")
    if config.eval_size >= 1 and config.eval_size != int(config.eval_size):
        raise DataError(f"data.eval_size is {config.eval_size}: below 1 it is a fraction, from 1 on a whole number of rows")
    if config.streaming and config.eval_size:
        raise DataError("data.eval_size needs all rows at hand, which data.streaming does not have; name data.eval")
    if config.streaming and config.batching == "grouped":
        raise DataError("data.batching=grouped needs all lengths at hand, which data.streaming does not have")
    for problem in problems(config):
        raise DataError(problem)
    if config.mode == "pretrain":
        given = [name for name in ("max_source_length", "max_target_length", "train_on_source") if getattr(config, name)]
        for name in [*given, *(["turns"] if config.turns != "all" else [])]:
            raise DataError(f"data.{name} has no effect with data.mode=pretrain, which trains every token; leave it out")


def _open(files: SourceFiles, config: DataConfig, tokenizer: Any) -> _Source:
    """Find a source's schema from its first rows."""
    source = files.source
    records = chain.from_iterable(read(f) for f in files.files)
    first = list(islice(records, 1))
    if not first:
        raise DataError(f"{files.name} holds no rows")
    head = [*first, *islice(records, FIRST_ROWS - 1)]
    good = [r.value for r in head if not r.fault]
    if not good:
        raise refusal([(files.files[0], Reject(r.number, r.fault, False, r.value)) for r in head])
    fields = dict(config.fields) | dict(source.fields)
    wanted = source.format or (config.format if config.format != "auto" else files.shape or "auto")
    schema = detect(good, format=wanted, fields=fields, mode=config.mode, name=files.name)
    if schema.format in DOCUMENTS and config.mode == "sft":
        raise DataError(
            f"{files.name}: rows are plain text ({schema.describe()}) without a prompt and an answer; "
            "data.mode=pretrain trains every token of them"
        )
    encoder = Encoder(config, tokenizer, schema.format)
    seen = {column for row in good if isinstance(row, dict) for column in row}
    unused = sorted(str(c) for c in seen - set(schema.columns.values()))
    report = SourceReport(files.name, schema.describe(), encoder.name, source.weight, len(files.files), unused)
    logger.info("%s: %s, template %s", files.name, report.format, report.template)
    return _Source(files, schema, encoder, report)


def _dataset(
    sources: Sequence[_Source], config: DataConfig, tokenizer: Any, limit: int | None, name: str, log: RejectLog
) -> tuple[Dataset, DataReport]:
    """All examples of data.train or data.eval."""
    log.start()
    total, parts, groups = Counts(), list[Part](), list[Group]()
    folder, tokenizer_id = cache.cache_folder(config.cache), tokenizer_digest(tokenizer)
    for source in sources:
        start = sum(map(len, parts))
        if limit is not None and total.rows >= limit:
            warn("%s: the row limit of %d is reached before %s, which is not read", name, limit, source.report.name)
        for file in source.files.files:
            left = None if limit is None else limit - total.rows
            if left == 0:
                break
            part = _part(source, file, config, folder, tokenizer_id, left)
            if not part.counts.rows:
                warn("%s: %s holds no rows", name, file.path)
            source.report.counts.add(part.counts)
            total.add(part.counts)
            parts.append(part)
            log.write([(file, r) for r in part.rejects])
        groups.append(Group(source.report.name, start, sum(map(len, parts)), source.report.weight))
    unused = total.rejected + total.overlong
    first = [f"{p.file.where(r.number)}: {r.reason}" for p in parts for r in p.rejects[:SHOWN]][:SHOWN]
    shown = f"{unused} of {total.rows} rows are not used" + (", the first of them:\n  " + "\n  ".join(first) if first else "")
    if not total.trained_tokens:
        raise DataError(f"{name}: no token would be trained; {shown}")
    for note, num_rows in total.notes.items():
        warn("%s: %s (%d rows)", name, note, num_rows)
    if unused:
        warn("%s: %s", name, shown)
    return Dataset(parts, groups), DataReport(total, [s.report for s in sources])


def _part(source: _Source, file: File, config: DataConfig, folder: Path | None, tokenizer_id: str, limit: int | None) -> Part:
    """The examples of one file, from the cache if it has them."""

    def build(writer: PartWriter) -> tuple[Counts, list[Reject]]:
        return _encode(source, file, config, limit, writer)

    name = ""
    if folder is not None:
        name = cache.key(
            content=digest(file), kind=file.kind, format=source.schema.format, columns=dict(source.schema.columns),
            template=source.encoder.name, settings={s: getattr(config, s) for s in ENCODING}, tokenizer=tokenizer_id,
            rows=limit,
        )  # fmt: skip
    part = cache.obtain(folder, name, file, build)
    refused = [(file, r) for r in part.rejects if stops(r, config)]
    if refused:
        raise refusal(refused)
    return part


def _encode(source: _Source, file: File, config: DataConfig, limit: int | None, writer: PartWriter) -> tuple[Counts, list[Reject]]:
    counts, rejects = Counts(), list[Reject]()
    stop_at: int | None = None  # a row that may not be passed over was met: look a little further for others, then stop
    started = spoken = time.monotonic()
    records: Iterator[Record] = islice(source.schema.gathered(read(file)), limit)
    for outcome in outcomes(records, source.schema, source.encoder):
        count(counts, outcome)
        if outcome.reject:
            rejects.append(outcome.reject)
            if stop_at is None and stops(outcome.reject, config):
                stop_at = counts.rows + LOOK_AHEAD
        elif stop_at is None:
            for example in outcome.examples:
                writer.add(example.ids, example.trained, outcome.number, outcome.task)
        if stop_at is not None and (counts.rows >= stop_at or len(rejects) >= SHOWN):
            break
        if time.monotonic() - spoken > _SECONDS_BETWEEN_LINES:
            spoken = time.monotonic()
            logger.info("%s: %d rows tokenised, %.0f rows/s", file.path, counts.rows, counts.rows / (spoken - started))
    refused = [(file, r) for r in rejects if stops(r, config)]
    if refused:
        raise refusal(refused)
    return counts, rejects


def _hold_out(train: Dataset, config: DataConfig, report: DataReport) -> tuple[Dataset, Dataset]:
    """Set a seeded choice of rows apart for evaluation; all examples of a row go together."""
    owners = np.concatenate([np.full(len(p), i) for i, p in enumerate(train.parts)])
    numbers = np.concatenate([p.numbers for p in train.parts])
    row_of = np.cumsum((np.diff(owners, prepend=-1) != 0) | (np.diff(numbers, prepend=-1) != 0)) - 1
    num_rows = int(row_of[-1]) + 1
    num_held = int(config.eval_size) if config.eval_size >= 1 else max(1, round(num_rows * config.eval_size))
    num_held = min(num_held, config.eval_read_nums or num_held)
    if num_held >= num_rows:
        raise DataError(f"data.eval_size={config.eval_size:g} would hold out {num_held} of {num_rows} usable rows; none would be left to train on")
    chosen = Permutation(num_rows, key(config.seed, HELD_OUT))(np.arange(num_held))
    held = np.isin(row_of, chosen)
    left, evaluation = train.subset(np.flatnonzero(~held)), train.subset(np.flatnonzero(held))
    if not left.num_trained.sum() or not evaluation.num_trained.sum():
        raise DataError("data.eval_size leaves no trained token on one side; hold out another number of rows")
    report.held_out = num_held
    report.counts = replace(report.counts, used=num_rows - num_held, **_sizes(left))
    report.evaluation = DataReport(Counts(rows=num_held, used=num_held, **_sizes(evaluation)), [])
    return left, evaluation


def _sizes(data: Dataset) -> dict[str, int]:
    return {
        "examples": len(data),
        "tokens": int(data.lengths.sum()),
        "trained_tokens": int(data.num_trained.sum()),
        "largest_id": data.largest_id,
    }


def _warn_of_shared_files(train: Dataset, evaluation: Dataset) -> None:
    known = {p.digest: p.file.path for p in train.parts if len(p)}
    for p in evaluation.parts:
        if p.digest in known:
            warn("data.eval: %s holds the same examples as %s of data.train; its scores say nothing of new rows", p.file.path, known[p.digest])
