"""What `vocab merge` and `vocab stats` are told."""

from __future__ import annotations

from dataclasses import dataclass

from deltune.config.fields import option


@dataclass(frozen=True, kw_only=True)
class VocabMergeSettings:
    """Two sentencepiece vocabularies in one: the base's pieces as they are, then those that it lacks."""

    base: str = option(help="Sentencepiece model, or a folder with a tokenizer.model: the vocabulary that a model has.")
    other: str = option(help="The same: where more pieces come from.")
    out: str = option(help="Folder for the merged vocabulary; must not exist or be empty.")
    scripts: list[str] = option([], "Take only pieces whose letters are all of these scripts, by their names in Unicode: han, hiragana, cyrillic ...")
    scores: str = option("kept", "Scores of added pieces. kept: the other's; above: a BPE base joins them before all its own, as with Chinese-LLaMA; below: after them.", choices=("kept", "above", "below"))


@dataclass(frozen=True, kw_only=True)
class VocabStatsSettings:
    """How many tokens a text takes by one tokenizer, or by two."""

    tokenizer: str = option(help="Model folder, hub id, `bundled`, or a sentencepiece model.")
    against: str | None = option(None, "Another one to compare with, such as the one before a merge.")
    file: str = option(help="Text file, UTF-8.")
