"""The `data` section: where rows come from, how they become messages, and how messages become tokens. Light to import."""

from __future__ import annotations

from dataclasses import dataclass

from deltune.config.fields import option
from deltune.data.named import NAMED

FORMATS = (
    "auto", "alpaca", "prompt_completion", "input_output", "sharegpt", "messages", "text", "dialogue", "tree", "tree_rows",
    "instances", "task", "exam", "rounds", "titled", *(name for name in NAMED if name not in ("alpaca",)),
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One file, folder or hub data set, and how its rows are read."""

    path: str = option(help="File, folder, glob, `bundled`, name of a public data set, or hub id as `hf:owner/name`.")
    weight: float = option(1.0, "How often each row is seen per epoch; 0.5 sees a different half each epoch.", gt=0)
    format: str | None = option(None, "Row format, or the name of a public data set for rows of its shape; null takes data.format.", choices=FORMATS)
    fields: dict[str, str] = option({}, "Role of a field to the column that holds it, e.g. {output: reply}; adds to data.fields.")
    split: str = option("train", "Split of a hub data set.")
    subset: str | None = option(None, "Configuration of a hub data set, where it has several.")
    files: str | None = option(None, "File or pattern inside a hub data set, instead of all that it declares.")
    revision: str | None = option(None, "Branch, tag or commit of a hub data set.")


@dataclass(frozen=True)
class DataConfig:
    """Training and evaluation data."""

    train: list[str | Source] = option(["bundled"], "Files, folders, globs, names of public data sets or hub ids (`hf:owner/name`); each a path or a mapping with weight, format, fields.")
    eval: list[str | Source] = option([], "The same, for evaluation; empty evaluates on a part of the training rows if eval_size asks for it.")
    eval_size: float = option(0.0, "Without data.eval: rows held out of the training data; below 1 a fraction, else a count.", ge=0)
    mode: str = option("sft", "sft trains the answers, pretrain every token.", choices=("sft", "pretrain"))
    format: str = option("auto", "Format of the rows, or the name of a public data set for rows of its shape; auto looks at the first rows.", choices=FORMATS)
    fields: dict[str, str] = option({}, "Role of a field to the column that holds it, e.g. {output: reply}.")
    template: str = option("auto", "chat: the tokenizer's chat template; alpaca: the Alpaca text frame; plain: prompt and answer joined; auto: chat if the tokenizer has one, else alpaca for instruction rows, else plain.", choices=("auto", "chat", "alpaca", "plain"))
    system: str | None = option(None, "System message put before conversations that have none.")
    meta_prompt: str = option("", "Text before the whole prompt.")
    prefix: str = option("", "Text right before the user's text.")
    postfix: str = option("", "Text right after the user's text.")
    max_length: int = option(1024, "Longest example.", gt=1, unit="tokens")
    max_source_length: int | None = option(None, "Longest prompt; a longer one loses its beginning.", gt=0, unit="tokens")
    max_target_length: int | None = option(None, "Longest answer; a longer one loses its end and keeps its EOS.", gt=0, unit="tokens")
    overlong: str = option("truncate", "What to do with an example over a limit.", choices=("truncate", "skip", "error"))
    turns: str = option("all", "Of a conversation's answers. all: one example with all of them; each: an example for each, trained alone with what stands before it; last: only the last.", choices=("all", "each", "last"))
    train_on_source: bool = option(False, "Train the prompt's tokens too.")
    read_nums: int | None = option(None, "Use only this many training rows.", gt=0)
    eval_read_nums: int | None = option(None, "Use only this many evaluation rows.", gt=0)
    on_bad: str = option("stop", "A row that cannot be used: stop with the first five, or skip and write rejects.jsonl.", choices=("stop", "skip"))
    weights: str = option("passes", "What the weights of sources say. passes: how often each row is seen per epoch; shares: which part of the examples a source gives, whatever its size.", choices=("passes", "shares"))
    mix_by: str | None = option(None, "Column that names a row's task, e.g. task; the tasks of a source are then mixed by mix_cap and mix_temperature. null: every source is a task.")
    mix_cap: int | None = option(None, "Most rows of a task that count in an epoch (examples-proportional mixing with a maximum); a larger task shows others each epoch.", gt=0)
    mix_temperature: float = option(1.0, "Tasks are visited in proportion to their rows (at most mix_cap) to the power of 1 / this; above 1 small ones gain.", ge=1)
    shuffle: bool = option(True, "Visit rows in seeded random order, another one each epoch.")
    batching: str = option("auto", "How examples share a forward pass. packed: joined into one row without padding, attention within each; grouped: padded, with others of like length; padded: padded to the longest; auto: packed where the model keeps documents apart, else padded.", choices=("auto", "packed", "grouped", "padded"))
    streaming: bool = option(False, "Read and tokenise rows as training goes, without a pass over all data first.")
    stream_block: int = option(1024, "With streaming: rows shuffled together.", gt=0)
    cache: str | None = option("auto", "Folder for tokenised data; auto is ~/.cache/deltune/tokens, null keeps it in memory.")
    seed: int = option(42, "Seed of the order and of the held-out rows.", ge=0)
