"""A scripted conversation: what is asked of the model, what is written where, and what every command does."""

from __future__ import annotations

import io
import json

import pytest
import torch

from deltune.errors import NumericsError
from deltune.models.generation import GenerateOptions, generate, render_prompt
from deltune.serve.chat import Chat, terminal_lines
from tests.test_generate_model import chatty
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def new_chat(model=None, system=None, max_new_tokens=12, **options) -> Chat:
    settings = GenerateOptions(max_new_tokens=max_new_tokens, **options)
    return Chat(model or chatty(), TOKENIZER, lambda m: render_prompt(TOKENIZER, m), settings, system=system, out=io.StringIO(), notes=io.StringIO())


def answer_of(model, messages, number=1, **options) -> str:
    """The answer by batch generation from messages written out."""
    ids = render_prompt(TOKENIZER, messages)
    return generate(model, TOKENIZER, [ids], GenerateOptions(**({"max_new_tokens": 12} | options)), numbers=[number])[0].text


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_transcript_of_a_scripted_session(tmp_path):
    chat = new_chat(system="Be kind.")
    file = tmp_path / "saved.jsonl"
    chat.run(iter(["hello\n", "\n", "and then?\n", f"/save {file}\n", "/reset\n", "/system Be brief.\n", "//slash\n", f"/save {file}\n", "/quit\n", "never read\n"]))
    system = {"role": "system", "content": "Be kind."}
    first = answer_of(chat.model, [system, user("hello")])
    second = answer_of(chat.model, [system, user("hello"), assistant(first), user("and then?")])
    brief = {"role": "system", "content": "Be brief."}
    third = answer_of(chat.model, [brief, user("/slash")])
    assert len({first, second, third}) == 3
    assert chat.out.getvalue() == f"{first}\n{second}\n{third}\n"
    assert chat.notes.getvalue().splitlines() == [
        f"4 messages saved to {file}", "the conversation starts anew", "system message set", f"2 messages saved to {file}",
    ]  # fmt: skip
    saved = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    assert saved == [
        [system, user("hello"), assistant(first), user("and then?"), assistant(second)],
        [brief, user("/slash"), assistant(third)],
    ]


def test_a_drawn_conversation_is_the_same_again_after_reset():
    chat = new_chat(temperature=1.0, seed=1)
    chat.run(iter(["hello", "hello", "/reset", "hello", "hello"]))
    lines = chat.messages
    again = new_chat(temperature=1.0, seed=1)
    again.run(iter(["hello", "hello"]))
    assert lines == again.messages
    assert lines[1] != lines[3]


def test_the_earliest_turns_leave_a_full_window_and_it_is_said():
    model = chatty(max_position_embeddings=150)
    chat = new_chat(model, max_new_tokens=20)
    said = [f"question number {n} xxxxxxxxxx" for n in range(5)]
    chat.run(iter(said))
    assert [m["content"] for m in chat.messages[::2]] == said, "nothing is lost from the record"
    assert chat.first_seen > 0 and chat.messages[chat.first_seen]["role"] == "user"
    seen = chat.messages[chat.first_seen : -1]
    assert chat.messages[-1]["content"] == answer_of(model, seen, number=9, max_new_tokens=20)
    size = len(render_prompt(TOKENIZER, seen))
    assert size + 20 <= 150, "the answer has its room"
    earlier = chat.messages[chat.first_seen - 2 : -1]
    assert len(render_prompt(TOKENIZER, earlier)) + 20 > 150, "no turn left out without need"
    assert "window of 150 tokens is full" in chat.notes.getvalue()


def test_a_message_larger_than_the_window_is_not_sent():
    chat = new_chat(chatty(max_position_embeddings=64))
    chat.run(iter(["hi", "x" * 80, "hi again"]))
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["hi", "hi again"]
    assert "not sent" in chat.notes.getvalue() and "64" in chat.notes.getvalue()


def test_a_message_that_the_template_refuses_is_not_sent():
    tokenizer = tiny_tokenizer(chat_template="{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ messages[-1]['content'] }}")
    chat = new_chat(system="S")
    chat.render = lambda m: render_prompt(tokenizer, m)
    chat.run(iter(["hi", "/system", "hi"]))
    assert "no system role" in chat.notes.getvalue()
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]


class Interrupting(io.StringIO):
    """Ctrl-C arrives while the third piece is written."""

    pieces = 0

    def write(self, text):
        self.pieces += 1
        if self.pieces == 3:
            raise KeyboardInterrupt
        return super().write(text)


def test_an_interrupt_ends_the_answer_and_not_the_chat():
    chat = new_chat(max_new_tokens=200)
    chat.model.generation_config.eos_token_id = None
    whole = answer_of(chat.model, [user("hello")], max_new_tokens=200)
    chat.out = Interrupting()
    chat.run(iter(["hello", "/save /nonexistent/folder/file"]))
    _, answer = chat.messages
    assert whole.startswith(answer["content"]) and 0 < len(answer["content"]) < len(whole)
    assert "stopped" in chat.notes.getvalue()
    assert "not saved: /nonexistent/folder/file" in chat.notes.getvalue()
    chat.run(iter(["go on"]))
    assert len(chat.messages) == 4


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_sent_no_control_characters_and_the_record_keeps_them():
    model = chatty()
    code = TOKENIZER("\x1b")["input_ids"][0]

    def say_it(module, inputs, output):
        output.logits[..., code] = 1e4

    model.register_forward_hook(say_it)
    piped, typed = new_chat(model, max_new_tokens=3), new_chat(model, max_new_tokens=3)
    typed.out = Terminal()
    for chat in (piped, typed):
        chat.run(iter(["hello"]))
        assert chat.messages[1]["content"] == "\x1b" * 3
    assert (piped.out.getvalue(), typed.out.getvalue()) == ("\x1b" * 3 + "\n", "\ufffd" * 3 + "\n")


def test_numbers_that_break_end_the_program():
    model = chatty()
    with torch.no_grad():
        model.lm_head.weight[0] = torch.nan
    with pytest.raises(NumericsError):
        new_chat(model).run(iter(["hello"]))


def test_unknown_commands_name_the_nearest_and_reach_no_model():
    chat = new_chat()
    chat.run(iter(["/rest", "/zzz", "/save", "/help"]))
    notes = chat.notes.getvalue()
    assert "/reset?" in notes and "/help names them" in notes and "nothing to save" in notes
    for name in (*chat.commands, "quit"):
        assert f"/{name}" in notes
    assert chat.messages == [] and chat.out.getvalue() == ""


def test_lines_of_a_terminal_end_with_eof_and_survive_an_interrupt(monkeypatch, capsys):
    events = iter(["first", KeyboardInterrupt, "second", EOFError])

    def typed(prompt):
        event = next(events)
        if isinstance(event, str):
            return event
        raise event

    monkeypatch.setattr("builtins.input", typed)
    assert list(terminal_lines()) == ["first", "second"]
    assert "/quit or Ctrl-D leaves" in capsys.readouterr().out
