"""deltune chat [run=RUN | model=MODEL adapter=FOLDER] [system=TEXT] [temperature=0.7 ...]

Talk to a model. Answers appear as they are written; /help names the commands. When the input is a pipe each line of it
is a message, answers go to standard output and everything else to standard error.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path


def main(words: list[str], file: Path | None = None) -> int:
    from deltune import log
    from deltune.settings import ChatSettings, load

    settings = load(ChatSettings, words, file)
    log.set_up()
    from deltune.commands.open_model import opened, options_of
    from deltune.commands.prompts import PromptWriter
    from deltune.serve.chat import Chat, terminal_lines

    with opened(settings) as place:
        writer = PromptWriter(
            replace(settings, system=None), place.tokenizer
        )  # the chat says which system message stands
        chat = Chat(place.model, place.tokenizer, writer.messages, options_of(settings), system=settings.system)
        typed = sys.stdin.isatty()
        if typed:
            beside = f" with {settings.adapter}" if settings.adapter else ""
            chat.note(
                f"{settings.model.path}{beside} on {place.engine.device}; /help names the commands, Ctrl-D leaves"
            )
        with place.engine.autocast():
            chat.run(terminal_lines() if typed else iter(sys.stdin))
    return 0
