"""Text of an answer while its tokens arrive: a character is given out once all of its bytes are there, and nothing of
a stop string is given out at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no whole character


class AnswerText:
    """Feed tokens with `push`; `text` grows to `tokenizer.decode(ids, skip_special_tokens=True)`, cut at a stop string.

    (Decoders with byte fallback write a whole run of bytes as U+FFFD if one is broken; here only the broken end.)

    Only the newest tokens are decoded each time. They are decoded together with the ones before them, whose text is
    then taken off: alone, a token may lose its leading space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop = [text for text in stop if text]
        self.text = ""
        self.stopped = False  # a stop string was found
        self._ids: list[int] = []
        self._context, self._settled = (
            0,
            0,
        )  # ids[:settled] are in text; ids[context:settled] are decoded again with the rest
        self._given = 0

    def push(self, token: int) -> None:
        """One more token of the answer."""
        self._ids.append(token)
        new = self._new_text()
        if new and not new.endswith(UNFINISHED):
            self._settle(new)

    def finish(self) -> None:
        """No more tokens: whatever was held back as the beginning of a character is text after all."""
        if not self.stopped:
            self._settle(self._new_text())

    def take(self) -> str:
        """Text that was not taken before and can no longer become part of a stop string."""
        end = len(self.text) if self.stopped else len(self.text) - self._possible_stop()
        piece, self._given = self.text[self._given : end], max(self._given, end)
        return piece

    def take_rest(self) -> str:
        """After `finish`: everything not taken before."""
        piece, self._given = self.text[self._given :], len(self.text)
        return piece

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._context : self._settled])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _settle(self, new: str) -> None:
        searched = max(0, len(self.text) - max(map(len, self.stop), default=0))
        self.text += new
        self._context, self._settled = self._settled, len(self._ids)
        places = [place for place in (self.text.find(stop, searched) for stop in self.stop) if place >= 0]
        if places:
            self.text, self.stopped = self.text[: min(places)], True

    def _possible_stop(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self.stop):
                return length
        return 0
