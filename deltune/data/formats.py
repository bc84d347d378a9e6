"""From a row to a conversation: what each format calls its parts, and why a row does not fit.

A format has roles (instruction, output, messages ...); a schema says which column plays which role. Nothing is
guessed inside a row: the schema is chosen once per source (see detect.py), and a row that does not fit it is refused
with the keys it has and the keys it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """What one row asks to be trained: turns, or plain text."""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None


# format -> (roles a row must have, roles it may have)
ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("system", "tools")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "prompt_completion": (("prompt", "completion"), ("system",)),
    "input_output": (("input", "output"), ("system",)),
    "text": (("text",), ()),
}

# names of speakers in use -> role
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "developer": "system",
    "function_call": "call",
    "tool_call": "call",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
}

TRAIN_FLAGS = ("loss_weight", "weight", "train")
TEMPLATE_KEYS = ("name", "tool_call_id", "reasoning_content", "thinking")
MEDIA = ("images", "image", "videos", "video", "audios", "audio")


@dataclass(frozen=True)
class Schema:
    """A format with the column that plays each role; optional roles whose column a row lacks are absent."""

    format: str
    columns: Mapping[str, str]

    def describe(self) -> str:
        renamed = [f"{role}={column}" for role, column in self.columns.items() if role != column]
        return self.format + (f" ({', '.join(renamed)})" if renamed else "")

    def needed(self) -> list[str]:
        return [self.columns[role] for role in ROLES[self.format][0]]

    def conversation(self, row: Any) -> Conversation:
        """The conversation of a row; BadRow says why there is none."""
        if not isinstance(row, Mapping):
            raise BadRow(f"the row is {_kind(row)}, not an object with the keys {', '.join(self.needed())}")
        for name in MEDIA:
            if row.get(name):
                raise BadRow(f"the row has {name}; only text is read")
        values = {role: row[column] for role, column in self.columns.items() if row.get(column) is not None}
        missing = [self.columns[role] for role in ROLES[self.format][0] if role not in values]
        if missing:
            empty = " (or it is null)" if any(m in row for m in missing) else ""
            raise BadRow(
                f"no key {', '.join(map(repr, missing))}{empty}; keys found: {keys_of(row)}; "
                f"{self.format} needs: {', '.join(self.needed())}"
            )
        return _PARSERS[self.format](values, self.columns)


def keys_of(row: Any) -> str:
    """The keys of a row for a message, cut short."""
    names = [printable(str(k)[:40]) for k in row][:12]
    return ", ".join(names) + (" ..." if len(row) > 12 else "") if names else "none"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {str: "text", bool: "true/false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _text(value: Any, role: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{role} must be text, but is {_kind(value)}")
    return value


def _answer(value: Any, role: str) -> str:
    if not _text(value, role).strip():
        raise BadRow(f"{role} is empty, so there is nothing to learn")
    return value


# ---- formats of one prompt and one answer; `values` are by role, `names` are the columns, for messages

Values = Mapping[str, Any]
Names = Mapping[str, str]


def _leading_system(values: Values, names: Names) -> list[Message]:
    text = _text(values.get("system", ""), names["system"])
    return [Message("system", text)] if text.strip() else []


def _alpaca(values: Values, names: Names) -> Conversation:
    messages = _leading_system(values, names)
    for pair in _parsed_list(values.get("history") or [], names["history"]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"{names['history']} must be a list of [prompt, answer] pairs")
        messages.append(Message("user", _text(pair[0], "a prompt in history")))
        messages.append(Message("assistant", _answer(pair[1], "an answer in history"), train=True))
    instruction, second = _text(values["instruction"], names["instruction"]), _text(values.get("input", ""), names["input"])
    if not instruction.strip() and not second.strip():
        raise BadRow(f"{names['instruction']} and {names['input']} are both empty")
    messages.append(Message("user", instruction, input=second if second.strip() else ""))
    messages.append(Message("assistant", _answer(values["output"], names["output"]), train=True))
    return Conversation(tuple(messages))


def _pair(prompt: str, answer: str) -> Callable[[Values, Names], Conversation]:
    """A prompt, which may be empty (the answer is then learnt on its own), and its answer."""

    def parse(values: Values, names: Names) -> Conversation:
        turns = [
            Message("user", _text(values[prompt], names[prompt])),
            Message("assistant", _answer(values[answer], names[answer]), train=True),
        ]
        return Conversation((*_leading_system(values, names), *turns))

    return parse


def _plain_text(values: Values, names: Names) -> Conversation:
    return Conversation(text=_answer(values["text"], names["text"]))


# ---- conversations


def _parsed_list(value: Any, role: str) -> list[Any]:
    """A list, or the JSON text of one, as tables hold it."""
    if isinstance(value, str):
        value, fault = parse_line(value)
        if fault:
            raise BadRow(f"{role} is text that is {fault}")
    if not isinstance(value, list):
        raise BadRow(f"{role} must be a list, but is {_kind(value)}")
    return value


def _tools(values: Values) -> tuple[dict[str, Any], ...]:
    """Tool descriptions in the shape that chat templates expect: {type: function, function: {name, ...}}."""
    value = values.get("tools")
    if value is None or value == "":
        return ()
    found = []
    for tool in _parsed_list(value, "tools"):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise BadRow("every tool must be an object with a name")
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(found)


def _call(value: Any) -> dict[str, Any]:
    """A tool call in the shape that chat templates expect, its arguments as an object."""
    inner = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or "arguments" not in inner:
        raise BadRow("a tool call must be an object with name and arguments")
    arguments = inner["arguments"]
    if isinstance(arguments, str):
        arguments, fault = parse_line(arguments)
        if fault:
            raise BadRow(f"the arguments of the call of {inner['name']} are {fault}")
    if not isinstance(arguments, dict):
        raise BadRow(f"the arguments of the call of {inner['name']} are {_kind(arguments)}, not an object")
    call: dict[str, Any] = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
    return call | ({"id": value["id"]} if isinstance(value.get("id"), str) else {})


def _flag(turn: Mapping[str, Any], place: str) -> bool | None:
    """Whether a message asks to be trained; None where it does not say."""
    for name in TRAIN_FLAGS:
        if turn.get(name) is not None:
            value = turn[name]
            if isinstance(value, str | list | dict) or value not in (0, 1):
                raise BadRow(f"{place}: {name} is {value!r:.40}; only 0 and 1 can be meant")
            return bool(value)
    return None


def _content(value: Any, place: str) -> str:
    """Text, or the text of a list of parts."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise BadRow(f"{place}: the content must be text or a list of parts, but is {_kind(value)}")
    pieces = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            found = part.get("type") if isinstance(part, dict) else _kind(part)
            raise BadRow(f"{place}: a part of type {found!r:.40}; only text is read")
        pieces.append(_text(part.get("text", part.get("value")), f"{place}: the text of a part"))
    return "".join(pieces)


def _turn(turn: Any, number: int, keys: tuple[str, str]) -> Message:
    place = f"message {number}"
    if not isinstance(turn, dict):
        raise BadRow(f"{place} is {_kind(turn)}, not an object with {keys[0]} and {keys[1]}")
    speaker = turn.get(keys[0])
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        found = f"{keys[0]} {speaker!r:.40}" if keys[0] in turn else f"no {keys[0]} (keys found: {keys_of(turn)})"
        raise BadRow(f"{place} has {found}; known are {', '.join(SPEAKERS)}")
    role, content = SPEAKERS[speaker], _content(turn.get(keys[1]), place)
    place = f"message {number} ({speaker})"
    calls: list[Any] = []
    if role == "call":
        value, fault = parse_line(content)
        if fault:
            raise BadRow(f"{place}: the call is {fault}")
        role, content, calls = "assistant", "", value if isinstance(value, list) else [value]
    elif turn.get("tool_calls") or turn.get("function_call"):
        calls = turn["tool_calls"] if turn.get("tool_calls") else [turn["function_call"]]
        if not isinstance(calls, list):
            raise BadRow(f"{place}: tool_calls must be a list, but is {_kind(calls)}")
        if role != "assistant":
            raise BadRow(f"{place}: only the assistant calls tools")
    if not content.strip() and not calls:
        raise BadRow(f"{place} is empty")
    wanted = _flag(turn, place)
    if wanted and role != "assistant":
        raise BadRow(f"{place} asks to be trained; only the assistant's messages are (or all, with data.train_on_source)")
    extra = {k: turn[k] for k in TEMPLATE_KEYS if turn.get(k) is not None}
    return Message(role, content, role == "assistant" and wanted is not False, tool_calls=[_call(c) for c in calls], extra=extra)


def _dialogue(role: str, keys: tuple[str, str]) -> Callable[[Values, Names], Conversation]:
    def parse(values: Values, names: Names) -> Conversation:
        turns = [_turn(t, i, keys) for i, t in enumerate(_parsed_list(values[role], names[role]), 1)]
        for i, turn in enumerate(turns):
            if turn.role == "system" and i > 0:
                raise BadRow(f"message {i + 1} is a system message; only the first can be one")
            if turn.role == "tool" and (i == 0 or turns[i - 1].role not in ("assistant", "tool")):
                raise BadRow(f"message {i + 1} is a tool's answer, but no call stands before it")
        leading = _leading_system(values, names)
        if leading and turns and turns[0].role == "system":
            raise BadRow("there is a system column and a system message")
        if not any(t.train for t in turns):
            asked = any(t.role == "assistant" for t in turns)
            raise BadRow("no assistant message is trained" if asked else "there is no assistant message, so there is nothing to learn")
        return Conversation((*leading, *turns), _tools(values))

    return parse


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with data.system before it, if it has none of its own."""
    if not system or conversation.text is not None or conversation.messages[0].role == "system":
        return conversation
    return replace(conversation, messages=(Message("system", system), *conversation.messages))


_PARSERS: dict[str, Callable[[Values, Names], Conversation]] = {
    "messages": _dialogue("messages", ("role", "content")),
    "sharegpt": _dialogue("conversations", ("from", "value")),
    "alpaca": _alpaca,
    "prompt_completion": _pair("prompt", "completion"),
    "input_output": _pair("input", "output"),
    "text": _plain_text,
}
