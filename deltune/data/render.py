"""From a conversation to text, with the characters marked that are trained: what the model itself would have to write.

One rule: an answer is everything that follows the prompt under which the model is asked for it, up to and including
the token that ends its turn; white space that a template writes after that token is not trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deltune.data.config import DataConfig
from deltune.data.conversation import BadRow, Conversation, Message
from deltune.errors import DataError

Span = tuple[int, int]

# notes: what a user should know about rows that are used all the same
SPLIT_TURNS = "the chat template rewrites earlier turns, so each answer became an example of its own"
TAGS_ONLY = "the mask comes from the template's generation tags alone; prefixes of the conversation cannot be rendered"
ENDS_IN_PROMPT = "the conversation ends in a prompt without an answer; that last prompt is not trained"

# Stanford Alpaca (Taori et al. 2023), the texts its model was trained on
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)

_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

# what a template may raise on a row it was not made for; anything else is our own fault
_TEMPLATE_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Piece:
    """Text tokenised by itself. `spans` are the trained characters; `ends` adds the EOS token, trained with them."""

    text: str
    spans: tuple[Span, ...] = ()
    ends: bool = False

    @property
    def whole(self) -> bool:
        """Trained from the first to the last character, or not at all: no offsets are needed."""
        return not self.spans or self.spans == ((0, len(self.text)),)


class Renderer(Protocol):
    """Conversation -> examples, each a sequence of pieces; `notes` collects what should be known about the row."""

    name: str
    starts: bool  # whether the tokenizer's BOS goes before the first piece

    def render(self, conversation: Conversation, notes: set[str]) -> list[tuple[Piece, ...]]: ...


def answer(text: str, train: bool) -> Piece:
    """An answer of a plain frame with its EOS."""
    return Piece(text, ((0, len(text)),) if train else (), ends=True)


def _joined(message: Message) -> str:
    return f"{message.content}\n{message.input}" if message.input else message.content


# ---- text frames


class Frame:
    """Prompts and answers as text, each tokenised by itself, so that a prompt has the tokens it will have when the
    model is asked. An answer ends with the EOS token."""

    starts = True

    def __init__(self, config: DataConfig):
        self.config = config

    def render(self, conversation: Conversation, notes: set[str]) -> list[tuple[Piece, ...]]:
        pieces: list[Piece] = []
        text, system = self.config.meta_prompt, ""
        for message in conversation.messages:
            if message.role == "tool" or message.tool_calls or conversation.tools:
                raise BadRow(f"template={self.name} cannot write tools; use a tokenizer whose chat template does")
            if message.role == "system":
                system = message.content
            elif message.role == "user":
                text += self.prompt(message, system, first=not pieces)
                system = ""
            else:
                if system:  # a conversation that the assistant opens
                    text, system = text + self.opening(system), ""
                pieces += [Piece(text), answer(message.content, message.train)]
                text = ""
        if text:
            notes.add(ENDS_IN_PROMPT)
            pieces.append(Piece(text))
        return [tuple(pieces)]

    def opening(self, system: str) -> str:
        return f"{system}\n\n"

    def prompt(self, message: Message, system: str, *, first: bool) -> str:
        raise NotImplementedError

    name = ""


class PlainFrame(Frame):
    """System text and a blank line, then prompt and answer with nothing between them but prefix and postfix."""

    name = "plain"

    def prompt(self, message: Message, system: str, *, first: bool) -> str:
        return (self.opening(system) if system else "") + self.config.prefix + _joined(message) + self.config.postfix


class AlpacaFrame(Frame):
    """The Alpaca text; a system message stands in for its first sentence, later turns repeat the headings."""

    name = "alpaca"

    def prompt(self, message: Message, system: str, *, first: bool) -> str:
        default = ALPACA_WITH_INPUT if message.input else ALPACA_WITHOUT_INPUT
        head = f"{system or default}\n\n" if first or system else "\n\n"
        body = f"### Instruction:\n{self.config.prefix}{message.content}"
        if message.input:
            body += f"\n\n### Input:\n{message.input}"
        return f"{head}{body}{self.config.postfix}\n\n### Response:\n"


# ---- chat templates


class _NoPrefix(Exception):
    """The template does not render a part of the conversation as it renders the whole."""


class ChatTemplate:
    """The tokenizer's own template, run by transformers in its sandbox.

    The mask comes from prefixes: the text of the conversation up to an answer, with the generation prompt, is what
    the model is given; what the template adds when the answer is there, the model must write. Where the template has
    generation tags they must mark the same characters, or the row is refused with the first difference. A template
    that rewrites earlier turns (removes their thinking) gives one example for each answer, as it is when asked.
    """

    name = "chat"
    starts = False  # templates write BOS themselves

    def __init__(self, config: DataConfig, tokenizer: Any):
        self.config, self.tokenizer = config, tokenizer
        self.specials = dict(tokenizer.special_tokens_map)
        # with and without tools: some tokenizers have a template for each
        self.source = {with_tools: self._template(with_tools) for with_tools in (False, True)}
        self.has_tags = {with_tools: bool(_TAG.search(text)) for with_tools, text in self.source.items()}
        if "date_string" in self.source[False]:
            # Llama 3's own default: the tokens must not change from one day to the next
            self.specials["date_string"] = "26 Jul 2024"

    def _template(self, with_tools: bool) -> str:
        try:
            return self.tokenizer.get_chat_template(tools=[{}] if with_tools else None)
        except ValueError as e:
            raise DataError(f"the tokenizer's chat template cannot be used: {e}; choose data.template=plain or alpaca") from e

    @property
    def changes_daily(self) -> bool:
        return "strftime_now" in self.source[False] and "date_string" not in self.specials

    def render(self, conversation: Conversation, notes: set[str]) -> list[tuple[Piece, ...]]:
        messages, has_tags = self._messages(conversation), self.has_tags[bool(conversation.tools)]
        full, tags = self._text(messages, conversation.tools)
        answers = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        trained = [i for i in answers if conversation.messages[i].train]
        if conversation.messages[-1].role != "assistant":
            notes.add(ENDS_IN_PROMPT)
        _everything_shown(conversation, full)
        try:
            turns = {i: self._turn(messages, conversation.tools, i, full, tags) for i in (answers if has_tags else trained)}
        except _NoPrefix as e:
            if not has_tags:
                raise BadRow(f"{e}, and the template has no generation tags: the answers cannot be told from the prompts") from None
            notes.add(TAGS_ONLY)
            spans = _tagged_turns(full, tags, answers)
            return [self._example(conversation, full, {i: spans[i] for i in trained})]
        if all(full.startswith(text) for text, _, _ in turns.values()):
            spans = {i: span for i, (_, span, _) in turns.items()}
            if has_tags:
                _must_agree(full, list(spans.values()), tags)
            return [self._example(conversation, full, {i: spans[i] for i in trained})]
        notes.add(SPLIT_TURNS)
        examples = []
        for i in trained:
            text, span, turn_tags = turns[i]
            if has_tags:
                _must_agree(text, [span], [tag for tag in turn_tags if tag[1] > span[0]])
            examples.append(self._example(conversation, text, {i: span}))
        return examples

    def _messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        found, meta = [], self.config.meta_prompt
        for message in conversation.messages:
            content = _joined(message)
            if message.role == "user":
                content = meta + self.config.prefix + content + self.config.postfix
                meta = ""
            entry: dict[str, Any] = {"role": message.role, "content": content, **message.extra}
            if message.tool_calls:
                entry["tool_calls"] = message.tool_calls
            found.append(entry)
        return found

    def _text(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], *, ask: bool = False) -> tuple[str, list[Span]]:
        """(rendered text, spans inside generation tags). With `ask`, up to where the model takes over."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                tools=list(tools) or None,
                chat_template=self.source[bool(tools)],
                return_assistant_tokens_mask=self.has_tags[bool(tools)],
                add_generation_prompt=ask,
                **self.specials,
            )
        except jinja2.TemplateSyntaxError as e:
            raise DataError(f"the chat template is not valid Jinja: line {e.lineno}: {e.message}") from e
        except (jinja2.TemplateError, *_TEMPLATE_FAULTS) as e:
            hint = "; this template takes no system message (drop data.system, or say it in data.meta_prompt)"
            about_system = "system" in str(e).lower() and messages and messages[0]["role"] == "system"
            raise BadRow(f"the chat template refuses the conversation: {e}{hint if about_system else ''}") from e
        return texts[0], list(spans[0]) if spans else []

    def _turn(
        self, messages: list[dict[str, Any]], tools: Sequence[Any], i: int, full: str, full_tags: list[Span]
    ) -> tuple[str, Span, list[Span]]:
        """(text up to and with answer i, the answer's span in it, tags in it)."""
        try:
            asked, _ = self._text(messages[:i], tools, ask=True)
            text, tags = (full, full_tags) if i == len(messages) - 1 else self._text(messages[: i + 1], tools)
        except BadRow as e:
            raise _NoPrefix(str(e)) from None
        if not text.startswith(asked):
            at = _first_difference(text, asked)
            raise _NoPrefix(
                f"before answer {i + 1} the template writes {_shown(text, at)} when the answer is there, "
                f"but {_shown(asked, at)} when it asks for one"
            )
        stop = len(text.rstrip())
        if stop <= len(asked):
            raise BadRow(f"the chat template writes nothing for message {i + 1} (assistant)")
        return text, (len(asked), stop), tags

    def _example(self, conversation: Conversation, text: str, spans: Mapping[int, Span]) -> tuple[Piece, ...]:
        for i, (start, stop) in spans.items():
            message = conversation.messages[i]
            said = message.content.rpartition("</think>")[2].strip()
            if not _occurs(said, text[start:stop]):
                raise BadRow(f"the chat template changes the answer of message {i + 1}: {_shown(said, 0)} is not in it")
            for call in message.tool_calls:
                if not _occurs(call["function"]["name"], text[start:stop]):
                    raise BadRow(f"the chat template does not write tool calls (message {i + 1})")
        return (Piece(text, tuple(spans[i] for i in sorted(spans))),)


def _occurs(said: str, text: str) -> bool:
    """Whether something is written in a text, as it is or inside a JSON string."""
    return said in text or any(json.dumps(said, ensure_ascii=a)[1:-1] in text for a in (False, True))


def _everything_shown(conversation: Conversation, text: str) -> None:
    """A template that leaves a prompt out would train answers to questions never asked."""
    for i, message in enumerate(conversation.messages, 1):
        if message.role != "assistant" and not _occurs(message.content.strip(), text):
            hint = "; it has no place for a system message" if message.role == "system" else ""
            raise BadRow(f"the chat template leaves out message {i} ({message.role}){hint}")
    for tool in conversation.tools:
        if not _occurs(tool["function"]["name"], text):
            raise BadRow("the chat template does not show the tools of the row")


def _first_difference(a: str, b: str) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shown(text: str, at: int) -> str:
    """A few characters from a place on, for a message."""
    return repr(text[at : at + 40]) + ("..." if len(text) > at + 40 else "")


def _trimmed(text: str, spans: Sequence[Span]) -> list[Span]:
    """Spans without white space at their ends, those that touch made one."""
    found: list[Span] = []
    for start, stop in sorted(spans):
        piece = text[start:stop]
        start, stop = start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())
        if start >= stop:
            continue
        if found and not text[found[-1][1] : start].strip():
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _must_agree(text: str, spans: Sequence[Span], tags: Sequence[Span]) -> None:
    """Prefixes and generation tags must mark the same characters, white space at the ends apart."""
    ours, theirs = _trimmed(text, spans), _trimmed(text, tags)
    if ours == theirs:
        return
    marks = [{k for a, b in pairs for k in (a, b)} for pairs in (ours, theirs)]
    at = min(marks[0] ^ marks[1])
    inside = [any(a <= at < b for a, b in pairs) for pairs in (ours, theirs)]
    if inside[0] == inside[1]:  # the difference is where a span ends
        what = "end the answer" if any(b == at for _, b in theirs) else "do not end the answer"
    else:
        what = "leave out" if inside[0] else "mark"
    raise BadRow(
        f"the chat template's generation tags {what} at character {at}, {_shown(text, at)}, but the prompt and the answer "
        f"part differently there. Mend the template and name its file in model.chat_template"
    )


def _tagged_turns(text: str, tags: Sequence[Span], answers: Sequence[int]) -> dict[int, Span]:
    found = [(start, start + len(text[start:stop].rstrip())) for start, stop in tags if text[start:stop].strip()]
    if len(found) != len(answers):
        raise BadRow(f"the chat template marks {len(found)} answers with generation tags, but the conversation has {len(answers)}")
    return dict(zip(answers, found, strict=True))
