"""Rows of published data sets that are neither a pair, nor a list of messages, nor a text: what each says, as conversations.

Each parser takes the row's values by role and the names of the columns, and raises BadRow with the place inside the row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

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
    pair,
    text_of,
)
from deltune.data.read import Record, parse_line

# ---- dialogues written as one text

# a text that begins with the first group's mark of a row is read by its marks: chip2 (OIG), openassistant-guanaco, hh-rlhf
MARKS = (
    re.compile(r"(?:^|\n)<(human|bot)>:"),
    re.compile(r"### ?(Human|Assistant):"),
    re.compile(r"(?:^|\n\n)(Human|Assistant):"),
)
_ROLE_OF_MARK = {"human": "user", "bot": "assistant", "Human": "user", "Assistant": "assistant"}


def marks_of(text: Any) -> re.Pattern[str] | None:
    """The marks of the speakers, by what the text begins with; None if it begins with none."""
    if not isinstance(text, str):
        return None
    start = text.lstrip()
    return next((marks for marks in MARKS if marks.match(start)), None)


def dialogue(values: Values, names: Names) -> Conversation:
    """A text in which marks say who speaks, without white space around what is said."""
    text = text_of(values["text"], names["text"]).strip()
    marks = marks_of(text)
    if marks is None:
        raise BadRow(f"{names['text']} begins with {text[:20]!r}, with no speaker's mark (<human>:, ### Human: or Human:)")
    pieces = marks.split(text)[1:]
    messages = []
    for number, (mark, said) in enumerate(zip(pieces[::2], pieces[1::2], strict=True), 1):
        role = _ROLE_OF_MARK[mark]
        if not said.strip():
            raise BadRow(f"turn {number} ({mark}) is empty")
        messages.append(Message(role, said.strip(), train=role == "assistant"))
    must_have_answer(tuple(messages))
    return Conversation(tuple(messages))


# ---- trees of messages (OpenAssistant)


_TREE_ROLES = (("prompter", "user"), ("assistant", "assistant"))


def tree(values: Values, names: Names) -> Conversation:
    """The conversation along the best replies of a tree: at each message the reply of the lowest rank, those without a
    rank after those with one, then the first; deleted and rejected replies are passed over. A prompt at the end, which
    nobody answered, is left out."""
    messages: list[Message] = []
    node, place = values["prompt"], names["prompt"]
    while node is not None:
        if not isinstance(node, Mapping):
            raise BadRow(f"{place} must be a message with text, role and replies, but is {kind_of(node)}")
        role = next((ours for theirs, ours in _TREE_ROLES if theirs == node.get("role")), None)
        if role is None:
            raise BadRow(f"{place} has role {node.get('role')!r:.40}; known are prompter, assistant")
        messages.append(Message(role, answer_of(node.get("text"), f"{place}.text"), train=role == "assistant"))
        replies = [r for r in list_of(node.get("replies") or [], f"{place}.replies") if _stands(r)]
        node = min(replies, key=_rank, default=None)
        place = f"reply {len(messages)}"
    if messages[-1].role == "user":
        messages.pop()
    must_have_answer(tuple(messages))
    return Conversation(tuple(messages))


def _stands(reply: Any) -> bool:
    return not (isinstance(reply, Mapping) and (reply.get("deleted") or reply.get("review_result") is False))


def _rank(reply: Any) -> tuple[bool, float]:
    rank = reply.get("rank") if isinstance(reply, Mapping) else None
    return (not isinstance(rank, int | float), rank if isinstance(rank, int | float) else 0)


def tree_rows(values: Values, names: Names) -> Conversation:
    """The same of a tree whose messages were rows of their own (see `gathered`)."""
    rows = list_of(values.get("messages"), "messages")
    nodes: dict[str, dict[str, Any]] = {}
    for row in rows:
        missing = [name for name in ("message_id", "text", "role") if not isinstance(row, Mapping) or row.get(name) is None]
        if missing:
            raise BadRow(f"no key {', '.join(map(repr, missing))}; keys found: {keys_of(row)}; a message needs: message_id, parent_id, text, role")
        name = text_of(row["message_id"], "message_id")
        if name in nodes:
            raise BadRow(f"message {name!r:.50} is there twice")
        nodes[name] = {**row, "replies": []}
    root = None
    for node in nodes.values():
        parent = node.get("parent_id")
        if parent is None:
            root = root or node
        elif isinstance(parent, str) and parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            raise BadRow(f"message {node['message_id']!r:.50} answers {parent!r:.50}, which is not among the rows of its tree; the rows of a tree must follow each other")
    if root is None:
        raise BadRow("no message of the tree is without parent_id")
    return tree({"prompt": root}, {"prompt": "the first message"})


def gathered(records: Iterable[Record]) -> Iterable[Record]:
    """Rows of messages joined into one record for each tree: neighbours that share message_tree_id. Its number is that
    of its first row."""
    waiting: list[Record] = []
    for record in records:
        tree_id = _tree_id(record)
        if waiting and (tree_id is None or tree_id != _tree_id(waiting[0])):
            yield _joined(waiting)
            waiting = []
        if tree_id is None:
            yield record
        else:
            waiting.append(record)
    if waiting:
        yield _joined(waiting)


def _tree_id(record: Record) -> Any:
    return record.value.get("message_tree_id") if not record.fault and isinstance(record.value, Mapping) else None


def _joined(records: list[Record]) -> Record:
    return Record(records[0].number, {**records[0].value, "messages": [r.value for r in records]}, "", records[-1].after)


# ---- tasks with several examples


def instances(values: Values, names: Names) -> tuple[Conversation, ...]:
    """An instruction with its instances {input, output}, a conversation each (self-instruct's seed tasks, unnatural
    instructions); `instruction_with_input` is the whole prompt where it is given. Reformulations are further ones."""
    instruction = text_of(values["instruction"], names["instruction"])
    found = []
    for role in ("instances", "reformulations"):
        for number, entry in enumerate(list_of(values.get(role) or [], names[role])):
            place = f"{names[role]}[{number}]"
            if not isinstance(entry, Mapping):
                raise BadRow(f"{place} is {kind_of(entry)}, not an object with input and output")
            answer = answer_of(entry.get("output"), f"{place}.output")
            if entry.get("instruction_with_input") is not None:
                found.append(pair(text_of(entry["instruction_with_input"], f"{place}.instruction_with_input"), answer))
                continue
            wording = text_of(entry.get("instruction", instruction), f"{place}.instruction")
            second = text_of(entry.get("input") or "", f"{place}.input")
            found.append(pair(wording, answer, input=second if second.strip() else ""))
    if not found:
        raise BadRow(f"{names['instances']} holds no instance, so there is nothing to learn")
    return tuple(found)


def task(values: Values, names: Names) -> Conversation:
    """A definition with one instance (super-natural instructions). Of several answers that count as right the first
    is learnt; a definition may be a list of sentences."""
    definition, answers = values["definition"], values["output"]
    if isinstance(definition, list):
        definition = "\n".join(text_of(part, f"a part of {names['definition']}") for part in definition)
    if isinstance(answers, list):
        if not answers:
            raise BadRow(f"{names['output']} is an empty list, so there is nothing to learn")
        answers = answers[0]
    second = text_of(values["input"], names["input"])
    return pair(text_of(definition, names["definition"]), answer_of(answers, names["output"]), input=second)


# ---- COIG


def exam(values: Values, names: Names) -> Conversation:
    """A question of an exam: instruction, context and question; the answer is the analysis, if there is one, and the
    answer in a line of its own."""
    question = text_of(values["question"], names["question"])
    parts = [text_of(values.get("context") or "", names["context"]), question]
    answer = text_of(values["answer"], names["answer"])
    analysis = text_of(values.get("analysis") or "", names["analysis"])
    said = "\n".join(part.strip() for part in (analysis, answer) if part.strip())
    return pair(
        text_of(values["instruction"], names["instruction"]), answer_of(said, names["answer"]),
        input="\n".join(part.strip() for part in parts if part.strip()),
    )  # fmt: skip


ROUNDS = tuple(f"round_{i}" for i in range(10))


def rounds(values: Values, names: Names) -> Conversation:
    """A chat of rounds, each {response: the JSON text of {Q, A}}."""
    messages = []
    for role in ROUNDS:
        if role not in values:
            continue
        place = names[role]
        response = values[role].get("response") if isinstance(values[role], Mapping) else None
        if isinstance(response, str):
            response, fault = parse_line(response)
            if fault:
                raise BadRow(f"{place}.response is text that is {fault}")
        if not isinstance(response, Mapping) or not {"Q", "A"} <= response.keys():
            raise BadRow(f"{place}.response must be an object with Q and A")
        messages.append(Message("user", answer_of(response["Q"], f"{place}.response.Q")))
        messages.append(Message("assistant", answer_of(response["A"], f"{place}.response.A"), train=True))
    return Conversation(tuple(messages))


# ---- documents


def titled(values: Values, names: Names) -> Conversation:
    """A document (WuDao): its title, a space, its content; the title is not repeated where the content begins with it."""
    title = text_of(values["title"], names["title"]).strip()
    content = answer_of(values["content"], names["content"]).strip()
    return Conversation(text=content if content.startswith(title) else f"{title} {content}")
