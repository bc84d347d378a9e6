"""A trained model ready to answer: base, adapter, tokenizer and engine put together for eval, generate and chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from deltune.engines.engine import Engine
    from deltune.models.generation import GenerateOptions
    from deltune.settings import EvalSettings, Generation, Run, Trained


@dataclass(frozen=True)
class Opened:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: Engine


@contextmanager
def opened(settings: Trained, *, as_stored: bool = False, fast: bool = True) -> Iterator[Opened]:
    """The model of `settings` with its adapter, frozen, on its device. `as_stored` keeps weights that are to be written
    again in their own type, whatever engine.precision is. Raises what loading any of them raises.
    """
    from deltune.adapters.files import load_adapter
    from deltune.commands.arithmetic import of_use
    from deltune.engines.build import build
    from deltune.models.load import check_pair, load, load_tokenizer

    engine = build(settings.engine)
    try:
        tokenizer = load_tokenizer(settings.model)
        model = load(settings.model, fast=fast, quant=settings.quant)
        if not as_stored:
            engine.compute_in(of_use(settings, model, engine.device))
        if settings.adapter is not None:
            load_adapter(model, settings.adapter, originals=originals_of(settings))
        check_pair(model.config, tokenizer)  # after the adapter, which may bring tokens
        model.requires_grad_(False)
        yield Opened(engine.place(model), tokenizer, engine)
    finally:
        engine.close()


def originals_of(settings: Trained | Run) -> Callable[[str], Tensor] | None:
    """What gives a quantised layer's weight as its file has it, for adapters that look at it; None on a plain base."""
    from deltune.models.load import originals

    return None if settings.quant.name == "none" else originals(settings.model)


@contextmanager
def opened_fast(settings: EvalSettings) -> Iterator[Opened]:
    """The same, computed in fast forms as in training, unless `settings.fast` says otherwise."""
    from deltune.commands import fast

    with opened(settings, fast=settings.fast == "auto") as place:
        if settings.fast == "auto":
            fast.put(place.model, adapted=settings.adapter is not None)
        yield place


def options_of(settings: Generation) -> GenerateOptions:
    """How `settings` say that answers are drawn."""
    from deltune.models.generation import GenerateOptions

    return GenerateOptions(
        max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, top_p=settings.top_p, top_k=settings.top_k, min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty, seed=settings.seed, stop=tuple(settings.stop), choices=choices_of(settings),
        decoding=settings.decoding,
    )  # fmt: skip


def choices_of(settings: Generation) -> tuple[str, ...]:
    """The texts that an answer is one of; ConfigError for a file without any."""
    from deltune.errors import ConfigError

    if settings.choices_file is None:
        return tuple(dict.fromkeys(settings.choices))
    try:
        lines = Path(settings.choices_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"choices_file={settings.choices_file}: cannot be read as text in UTF-8 ({error})") from None
    texts = tuple(dict.fromkeys(line for line in lines if line.strip()))
    if not texts:
        raise ConfigError(f"choices_file={settings.choices_file}: holds no text")
    return texts


def provenance(settings: Trained) -> dict[str, Any]:
    """What it takes to get the same answers again: every setting, hashes of model and adapter files, versions."""
    from deltune.commands.describe_run import versions
    from deltune.models.load import model_identity
    from deltune.weights import sha256_of

    files = [] if settings.adapter is None else sorted(Path(settings.adapter).rglob("adapter_*"))
    return {
        "settings": asdict(settings),
        "model": model_identity(settings.model),
        "adapter": {file.name: sha256_of(file) for file in files},
        "versions": versions(),
    }
