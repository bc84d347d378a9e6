"""Plain values become instances or one message: types, ranges, choices, nested sections, and rules between keys."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from deltune.config.check import build
from deltune.config.fields import Choice, choice, option, section
from deltune.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Part:
    path: str = option(help="Where it is.")
    weight: float = option(1.0, "How much.", gt=0)


@dataclasses.dataclass(frozen=True)
class Round:
    shape: str = option("round", "Shape.", choices=("round",))
    radius: float = option(1.0, "Radius.", gt=0, lt=10)


@dataclasses.dataclass(frozen=True)
class Square:
    shape: str = option("square", "Shape.", choices=("square",))
    side: int = option(2, "Side.", ge=1, le=8)


SHAPES = Choice("shape", {"round": Round, "square": Square}, default="round", optional=True, help="The shape.")


@dataclasses.dataclass(frozen=True)
class Inner:
    count: int = option(3, "A count.", ge=0)
    rate: float = option(0.5, "A rate.")
    flag: bool = option(False, "A flag.")
    mode: str = option("a", "A mode.", choices=("a", "b"))
    maybe: int | None = option(None, "Perhaps.", gt=0)
    names: list[str] = option([], "Names.")
    either: list[str] | str = option("all", "One or several.")
    parts: list[str | Part] = option([], "Parts.")
    factors: dict[str, float] = option({}, "Factors.")

    def problems(self) -> list[str]:
        return ["rate is above count"] if self.rate > self.count else []


@dataclasses.dataclass(frozen=True)
class Root:
    title: str = option("none", "Title.")
    inner: Inner = section(Inner)
    shape: Round | Square | None = choice(SHAPES)


def inner(**values) -> Inner:
    return build(Root, {"inner": values}).inner


def refused(mapping, where="x.yaml") -> str:
    with pytest.raises(ConfigError) as caught:
        build(Root, mapping, where)
    return str(caught.value)


def test_nothing_stated_is_all_defaults():
    assert build(Root, {}) == Root()


def test_an_instance_as_plain_values_builds_itself_again():
    made = build(Root, {"inner": {"parts": ["a", {"path": "b", "weight": 2}], "factors": {"x": 1}}, "shape": {"shape": "square"}})
    assert build(Root, dataclasses.asdict(made)) == made
    assert made.inner.parts == ["a", Part("b", 2.0)]
    assert made.shape == Square()


@pytest.mark.parametrize(
    ("key", "given", "meant"),
    [
        ("count", 8.0, 8), ("count", np.int64(8), 8), ("rate", 1, 1.0), ("rate", "1e-4", 1e-4), ("rate", np.float32(0.5), 0.5),
        ("flag", True, True), ("flag", "yes", True), ("flag", "off", False), ("maybe", None, None), ("maybe", 4, 4),
        ("names", "one", ["one"]), ("names", ("a", "b"), ["a", "b"]), ("either", "one", "one"), ("either", ["a"], ["a"]),
        ("factors", {"a": "2.5"}, {"a": 2.5}), ("parts", Path("a/b"), ["a/b"]), ("parts", {"path": "p"}, [Part("p")]),
    ],
)  # fmt: skip
def test_a_value_becomes_the_one_thing_it_can_mean(key, given, meant):
    found = getattr(inner(**{key: given}), key)
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("count", True, "whole number"), ("count", 1.5, "whole number"), ("count", "8", "whole number"), ("count", None, "whole number"),
        ("count", -1, "at least 0"), ("count", float("nan"), "whole number"), ("count", [1], "whole number"),
        ("rate", "fast", "number"), ("rate", False, "number"), ("rate", float("inf"), "finite"), ("rate", "nan", "finite"),
        ("rate", 10**400, "finite"), ("flag", 1, "true or false"), ("flag", "maybe", "true or false"), ("mode", "c", "one of a, b"),
        ("mode", 3, "text"), ("mode", ["a"], "text"), ("maybe", 0, "above 0"), ("names", {"a": 1}, "list"), ("names", [1], "text"),
        ("either", 4, "text"), ("parts", [{"weight": 2}], "must be given"), ("parts", [["a"]], "text"),
        ("factors", [1], "mapping"), ("factors", {"a": "b"}, "number"), ("mode", "a\0", "NUL"), ("mode", "\ud800", "UTF-8"),
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_refused_with_what_would(key, given, expected):
    message = refused({"inner": {key: given}})
    assert message.startswith(f"inner.{key}")
    assert "(x.yaml)" in message
    assert expected in message


def test_every_problem_is_told_at_once_each_with_its_place():
    origins = {("inner", "count"): "my.yaml:3", ("title",): "command line", ("inner", "parts"): "my.yaml:9"}
    message = refused({"title": 4, "inner": {"count": -1, "parts": [{"path": "a", "wieght": 1}], "naems": 1}}, origins)
    first, *lines = message.splitlines()
    assert first == "4 problems in the config:"
    assert "title=4 (command line)" in message
    assert "inner.count=-1 (my.yaml:3)" in message
    assert "inner.parts[0].wieght=1 (my.yaml:9)" in message and "nearest: weight" in message
    assert any("inner.naems" in line and "inner.names" in line for line in lines)


def test_a_key_of_another_option_says_which_options_have_it():
    message = refused({"shape": {"shape": "round", "side": 3}})
    assert "shape=round has no such key; square has it" in message


def test_the_choice_key_decides_and_null_switches_an_optional_section_off():
    assert build(Root, {"shape": {"radius": 3}}).shape == Round(radius=3.0)
    assert build(Root, {"shape": {"shape": "square", "side": 3}}).shape == Square(side=3)
    assert build(Root, {"shape": None}).shape is None
    assert "did you mean square?" in refused({"shape": {"shape": "sqare"}})
    assert "there are round, square; null for none" in refused({"shape": {"shape": ["round"]}})
    assert "wants keys of its own" in refused({"inner": 3})


def test_ranges_are_open_or_closed_as_stated():
    assert build(Root, {"shape": {"shape": "square", "side": 8}}).shape.side == 8
    assert "at least 1 and at most 8" in refused({"shape": {"shape": "square", "side": 9}})
    assert "above 0 and below 10" in refused({"shape": {"radius": 10}})


def test_rules_between_keys_are_asked_once_all_values_fit():
    assert "inner.rate=4.0 (x.yaml): is above count" in refused({"inner": {"rate": 4}})
    message = refused({"inner": {"rate": 4, "count": -1}})
    assert "is above count" not in message


def test_a_config_cannot_name_python():
    message = refused({"inner": {"_target_": "os.system"}})
    assert "cannot name Python" in message
