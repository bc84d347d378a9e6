"""Help, docs and schema say what the dataclasses say, and the docs on disk are the ones that the code writes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from deltune.commands.list import config_page, schema_page
from deltune.config import describe
from deltune.config.fields import walk
from deltune.config.words import expand_sweep
from deltune.settings import (
    ChatSettings,
    ConvertSettings,
    EvalSettings,
    GenerateSettings,
    InitSettings,
    MergeSettings,
    PreviewSettings,
    Run,
    load_run,
)
from tests.conftest import ROOT

VERBS = (Run, EvalSettings, GenerateSettings, ChatSettings, MergeSettings, ConvertSettings, PreviewSettings, InitSettings)


def test_docs_config_is_what_the_code_writes():
    """If this fails: `make docs`, then look at the difference."""
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == config_page() + "\n"


@pytest.mark.parametrize("cls", VERBS)
def test_the_page_and_the_help_tell_of_every_key(cls):
    page = config_page()
    light = describe.help_text(cls, {}, {}, 100)
    for key in walk(cls):
        assert f"| `{key.dotted}` |" in page
    for key in walk(cls, load=False):
        assert re.search(rf"^  {re.escape(key.dotted)}( =|$)", light, re.MULTILINE), key.dotted


def test_help_shows_default_values_and_limits_and_narrows_to_an_option():
    text = describe.help_text(Run, {"schedule": ["linear"]}, {"schedule": "wsd"}, 100)
    assert "  optim.lr = 0.0002\n" in text and "[a number above 0]" in text
    assert "schedule.decay" in text and "schedule.power" not in text
    wide = describe.help_text(Run, {}, {}, 100)
    assert "schedule.power" in wide and "Only polynomial." in wide
    assert "  schedule.floor = 0.1\n" in wide and "  schedule.floor = 0.0\n" in wide  # options differ in their default


def test_help_of_a_verb_narrowed_to_a_method_shows_its_own_keys():
    assert "adapter.rank" in describe.help_text(Run, {}, {"adapter": "lora"}, 100)
    assert "adapter.rank" not in describe.help_text(Run, {}, {}, 100)


def test_the_configs_on_the_page_compose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```yaml\n(.*?)```", config_page(), re.DOTALL)
    assert blocks
    for block in blocks:
        file = Path("my.yaml")
        file.write_text(block, encoding="utf-8")
        run = load_run([], file)
        assert run.eval.micro_batch == run.train.micro_batch == 4
        assert run.train.epochs == 2 and run.optim.lr == 1e-4 and run.adapter.rank == 16


    commands = [shlex.split(line, comments=True)[2:] for line in re.findall(r"^deltune train .*$", config_page(), re.MULTILINE)]
    assert [len(expand_sweep([word for word in words if "=" in word])) for words in commands] == [1, 6]
    for words in commands:
        for combination in expand_sweep([word for word in words if "=" in word]):
            assert load_run(combination, Path("my.yaml")).train.epochs == 2


def conforms(schema: dict, value) -> bool:
    """The part of JSON Schema that ours uses: an independent reading of it."""
    if "anyOf" in schema and not any(conforms(one, value) for one in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    kind = schema.get("type")
    kinds = {"string": str, "boolean": bool, "null": type(None), "array": list, "object": dict, "integer": int, "number": (int, float)}
    if kind and (not isinstance(value, kinds[kind]) or (kind in ("integer", "number") and isinstance(value, bool))):
        return False
    bounds = {"minimum": lambda v, m: v >= m, "exclusiveMinimum": lambda v, m: v > m, "maximum": lambda v, m: v <= m, "exclusiveMaximum": lambda v, m: v < m}
    if any(name in schema and not holds(value, schema[name]) for name, holds in bounds.items()):
        return False
    if kind == "array":
        return all(conforms(schema["items"], item) for item in value)
    if kind == "object":
        known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
        if any(name not in value for name in schema.get("required", [])):
            return False
        return all(conforms(known[k], v) if k in known else (rest is not False and (rest is True or conforms(rest, v))) for k, v in value.items())
    return True


def test_the_schema_takes_real_configs_and_refuses_broken_ones():
    import json

    schema = json.loads(schema_page())
    for words in ([], ["preset=demo"], ["adapter=null", "schedule=wsd", "optim=sgd", "engine=ddp"], ["data.train=[a,{path: b}]"]):
        assert conforms(schema, load_run(words).to_dict())
    short = {"preset": "demo", "model": "./folder", "data": ["a.jsonl", {"path": "b.jsonl"}], "schedule": "linear", "adapter": None, "eval": "exact_match"}
    assert conforms(schema, short)
    for change in ({"seed": -1}, {"sede": 1}, {"schedule": "linaer"}, {"schedule": {"name": "constant", "floor": 1}}, {"optim": {"lr": 0}}, {"train": {"steps": 1.5}}, {"data": {"train": [{"weight": 1}]}}, {"log": {"sinks": "x", "every": True}}):
        assert not conforms(schema, short | change), change
