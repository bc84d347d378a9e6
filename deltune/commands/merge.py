"""`deltune merge`: an adapter folded into its base, as a Hugging Face folder that has proved to answer as the two do.

The folder takes its name last: what lies under it was read back and compared on a text. A quantised base is merged in
plain values; these are rounded to codes again only where that is asked for.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deltune.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

    from deltune.commands.open_model import Opened
    from deltune.settings import MergeSettings

TEXT = """The harbour was quiet at six in the morning. Two fishermen mended a net and argued about the price of diesel, while
gulls walked along the wall as if they owned it. 12 boats had gone out; by noon, 9 of them would be back. "Rain?" asked
the younger one. - def area(r): return 3.14159 * r ** 2 - 海面很平静，远处有一条白色的船。 Le vent se lève ; il faut tenter de vivre."""
LONGEST_OF_TEXT, LONGEST = 128, 512  # tokens of it, or of a given text, that are compared


@dataclass(frozen=True)
class Verdict:
    """How the merged folder answers beside base and adapter, over the tokens of a text."""

    folder: Path
    dtype: str  # of the merged weights
    num_bytes: int
    num_layers: int
    num_tokens: int
    max_difference: float  # of any logit
    max_logit: float  # largest absolute logit of base and adapter
    num_changed: int  # tokens whose most probable successor is another
    weight_error: float | None = None  # ‖Q(W) - W‖ / ‖W‖ of the merged weights, where they were quantised anew


def main(words: list[str], file: Path | None) -> int:
    """The verb."""
    from deltune import log
    from deltune.settings import MergeSettings, load

    settings = load(MergeSettings, words, file)
    log.set_up()
    verdict = merge_to_folder(settings)
    share = 100 * verdict.num_changed / verdict.num_tokens
    print(f"merged {verdict.num_layers} layers of {settings.adapter} into {settings.model.path}")
    print(f"wrote {verdict.folder} ({verdict.num_bytes:,} bytes, {verdict.dtype})")
    if verdict.weight_error is not None:
        print(f"rounded the merged weights to {settings.requantise} again: {100 * verdict.weight_error:.2f} % off (Frobenius norm of what is lost, over theirs)")
    print(
        f"read back and compared with the unmerged adapter on {verdict.num_tokens} tokens: largest difference of a logit "
        f"{verdict.max_difference:.2g} (logits reach {verdict.max_logit:.3g}); another token becomes the most probable at "
        f"{verdict.num_changed} of {verdict.num_tokens} ({share:.1f} %)"
    )
    if verdict.weight_error is None:
        print(f"next: deltune chat model={verdict.folder}")
    else:
        print(f"next: transformers.AutoModelForCausalLM.from_pretrained({str(verdict.folder)!r}), with bitsandbytes installed")
    return 0


def merge_to_folder(settings: MergeSettings) -> Verdict:
    """Merge, write, read back, compare. Raises a DeltuneError, and then leaves nothing under `settings.out`."""
    from deltune.adapters.attach import merge
    from deltune.adapters.wrapper import wrappers
    from deltune.commands.open_model import opened
    from deltune.models.config import QUANTS
    from deltune.models.load import load, save_model
    from deltune.models.requantise import write

    out = Path(settings.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"out={out}: something is there already. What fits: a folder that does not exist, or an empty one.")
    written, codes = out.with_name(f".{out.name}.merged"), out.with_name(f".{out.name}.codes")
    quant, error = None, None
    if settings.requantise != "none":
        quant = settings.quant if settings.quant.name == settings.requantise else QUANTS.resolve(settings.requantise)(name=settings.requantise)
        quant = replace(quant, compute_dtype="auto")
    asked = "bfloat16" if settings.dtype == "auto" and settings.quant.name != "none" else settings.dtype
    try:
        with opened(settings, as_stored=True) as it:
            ids = text_ids(it, settings.text)
            expected = logits(it, ids)
            num_layers = len(wrappers(it.model))
            set_dtype(it.model, asked, widen=True)
            merge(it.model)
            set_dtype(it.model, asked)
            in_plain(it.model)
            dtype = str(it.model.dtype).removeprefix("torch.")
            save_model(it.model, it.tokenizer, written)
            it.model.to("meta")  # two models need not fit at once
            where = replace(settings.model, path=str(written), revision=None, tokenizer=None, dtype="auto")
            found = logits(replace(it, model=it.engine.place(load(where, quant=quant))), ids)
            if quant is not None:
                error = write(written, codes, quant)
                shutil.rmtree(written)
                codes.rename(written)
                dtype = f"{settings.requantise}, the rest {dtype}"
        if not found.isfinite().all():
            raise ModelError(f"{out}: the merged model's logits are not finite in {dtype}. What fits: dtype=float32 or dtype=bfloat16.")
        num_bytes = sum(file.stat().st_size for file in written.glob("*.safetensors"))
        if out.exists():
            out.rmdir()
        written.rename(out)
    finally:
        shutil.rmtree(written, ignore_errors=True)
        shutil.rmtree(codes, ignore_errors=True)
    return Verdict(
        folder=out, dtype=dtype, num_bytes=num_bytes, num_layers=num_layers, num_tokens=len(expected),
        max_difference=(found - expected).abs().max().item(), max_logit=expected.abs().max().item(),
        num_changed=int((found.argmax(-1) != expected.argmax(-1)).sum()), weight_error=error,
    )  # fmt: skip


def text_ids(it: Opened, file: str | None) -> torch.Tensor:
    """The first tokens of a file's text, or of the fixed text [1, seq]. Raises ConfigError for a file without any."""
    import torch

    text, longest = TEXT, LONGEST_OF_TEXT
    if file is not None:
        try:
            text, longest = Path(file).read_text(encoding="utf-8"), LONGEST
        except (OSError, UnicodeDecodeError) as problem:
            raise ConfigError(f"text={file}: cannot be read: {problem}") from None
        if not text.strip():
            raise ConfigError(f"text={file}: there is no text in it")
    return torch.tensor([it.tokenizer(text)["input_ids"][:longest]], device=it.engine.device)


def logits(it: Opened, ids: torch.Tensor) -> torch.Tensor:
    """What the model says after each token, [seq, vocab], float32 on the CPU."""
    import torch

    with torch.no_grad(), it.engine.autocast():
        return it.model(ids, use_cache=False).logits[0].float().cpu()


def set_dtype(model: torch.nn.Module, name: str, *, widen: bool = False) -> None:
    """Store the floating parameters in this type; with `widen` only where theirs holds less. `auto` leaves all as is.

    Buffers stay: they hold constants that a shorter type would spoil.
    """
    import torch

    from deltune.weights import is_quantised

    if name == "auto":
        return
    dtype = getattr(torch, name)
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            new = parameter.data.to(torch.promote_types(parameter.dtype, dtype) if widen else dtype)
            if is_quantised(parameter):
                setattr(module, leaf, torch.nn.Parameter(new, requires_grad=False))  # the type that its values are given in
            else:
                parameter.data = new


def in_plain(model: torch.nn.Module) -> None:
    """Have layers that are stored quantised still, for nothing was merged into them, hold their values."""
    import torch

    from deltune.weights import dequantised, is_quantised

    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if is_quantised(parameter):
                setattr(module, leaf, torch.nn.Parameter(dequantised(parameter), requires_grad=False))
