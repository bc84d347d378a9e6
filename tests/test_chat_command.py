"""`deltune chat` down a pipe: what goes in, what comes out where, as another program sees it."""

from __future__ import annotations

import io

from deltune.commands import chat as command
from deltune.models.generation import GenerateOptions, generate, render_prompt
from tests.test_generate_model import chatty
from tests.tiny import tiny_tokenizer


def test_a_piped_session_writes_answers_only(tmp_path, monkeypatch, capsys):
    model, tokenizer = chatty(), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/system\nand you?\n/quit\nnot read\n"))
    assert command.main([f"model={tmp_path}", "system=Be kind.", "max_new_tokens=9"]) == 0

    def answer(messages) -> str:
        return generate(model, tokenizer, [render_prompt(tokenizer, messages)], GenerateOptions(max_new_tokens=9))[0].text

    system, hello = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}
    first = answer([system, hello])
    # /system without text takes the message away, also the one of the settings
    second = answer([hello, {"role": "assistant", "content": first}, {"role": "user", "content": "and you?"}])
    captured = capsys.readouterr()
    assert captured.out == f"{first}\n{second}\n"
    assert captured.err.strip().endswith("no system message")
