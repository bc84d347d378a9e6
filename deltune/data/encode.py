"""From text to tokens and labels: one masking rule, and limits that never cut away a whole answer in silence.

A token is trained if it holds a character that is trained; the first token of an example never is, since nothing
stands before it to predict it from. Shapes: seq = tokens of one example.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from deltune.data.config import DataConfig
from deltune.data.conversation import BadRow, Conversation, by_turns, with_system
from deltune.data.formats import DOCUMENTS, INSTRUCTIONS
from deltune.data.render import AlpacaFrame, ChatTemplate, Piece, PlainFrame, Renderer
from deltune.errors import DataError

NO_END = "an answer does not end in a special token, so the model is not taught to stop"
SPECIALS = "the text itself holds special tokens, which become those tokens"
CHANGES_DAILY = "the chat template writes today's date: the tokens change from day to day"
DOCUMENT_SPLIT = "a text longer than data.max_length was split into several examples"


# the settings that decide what tokens a row becomes, its schema and template apart
ENCODING = (
    "mode", "system", "meta_prompt", "prefix", "postfix", "max_length", "max_source_length", "max_target_length",
    "overlong", "train_on_source", "turns", "mix_by",
)  # fmt: skip


class Overlong(BadRow):
    """A row over a limit, where limits do not truncate."""


class Encoded(NamedTuple):
    """One example. A row may give several."""

    ids: np.ndarray  # int32 [seq]
    trained: np.ndarray  # bool [seq]
    truncated: bool


class Encoder:
    """Rows of one source to tokens. `name` says which template is used."""

    def __init__(self, config: DataConfig, tokenizer: Any, format: str):
        self.config, self.tokenizer, self.format = config, tokenizer, format
        self.renderer = None if format in DOCUMENTS else _renderer(config, tokenizer, format)
        self.name = self.renderer.name if self.renderer else "text"
        if format in DOCUMENTS:
            for setting in ("system", "meta_prompt", "prefix", "postfix"):
                if getattr(config, setting):
                    raise DataError(f"data.{setting} has no effect on rows of plain text; leave it out")
        self.eos: int | None = tokenizer.eos_token_id
        if self.eos is None and self.name != "chat":
            raise DataError("the tokenizer has no EOS token, so answers and documents could not be ended; set one in its files")
        self.first = _leading_bos(tokenizer)
        # a turn may end in a token that is not the tokenizer's EOS, e.g. <|im_end|> or <|eot_id|>
        self.ends = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        written = sorted({t for t in tokenizer.all_special_tokens if t.strip()}, key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, written)) or r"(?!)")

    def encode(self, rows: Sequence[Sequence[Conversation]]) -> list[tuple[list[Encoded] | BadRow, set[str]]]:
        """What the conversations of each row become: its examples, or why there are none; with notes on it. A row is
        used whole or not at all."""
        notes: list[set[str]] = [set() for _ in rows]
        rendered = [self._render_row(r, n) for r, n in zip(rows, notes, strict=True)]
        pieces = [p for r in rendered if not isinstance(r, BadRow) for example in r for p in example]
        tokens = iter(self._tokenize(pieces))
        found: list[list[Encoded] | BadRow] = []
        for result, note in zip(rendered, notes, strict=True):
            if isinstance(result, BadRow):
                found.append(result)
                continue
            joined = [self._join([(p, *next(tokens)) for p in example]) for example in result]
            try:
                found.append([e for ids, answer in joined for e in self._finish(ids, answer, note)])
            except BadRow as e:
                found.append(e)
        return list(zip(found, notes, strict=True))

    # ---- text

    def _render_row(self, row: Sequence[Conversation], notes: set[str]) -> list[tuple[Piece, ...]] | BadRow:
        try:
            return [e for c in row for turns in by_turns(c, self.config.turns) for e in self._render(turns, notes)]
        except BadRow as e:
            return e

    def _render(self, conversation: Conversation, notes: set[str]) -> list[tuple[Piece, ...]]:
        contents = [conversation.text or ""] + [t for m in conversation.messages for t in (m.content, m.input)]
        if any(self._special_text.search(text) for text in contents):
            notes.add(SPECIALS)
        if isinstance(self.renderer, ChatTemplate) and self.renderer.changes_daily:
            notes.add(CHANGES_DAILY)
        if self.renderer is None:
            text = conversation.text or ""
            return [(Piece(text, ((0, len(text)),), ends=True),)]
        return self.renderer.render(with_system(conversation, self.config.system), notes)

    # ---- tokens

    def _tokenize(self, pieces: Sequence[Piece]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, trained) of each piece: int32 and bool [seq]."""
        if not pieces:
            return []
        texts = [p.text for p in pieces]
        partial = not all(p.whole for p in pieces)
        if partial and not self.tokenizer.is_fast:
            return [self._by_common_prefix(p) for p in pieces]
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
            return_offsets_mapping=partial, verbose=False,
        )  # fmt: skip
        found = []
        for number, (piece, ids) in enumerate(zip(pieces, encoded["input_ids"], strict=True)):
            if piece.whole:
                trained = np.full(len(ids), bool(piece.spans))
            else:
                flat = chain.from_iterable(encoded["offset_mapping"][number])  # read flat: three times as fast as np.array
                trained = _covered(np.fromiter(flat, np.int64, 2 * len(ids)).reshape(-1, 2), piece.spans)
            found.append((np.array(ids, dtype=np.int32), trained))
        return found

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _by_common_prefix(self, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """For tokenizers without offsets: a span begins where the tokens of the text before it part from the whole's."""
        ids = self._ids(piece.text)
        trained = np.zeros(len(ids), dtype=bool)
        for start, stop in piece.spans:
            first, last = (_common_prefix(ids, self._ids(piece.text[:end])) for end in (start, stop))
            trained[first:last] = True
        return np.array(ids, dtype=np.int32), trained

    def _join(self, parts: list[tuple[Piece, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        """One example from its pieces, with BOS before and EOS where a piece ends; neither is ever doubled."""
        all_ids: list[np.ndarray] = []
        all_trained: list[np.ndarray] = []
        starts = self.renderer is None or self.renderer.starts
        if starts and self.first is not None and not any(len(ids) and ids[0] == self.first for _, ids, _ in parts[:1]):
            all_ids.append(np.array([self.first], dtype=np.int32))
            all_trained.append(np.zeros(1, dtype=bool))
        for piece, ids, trained in parts:
            all_ids.append(ids)
            all_trained.append(trained)
            if piece.ends and (not len(ids) or ids[-1] != self.eos):
                all_ids.append(np.array([self.eos], dtype=np.int32))
                all_trained.append(np.array([bool(piece.spans)]))
        return np.concatenate(all_ids), np.concatenate(all_trained)

    # ---- labels and limits

    def _finish(self, ids: np.ndarray, answer: np.ndarray, notes: set[str]) -> list[Encoded]:
        if self.config.mode == "pretrain":
            return self._pieces(ids, notes)
        if answer.any() and not self._all_end(ids, answer):
            notes.add(NO_END)
        ids, answer, truncated = self._fit(ids, answer)
        trained = np.ones_like(answer) if self.config.train_on_source else answer.copy()
        trained[:1] = False
        if not trained.any():
            raise BadRow("no token of it would be trained")
        return [Encoded(ids, trained, truncated)]

    def _all_end(self, ids: np.ndarray, answer: np.ndarray) -> bool:
        last = np.flatnonzero(answer & ~np.append(answer[1:], False))
        return all(i in self.ends for i in ids[last].tolist())

    def _pieces(self, ids: np.ndarray, notes: set[str]) -> list[Encoded]:
        """A document in pieces of at most max_length. Neighbours share one token, so that every token but the first of
        the document is predicted exactly once."""
        limit = self.config.max_length
        if len(ids) < 2:
            raise BadRow("no token of it would be trained")
        if len(ids) > limit:
            self._refuse_overlong(f"{len(ids)} tokens, data.max_length is {limit}")
            notes.add(DOCUMENT_SPLIT)
        found = []
        for start in range(0, len(ids) - 1, limit - 1):
            piece = ids[start : start + limit]
            trained = np.ones(len(piece), dtype=bool)
            trained[0] = False
            found.append(Encoded(piece, trained, False))
        return found

    def _refuse_overlong(self, what: str) -> None:
        if self.config.overlong != "truncate":
            raise Overlong(what)

    def _fit(self, ids: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Cut to the limits: each prompt at its beginning (BOS stays), each answer at its end (its last token stays),
        then the whole to max_length."""
        keep = np.ones(len(ids), dtype=bool)
        for start, stop, is_answer in _runs(answer):
            limit = self.config.max_target_length if is_answer else self.config.max_source_length
            if limit is not None and stop - start > limit:
                self._refuse_overlong(f"{'an answer' if is_answer else 'a prompt'} of {stop - start} tokens, the limit is {limit}")
                keep[self._surplus(ids, start, stop, limit, is_answer)] = False
        num_before = len(ids)
        ids, answer = ids[keep], answer[keep]
        if len(ids) > self.config.max_length:
            self._refuse_overlong(f"{len(ids)} tokens, data.max_length is {self.config.max_length}")
            keep = self._within(ids, answer)
            ids, answer = ids[keep], answer[keep]
        return ids, answer, len(ids) < num_before

    def _within(self, ids: np.ndarray, answer: np.ndarray) -> np.ndarray:
        """bool [seq]: what stays within max_length. Whole turns from the first on, as long as prompt and answer both fit.

        If even the first pair does not, its prompt is cut first, but keeps half of max_length; then its answer is cut
        at the end. So an answer always keeps at least half, and a conversation never has an answer without its prompt.
        """
        limit, keep = self.config.max_length, np.zeros(len(ids), dtype=bool)
        runs = _runs(answer)
        if runs[0][2]:
            runs.insert(0, (0, 0, False))
        (_, border, _), (_, stop, _) = runs[0], runs[1] if len(runs) > 1 else (0, runs[0][1], True)
        if stop > limit:
            num_prompt = min(border, max(limit - (stop - border), limit // 2))
            keep[:stop] = True
            for run, room in (((0, border, False), num_prompt), ((border, stop, True), limit - num_prompt)):
                if run[1] - run[0] > room:
                    keep[self._surplus(ids, *run[:2], room, run[2])] = False
            return keep
        for i in range(3, len(runs), 2):
            if runs[i][1] > limit:
                break
            stop = runs[i][1]
        keep[:stop] = True
        return keep

    def _surplus(self, ids: np.ndarray, start: int, stop: int, limit: int, is_answer: bool) -> slice:
        """Which tokens of a stretch go so that `limit` stay."""
        if is_answer:
            end = 1 if int(ids[stop - 1]) in self.ends else 0
            return slice(start + limit - end, stop - end)
        head = 1 if start == 0 and int(ids[0]) == self.tokenizer.bos_token_id else 0
        return slice(start + head, stop - limit + head)


def _renderer(config: DataConfig, tokenizer: Any, format: str) -> Renderer:
    name = config.template
    if name == "auto":
        name = "chat" if tokenizer.chat_template else ("alpaca" if format in INSTRUCTIONS else "plain")
    if name == "chat":
        if not tokenizer.chat_template:
            raise DataError(
                "data.template is chat, but the tokenizer has no chat template; choose plain or alpaca, "
                "or name a template file in model.chat_template"
            )
        return ChatTemplate(config, tokenizer)
    return AlpacaFrame(config) if name == "alpaca" else PlainFrame(config)


def _leading_bos(tokenizer: Any) -> int | None:
    """The BOS id if this tokenizer puts one before plain text of itself, as it will when the model is asked."""
    with_specials, without = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (True, False))
    bos = tokenizer.bos_token_id
    return bos if bos is not None and with_specials[:1] == [bos] and without[:1] != [bos] else None


def _covered(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """int [seq, 2] character ranges -> bool [seq]: tokens that hold a character of a span. A token without width
    belongs to the span that it stands in."""
    starts, stops = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
    trained = np.zeros(len(offsets), dtype=bool)
    for start, stop in spans:
        trained |= (starts < stop) & (stops > start)
    return trained


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _runs(answer: np.ndarray) -> list[tuple[int, int, bool]]:
    """(start, stop, is answer) of the stretches of an example, in turn."""
    borders = [0, *(np.flatnonzero(answer[1:] != answer[:-1]) + 1).tolist(), len(answer)]
    return [(a, b, bool(answer[a])) for a, b in pairwise(borders)]


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of all that decides what tokens a text becomes: vocabulary and rules, template, specials, library versions."""
    import tokenizers
    import transformers

    if tokenizer.is_fast:
        body = json.loads(tokenizer.backend_tokenizer.to_str())
        body = {name: body[name] for name in body if name not in ("truncation", "padding")}  # of the last call, not its own
    else:
        body = sorted(tokenizer.get_vocab().items())
    what = [
        type(tokenizer).__name__, body, tokenizer.chat_template, tokenizer.special_tokens_map,
        sorted(tokenizer.get_added_vocab().items()), transformers.__version__, tokenizers.__version__,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
