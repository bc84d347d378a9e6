"""`deltune VERB ...`: finds the verb, hands it its words, and turns faults into one line and an exit code. Light.

A user's fault (DeltuneError) is a message and its exit code, Ctrl-C is 130; a traceback is a fault of ours.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from deltune.errors import ConfigError, DeltuneError, Interrupted

# verb -> (what it does, class of its settings in deltune.settings; None where it takes plain words)
VERBS: dict[str, tuple[str, str | None]] = {
    "train": ("fine-tune or pretrain a model", "Run"),
    "eval": ("loss, perplexity, token accuracy and exact match on data", "EvalSettings"),
    "score": ("scores of answers that are there already, and paired comparisons", "ScoreSettings"),
    "ratings": ("what a judge's reviews of pairs of answers say of the systems", "RatingsSettings"),
    "generate": ("answer one prompt, or a file of them", "GenerateSettings"),
    "chat": ("talk to a model", "ChatSettings"),
    "merge": ("fold an adapter into its base model", "MergeSettings"),
    "convert": ("write an adapter of any method as plain LoRA", "ConvertSettings"),
    "preview": ("the examples, token by token, as the trainer will see them", "PreviewSettings"),
    "plan": ("parameters, steps, memory and time of a run, without loading weights", "Run"),
    "doctor": ("what is installed, and which devices, types and engines work here", None),
    "vocab": ("merge two sentencepiece vocabularies, or count a text's tokens", None),
    "init": ("look at a model and a data file, and write a config that runs", "InitSettings"),
    "list": ("models, methods, formats, optimizers, schedules, presets, keys ...", None),
    "launch": ("start several processes: deltune launch -n 2 train ...", None),
}
SWEEPABLE = ("train", "eval", "generate", "plan", "merge", "convert", "preview")
HELP = ("-h", "--help", "help")
INTERRUPTED = 130
BROKEN_PIPE = 141  # what a shell reports for a program ended by SIGPIPE

USAGE = """\
deltune VERB [FILE.yaml] [group=option ...] [key=value ...]

Verbs:
{verbs}

  deltune train data=chats.jsonl lr=1e-4            words
  deltune train my.yaml adapter.rank=16             a file, and words over it
  deltune train my.yaml -m lr=1e-4,2e-4             a sweep: one run for each value
  deltune VERB --help                               every key of a verb, with default and meaning
  deltune --version"""


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except DeltuneError as error:
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if rank == "0" or not isinstance(error, Interrupted):  # all ranks are interrupted at one step: one says so
            print(f"deltune{f' [rank {rank}]' if world != '1' else ''}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("deltune: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has gone; nothing more can be said to it, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _dispatch(words: list[str]) -> int:
    if not words or (words[0] in HELP and len(words) == 1):
        print(usage())
        return 0 if words else ConfigError.exit_code
    if words[0] in ("--version", "-V"):
        from deltune import __version__

        print(f"deltune {__version__}")
        return 0
    if words[0] in HELP:
        words = [words[1], "--help"]
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        raise ConfigError(_unknown_verb(verb))
    if verb == "launch":
        from deltune.commands.launch import main as launch

        return launch(rest)
    if any(word in HELP[:2] for word in rest):
        print(verb_help(verb, rest))
        return 0
    sweep = [word for word in rest if word in ("-m", "--multirun")]
    words, file = [word for word in rest if word not in sweep], None
    if VERBS[verb][1] is not None:
        from deltune.settings import split_file

        words, file = split_file(words)
    if sweep:
        return _sweep(verb, words, file)
    return _main_of(verb)(words, file)


def usage() -> str:
    width = max(map(len, VERBS))
    return USAGE.format(verbs="\n".join(f"  {verb:<{width}}  {meaning}" for verb, (meaning, _) in VERBS.items()))


def _unknown_verb(word: str) -> str:
    from deltune.config.suggest import nearest

    if Path(word).suffix in (".yaml", ".yml") or "=" in word:
        return f"{word}: a verb comes first: deltune train {word}"
    found = nearest(word, VERBS)
    return f"{word}: no such verb{'; nearest: ' + ', '.join(found) if found else ''}. There are {', '.join(VERBS)}."


def _main_of(verb: str):
    return importlib.import_module(f"deltune.commands.{verb}").main


def _sweep(verb: str, words: list[str], file: Path | None) -> int:
    """One command for each combination of values, all checked before the first starts."""
    from deltune import settings
    from deltune.config.compose import options
    from deltune.config.words import expand_sweep

    if verb not in SWEEPABLE:
        raise ConfigError(f"-m: {verb} cannot be swept; {', '.join(SWEEPABLE)} can")
    combinations = expand_sweep(words, options)
    if len(combinations) == 1:
        raise ConfigError("-m: no word has several values to sweep over, e.g. lr=1e-4,2e-4")
    folders: dict[Path, list[str]] = {}
    for combination in combinations:
        found = settings.load(getattr(settings, VERBS[verb][1] or ""), combination, file)
        if isinstance(found, settings.Run):
            if found.folder in folders:
                raise ConfigError(f"-m: two runs of the sweep would share the folder {found.folder}: leave `name` out, or sweep over it too")
            folders[found.folder] = combination
    varied = [i for i in range(len(words)) if len({combination[i] for combination in combinations}) > 1]
    for number, combination in enumerate(combinations, 1):
        print(f"[{number}/{len(combinations)}] {' '.join(combination[i] for i in varied)}", flush=True)
        code = _main_of(verb)(combination, file)
        if code:
            return code
    return 0


def verb_help(verb: str, words: list[str]) -> str:
    """All keys of a verb; a word like `schedule=wsd` narrows its section to that option."""
    import shutil

    meaning, name = VERBS[verb]
    if name is None:
        return (importlib.import_module(f"deltune.commands.{verb}").__doc__ or "").strip()
    from dataclasses import fields

    from deltune import settings
    from deltune.config.compose import options
    from deltune.config.describe import help_text

    cls = getattr(settings, name)
    tables = {field.name: field.metadata["table"] for field in fields(cls) if "table" in field.metadata}
    pairs = (word.partition("=")[::2] for word in words)
    chosen = {key: value for key, value in pairs if key in tables and value in tables[key].options}
    groups = {field.name: options(field.name) for field in fields(cls)}
    groups |= {name: sorted(table.named) for name, table in tables.items() if table.named}
    width = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    presets = f"Presets: {', '.join(f'preset={option}' for option in options('preset'))}\n" if cls is settings.Run else ""
    return (
        f"deltune {verb} [FILE.yaml] [group=option ...] [key=value ...]\n\n{meaning[0].upper()}{meaning[1:]}. A key may be written "
        f"short where only one section has it: lr=1e-4.\n{presets}\n{help_text(cls, groups, chosen, width)}"
    )


if __name__ == "__main__":
    sys.exit(main())
