"""A setting that nothing reads is a lie to the user: every field of every section is read somewhere in the package.

The package's syntax trees are searched for reads of each field on something known to be of its class: a parameter or
attribute with that annotation, a lambda's argument where the file knows the class, what a function with that return annotation gives, or a section of such a thing
(`run.eval.every`). What a dataclass says of itself, and the rules that only complain, do not count.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import deltune
from deltune import settings
from deltune.adapters.config import AdapterConfig
from deltune.config.fields import Key, walk
from deltune.data.config import Source

PACKAGE = Path(deltune.__file__).parent
ROOTS = tuple(vars(settings)[name] for name in sorted(vars(settings)) if name == "Run" or name.endswith("Settings"))
COMPLAINTS = re.compile(r"problems|\w*_rules?|_changed")

# fields that are read by name from plain values, before there is an instance
BY_NAME = {("EvalSettings", "run"), ("GenerateSettings", "run"), ("ChatSettings", "run"), ("MergeSettings", "run"), ("ConvertSettings", "run")}
BY_NAME |= {("OftConfig", "sign")}  # has one value, and is there to be recorded in files


def all_keys() -> list[Key]:
    keys = [key for root in ROOTS for key in walk(root)]
    keys += [Key(("data", "train", field.name), None, field, Source) for field in dataclasses.fields(Source)]
    return keys


def known_classes() -> dict[str, type]:
    """Section classes by name, with the bases that annotations may name."""
    found = {base.__name__: base for key in all_keys() for base in key.section.__mro__ if dataclasses.is_dataclass(base)}
    return found | {root.__name__: root for root in ROOTS}


CLASSES = known_classes()
ADAPTERS = {name for name, cls in CLASSES.items() if issubclass(cls, AdapterConfig)}


def sections_of(cls: type) -> dict[str, set[str]]:
    """Fields of a class that hold sections, with the classes that may be in them."""
    found: dict[str, set[str]] = {}
    for field in dataclasses.fields(cls):
        if "section" in field.metadata:
            found[field.name] = {field.metadata["section"].__name__}
        elif "table" in field.metadata:
            table = field.metadata["table"]
            found[field.name] = {table.resolve(name).__name__ for name in table.options}
    return found


SECTIONS = {name: sections_of(cls) for name, cls in CLASSES.items()}


def named(annotation: ast.AST | None) -> set[str]:
    return set(re.findall(r"\w+", ast.unparse(annotation))) & set(CLASSES) if annotation is not None else set()


class Module:
    """What is known of the types of names in one file; a name has all types that it has anywhere in the file."""

    def __init__(self, tree: ast.Module, returns: dict[str, set[str]], attributes: dict[str, set[str]]):
        self.tree, self.returns = tree, returns
        self.types: dict[str, set[str]] = defaultdict(set)
        self.types.update({"." + name: set(types) for name, types in attributes.items()})
        self.imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names} & set(CLASSES)
        for _ in range(3):  # an assignment may come before what it builds on
            for node in ast.walk(tree):
                self.learn(node)

    def learn(self, node: ast.AST) -> None:
        if isinstance(node, ast.arg):
            self.types[node.arg] |= named(node.annotation)
        elif isinstance(node, ast.Lambda):  # has no annotations: it may be given whatever section the file knows
            for arg in node.args.args:
                self.types[arg.arg] |= self.imported
        elif isinstance(node, ast.AnnAssign):
            self.bind(node.target, named(node.annotation))
        elif isinstance(node, (ast.Assign, ast.NamedExpr)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for one, value in zip(target.elts, node.value.elts, strict=False):
                        self.bind(one, self.type_of(value))
                else:
                    self.bind(target, self.type_of(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            self.bind(node.args[0], named(node.args[1]))

    def bind(self, target: ast.AST, types: set[str]) -> None:
        if isinstance(target, ast.Name):
            self.types[target.id] |= types
        elif isinstance(target, ast.Attribute):
            self.types["." + target.attr] |= types

    def type_of(self, node: ast.AST) -> set[str]:
        if isinstance(node, ast.Name):
            return self.types.get(node.id, set())
        if isinstance(node, ast.Attribute):
            inner = set().union(*(SECTIONS[cls].get(node.attr, set()) for cls in self.type_of(node.value)))
            return inner | self.types.get("." + node.attr, set())
        if isinstance(node, ast.Call):
            callee = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            given = set().union(*(named(arg) for arg in node.args if isinstance(arg, ast.Name)))
            made = {callee} & set(CLASSES)
            return made | self.returns.get(callee, set()) | (given if callee == "load" else set())
        if isinstance(node, ast.IfExp):
            return self.type_of(node.body) | self.type_of(node.orelse)
        return set()

    def reads(self) -> Iterator[tuple[str, str]]:
        """(class, field) of every attribute that is read on something of a known class."""
        for node in readable(self.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                for cls in self.type_of(node.value):
                    yield cls, node.attr


def readable(node: ast.AST, inside: str = "") -> Iterator[ast.AST]:
    """All nodes but those in functions that only complain; a settings class counts as what its methods read of it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef) and COMPLAINTS.fullmatch(child.name):
            continue
        within = child.name if isinstance(child, ast.ClassDef) and child.name in CLASSES else inside
        if inside and isinstance(child, ast.Name) and child.id == "self":
            child.id = f"self of {inside}"
        yield child
        yield from readable(child, within)


def reads_in_package() -> set[tuple[str, str]]:
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
    returns: dict[str, set[str]] = defaultdict(set)
    attributes: dict[str, set[str]] = defaultdict(set)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                returns[node.name] |= named(node.returns)
            elif isinstance(node, ast.ClassDef) and path.name != "config.py" and path.parent.name != "settings":
                for line in node.body:
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                        attributes[line.target.id] |= named(line.annotation)
    found: set[tuple[str, str]] = set()
    for tree in trees.values():
        module = Module(tree, returns, attributes)
        # a method's deltas and banks stand beside its config, and hold it as `self.config`
        module.types[".config"] |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)} & set(ADAPTERS)
        for name in CLASSES:
            module.types[f"self of {name}"] = {name}
        list(readable(tree))  # names the selves
        found |= set(module.reads())
    return found


def is_read(key: Key, reads: set[tuple[str, str]]) -> bool:
    """Read on the field's class, on a base of it, or on a class that inherits the field."""
    related = {name for name, cls in CLASSES.items() if issubclass(key.section, cls) or issubclass(cls, key.section)}
    return any((name, key.field.name) in reads for name in related)


def test_every_field_of_every_section_is_read():
    reads = reads_in_package()
    unread = sorted({f"{key.section.__name__}.{key.field.name}" for key in all_keys() if not is_read(key, reads) and (key.section.__name__, key.field.name) not in BY_NAME})
    assert not unread, f"{len(unread)} settings are read by nothing: {', '.join(unread)}"


@pytest.mark.parametrize(
    ("code", "read"),
    [
        ("def f(run: Run):\n    return run.eval.patience", True),
        ("def f(config: EvalConfig):\n    return config.patience", True),
        ("class A:\n    def __init__(self, eval: EvalConfig):\n        self.eval, self.x = eval, 1\n    def f(self):\n        return self.eval.patience", True),
        ("run = load_run(words)\nprint(run.eval.patience)", True),
        ("def f(run: Run):\n    settings = run.eval\n    return settings.patience", True),
        ("def f(other):\n    return other.patience", False),
        ("def f(run: Run):\n    return run.train.patience", False),
        ("def problems(run: Run):\n    return run.eval.patience", False),
        ("def f(run: Run):\n    run.eval.patience = 3", False),
        ("x = {'patience': 3}", False),
    ],
)
def test_the_search_sees_reads_and_nothing_else(code, read):
    module = Module(ast.parse(code), {"load_run": {"Run"}}, {})
    assert (("EvalConfig", "patience") in set(module.reads())) == read
