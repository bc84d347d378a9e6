"""What `generate` and `chat` are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltune.config.fields import changed, option, section
from deltune.models import decoding
from deltune.models.decoding import DecodingConfig
from deltune.settings.trained import Trained

OUTPUTS = (".jsonl", ".json", ".csv", ".parquet")


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
    min_p: float = option(0.0, "Least probability of a token, as a fraction of the most probable one's (arXiv:2407.01082).", ge=0, le=1)
    repetition_penalty: float = option(1.0, "Above 1 makes tokens that already appeared less probable (arXiv:1909.05858).", gt=0)
    seed: int = option(42, "Seed of the draws.", ge=0)
    stop: list[str] = option([], "Texts that end an answer; they are not part of it.")
    choices: list[str] = option([], "An answer is one of these texts, letter by letter; empty leaves it free.")
    choices_file: str | None = option(None, "File of such texts, one a line.")
    decoding: DecodingConfig = section(DecodingConfig, "Beams, penalties and all else that transformers' GenerationConfig has, by its names.")

    @property
    def do_sample(self) -> bool:
        return self.temperature > 0

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.do_sample:
            keys = [key for key in ("top_p", "top_k", "min_p") if changed(self, key)]
            keys += [f"decoding.{key}" for key in decoding.DRAWING if changed(self.decoding, key)]
            found += [f"{key} has no effect while temperature is 0: nothing is drawn" for key in keys]
        if self.choices and self.choices_file is not None:
            found.append("choices cannot be given together with choices_file")
        return found


@dataclass(frozen=True)
class GenerateSettings(Generation):
    """Answers to one prompt, or to a file of them."""

    prompt: str | None = option(None, "The prompt.")
    file: str | None = option(None, "File of prompts: JSONL with `prompt` (or rows as for training), or text with one prompt a line.")
    out: str | None = option(None, "File for the answers to `file`: .jsonl, .json, .csv or .parquet; null prints them.")
    batch: int = option(8, "Prompts answered together.", gt=0)
    repeat: int = option(1, "Answers to each row, each drawn anew.", gt=0)
    sample: int | None = option(None, "Answer only so many rows, chosen by `seed`; null answers all.", gt=0)
    stratify: str | None = option(None, "With sample: column of whose values each keeps its share of the rows.")
    adapters: dict[str, str] = option({}, "Name to folder of further adapters: a row whose `adapter` names one is answered by it, with null by the base model.")

    def problems(self) -> list[str]:
        found = super().problems()
        if (self.prompt is None) == (self.file is None):
            found.append("prompt must be given, or file=prompts.jsonl, and not both")
        if self.file is None and self.out is not None:
            found.append("out has no effect without file: a single prompt's answer is printed")
        if self.file is None and changed(self, "batch"):
            found.append("batch has no effect without file")
        if self.file is None:
            found += [f"{key} has no effect without file" for key in ("repeat", "sample", "stratify", "adapters") if changed(self, key)]
        if self.repeat > 1 and not self.do_sample:
            found.append("repeat has no effect while temperature is 0: every answer to a row would be the same")
        if self.stratify is not None and self.sample is None:
            found.append("stratify has no effect without sample")
        if self.file is not None and self.out is not None and Path(self.out).suffix not in OUTPUTS:
            found.append(f"out must end in {', '.join(OUTPUTS)}")
        for name in self.adapters:
            if name == "default":
                found.append("adapters: default is the name of the adapter that `adapter` gives; choose another")
        return found


@dataclass(frozen=True)
class ChatSettings(Generation):
    """A conversation at the terminal."""
