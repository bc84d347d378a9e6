"""More tokens for a tokenizer and its model: which are new, which rows of the model they get, and what these start as.

A row is new if its token is, or if it only fills a table up. What a new row starts as is a function of the seed and the
token's text alone, whatever else is added and in whatever order.

Shapes: a table is [rows, dim]; starts are [new rows, dim], float32, in the order of the new ids.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltune.errors import ModelError
from deltune.log import logger
from deltune.models.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD = "[PAD]"
CLASSIC = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # what sentencepiece calls them
ANCHOR = "\n"  # put before a text, so that its pieces are those within a line and not those at a text's beginning
BLOCK = 8192  # rows whose statistics are taken at a time
SPACE = "▁"  # sentencepiece's


# -- the tokenizer ----------------------------------------------------------------------------------------------


def repair(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Name the special tokens that a tokenizer has and does not name, as files of early Llama models do: <s>, </s> and <unk>
    of a vocabulary that holds at least the last two."""
    vocabulary = tokenizer.get_vocab()
    if not {"</s>", "<unk>"} <= vocabulary.keys():
        return
    nameless = {name: token for name, token in CLASSIC.items() if not getattr(tokenizer, name) and token in vocabulary}
    if nameless:
        tokenizer.add_special_tokens(nameless)
        logger.info("%s: %s named, which the tokenizer has and does not name", where, ", ".join(f"{name}={token}" for name, token in nameless.items()))


def add(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Add the config's tokens. ModelError for one that is empty, given twice, or there already."""
    seen: dict[str, str] = {}
    for key, given, special in (("model.add_tokens", config.add_tokens, False), ("model.add_special_tokens", config.add_special_tokens, True)):
        texts = []
        for where, text in _texts(key, given):
            if not text:
                raise ModelError(f"{where}: an empty text cannot be a token")
            if text in seen:
                raise ModelError(f"{where}: {text!r} is given twice, first in {seen[text]}")
            there = _id_of(tokenizer, text)
            if there is not None:
                raise ModelError(f"{where}: {text!r} is a token already (id {there}). What fits: the list without it")
            seen[text] = where
            texts.append(text)
        if texts and tokenizer.add_tokens(texts, special_tokens=special) != len(texts):
            raise ModelError(f"{key}: the tokenizer takes some of these texts for one another once it has normalised them")


def _texts(key: str, given: list[str] | str) -> Iterator[tuple[str, str]]:
    """Each text with where it stands."""
    if not isinstance(given, str):
        yield from ((f"{key}[{i}]", text) for i, text in enumerate(given))
        return
    file = Path(given).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ModelError(f"{key}={given}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ModelError(f"{key}={given}: cannot be read: {error.strerror}. What fits: a file with one token a line, or a list with quotes around each: {key}='[\"<a>\",\"<b>\"]'") from None
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise ModelError(f"{key}={given}: the file holds no token")
    yield from ((f"{given}:{number}", line.removesuffix("\r")) for number, line in enumerate(lines, 1))


def _id_of(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The token that a text is as a whole, if there is one."""
    known = tokenizer.get_vocab().get(text)
    if known is not None:
        return known
    ids = _pieces(tokenizer, text)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id and tokenizer.decode(ids) == text else None


def settle_pad(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    """Have the tokenizer name a token that pads, as `model.pad_token` says.

    Batches are masked by their lengths and padding is never trained, so which token pads changes no number; a token of
    its own would cost a longer vocabulary for nothing. Where there is none, auto takes the unknown token, else EOS: a
    reader who masks by id then still sees the EOS of an answer.
    """
    how = config.pad_token
    if how == "add":
        if tokenizer.pad_token_id is not None:
            raise ModelError(f"model.pad_token=add: the tokenizer has a token that pads, {tokenizer.pad_token!r}. What fits: model.pad_token=auto")
        tokenizer.add_special_tokens({"pad_token": PAD})
    elif how != "auto" or tokenizer.pad_token_id is None:
        first = {"unk": tokenizer.unk_token, "eos": tokenizer.eos_token, "auto": tokenizer.unk_token or tokenizer.eos_token}[how]
        if not first:
            raise ModelError(f"model.pad_token={how}: the tokenizer has no {how} token. What fits: model.pad_token=auto")
        tokenizer.pad_token = first


# -- what is new ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Growth:
    """A model's tables before and after."""

    rows: int  # before
    size: int  # after
    ids: tuple[int, ...]  # of new rows, ascending
    texts: Mapping[int, str]  # of new tokens; rows that only fill up have none
    pieces: Mapping[int, tuple[int, ...]]  # what a new token's text was before; () where nothing is known
    known: tuple[int, ...]  # ids of tokens that were there before


def growth(config: ModelConfig, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, rows: int) -> Growth | None:
    """What the model lacks that its new tokenizer needs; None if nothing. `rows` are those of the model's tables.

    Raises ModelError if the tokens of both have not the same ids.
    """
    before, after = old.get_vocab(), new.get_vocab()
    moved = [token for token, i in before.items() if after.get(token) != i]
    if moved:
        raise ModelError(
            f"model.tokenizer={config.tokenizer}: {len(moved)} of the model's own {len(before)} tokens are missing or have another id, first "
            f"{moved[0]!r} ({before[moved[0]]}). What fits: a tokenizer that has the model's tokens in their places and others after them"
        )
    fresh = {i: token for token, i in after.items() if token not in before}
    taken = fresh.keys() & set(before.values())
    if taken:
        raise ModelError(f"the tokenizer gives {fresh[min(taken)]!r} the id {min(taken)}, which another token has")
    if config.grow and not set(fresh.values()) - _given(config):
        raise ModelError(f"model.grow has no effect: model.tokenizer={config.tokenizer} has no token beyond the model's own")
    size = max(rows, max(after.values()) + 1)
    size = math.ceil(size / config.vocab_multiple) * config.vocab_multiple
    ids = tuple(sorted({*fresh, *range(rows, size)}))
    if not ids:
        return None
    texts = {i: _text_of(new, token) for i, token in fresh.items()}
    known = tuple(sorted(i for i in before.values() if i < rows))
    return Growth(rows, size, ids, texts, {i: _known_pieces(old, text) for i, text in texts.items()}, known)


def _given(config: ModelConfig) -> set[str]:
    return {text for key in (config.add_tokens, config.add_special_tokens) for _, text in _texts("", key)} | {PAD}


def _text_of(tokenizer: PreTrainedTokenizerBase, token: str) -> str:
    """What a token writes, the space that it may begin with included."""
    if token in tokenizer.get_added_vocab():
        return token
    return token.replace(SPACE, " ") if SPACE in tokenizer.get_vocab() else tokenizer.convert_tokens_to_string([token])


def _known_pieces(old: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(i for i in _pieces(old, text) if i != old.unk_token_id)


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text within a line."""
    def ids(given: str) -> list[int]:
        return tokenizer(given, add_special_tokens=False, verbose=False)["input_ids"]

    before, whole = ids(ANCHOR), ids(ANCHOR + text)
    return whole[len(before) :] if whole[: len(before)] == before else ids(text)


# -- how new rows start -----------------------------------------------------------------------------------------


@torch.no_grad()
def starts(new: Growth, table: Tensor, how: str, *, name: str, seed: int) -> Tensor:
    """New rows of a table [rows, dim] by `model.new_rows`; `name` tells the tables of one model apart.

    With μ and σ the mean and standard deviation of each column over the known tokens' rows: subwords is the mean of a
    text's pieces, and μ where there are none; mean is μ; normal is N(μ, σ²); uniform is U(μ - √3σ, μ + √3σ). xavier is
    N(0, 2 / (rows + dim)) with the rows there are now, kaiming N(0, 2 / dim), as torch.nn.init has them for the table.
    """
    mean, deviation = _statistics(table, new.known) if how in ("subwords", "mean", "normal", "uniform") else (None, None)
    rows = torch.empty(len(new.ids), table.shape[1], dtype=torch.float32)
    for row, i in zip(rows, new.ids, strict=True):
        row.copy_(_start(new, i, table, how, mean, deviation, f"{name}/{new.texts.get(i, i)}", seed))
    return rows


def _start(new: Growth, i: int, table: Tensor, how: str, mean: Tensor | None, deviation: Tensor | None, key: str, seed: int) -> Tensor:
    if how in ("subwords", "mean"):
        pieces = new.pieces.get(i, ()) if how == "subwords" else ()
        return table[list(pieces)].double().mean(0) if pieces else mean
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    dim = table.shape[1]
    if how == "uniform":
        return mean + deviation * math.sqrt(3) * (2 * torch.rand(dim, generator=generator).to(mean) - 1)
    drawn = torch.randn(dim, generator=generator)
    if how == "normal":
        return mean + deviation * drawn.to(mean)
    return drawn * math.sqrt(2 / (len(table) + dim) if how == "xavier" else 2 / dim)


def _statistics(table: Tensor, known: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of each column over these rows, float64 [dim]."""
    if not known:
        raise ModelError("model.new_rows: no token was known before, so there is no mean to start from. What fits: model.new_rows=kaiming")
    blocks = torch.tensor(known, device=table.device).split(BLOCK)
    mean = torch.stack([table[block].double().sum(0) for block in blocks]).sum(0) / len(known)
    squares = torch.stack([(table[block].double() - mean).square().sum(0) for block in blocks]).sum(0)
    return mean, (squares / len(known)).sqrt()
