"""What `generate` and `chat` are told."""

from __future__ import annotations

from dataclasses import dataclass

from deltune.config.fields import option
from deltune.settings.rules import changed
from deltune.settings.trained import Trained


@dataclass(frozen=True)
class Generation(Trained):
    """How prompts are written and answers drawn."""

    template: str = option("auto", "Frame of a prompt, as data.template.", choices=("auto", "chat", "alpaca", "plain"))
    system: str | None = option(None, "System message.")
    meta_prompt: str = option("", "Text before the whole prompt.")
    prefix: str = option("", "Text right before the user's text.")
    postfix: str = option("", "Text right after the user's text.")
    max_new_tokens: int = option(256, "Longest answer.", gt=0, unit="tokens")
    temperature: float = option(0.0, "0 takes the most probable token each time; above 0 draws.", ge=0)
    top_p: float = option(1.0, "Draw from the smallest set of tokens with this much probability.", gt=0, le=1)
    top_k: int = option(0, "Draw from this many most probable tokens; 0 from all.", ge=0)
    repetition_penalty: float = option(1.0, "Above 1 makes tokens that already appeared less probable (arXiv:1909.05858).", gt=0)
    seed: int = option(42, "Seed of the draws.", ge=0)
    stop: list[str] = option([], "Texts that end an answer; they are not part of it.")

    @property
    def do_sample(self) -> bool:
        return self.temperature > 0

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.do_sample:
            for key in ("top_p", "top_k"):
                if changed(self, key):
                    found.append(f"{key} has no effect while temperature is 0: nothing is drawn")
        return found


@dataclass(frozen=True)
class GenerateSettings(Generation):
    """Answers to one prompt, or to a file of them."""

    prompt: str | None = option(None, "The prompt.")
    file: str | None = option(None, "File of prompts: JSONL with `prompt` (or rows as for training), or text with one prompt a line.")
    out: str | None = option(None, "JSONL file for the answers to `file`; null prints them.")
    batch: int = option(8, "Prompts answered together.", gt=0)

    def problems(self) -> list[str]:
        found = super().problems()
        if (self.prompt is None) == (self.file is None):
            found.append("prompt must be given, or file=prompts.jsonl, and not both")
        if self.file is None and self.out is not None:
            found.append("out has no effect without file: a single prompt's answer is printed")
        if self.file is None and changed(self, "batch"):
            found.append("batch has no effect without file")
        return found


@dataclass(frozen=True)
class ChatSettings(Generation):
    """A conversation at the terminal."""
