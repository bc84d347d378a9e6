"""docs/evaluation-tasks.md says what the catalogue, the templates and the extractor do, and its examples run."""

from __future__ import annotations

import dataclasses
import re

import pytest

from deltune.evaluation.tasks.catalogue import TASKS
from deltune.evaluation.tasks.extract import extract
from deltune.evaluation.tasks.item import Item
from deltune.evaluation.tasks.templates import TEMPLATES, Template, prompt, template_named
from tests.conftest import ROOT

PATH = ROOT / "docs" / "evaluation-tasks.md"


def page() -> str:
    return PATH.read_text("utf-8")


def table(*rows: tuple[str, ...]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def task_table() -> str:
    rows = [
        (f"`{t.name}`", t.help, f"`{t.template}`", ", ".join(t.protocols), t.mean, ", ".join(f"`{f}`" for f in t.files), f"`{t.train}`")
        for t in TASKS.values()
    ]
    return table(("task", "what", "template", "protocols", "mean", "asked, of a folder", "exemplars"), *rows)


def template_table() -> str:
    return table(("template", "what"), *((f"`{name}`", template.help) for name, template in TEMPLATES.items()))


def field_table() -> str:
    rows = []
    for field in dataclasses.fields(Template):
        default = getattr(Template(), field.name)
        shown = "A to Z" if field.name == "labels" else repr(default) if default != "" else "empty"
        rows.append((f"`{field.name}`", f"`{shown}`" if shown not in ("empty", "A to Z") else shown, field.metadata["help"]))
    return table(("part", "default", "what"), *rows)


@pytest.mark.parametrize("wanted", [task_table, template_table, field_table])
def test_the_tables_are_the_code(wanted):
    assert wanted() in page(), f"docs/evaluation-tasks.md lacks this table:\n\n{wanted()}"


def test_the_template_on_the_page_makes_the_prompt_on_the_page(tmp_path):
    file, shown = re.search(r"```yaml\n(.*?)```.*?```text\n(.*?)```", page(), re.S).groups()
    (tmp_path / "own.yaml").write_text(file, "utf-8")
    item = Item("f:1", "", "Rain fell all night.", "Why is the road wet?", ("It rained.", "It was washed."), 0)
    assert prompt(item, template_named(str(tmp_path / "own.yaml")), [], "letters") == shown.removesuffix("\n")


def test_the_page_tells_what_is_found_in_a_text():
    item = Item("f:1", "", "", "Which?", ("a cat", "a black cat", "snow", "7"), 0)
    rows = re.findall(r"^\| `(.*?)` \| (\w+|none) \|$", page().partition("## Answers in generated text")[2], re.M)
    assert len(rows) >= 8
    for text, found in rows:
        place = extract(text, item, TEMPLATES["plain"])
        assert ("none" if place is None else "ABCD"[place]) == found, text
