"""deltune list [WHAT ...]

What there is to choose from. WHAT narrows it: models, methods, data, formats, tasks, templates, optimizers, schedules, engines,
sinks, groups, presets; `keys` is every setting, as in docs/config.md, and `schema` a JSON Schema of a config for editors.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from deltune import settings
from deltune.config import describe
from deltune.config.compose import CONF, options
from deltune.config.fields import Choice
from deltune.config.suggest import closest
from deltune.errors import ConfigError

Row = tuple[str, str]  # a name, and what it is

INTRO = """\
# Config

Every key of every verb. This page is written by `deltune list keys` from the code; a test holds it to that.

A key is stated by a word of the command line, in a YAML file, or in a preset. Words lie over the file, the file over
the preset, and what nobody states has its default. A value of an upper layer replaces that of a lower one whole.

```yaml
# my.yaml, for `deltune train my.yaml`
model: ./Qwen3-0.6B          # a section given plain text: its main key, here model.path
data:
  train: [chats.jsonl, {path: more.jsonl, weight: 0.5}]
  eval_size: 0.05
adapter: {method: lora, rank: 16}
schedule: linear             # a group option: one of the files in deltune/conf/schedule
optim.lr: 1e-4               # a dotted key
epochs: 2                    # a short key, since only one section has it
train.micro_batch: 4
eval.micro_batch: ${train.micro_batch}   # the value of another key
```

On the command line the same keys are words:

```sh
deltune train my.yaml lr=2e-4 adapter=null 'data.fields={output: reply}'
deltune train my.yaml -m lr=1e-4,2e-4 'seed=range(1,4)'    # a sweep: a run for each combination
```

Words follow [Hydra's override grammar](https://hydra.cc/docs/advanced/override_grammar/basic/): lists are `[a,b]`,
mappings `{a: b}`, `null` is nothing. Text needs no quotes beyond the shell's, except in lists and mappings, where signs
and letters beyond ASCII do.

Choosing another option of a section (`schedule=wsd` over a file with `cosine`) leaves out, with a warning, keys of the
lower layer that the new option does not have. `preset=NAME` lies under everything else. A run's own `config.yaml`
states every key and reruns it. `deltune preview` takes a training config as well. Files hold plain values only: no aliases, no environment, nothing that runs.
"""

VERBS_OF_PAGE = (
    ("deltune train, deltune plan", settings.Run, ()),
    ("deltune eval", settings.EvalSettings, ("model", "data", "engine")),
    ("deltune score", settings.ScoreSettings, ()),
    ("deltune ratings", settings.RatingsSettings, ()),
    ("deltune generate", settings.GenerateSettings, ("model", "engine")),
    ("deltune chat", settings.ChatSettings, ("model", "engine")),
    ("deltune merge", settings.MergeSettings, ("model", "engine")),
    ("deltune convert", settings.ConvertSettings, ("model", "engine")),
    ("deltune preview", settings.PreviewSettings, ("model", "data", "train")),
    ("deltune vocab merge", settings.VocabMergeSettings, ()),
    ("deltune vocab stats", settings.VocabStatsSettings, ()),
    ("deltune init", settings.InitSettings, ()),
)


def main(words: list[str], file: Path | None = None) -> int:
    """Print the topics asked for, or all of them."""
    for word in words:
        if word not in (*TOPICS, *PAGES):
            names = [*TOPICS, *PAGES]
            raise ConfigError(f"list {word}: there are {', '.join(names)}{closest(word, names)}")
    for word in words or TOPICS:
        if word in PAGES:
            print(PAGES[word]())
            continue
        rows = list(TOPICS[word]())
        width = min(max((len(name) for name, _ in rows), default=0), 40)
        print("\n".join([f"{word}:", *(f"  {name:<{width}}  {meaning}".rstrip() for name, meaning in rows)]))
    return 0


# -- topics -----------------------------------------------------------------------------------------------------


def models() -> Iterator[Row]:
    """The bundled model, and those that Hugging Face's cache on this machine holds."""
    yield "bundled", "the tiny model inside the package"
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    for folder in sorted(cache.glob("models--*")):
        configs = sorted(folder.glob("snapshots/*/config.json"))
        if configs:
            yield folder.name.removeprefix("models--").replace("--", "/"), f"in the cache: {_architecture(configs[0])}"
    yield "FOLDER or owner/name", "any Hugging Face causal language model with safetensors"


def _architecture(config: Path) -> str:
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"config.json cannot be read ({error})"
    return ", ".join(found.get("architectures") or [str(found.get("model_type", "unknown type"))])


def formats() -> Iterator[Row]:
    """Row formats with the columns that each needs and may have."""
    from deltune.data.formats import ROLES

    for name, (needed, allowed) in ROLES.items():
        yield name, ", ".join(needed) + (f"; may have {', '.join(allowed)}" if allowed else "")


def data() -> Iterator[Row]:
    """Public data sets by name: where, format, licence, what."""
    from deltune.data.named import NAMED

    for name, entry in NAMED.items():
        place = f"hf:{entry.hub}" if entry.hub else "local files"
        formats = " or ".join(dict.fromkeys(format for format, _ in entry.shapes))
        yield name, f"{place}; {formats}; {entry.licence}; {entry.note}"


def data_table() -> str:
    """The same as a table of docs/data.md."""
    from deltune.data.named import NAMED

    lines = ["| name | on the hub | formats | licence | |", "|---|---|---|---|---|"]
    for name, entry in NAMED.items():
        hub = f"[{entry.hub}](https://huggingface.co/datasets/{entry.hub})" if entry.hub else "–"
        formats = ", ".join(dict.fromkeys(f"`{format}`" for format, _ in entry.shapes))
        lines.append(f"| `{name}` | {hub} | {formats} | {entry.licence} | {entry.note} |")
    return "\n".join(lines)


def table(section: str) -> Callable[[], Iterator[Row]]:
    """The options of a Choice, each with the first line of its dataclass."""

    def rows() -> Iterator[Row]:
        found: Choice = next(field for field in fields(settings.Run) if field.name == section).metadata["table"]
        for name in found.options:
            default = " (default)" if name == found.default else ""
            yield name, _first_line(found.resolve(name)) + default

    return rows


def methods() -> Iterator[Row]:
    """Named adaptation methods; docs/methods.md tells more."""
    from deltune.adapters.config import METHODS

    for name in sorted(METHODS):
        yield name, f"{METHODS[name].formula} ({METHODS[name].paper})"


def tasks() -> Iterator[Row]:
    """Tasks with right answers; docs/evaluation.md tells more."""
    from deltune.evaluation.tasks.catalogue import TASKS

    for name, task in TASKS.items():
        yield name, f"{task.help}; template {task.template}; {', '.join(task.protocols)}"


def templates() -> Iterator[Row]:
    from deltune.evaluation.tasks.templates import TEMPLATES

    for name, template in TEMPLATES.items():
        yield name, template.help


def sinks() -> Iterator[Row]:
    from deltune.training.sinks import SINKS

    for name, cls in SINKS.items():
        yield name, _first_line(cls)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().partition("\n")[0]


def groups() -> Iterator[Row]:
    """Every group option that is more than a name of a table."""
    for field in fields(settings.Run):
        for name in options(field.name):
            yield f"{field.name}={name}", _comment(CONF / field.name / f"{name}.yaml")


def presets() -> Iterator[Row]:
    for name in options("preset"):
        yield f"preset={name}", _comment(CONF / "preset" / f"{name}.yaml")


def _comment(file: Path) -> str:
    """The first comment of a group file, or what it states where it has none."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comments = [line[2:] for line in lines if line.startswith("# ") and not line.startswith("# @")]
    return comments[0] if comments else "; ".join(line for line in lines if line and not line.startswith("#"))


TOPICS: dict[str, Callable[[], Iterable[Row]]] = {
    "models": models,
    "methods": methods,
    "data": data,
    "formats": formats,
    "tasks": tasks,
    "templates": templates,
    "optimizers": table("optim"),
    "schedules": table("schedule"),
    "engines": table("engine"),
    "sinks": sinks,
    "groups": groups,
    "presets": presets,
}


# -- pages ------------------------------------------------------------------------------------------------------


def config_page() -> str:
    """docs/config.md."""
    parts = [INTRO]
    for title, cls, skip in VERBS_OF_PAGE:
        told = f"\n\nSections as for training: {', '.join(f'[{name}](#{name})' for name in skip)}." if skip else ""
        doc = re.sub(r"\s+", " ", cls.__doc__ or "")
        parts.append(f"## {title}\n\n{doc}{told}\n\n{describe.markdown(cls, skip=skip)}\n")
    return "\n".join(parts).rstrip()


def schema_page() -> str:
    """A JSON Schema of a training config."""
    known = {field.name: options(field.name) for field in fields(settings.Run)}
    schema = describe.schema(settings.Run, known)
    schema["properties"]["preset"] = {"enum": options("preset"), "description": "Values under everything else."}
    return json.dumps(schema, indent=2, ensure_ascii=False)


BETWEEN_MARKS = re.compile(r"(<!-- written by make docs -->\n).*?(\n<!-- end -->)", re.S)  # of docs/data.md
PAGES: dict[str, Callable[[], str]] = {"keys": config_page, "schema": schema_page}


if __name__ == "__main__":  # make docs
    if sys.argv[1:] == ["--write-docs"]:
        docs = Path(__file__).resolve().parents[2] / "docs"
        (docs / "config.md").write_text(config_page() + "\n", encoding="utf-8")
        page = (docs / "data.md").read_text(encoding="utf-8")
        (docs / "data.md").write_text(BETWEEN_MARKS.sub(lambda marks: marks[1] + data_table() + marks[2], page), encoding="utf-8")
    else:
        sys.exit(main(sys.argv[1:]))
