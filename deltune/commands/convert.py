"""`deltune convert`: an adapter of any method that is a matrix, written as plain LoRA, with what that loses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deltune.errors import ConfigError

if TYPE_CHECKING:
    from deltune.adapters.convert import Converted
    from deltune.settings import ConvertSettings

SHOWN = 5  # layers listed
NEGLIGIBLE = 1e-5  # a relative error that float32 makes by itself


def main(words: list[str], file: Path | None) -> int:
    """The verb."""
    from deltune import log
    from deltune.settings import ConvertSettings, load

    settings = load(ConvertSettings, words, file)
    log.set_up()
    print("\n".join(lines(settings, convert(settings))))
    return 0


def convert(settings: ConvertSettings) -> Converted:
    """Read, convert, write into `settings.out`. Raises a DeltuneError, and then leaves nothing there."""
    from deltune.adapters.convert import to_lora
    from deltune.adapters.files import save_adapter
    from deltune.commands.open_model import opened

    out = Path(settings.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"out={out}: something is there already. What fits: a folder that does not exist, or an empty one.")
    with opened(settings, as_stored=True) as it:
        made = to_lora(it.model, rank=settings.rank, svd=settings.svd)
        save_adapter(it.model, out, name=made.name, base=settings.model.path)
        if settings.model.tokenizer is not None and Path(settings.model.tokenizer) == Path(settings.adapter):
            it.tokenizer.save_pretrained(out)  # the adapter brings tokens of its own
    return made


def lines(settings: ConvertSettings, made: Converted) -> Iterator[str]:
    """What was made, and where it lost most."""
    ranks = sorted(set(made.ranks.values()))
    yield f"wrote {settings.out}: LoRA of rank {ranks[0] if len(ranks) == 1 else f'{ranks[0]} to {ranks[-1]}'} on {len(made.ranks)} layers"
    if made.error < NEGLIGIBLE:
        yield "the change is the same, up to rounding"
    else:
        yield f"of the change {100 * made.error:.2g} % is lost (Frobenius norm of what is lost, over that of the change)"
        worst = sorted(made.errors, key=made.errors.get, reverse=True)[:SHOWN]
        yield "most in " + ", ".join(f"{place} ({100 * made.errors[place]:.2g} %)" for place in worst)
    yield f"next: deltune chat model={settings.model.path} adapter={settings.out}"
