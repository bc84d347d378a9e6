"""`deltune init`: look at a model and a data file, and write a commented config that runs as it is.

Every value in the file is either what was seen or chosen from it by a rule that its comment states.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltune import log
from deltune.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from deltune.commands.estimate import Memory
    from deltune.commands.survey import MicroBatches, Survey
    from deltune.data.config import DataConfig
    from deltune.settings import InitSettings

# size of a model, in parameters, from which on a rate is the one to start from with LoRA
RATES = ((1e9, 2e-4), (1e8, 5e-4), (1e7, 1e-3), (0, 3e-3))
LARGEST_BATCH, STEPS_OF_AN_EPOCH, STEPS = 16, 50, 300
MEMORY_SHARE = 0.8  # of what is free
HELD_OUT = 200  # rows, at most
MUCH_PADDING = 0.3
NO_LIMIT = 1 << 30  # tokens
PIECE = 1024  # tokens into which running text is cut


def main(words: list[str], file: Path | None) -> int:
    """The verb."""
    from deltune.settings import InitSettings, load
    from deltune.training.storage import write_text

    settings = load(InitSettings, words, file)
    log.set_up()
    settings = asked(settings)
    seen = look(settings.model or "", settings.data or "")
    print("\n".join(shown(seen)))
    choice = choose(seen)
    out = Path(settings.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, "\n".join(starter(seen, choice)) + "\n")
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error.strerror})") from None
    print(f"\nWrote {out}. Next:\n  deltune preview {out}\n  deltune plan {out}\n  deltune train {out}")
    return 0


# -- questions --------------------------------------------------------------------------------------------------


def asked(settings: InitSettings) -> InitSettings:
    """The settings with what was missing filled in by the user. ConfigError where nobody answers, or the file is there."""
    model, data = settings.model, settings.data
    if model is None:
        model = answer("Model (a folder, a hub id like owner/name, or bundled)", "bundled", "model=...")
    if data is None:
        data = answer("Training data (a file or folder, or bundled)", "bundled", "data=...")
    if Path(settings.out).exists() and not settings.overwrite:
        refusal = f"out={settings.out}: the file is there already. What fits: overwrite=true, or another out=..."
        was_asked = settings.model is None or settings.data is None
        if not was_asked or answer(f"{settings.out} is there already. Replace it? (yes, no)", "no", "overwrite=true").lower() not in ("y", "yes"):
            raise ConfigError(refusal)
    return replace(settings, model=model, data=data)


def answer(question: str, default: str, word: str) -> str:
    """What the user types, or the default for an empty line."""
    try:
        return input(f"{question} [{default}]: ").strip() or default
    except EOFError:
        print()
        raise ConfigError(f"init: nobody answered; say it on the command line: {word}") from None


# -- looking ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """The model and the data as they were found."""

    model_path: str
    data_path: str
    model: PreTrainedModel  # on the meta device
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    mode: str  # data.mode
    format: str
    found: Survey  # of examples, with no limit of length; of running text, in pieces
    example: str  # the first one, trained tokens in [[ ]]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def context(self) -> int | None:
        """The longest text that the model was made for, where its config says so."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def num_lost(self) -> int:
        return sum(report.rejected for report in self.found.reports)


def look(model_path: str, data_path: str) -> Seen:
    """Shapes of the model, tokens of the data. Raises ModelError and DataError as training would."""
    from deltune.commands.survey import survey
    from deltune.data.config import DataConfig
    from deltune.engines.engine import pick_device
    from deltune.models.config import ModelConfig
    from deltune.models.load import check_pair, empty, load_tokenizer

    tokenizer, model = load_tokenizer(ModelConfig(path=model_path)), empty(ModelConfig(path=model_path))
    check_pair(model.config, tokenizer)
    mode = mode_of(data_path)
    limit = PIECE if mode == "pretrain" else NO_LIMIT
    config = DataConfig(train=[data_path], mode=mode, max_length=limit, on_bad="skip", cache=None)
    found = survey(config, tokenizer)
    sources = [source for report in found.reports for source in report.sources]
    return Seen(
        model_path, data_path, model, tokenizer, pick_device("auto"), config.mode, f"{sources[0].format}, template {sources[0].template}",
        found, first_example(config, tokenizer),
    )  # fmt: skip


def mode_of(data_path: str) -> str:
    """pretrain for rows of plain text, sft for all that have an answer."""
    from deltune.data.config import Source
    from deltune.data.detect import FIRST_ROWS, detect
    from deltune.data.formats import DOCUMENTS
    from deltune.data.read import read
    from deltune.data.sources import resolve

    source = resolve([Source(path=data_path)], "data.train")[0]
    rows = [record.value for record in islice(read(source.files[0]), FIRST_ROWS) if not record.fault]
    if not rows:
        raise DataError(f"{data_path}: no row of the first {FIRST_ROWS} can be read")
    found = detect(rows, format=source.shape or "auto", fields={}, mode="sft", name=data_path)
    return "pretrain" if found.format in DOCUMENTS else "sft"


def first_example(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    from deltune.commands.preview import bracketed, spans
    from deltune.data.prepare import prepare

    few = prepare(replace(config, read_nums=20), tokenizer)  # of which one can be used, if any can
    return bracketed(spans(few.train[0], tokenizer))


def shown(seen: Seen) -> Iterator[str]:
    """What was found, for the user to see."""
    from deltune.training.display import count

    found, text = seen.found, seen.model.config.get_text_config()
    context = f", context of {seen.context:,} tokens" if seen.context else ""
    template = "with a chat template" if seen.tokenizer.chat_template else "without a chat template"
    yield ""
    yield f"Model  {seen.model_path}: {type(seen.model).__name__}, {count(seen.num_parameters)} parameters in {_name(seen.model.dtype)}{context}"
    yield f"       {text.num_hidden_layers} layers of width {text.hidden_size}, vocabulary of {text.vocab_size:,}, {template}"
    about = "about " if found.sampled else ""
    yield f"Data   {seen.data_path}: {seen.format}; {about}{found.num_rows:,} rows, {about}{found.examples_per_epoch:,} examples"
    yield f"       {found.mean_length:.0f} tokens on average, {found.mean_trained:.0f} of them trained; longest {found.lengths.max():,}"
    if seen.num_lost:
        yield f"       {seen.num_lost:,} rows cannot be used"
    yield f"First example, [[what is trained]]:\n{seen.example[:600]}{' …' if len(seen.example) > 600 else ''}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- choosing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The values of the file, as sections, and why where the file's fixed comments do not say it."""

    values: dict[str, Any]
    needed: float | None  # bytes at the worst moment; None where they cannot be told
    free: float
    fits: bool


def choose(seen: Seen) -> Choice:
    """Sensible values, by the rules that the file's comments state."""
    from deltune.commands import estimate
    from deltune.commands.batching import settled
    from deltune.data.config import DataConfig
    from deltune.models.dry_run import CostUnknown
    from deltune.settings import run_from

    found, free, batching = seen.found, estimate.free_memory(seen.device), settled(DataConfig(), seen.model)
    limit = length_limit(seen)
    clipped = replace(found, lengths=found.lengths.clip(max=limit), trained=found.trained.clip(max=limit))
    wanted = wanted_batch(found.examples_per_epoch)
    sizes = [wanted >> n for n in range(wanted.bit_length())]
    needed, place = None, 0

    def tried(size: int, recompute: bool) -> tuple[dict[str, Any], MicroBatches, Memory]:
        values = values_of(seen, limit, size, wanted // size, recompute)
        run = run_from(values)
        shapes = estimate.shapes_for(run, clipped, batching.name)
        return values, shapes, estimate.memory_of(run, estimate.shapes_of(run), shapes, seen.device)

    def fits(size: int, recompute: bool) -> bool:
        return tried(size, recompute)[2].most <= MEMORY_SHARE * free

    try:
        recompute = not fits(1, False)
        place = bisect_left(sizes, True, key=lambda size: fits(size, recompute))
        values, shapes, needed = tried(sizes[min(place, len(sizes) - 1)], recompute)
    except CostUnknown:
        values = values_of(seen, limit, wanted, 1, False)
        shapes = estimate.shapes_for(run_from(values), clipped, batching.name)
    if batching.why_padded and shapes.padding > MUCH_PADDING:
        values["data"]["batching"] = "grouped"
    return Choice(values, needed.most if needed else None, free, place < len(sizes))


def length_limit(seen: Seen) -> int:
    """A round number that leaves 99 of 100 examples whole, within the model's context; running text is cut into pieces."""
    from deltune.commands.survey import limit_for

    limit = PIECE if seen.mode == "pretrain" else limit_for(seen.found.lengths)
    return min(limit, seen.context or limit)


def wanted_batch(num_examples: int) -> int:
    """Examples in a step: the largest power of two, up to 16, that leaves an epoch fifty steps."""
    size = LARGEST_BATCH
    while size > 1 and num_examples / size < STEPS_OF_AN_EPOCH:
        size //= 2
    return size


def values_of(seen: Seen, limit: int, micro_batch: int, accumulate: int, recompute: bool) -> dict[str, Any]:
    num_examples = seen.found.examples_per_epoch
    steps_of_an_epoch = max(1, num_examples // (micro_batch * accumulate))
    epochs = 1 if seen.mode == "pretrain" else min(5, max(1, round(STEPS / steps_of_an_epoch)))
    held_out = {"eval": ["bundled"]} if seen.data_path == "bundled" else {"eval_size": min(HELD_OUT, num_examples // 20)}
    every = max(1, epochs * steps_of_an_epoch // 6)
    return {
        "model": {"path": seen.model_path, "gradient_checkpointing": "full" if recompute else "auto"},
        "data": {
            "train": [seen.data_path], **held_out, "mode": seen.mode, "max_length": limit,
            "on_bad": "skip" if seen.num_lost else "stop", "batching": "auto",
        },
        "adapter": {"method": "lora", "rank": 16, "alpha": 32},
        "optim": {"lr": next(rate for size, rate in RATES if seen.num_parameters >= size)},
        "schedule": {"name": "cosine", "warmup": 0.03},
        "engine": {"precision": "auto"},
        "train": {"epochs": epochs, "micro_batch": micro_batch, "accumulate": accumulate},
        "eval": {"every": every} if any(held_out.values()) else {},
        "checkpoint": {"every": every},
    }  # fmt: skip


# -- writing ----------------------------------------------------------------------------------------------------


def starter(seen: Seen, choice: Choice) -> Iterator[str]:
    """The file, line by line. Lines that are commented out are other choices, as they would be written."""
    from deltune.training.display import count, memory, one_line

    v, found = choice.values, seen.found
    model, data = one_line(seen.model_path), one_line(seen.data_path)
    width = f"99 of 100 examples have at most {round(_quantile(found)):,} tokens, the longest {found.lengths.max():,}"
    yield "# Made by `deltune init`. Run it: deltune train THIS_FILE. Every key: deltune list keys, or docs/config.md."
    yield f"# {model}: {type(seen.model).__name__}, {count(seen.num_parameters)} parameters in {_name(seen.model.dtype)}"
    yield f"# {data}: {seen.format}, {'about ' if found.sampled else ''}{found.examples_per_epoch:,} examples"
    if choice.needed is None:
        yield "# what memory it needs cannot be told beforehand for this kind of model"
    else:
        needed = f"{memory(choice.needed)} of memory at the worst moment, of {memory(choice.free)} that were free"
        yield f"# needs about {needed}" if choice.fits else f"# BEWARE: needs about {needed}: deltune plan names settings that fit"
    yield "\nmodel:"
    yield from lines(v["model"], {
        "gradient_checkpointing": {
            "auto": "activations are computed twice (selective, full) only where they do not fit the memory",
            "full": "activations are computed twice rather than kept: less memory, more time",
        }[v["model"]["gradient_checkpointing"]],
    })  # fmt: skip
    yield "  # dtype: bfloat16             # half the memory of float32 weights"
    yield "\ndata:"
    yield from lines(v["data"], {
        "eval_size": "rows held out to measure on; or name a file: eval: [held_out.jsonl]",
        "mode": "trains the answers only; pretrain trains every token" if seen.mode == "sft" else "trains every token",
        "max_length": width if seen.mode == "sft" else "longer texts are cut into pieces of so many tokens",
        "on_bad": f"{seen.num_lost:,} rows cannot be used and go to rejects.jsonl" if seen.num_lost else "or skip, and write bad rows to rejects.jsonl",
        "batching": {
            "auto": "joined into rows without padding, each seeing itself alone, where the model can; else padded",
            "grouped": "examples of like length together, so that little is padding: this model cannot pack",
        }[v["data"]["batching"]],
    })  # fmt: skip
    if seen.mode == "sft":
        yield "  # system: You are a helpful assistant."
    yield "\nadapter:                       # or adapter: null, which trains the model's own weights (lr about a tenth)"
    yield from lines(v["adapter"], {"rank": "more is a larger change, and a larger file", "alpha": "strength: the change is scaled by alpha / rank"})
    yield "\noptim:"
    yield from lines(v["optim"], {"lr": "peak rate for a model of this size; the first thing to vary"})
    yield "\nschedule:"
    yield from lines(v["schedule"], {"name": "or linear, constant, wsd ...: deltune list schedules", "warmup": "share of all steps; from 1 on a number of steps"})
    yield "\nengine:"
    yield from lines(v["engine"], {"precision": "bfloat16 where the device is fast at it; fp32 computes in the weights' own type"})
    yield "\ntrain:"
    yield from lines(v["train"], {
        "epochs": "passes over the data; or steps: 300", "micro_batch": "examples at once",
        "accumulate": "micro-batches in a step",
    })  # fmt: skip
    if v["eval"]:
        yield "\neval:"
        yield from lines(v["eval"], {"every": "steps; the best checkpoint is the one that is exported"})
        if seen.mode == "sft":
            yield "  # exact_match: true           # also generate the answers and compare"
    yield "\ncheckpoint:"
    yield from lines(v["checkpoint"], {"every": "steps; a run that ends early goes on from the last one"})


def _quantile(found: Survey) -> float:
    import numpy as np

    return float(np.quantile(found.lengths, 0.99))


def lines(section: dict[str, Any], comments: dict[str, str]) -> Iterator[str]:
    """A section's keys, each on its line, with comments to the right."""
    from deltune.config.yaml_file import write

    for key, value in section.items():
        first, *rest = write({key: value}).splitlines()
        comment = f"# {comments[key]}" if key in comments else ""
        yield f"  {first:<29} {comment}".rstrip()
        yield from (f"    {line}" for line in rest)  # the entries of a list
