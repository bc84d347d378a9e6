"""Sentencepiece vocabularies: two merged into one, and one written as a tokenizer that transformers loads.

A merged vocabulary begins with the base's pieces, each as it was: id, score and type, bytes and specials among them. The
other's pieces follow in its order. So a text in which no added piece occurs is cut as it was before.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltune.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODEL = "tokenizer.model"
SPACE = "▁"
SCORES = ("kept", "above", "below")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # a piece's type
UNIGRAM, BPE = 1, 2  # a model's


@dataclass(frozen=True)
class Merged:
    """Two vocabularies in one, and what became of the other's pieces."""

    proto: Any
    num_base: int
    num_added: int
    num_there: int  # the base has them
    num_other_script: int
    specials: tuple[str, ...]  # of the other, which stay behind
    unreached: tuple[str, ...]  # added, and yet their own text is cut otherwise
    mixed: bool  # one is a BPE model and the other a unigram one


def read(path: str | Path, key: str) -> Any:
    """The model in a file, or in a folder's tokenizer.model, as sentencepiece's protobuf. ModelError names `key`."""
    file = Path(path).expanduser()
    file = file / MODEL if file.is_dir() else file
    if not file.is_file():
        raise ModelError(f"{key}={path}: there is no {file.name}. What fits: a sentencepiece model, or a folder with a {MODEL}")
    proto = _library().ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except _decode_error() as error:
        raise ModelError(f"{key}={path}: not a sentencepiece model ({error})") from None
    if not proto.pieces or proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise ModelError(f"{key}={path}: not a sentencepiece model of pieces by BPE or unigram")
    return proto


def _library() -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ModelError(f"sentencepiece vocabularies need a library that is missing ({error.name}): pip install 'deltune[vocab]'") from None
    return sentencepiece_model_pb2


def _decode_error() -> type[Exception]:
    from google.protobuf.message import DecodeError

    return DecodeError


def merge(base: Any, other: Any, *, scripts: Sequence[str] = (), scores: str = "kept") -> Merged:
    """The base's pieces, then those of the other that it lacks, in the other's order.

    `scripts`: only pieces whose letters are all of these (Unicode's names, such as han or cyrillic). `scores` of added
    pieces: kept as they are; above the base's highest, so that a BPE base joins them before all others, as with
    Chinese-LLaMA's score of 0 for each; below its lowest, so that they join what the base's merges leave; both in the
    other's order. Which of two merges of one score comes first is told otherwise by each library, so for a BPE base a
    score that is there already is lowered by the least that float32 can say.
    Specials and bytes of the other stay behind: the base has its own.
    """
    _check(base, other)
    wanted = known_scripts(scripts)
    merged = type(base)()
    merged.CopyFrom(base)
    there = {piece.piece for piece in base.pieces}
    taken = {piece.score for piece in base.pieces if piece.type == NORMAL}
    lowest, highest = min(taken), max(taken)
    added: list[str] = []
    specials: list[str] = []
    num_there = num_other_script = 0
    for piece in other.pieces:
        if piece.type not in (NORMAL, USER_DEFINED):
            if piece.piece not in there and piece.type != BYTE:
                specials.append(piece.piece)
            continue
        if piece.piece in there:
            num_there += 1
        elif wanted and not _is_of(piece.piece, wanted):
            num_other_script += 1
        else:
            new = merged.pieces.add()
            new.CopyFrom(piece)
            new.score = {"kept": piece.score, "above": highest + len(other.pieces) - len(added), "below": lowest - 1 - len(added)}[scores]
            while base.trainer_spec.model_type == BPE and new.score in taken:
                new.score = float(np.nextafter(np.float32(new.score), np.float32(-np.inf)))
            taken.add(new.score)
            there.add(piece.piece)
            added.append(piece.piece)
    if not added:
        raise ModelError(f"nothing to add: of the other's {len(other.pieces)} pieces {num_there} are in the base already, and {num_other_script} are of other scripts")
    merged.trainer_spec.vocab_size = len(merged.pieces)
    mixed = base.trainer_spec.model_type != other.trainer_spec.model_type
    return Merged(merged, len(base.pieces), len(added), num_there, num_other_script, tuple(specials), _unreached(merged, added), mixed)


def _check(base: Any, other: Any) -> None:
    """ModelError where a piece does not mean the same in both."""
    for name, meaning in (("escape_whitespaces", "writes a space as ▁"), ("add_dummy_prefix", "puts a space before a text")):
        one, two = (getattr(proto.normalizer_spec, name) for proto in (base, other))
        if one != two:
            raise ModelError(f"the vocabularies do not belong together: only the {'base' if one else 'other'} {meaning} ({name})")
    if base.trainer_spec.treat_whitespace_as_suffix != other.trainer_spec.treat_whitespace_as_suffix:
        raise ModelError("the vocabularies do not belong together: one has a word's space before it, the other after it (treat_whitespace_as_suffix)")


def _unreached(merged: Any, added: list[str]) -> tuple[str, ...]:
    """Added pieces that do not come out of their own text: BPE joins two pieces at a time and may lack a step."""
    processor = processor_of(merged)
    texts = [piece.replace(SPACE, " ") for piece in added]
    # a letter of no script before it keeps the prefix's space off a piece that has none
    return tuple(piece for piece, text in zip(added, texts, strict=True) if piece not in processor.encode(f"\n{text}", out_type=str))


def processor_of(proto: Any) -> Any:
    """Sentencepiece itself, on this model."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


# -- scripts ----------------------------------------------------------------------------------------------------


def script_of(character: str) -> str | None:
    """The script of a letter or mark by its Unicode name, in lower case; None for anything else."""
    if unicodedata.category(character)[0] not in "LM":
        return None
    first = unicodedata.name(character, "").split(" ")[0].split("-")[0].lower()
    return "han" if first == "cjk" else first or None


@functools.cache
def _all_scripts() -> frozenset[str]:
    return frozenset(filter(None, map(script_of, map(chr, range(sys.maxunicode + 1)))))


def known_scripts(names: Sequence[str]) -> frozenset[str]:
    """The names in lower case; ModelError for one that no letter has."""
    from difflib import get_close_matches

    for name in names:
        if name.lower() not in _all_scripts():
            near = get_close_matches(name.lower(), _all_scripts(), n=3)
            raise ModelError(f"scripts names {name!r}, which no letter is of; {'nearest: ' + ', '.join(near) if near else 'there are han, latin, cyrillic, arabic, hangul …'}")
    return frozenset(name.lower() for name in names)


def _is_of(piece: str, scripts: frozenset[str]) -> bool:
    found = {script for script in map(script_of, piece) if script is not None}
    return bool(found) and found <= scripts


# -- as a tokenizer of transformers' ----------------------------------------------------------------------------


def fast(proto: Any, *, add_bos: bool = True) -> Tokenizer:
    """A BPE model as a tokenizer of the tokenizers library: the same ids for every text without user-defined symbols, after
    each of which that library puts the space that belongs before a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    spec, normal = proto.trainer_spec, proto.normalizer_spec
    if spec.model_type != BPE or normal.precompiled_charsmap or normal.remove_extra_whitespaces:
        raise ModelError(f"only a BPE vocabulary without normalisation is written for transformers; {MODEL} alone holds this one")
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    unknown = next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=_merges(proto, ids), unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback))
    prefix = [normalizers.Prepend(SPACE)] if normal.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = [piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(piece.piece, normalized=False) for piece in proto.pieces if piece.type == USER_DEFINED])
    if add_bos:
        bos = proto.pieces[spec.bos_id].piece
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, spec.bos_id)])
    return tokenizer


def _merges(proto: Any, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, by the third's score, the highest first."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    whole = {piece.piece for piece in proto.pieces if piece.type == NORMAL}
    for piece in proto.pieces:
        if piece.type != NORMAL:
            continue
        text = piece.piece
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in whole and right in whole:
                found.append((-piece.score, ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(found)]
