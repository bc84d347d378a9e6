"""A conversation at the terminal, or down a pipe: answers go to `out` and nothing else does, what is said about the
conversation goes to `notes`. Ctrl-C ends an answer, the end of input ends the chat."""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from deltune.errors import DeltuneError, ModelError, NumericsError
from deltune.models.generation import GenerateOptions, context_window, stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# {"role", "content"} of each turn -> token ids up to where the answer begins
Render = Callable[[list[dict[str, str]]], list[int]]

# control characters but tab and line feed: a terminal would obey them, and answers may hold any
HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}

HELP = """\
/reset          forget the conversation, keep the system message
/system TEXT    set the system message; without TEXT take it away
/save [FILE]    append the conversation to FILE as one line of JSON, a row that can be trained on
/help           this text
/quit           leave; so does Ctrl-D. Ctrl-C stops an answer.
A message that begins with / is written with //."""


class Chat:
    """The conversation so far and what may be said to it. `messages` hold user and assistant turns only."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, render: Render, options: GenerateOptions, *,
        system: str | None = None, out: TextIO | None = None, notes: TextIO | None = None,
    ):  # fmt: skip
        self.model, self.tokenizer, self.render, self.options = model, tokenizer, render, options
        self.system, self.messages = system, []
        self.first_seen = 0  # messages before this one no longer fit into the context window
        self.out, self.notes = out or sys.stdout, notes or sys.stderr
        self.commands: dict[str, Callable[[str], None]] = {
            "reset": self.reset,
            "system": self.set_system,
            "save": self.save,
            "help": self.help,
        }

    def run(self, lines: Iterator[str]) -> None:
        """Answer each line, until the lines end or one says /quit."""
        for line in lines:
            text = line.strip()
            if not text:
                continue
            if text.startswith("/") and not text.startswith("//"):
                name, _, rest = text[1:].partition(" ")
                if name == "quit":
                    return
                self.command(name, rest.strip())
            else:
                self.say(text[1:] if text.startswith("//") else text)

    def command(self, name: str, rest: str) -> None:
        if name in self.commands:
            self.commands[name](rest)
            return
        near = difflib.get_close_matches(name, [*self.commands, "quit"], n=1)
        self.note(f"no command /{name}" + (f"; did you mean /{near[0]}?" if near else "; /help names them"))

    def say(self, text: str) -> None:
        """Add a user's message and the answer to it, which is written as it comes."""
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self.fitting_prompt()
            answer = self.write_answer(ids)
        except NumericsError:
            raise
        except DeltuneError as error:  # the message cannot be answered; the conversation before it can go on
            self.messages.pop()
            self.note(f"not sent: {error}")
            return
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()
            self.note("no answer; the message is not kept")

    def write_answer(self, ids: list[int]) -> str:
        """The answer's text, or as much of it as there was when Ctrl-C came."""
        answer, stopped = "", False
        # the number of the turn makes draws differ from turn to turn, and a repeated conversation the same
        pieces = stream(self.model, self.tokenizer, ids, self.options, number=len(self.messages))
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    answer += piece
                    print(piece.translate(HARMLESS) if self.out.isatty() else piece, end="", file=self.out, flush=True)
        except KeyboardInterrupt:
            stopped = True
        print(file=self.out, flush=True)
        if stopped:
            self.note("stopped")
        return answer

    def fitting_prompt(self) -> list[int]:
        """Token ids of the conversation, without the earliest turns once window and answer have no room for them."""
        window, before = context_window(self.model), self.first_seen
        ids = self.prompt_from(self.first_seen)
        if window is not None:
            reserve = min(self.options.max_new_tokens, window // 2)
            first = self.first_seen
            while len(ids) + reserve > window and (later := self.next_question(first)) is not None:
                first = later
                ids = self.prompt_from(first)
            if len(ids) >= window:
                raise ModelError(f"the message has {len(ids)} tokens, and the model's context window is {window}")
            self.first_seen = first
        if self.first_seen > before:
            self.note(
                f"the context window of {window} tokens is full: the model no longer sees the first "
                f"{self.first_seen} messages"
            )
        return ids

    def prompt_from(self, first: int) -> list[int]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return self.render(head + self.messages[first:])

    def next_question(self, first: int) -> int | None:
        """Place of the first user's message after `first`, if there is a later one."""
        places = range(first + 1, len(self.messages))
        return next((place for place in places if self.messages[place]["role"] == "user"), None)

    def reset(self, rest: str) -> None:
        self.messages, self.first_seen = [], 0
        self.note("the conversation starts anew")

    def set_system(self, rest: str) -> None:
        self.system = rest or None
        self.note("system message set" if rest else "no system message")

    def save(self, rest: str) -> None:
        if not self.messages:
            self.note("nothing to save yet")
            return
        file = Path(rest).expanduser() if rest else Path(time.strftime("chat-%Y%m%d-%H%M%S.jsonl"))
        head = [{"role": "system", "content": self.system}] if self.system else []
        try:
            with file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps({"messages": head + self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            self.note(f"not saved: {file}: {error.strerror}")
            return
        self.note(f"{len(self.messages)} messages saved to {file}")

    def help(self, rest: str) -> None:
        self.note(HELP)

    def note(self, text: str) -> None:
        print(text, file=self.notes, flush=True)


def terminal_lines(prompt: str = "> ") -> Iterator[str]:
    """Lines typed at a terminal, with editing and history where the system has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() uses it once it is loaded
    while True:
        try:
            yield input(prompt)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves")
