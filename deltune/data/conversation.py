"""Turns of a conversation, and the checks that every format makes of a row's values: what is wrong is said in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deltune.data.read import parse_line, printable
from deltune.errors import DataError


class BadRow(DataError):
    """A row that cannot be used; the message is the reason in one line, without the place."""

    def __init__(self, reason: str):
        super().__init__(printable(reason))


@dataclass(frozen=True)
class Message:
    """One turn. `input` is the second part of an Alpaca prompt, which the Alpaca frame sets apart."""

    role: str  # system, user, assistant, tool
    content: str
    train: bool = False
    input: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)  # keys that only a chat template understands


@dataclass(frozen=True)
class Conversation:
    """What is asked to be trained: turns, or plain text. A row gives one or several."""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None


Values = Mapping[str, Any]  # of a row, by role
Names = Mapping[str, str]  # of the columns, by role, for messages


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with data.system before it, if it has none of its own."""
    if not system or conversation.text is not None or conversation.messages[0].role == "system":
        return conversation
    return replace(conversation, messages=(Message("system", system), *conversation.messages))


def by_turns(conversation: Conversation, turns: str) -> list[Conversation]:
    """The conversation as data.turns asks. all: as it is. each: one for each trained answer, which alone is trained,
    with all that stands before it. last: only the last of these."""
    if turns == "all" or conversation.text is not None:
        return [conversation]
    places = [i for i, message in enumerate(conversation.messages) if message.train]
    found = []
    for place in places if turns == "each" else places[-1:]:
        before = (replace(message, train=False) for message in conversation.messages[:place])
        found.append(replace(conversation, messages=(*before, conversation.messages[place])))
    return found


def pair(prompt: str, answer: str, *, input: str = "", system: str = "") -> Conversation:
    """A prompt and its answer, which is trained."""
    first = (Message("system", system),) if system.strip() else ()
    return Conversation((*first, Message("user", prompt, input=input), Message("assistant", answer, train=True)))


# ---- checks


def keys_of(row: Any) -> str:
    """The keys of a row for a message, cut short."""
    names = [printable(str(k)[:40]) for k in row][:12]
    return ", ".join(names) + (" ..." if len(row) > 12 else "") if names else "none"


def kind_of(value: Any) -> str:
    """What a JSON value is, for a message."""
    if value is None:
        return "null"
    names = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def text_of(value: Any, role: str) -> str:
    """Text, or BadRow."""
    if not isinstance(value, str):
        raise BadRow(f"{role} must be text, but is {kind_of(value)}")
    return value


def answer_of(value: Any, role: str) -> str:
    """Text that is not blank, or BadRow."""
    if not text_of(value, role).strip():
        raise BadRow(f"{role} is empty, so there is nothing to learn")
    return value


def list_of(value: Any, role: str) -> list[Any]:
    """A list, or the JSON text of one, as tables hold it; or BadRow."""
    if isinstance(value, str):
        value, fault = parse_line(value)
        if fault:
            raise BadRow(f"{role} is text that is {fault}")
    if not isinstance(value, list):
        raise BadRow(f"{role} must be a list, but is {kind_of(value)}")
    return value


def must_have_answer(messages: tuple[Message, ...]) -> None:
    """BadRow where no turn is trained."""
    if not any(message.train for message in messages):
        asked = any(message.role == "assistant" for message in messages)
        raise BadRow("no assistant message is trained" if asked else "there is no assistant message, so there is nothing to learn")
