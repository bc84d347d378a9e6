"""README.md, the model card of a run: what was trained on what, with what result, and how to use it.

Every fact comes from the run folder, and what is not known is left out rather than guessed (the licence, above all).
Users' text is escaped for the place that it goes to: YAML, Markdown, a table's cell, Python or a shell.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from deltune.training import display, records, storage

FILE = "README.md"
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
SETTINGS = (
    "seed", "adapter.delta", "adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.targets", "optim.name", "optim.lr",
    "optim.weight_decay", "optim.max_grad_norm", "schedule.name", "schedule.warmup", "train.steps", "train.epochs",
    "train.micro_batch", "train.micro_batch_tokens", "train.accumulate", "data.batching", "data.mode", "data.template", "data.max_length", "engine.name", "engine.precision",
)  # fmt: skip


def write_card(folder: Path) -> Path:
    """Write README.md from the other files of the run folder. CheckpointError where one of them is damaged."""
    run = records.read(folder)
    parts = [_front_matter(run), f"# {markdown(run.name)}", _summary(run), _results(run), _usage(run), _data(run)]
    parts += [_settings(run), _provenance(run)]
    path = folder / FILE
    storage.write_text(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def base_model(run: records.Records) -> str:
    """What the training started from, as the user named it; "" where it is not known."""
    return run.description.get("model", {}).get("path") or run.config.get("model", {}).get("path") or ""


def loading_code(run: records.Records) -> list[tuple[str, str]]:
    """(title, code) of the ways to use what the run left in its folder; [] while it has left nothing."""
    folder = run.folder.as_posix() if not run.folder.is_absolute() else run.folder.name
    place = shlex.quote(display.one_line(folder))
    commands = f"deltune chat run={place}\ndeltune generate run={place} prompt='...'\n"
    if (run.folder / "model").is_dir():
        return [("With transformers", _whole_model_code(folder)), ("With Deltune's commands", commands)]
    if not (run.folder / "adapter").is_dir():
        return []
    base = base_model(run)
    if base == "bundled":
        begin = "from deltune.models.folder import BUNDLED as base  # the tiny model inside the deltune package\n"
    else:
        begin = f"base = {base!r}\n"
    adapter = f"{folder}/adapter"
    facts = _adapter(run)
    own_tokenizer = (run.folder / "adapter" / "tokenizer_config.json").is_file()
    begin += f"model = AutoModelForCausalLM.from_pretrained(base)\ntokenizer = AutoTokenizer.from_pretrained({repr(adapter) if own_tokenizer else 'base'})\n"
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    longer = f"model.resize_token_embeddings({facts['rows']}, mean_resizing=False)  # the adapter has the new rows\n" if facts.get("rows") else ""
    ways = [
        ("With PEFT", f"from peft import PeftModel\n{imports}\n{begin}{longer}model = PeftModel.from_pretrained(model, {adapter!r})\n"),
        ("With Deltune", f"import deltune\n{imports}\n{begin}deltune.load_adapter(model, {adapter!r})\n"),
        ("With Deltune's commands", commands + (f"deltune merge run={place} out=merged\n" if facts.get("merges", True) else "")),
    ]
    return ways if facts.get("library", "peft") == "peft" else ways[1:]


def _adapter(run: records.Records) -> dict[str, Any]:
    """What is known of the adapter: `method`, `library` that reads its file, `merges`, and with new tokens the `rows` of its base."""
    known = run.description.get("adapter")
    return known if isinstance(known, dict) else {}


def _whole_model_code(folder: str) -> str:
    place = repr(f"{folder}/model")
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({place})\ntokenizer = AutoTokenizer.from_pretrained({place})\n"
    )


# -- sections ---------------------------------------------------------------------------------------------------


def _front_matter(run: records.Records) -> str:
    import yaml

    method = method_name(run)
    facts: dict[str, Any] = {}
    # hubs refuse a base_model that is no id of theirs, such as a local folder
    if _is_hub_id(base_model(run)):
        facts["base_model"] = base_model(run)
    facts |= {
        "library_name": _adapter(run).get("library", "peft") if method else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["deltune", *([method] if method else []), run.config.get("data", {}).get("mode", "sft")],
    }
    return "---\n" + yaml.safe_dump(facts, sort_keys=False, allow_unicode=True) + "---"


def _is_hub_id(path: str) -> bool:
    return bool(HUB_ID.fullmatch(path)) and path != "bundled" and not Path(path).exists()


def method_name(run: records.Records) -> str:
    """The adaptation method by its name; empty where the model's own weights were trained."""
    return _adapter(run).get("method") or (run.config.get("adapter") or {}).get("delta", "")


def _summary(run: records.Records) -> str:
    base, method = base_model(run), method_name(run)
    what = f"A {code(method)} adapter for" if method else "All weights of"
    text = f"{what} {code(base)}" if base else what.removesuffix(" for").removesuffix(" of")
    trained_on = run.config.get("data", {}).get("train") or []
    names = [source["path"] if isinstance(source, dict) else source for source in trained_on]
    if names:
        text += " trained on " + ", ".join(code(Path(str(name)).name) for name in names)
    version = run.description.get("versions", {}).get("deltune")
    text += f" with Deltune{f' {markdown(version)}' if version else ''}, {run.last_step:,} steps"
    if not run.outcome:
        text += ". The run had not ended when this was written"
    picture = "\n\n![Loss over steps](loss.png)" if (run.folder / "loss.png").exists() else ""
    return f"{text}.{picture}"


def _results(run: records.Records) -> str:
    rows = display.before_after(run.metrics_before, run.metrics_after)
    if not rows:
        return ""
    note = "On the evaluation data, before and after training:\n\n" if len(rows[0]) == 3 else "On the evaluation data:\n\n"
    return "## Results\n\n" + note + table([[markdown(cell) for cell in row] for row in rows])


def _usage(run: records.Records) -> str:
    blocks = [f"{title}:\n\n{fenced(text, '' if 'commands' in title else 'python')}" for title, text in loading_code(run)]
    return "## How to use it\n\n" + "\n\n".join(blocks) if blocks else ""


def _data(run: records.Records) -> str:
    tables = [
        table([[markdown(cell) for cell in rows[0]], *([_cell(cell) for cell in row] for row in rows[1:])])
        for rows in (run.data_table(), run.source_table())
        if rows
    ]
    return "## Data\n\n" + "\n\n".join([*tables, *map(markdown, run.data_notes())]) if tables else ""


def _cell(cell: Any) -> str:
    """Counts as text, anything that a user named as code."""
    return markdown(display.value(cell)) if isinstance(cell, (int, float)) else code(display.value(cell))


def _settings(run: records.Records) -> str:
    found = []
    for key in SETTINGS:
        section, _, name = key.rpartition(".")
        values = run.config.get(section) if section else run.config
        if key == "train.micro_batch" and values and values.get("micro_batch_tokens"):
            continue  # that one counts instead
        if values and values.get(name) is not None:
            # a count of tokens reads better with separators, a setting as it is typed
            found.append((key, str(values[name]) if isinstance(values[name], int) else values[name]))
    if "num_parameters" in run.start:
        found.append(("trainable parameters", run.start["num_trainable"]))
        found.append(("all parameters", run.start["num_parameters"]))
    if not found:
        return ""
    again = "All settings are in `config.yaml`; `deltune train config.yaml` runs it again.\n\n"
    return "## Settings\n\n" + again + _facts(found)


def _provenance(run: records.Records) -> str:
    rest = {name: value for name, value in run.description.items() if name not in ("data", "adapter")}
    facts = display.flat_facts(rest)
    if run.outcome.get("loss_chain"):
        facts.append(("loss chain", run.outcome["loss_chain"]))
    return "## Model and environment\n\n" + _facts(facts) if facts else ""


def _facts(facts: list[tuple[str, Any]]) -> str:
    return table([["", ""], *([markdown(name), code(display.value(value))] for name, value in facts)])


# -- escaping ---------------------------------------------------------------------------------------------------


def markdown(text: object) -> str:
    """Text on one line that Markdown, and HTML in it, take for nothing but text."""
    escaped = re.sub(r"([\\`*_\[\]|#~$!])", r"\\\1", display.one_line(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: object) -> str:
    """An inline code span, fit for a table's cell, whatever backticks the text holds."""
    content = display.one_line(text).replace("|", r"\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", content)), default=0))
    padding = " " if content.startswith("`") or content.endswith("`") else ""
    return f"{ticks}{padding}{content}{padding}{ticks}" if content else ""


def fenced(text: str, language: str) -> str:
    """A code block that its own text cannot end."""
    content = display.plain(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", content)), default=0))
    return f"{fence}{language}\n{content.rstrip()}\n{fence}"


def table(rows: list[list[str]]) -> str:
    """A Markdown table of cells that are Markdown already; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])
