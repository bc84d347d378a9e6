"""deltune vocab merge base=MODEL other=MODEL out=FOLDER [scripts=[han]] [scores=kept|above|below]
deltune vocab stats tokenizer=FOLDER file=TEXT [against=FOLDER]

merge writes two sentencepiece vocabularies as one: the base's pieces with their ids, scores and types, then the other's
that it lacks. `deltune train model=BASE model.tokenizer=FOLDER model.grow=true` gives a model rows for them. stats counts
the tokens that a text takes. Docs: docs/vocabulary.md.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltune.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from deltune.models.pieces import Merged
    from deltune.settings import VocabMergeSettings, VocabStatsSettings

SHOWN = 8


def main(words: list[str], file: Path | None = None) -> int:
    from deltune import log, settings

    verbs: dict[str, tuple[type, Callable[[Any], str]]] = {
        "merge": (settings.VocabMergeSettings, lambda found: "\n".join(told(found, merge(found)))),
        "stats": (settings.VocabStatsSettings, stats),
    }
    if not words or words[0] not in verbs:
        raise ConfigError(f"vocab: {'what to do is missing' if not words else f'{words[0]} is nothing that it does'}; there are merge and stats")
    cls, run = verbs[words[0]]
    log.set_up()
    print(run(settings.load(cls, words[1:])))
    return 0


def merge(settings: VocabMergeSettings) -> Merged:
    """Read both, merge, write. Raises a DeltuneError, and then leaves nothing under `settings.out`."""
    from deltune.models import pieces

    out = Path(settings.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"out={out}: something is there already. What fits: a folder that does not exist, or an empty one.")
    base, other = (pieces.read(path, key) for key, path in (("base", settings.base), ("other", settings.other)))
    merged = pieces.merge(base, other, scripts=settings.scripts, scores=settings.scores)
    written = out.with_name(f".{out.name}.new")
    shutil.rmtree(written, ignore_errors=True)
    written.mkdir(parents=True)
    try:
        _write(merged.proto, Path(settings.base), written)
        if out.exists():
            out.rmdir()
        written.rename(out)
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return merged


def _write(proto: Any, base: Path, folder: Path) -> None:
    """tokenizer.model, and what transformers loads beside it, with the settings that the base's folder has."""
    from deltune.models import pieces

    (folder / pieces.MODEL).write_bytes(proto.SerializeToString())
    stated: dict[str, Any] = {}
    if (base / "tokenizer_config.json").is_file():
        from deltune.models.folder import read_json

        stated = read_json(base / "tokenizer_config.json", f"base={base}")
    if proto.trainer_spec.model_type != pieces.BPE:
        return  # `told` says so
    add_bos = bool(stated.get("add_bos_token", True)) and proto.trainer_spec.bos_id >= 0
    pieces.fast(proto, add_bos=add_bos).save(str(folder / "tokenizer.json"))
    ids = {"unk_token": proto.trainer_spec.unk_id, "bos_token": proto.trainer_spec.bos_id, "eos_token": proto.trainer_spec.eos_id}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {name: proto.pieces[i].piece for name, i in ids.items() if i >= 0}
    config |= {key: stated[key] for key in ("chat_template", "model_max_length") if key in stated}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (base / "chat_template.jinja").is_file():
        shutil.copy(base / "chat_template.jinja", folder)


def told(settings: VocabMergeSettings, merged: Merged) -> list[str]:
    """What was made of what."""
    total = merged.num_base + merged.num_added
    lines = [f"wrote {settings.out}: {total:,} pieces, the base's {merged.num_base:,} and {merged.num_added:,} of the other"]
    lines.append(f"of the other {merged.num_there:,} are in the base already" + (f", and {merged.num_other_script:,} are not of {', '.join(settings.scripts)}" if settings.scripts else ""))
    if merged.specials:
        lines.append(f"its specials stay behind: {_some(merged.specials)}")
    if merged.mixed and settings.scores == "kept":
        lines.append("the scores of one are ranks of merges and those of the other log-probabilities: scores=above or scores=below may suit better")
    if merged.unreached:
        lines.append(f"{len(merged.unreached):,} added pieces do not come out of their own text, where other pieces come first or a step to them is lacking: {_some(merged.unreached)}")
    if not (Path(settings.out) / "tokenizer.json").exists():
        lines.append("a unigram vocabulary is written as tokenizer.model alone, which sentencepiece reads; model.tokenizer needs a BPE base")
    else:
        lines.append(f"next: deltune train model=BASE model.tokenizer={settings.out} model.grow=true data=FILE")
    return lines


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def stats(settings: VocabStatsSettings) -> str:
    """A line for each tokenizer: pieces that it has, tokens of the text, characters and bytes for each."""
    try:
        text = Path(settings.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"file={settings.file}: cannot be read as UTF-8 text: {error}") from None
    if not text:
        raise DataError(f"file={settings.file}: holds no text")
    counts = {}
    for key, path in (("against", settings.against), ("tokenizer", settings.tokenizer)):
        if path is not None:
            counts[path] = _counted(path, key, text)
    width = max(map(len, counts))
    lines = [f"{'':<{width}}  {'vocabulary':>10}  {'tokens':>10}  characters/token  bytes/token"]
    size = len(text.encode("utf-8"))
    lines += [f"{path:<{width}}  {pieces:>10,}  {tokens:>10,}  {len(text) / tokens:>16.3f}  {size / tokens:>11.3f}" for path, (pieces, tokens) in counts.items()]
    if settings.against is not None and len(counts) == 2:
        before, after = (tokens for _, tokens in counts.values())
        lines.append(f"{100 * (after / before - 1):+.1f} % tokens")
    return "\n".join(lines)


def _counted(path: str, key: str, text: str) -> tuple[int, int]:
    """(pieces of the vocabulary, tokens of the text)."""
    from deltune.models.config import ModelConfig
    from deltune.models.load import load_tokenizer

    if Path(path).is_file():
        from deltune.models import pieces

        processor = pieces.processor_of(pieces.read(path, key))
        return processor.get_piece_size(), max(1, len(processor.encode(text)))
    try:
        tokenizer = load_tokenizer(ModelConfig(tokenizer=None if path == "bundled" else path))
    except ModelError as error:
        raise ModelError(str(error).replace("model.tokenizer=", f"{key}=", 1)) from None
    return len(tokenizer), max(1, len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
