"""From a row to a conversation: what each format calls its parts, and why a row does not fit.

A format has roles (instruction, output, messages ...); a schema says which column plays which role. Nothing is
guessed inside a row: the schema is chosen once per source (see detect.py), and a row that does not fit it is refused
with the keys it has and the keys it needs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deltune.data import shapes
from deltune.data.conversation import (
    BadRow,
    Conversation,
    Message,
    Names,
    Values,
    answer_of,
    keys_of,
    kind_of,
    list_of,
    must_have_answer,
    text_of,
)
from deltune.data.read import Record, parse_line

# format -> (roles a row must have, roles it may have)
ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("system", "tools")),
    "sharegpt": (("conversations",), ("system", "tools")),
    "alpaca": (("instruction", "output"), ("input", "system", "history")),
    "prompt_completion": (("prompt", "completion"), ("system",)),
    "input_output": (("input", "output"), ("system",)),
    "text": (("text",), ()),
    "dialogue": (("text",), ()),
    "tree": (("prompt",), ()),
    "tree_rows": (("message_tree_id", "message_id", "role", "text"), ("parent_id", "rank", "deleted", "review_result", "messages")),
    "instances": (("instruction", "instances"), ("reformulations",)),
    "task": (("definition", "input", "output"), ()),
    "exam": (("instruction", "question", "answer"), ("context", "analysis")),
    "rounds": (shapes.ROUNDS[:1], shapes.ROUNDS[1:]),
    "titled": (("title", "content"), ()),
}
DOCUMENTS = ("text", "titled")  # formats without a prompt, for data.mode=pretrain
INSTRUCTIONS = ("alpaca", "instances", "task", "exam")  # formats that data.template=auto puts into the Alpaca frame

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

    def conversations(self, row: Any) -> tuple[Conversation, ...]:
        """The conversations of a row, one or more; BadRow says why there is none."""
        if not isinstance(row, Mapping):
            raise BadRow(f"the row is {kind_of(row)}, not an object with the keys {', '.join(self.needed())}")
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
        found = _PARSERS[self.format](values, self.columns)
        return found if isinstance(found, tuple) else (found,)

    def gathered(self, records: Iterable[Record]) -> Iterable[Record]:
        """Records as `conversations` takes them: those of messages joined into their trees, all others as they are."""
        return shapes.gathered(records) if self.format == "tree_rows" else records


# ---- formats of one prompt and one answer; `values` are by role, `names` are the columns, for messages


def _leading_system(values: Values, names: Names) -> list[Message]:
    text = text_of(values.get("system", ""), names["system"])
    return [Message("system", text)] if text.strip() else []


def _alpaca(values: Values, names: Names) -> Conversation:
    messages = _leading_system(values, names)
    for pair in list_of(values.get("history") or [], names["history"]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"{names['history']} must be a list of [prompt, answer] pairs")
        messages.append(Message("user", text_of(pair[0], "a prompt in history")))
        messages.append(Message("assistant", answer_of(pair[1], "an answer in history"), train=True))
    second = text_of(values.get("input", ""), names["input"])
    instruction = _wording(values, names, second)
    if not instruction.strip() and not second.strip():
        raise BadRow(f"{names['instruction']} and {names['input']} are both empty")
    messages.append(Message("user", instruction, input=second if second.strip() else ""))
    messages.append(Message("assistant", answer_of(values["output"], names["output"]), train=True))
    return Conversation(tuple(messages))


def _wording(values: Values, names: Names, second: str) -> str:
    """The instruction; of a list of wordings one, by a hash of the rest of the row."""
    given = values["instruction"]
    if isinstance(given, list) and given:
        given = given[zlib.crc32(f"{second}\0{values['output']}".encode()) % len(given)]
    return text_of(given, names["instruction"])


def _pair(prompt: str, answer: str) -> Callable[[Values, Names], Conversation]:
    """A prompt, which may be empty (the answer is then learnt on its own), and its answer."""

    def parse(values: Values, names: Names) -> Conversation:
        turns = [
            Message("user", text_of(values[prompt], names[prompt])),
            Message("assistant", answer_of(values[answer], names[answer]), train=True),
        ]
        return Conversation((*_leading_system(values, names), *turns))

    return parse


def _plain_text(values: Values, names: Names) -> Conversation:
    return Conversation(text=answer_of(values["text"], names["text"]))


# ---- conversations


def _tools(values: Values) -> tuple[dict[str, Any], ...]:
    """Tool descriptions in the shape that chat templates expect: {type: function, function: {name, ...}}."""
    value = values.get("tools")
    if value is None or value == "":
        return ()
    found = []
    for tool in list_of(value, "tools"):
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
        raise BadRow(f"the arguments of the call of {inner['name']} are {kind_of(arguments)}, not an object")
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
        raise BadRow(f"{place}: the content must be text or a list of parts, but is {kind_of(value)}")
    pieces = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            found = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise BadRow(f"{place}: a part of type {found!r:.40}; only text is read")
        pieces.append(text_of(part.get("text", part.get("value")), f"{place}: the text of a part"))
    return "".join(pieces)


def _turn(turn: Any, number: int, keys: tuple[str, str]) -> Message:
    place = f"message {number}"
    if not isinstance(turn, dict):
        raise BadRow(f"{place} is {kind_of(turn)}, not an object with {keys[0]} and {keys[1]}")
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
            raise BadRow(f"{place}: tool_calls must be a list, but is {kind_of(calls)}")
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
        turns = [_turn(t, i, keys) for i, t in enumerate(list_of(values[role], names[role]), 1)]
        for i, turn in enumerate(turns):
            if turn.role == "system" and i > 0:
                raise BadRow(f"message {i + 1} is a system message; only the first can be one")
            if turn.role == "tool" and (i == 0 or turns[i - 1].role not in ("assistant", "tool")):
                raise BadRow(f"message {i + 1} is a tool's answer, but no call stands before it")
        leading = _leading_system(values, names)
        if leading and turns and turns[0].role == "system":
            raise BadRow("there is a system column and a system message")
        must_have_answer(tuple(turns))
        return Conversation((*leading, *turns), _tools(values))

    return parse


_PARSERS: dict[str, Callable[[Values, Names], Conversation | tuple[Conversation, ...]]] = {
    "messages": _dialogue("messages", ("role", "content")),
    "sharegpt": _dialogue("conversations", ("from", "value")),
    "alpaca": _alpaca,
    "prompt_completion": _pair("prompt", "completion"),
    "input_output": _pair("input", "output"),
    "text": _plain_text,
    "dialogue": shapes.dialogue,
    "tree": shapes.tree,
    "tree_rows": shapes.tree_rows,
    "instances": shapes.instances,
    "task": shapes.task,
    "exam": shapes.exam,
    "rounds": shapes.rounds,
    "titled": shapes.titled,
}
