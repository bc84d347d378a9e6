"""How many examples there are and how long they are: all of them where that is quick, else a sample of each source.

A sample is the first rows of each source; what is told of the rest is in proportion, and said to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltune.data.bins import best_fit

if TYPE_CHECKING:
    from deltune.data.config import DataConfig, Source
    from deltune.data.dataset import Dataset
    from deltune.data.prepare import DataReport
    from deltune.data.read import File

QUICK_BYTES = 8_000_000  # of data that is tokenised whole: some seconds
SAMPLE_ROWS = 1000  # of each source, where there is more


@dataclass(frozen=True)
class Survey:
    """Training and evaluation examples. Arrays are of the examples looked at, [looked at]."""

    lengths: np.ndarray  # tokens
    trained: np.ndarray  # trained tokens
    chance: np.ndarray  # of being the next example, sums to 1
    num_rows: int
    examples_per_epoch: int
    num_evaluation: int  # examples
    evaluation_length: float  # mean tokens
    largest_id: int
    reports: list[DataReport]
    data: Dataset | None  # the training examples, where all were looked at; None if sampled

    @property
    def sampled(self) -> bool:
        return self.data is None

    @property
    def mean_length(self) -> float:
        return float(self.lengths @ self.chance)

    @property
    def mean_trained(self) -> float:
        return float(self.trained @ self.chance)


@dataclass(frozen=True)
class MicroBatches:
    """What micro-batches look like, by drawing some: tensors [size, seq]. Packed, `size` is 1 and `seq` all of their tokens."""

    size: int  # rows: examples where padded
    seq: float  # mean
    trained: float  # mean of their trained tokens
    longest: int  # the largest seq
    most_trained: int
    padding: float  # share of positions that hold none of the tokens
    examples: float  # mean; padded it is `size`
    typical: tuple[int, ...]  # lengths of the examples of the one whose seq is next to the mean
    largest: tuple[int, ...]  # of the one with the largest seq
    batching: str  # packed, grouped or padded
    capacity: int | None  # of a bin, where tokens are counted

    @property
    def unfilled(self) -> float:
        """Share of the bins' capacity that holds no token."""
        return 0.0 if self.capacity is None else 1 - self.seq / self.capacity


def survey(config: DataConfig, tokenizer: Any) -> Survey:
    """Look at the data of a config. Raises DataError as training would, as far as rows are looked at."""
    from deltune.data.prepare import prepare
    from deltune.data.sources import resolve

    sources = resolve(config.train, "data.train") + resolve(config.eval, "data.eval")
    few = config.read_nums is not None and config.read_nums <= SAMPLE_ROWS
    if sum(source.size for source in sources) > QUICK_BYTES and not few:
        return _sampled(config, tokenizer)
    whole = prepare(replace(config, streaming=False), tokenizer)
    data, evaluation = whole.train, whole.evaluation
    chance = np.concatenate([np.full(group.stop - group.start, group.weight) for group in data.groups])
    return Survey(
        data.lengths, data.num_trained, chance / chance.sum(), whole.report.rows, data.examples_per_epoch,
        len(evaluation) if evaluation else 0, float(evaluation.lengths.mean()) if evaluation else 0.0, data.largest_id,
        [whole.report], data,
    )  # fmt: skip


def _sampled(config: DataConfig, tokenizer: Any) -> Survey:
    """In proportion to the first rows of each source."""
    from deltune.data.mix import Task, visits

    looked_at = [_look(entry, config, tokenizer, "data.train") for entry in config.train]
    left = config.read_nums
    for look in looked_at:  # a limit counts rows from the first source on
        if left is not None:
            look.num_rows = min(look.num_rows, left)
            left -= look.num_rows
    num_rows = sum(look.num_rows for look in looked_at)
    held_out = config.eval_size if config.eval_size < 1 else min(1.0, config.eval_size / num_rows)
    evaluation = [_look(entry, config, tokenizer, "data.eval") for entry in config.eval]
    # the tasks of data.mix_by are not known from the first rows: sources are then weighed alone
    known = config if config.mix_by is None else replace(config, mix_by=None, mix_cap=None, mix_temperature=1.0)
    per_epoch = visits([Task(i, "", look.examples) for i, look in enumerate(looked_at)], [look.weight for look in looked_at], known)
    chance = np.concatenate([np.full(len(look.lengths), n / len(look.lengths)) for look, n in zip(looked_at, per_epoch, strict=True)])
    lengths = np.concatenate([look.lengths for look in looked_at])
    num_evaluation = sum(look.examples for look in evaluation) + held_out * sum(look.examples for look in looked_at)
    tested = np.concatenate([look.lengths for look in evaluation]) if evaluation else lengths
    return Survey(
        lengths, np.concatenate([look.trained for look in looked_at]), chance / chance.sum(), num_rows,
        round(float(chance.sum()) * (1 - held_out)), round(num_evaluation), float(tested.mean()) if num_evaluation else 0.0,
        max(look.report.largest_id for look in looked_at), [look.report for look in looked_at], None,
    )  # fmt: skip


@dataclass
class _Look:
    """A sample of one source."""

    lengths: np.ndarray
    trained: np.ndarray
    num_rows: int  # in the whole source
    weight: float
    report: DataReport

    @property
    def examples(self) -> float:
        """In the whole source."""
        return self.num_rows * len(self.lengths) / self.report.rows


def _look(entry: str | Source, config: DataConfig, tokenizer: Any, key: str) -> _Look:
    from deltune.data.prepare import prepare
    from deltune.data.sources import resolve

    alone = replace(config, train=[entry], eval=[], eval_size=0.0, read_nums=SAMPLE_ROWS, streaming=False, cache=None)
    data = prepare(alone, tokenizer)
    sources = resolve([entry], key)
    num_rows = sum(count_rows(file) for source in sources for file in source.files)
    return _Look(data.train.lengths, data.train.num_trained, num_rows, sources[0].source.weight, data.report)


def count_rows(file: File) -> int:
    """Rows of a file: counted where its end is near or its format knows, else by the bytes of the first ones."""
    from deltune.data.read import open_hub, read

    if file.kind == "parquet":
        import pyarrow.parquet

        return pyarrow.parquet.ParquetFile(file.path).metadata.num_rows
    if file.kind == "hub":
        return len(open_hub(file))
    if file.kind == "json" or file.gzipped:  # no place in the file is known before its end
        return sum(1 for _ in read(file))
    first = list(islice(read(file), SAMPLE_ROWS))
    if len(first) < SAMPLE_ROWS:
        return len(first)
    return round(Path(file.path).stat().st_size / first[-1].after.offset * len(first))


def micro_batches(found: Survey, size: int, *, batching: str = "padded", capacity: int | None = None, number: int = 400) -> MicroBatches:
    """Micro-batches of so many examples, or of so many tokens, as the loader would draw them, the longest example among them."""
    rng = np.random.default_rng(0)
    if capacity is not None:
        size = max(1, round(capacity / found.mean_length))
    draw = rng.choice(len(found.lengths), size=number * size, p=found.chance)
    draw[0] = found.lengths.argmax()
    if batching == "grouped":
        draw = draw[np.argsort(found.lengths[draw], kind="stable")]
    groups = [draw[bin] for bin in best_fit(found.lengths[draw], capacity)] if capacity is not None else list(draw.reshape(number, size))
    packed = batching == "packed"
    seqs = np.array([found.lengths[group].sum() if packed else found.lengths[group].max() for group in groups])
    trained = np.array([found.trained[group].sum() for group in groups])
    typical, largest = (tuple(found.lengths[groups[i]].tolist()) for i in (np.abs(seqs - seqs.mean()).argmin(), seqs.argmax()))
    rows = 1 if packed else size
    return MicroBatches(
        size=rows, seq=float(seqs.mean()), trained=float(trained.mean()), longest=int(seqs.max()), most_trained=int(trained.max()),
        padding=float(1 - found.lengths[draw].sum() / (seqs.sum() * rows)), examples=len(draw) / len(groups), typical=typical,
        largest=largest, batching=batching, capacity=capacity,
    )  # fmt: skip


def limit_for(lengths: np.ndarray, share: float = 0.99) -> int:
    """A round number of tokens that leaves this share of examples whole."""
    wanted = float(np.quantile(lengths, share))
    return int(next(step for step in ROUND if step >= wanted) if wanted <= ROUND[-1] else -(-wanted // 1024) * 1024)


ROUND: Sequence[int] = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
