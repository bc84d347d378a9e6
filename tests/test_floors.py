"""The house stands: who may import whom, what is light to import, how long a file may be, and what is never written."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import deltune
from tests.conftest import ROOT

PACKAGE = Path(deltune.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500

FLOORS = {
    "errors": 0, "log": 0, "dist": 0, "weights": 0, "recipe": 0, "tables": 0,
    "config": 1, "adapters": 1, "models": 1, "data": 1, "optim": 1, "engines": 1,
    "training": 2, "evaluation": 2, "serve": 2,
    "settings": 3, "commands": 3,
    "cli": 4, "__init__": 4,
}  # fmt: skip
HEAVY = {"transformers", "peft", "matplotlib", "tensorboard", "pyarrow", "hydra", "rich"}
TORCH_FREE = ("cli.py", "settings/*.py", "errors.py", "log.py", "dist.py", "config/*.py", "**/config.py", "commands/list.py", "__init__.py")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module that is imported anywhere in a file, with its line; `from a import b` may mean a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}: write the whole name"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("deltune.") and ":" in node.value:
            yield node.value.partition(":")[0], node.lineno  # an option of a Choice, imported when chosen


def at_the_top(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when a file is imported; what stands under TYPE_CHECKING does not."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.If):
            guarded = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            pending += node.orelse if guarded else [*node.body, *node.orelse]
        elif isinstance(node, (ast.Try, ast.With)):
            pending += node.body
        else:
            yield node


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def may_import(importer: str, imported: str) -> bool:
    """Whether a file (`room/file`) may import a module (`deltune.room.file...`)."""
    room, other = importer.split("/")[0].removesuffix(".py"), imported.split(".")[1]
    if other not in FLOORS:  # `from deltune import something`
        return FLOORS[room] == 4 or other == "__version__"
    if room == other:
        return True
    here, there = FLOORS[room], FLOORS[other]
    if importer.endswith("/config.py"):
        return imported.startswith("deltune.config.fields")
    if here == 0:
        return other == "errors"
    if here == 1:
        return there == 0 or imported.startswith("deltune.config.fields")
    if here == 2:
        return there < 2 and not (room == "training" and other == "adapters")
    return there <= here


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_room_imports_only_what_lies_below(path):
    wrong = [
        f"line {line}: {module}" for module, line in imports(tree_of(path))
        if module.startswith("deltune.") and not may_import(name_of(path), module)
    ]
    assert not wrong, f"{name_of(path)} may not import: {'; '.join(wrong)}"


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("data/read.py", "deltune.errors.DataError", True), ("data/read.py", "deltune.models.load", False), ("data/read.py", "deltune.config.check", False),
        ("data/config.py", "deltune.config.fields.option", True), ("data/config.py", "deltune.errors.DataError", False),
        ("training/loop.py", "deltune.engines.engine.Engine", True), ("training/loop.py", "deltune.adapters.attach", False),
        ("training/loop.py", "deltune.evaluation.lm", False), ("evaluation/lm.py", "deltune.adapters.attach", True), ("weights.py", "deltune.log.logger", False),
        ("weights.py", "deltune.errors.ModelError", True), ("commands/train.py", "deltune.settings.Run", True), ("settings/run.py", "deltune.cli.main", False),
        ("config/check.py", "deltune.settings.Run", False), ("cli.py", "deltune.commands.launch", True), ("commands/list.py", "deltune.cli.VERBS", False),
    ],
)  # fmt: skip
def test_the_floors_are_those_of_the_architecture(importer, imported, allowed):
    assert may_import(importer, imported) == allowed


def test_every_room_has_a_floor():
    assert {room_of(path) for path in FILES} <= set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_are_imported_where_they_are_needed(path):
    heavy = [
        f"line {line}: {module}" for node in at_the_top(tree_of(path)) if isinstance(node, (ast.Import, ast.ImportFrom))
        for module, line in imports(node) if module.split(".")[0] in HEAVY
    ]
    assert not heavy, f"{name_of(path)}: import inside the function that needs it: {'; '.join(heavy)}"


@pytest.mark.parametrize("path", sorted({path for pattern in TORCH_FREE for path in PACKAGE.glob(pattern)}), ids=name_of)
def test_light_files_do_not_import_torch_at_the_top(path):
    found = [module for node in at_the_top(tree_of(path)) if isinstance(node, (ast.Import, ast.ImportFrom)) for module, _ in imports(node)]
    assert not [module for module in found if module.split(".")[0] in ("torch", "numpy", "safetensors")]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_says_what_it_is_and_stays_readable(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES, f"{name_of(path)} has {len(lines)} lines; a file holds one idea, in at most {MAX_LINES}"
    if lines:
        assert ast.get_docstring(tree_of(path)), f"{name_of(path)} opens without a sentence saying what it is"


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_that_runs_what_a_file_says(path):
    tree = tree_of(path)
    modules = {module.split(".")[0] for module, _ in imports(tree)}
    assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    for name, call in calls(tree):
        where = f"{name_of(path)}:{call.lineno}"
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        assert name not in ("eval", "exec", "compile", "builtins.eval", "builtins.exec", "os.system", "os.popen"), where
        assert "trust_remote_code" not in keywords, f"{where}: trust_remote_code is never passed"
        assert not name.endswith(("hydra.utils.instantiate", "utils.instantiate", "utils.call", "yaml.load_all", "yaml.unsafe_load")), where
        assert name not in ("yaml.load", "yaml.full_load", "instantiate"), where
        shell = keywords.get("shell")
        assert shell is None or (isinstance(shell, ast.Constant) and shell.value is False), f"{where}: never a shell"
        if name in ("torch.load", "load") and name.startswith("torch"):
            safe = keywords.get("weights_only")
            assert isinstance(safe, ast.Constant) and safe.value is True, f"{where}: torch.load needs weights_only=True"
        safe = keywords.get("weights_only")
        assert safe is None or (isinstance(safe, ast.Constant) and safe.value is True), f"{where}: weights_only=True or nothing"


def test_settings_of_models_never_switch_remote_code_on():
    """As a string it may only stand where it is refused or explained."""
    users = {name_of(path) for path in FILES if "trust_remote_code" in path.read_text(encoding="utf-8")}
    assert users <= {"config/foreign.py", "models/folder.py", "models/load.py"}


LIGHT = """
import json, sys
{code}
print(json.dumps([name for name in ("torch", "hydra", "omegaconf", "transformers", "rich", "yaml", "numpy") if name in sys.modules]))
"""


@pytest.mark.parametrize(
    "code",
    [
        "import deltune",
        "from deltune.cli import main; main(['--help'])",
        "from deltune.cli import main; main(['--version'])",
        "from deltune.cli import main; main(['trian'])",
    ],
)
def test_help_and_import_are_light(code):
    done = subprocess.run([sys.executable, "-c", LIGHT.format(code=code)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


@pytest.mark.parametrize("verb", ["train", "eval", "generate", "chat", "merge", "preview", "plan", "init"])
def test_help_of_a_verb_needs_no_torch(verb):
    code = f"from deltune.cli import main; main(['{verb}', '--help'])"
    done = subprocess.run([sys.executable, "-c", LIGHT.format(code=code)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "hydra", "omegaconf", "transformers", "rich"} & set(json.loads(done.stdout.splitlines()[-1]))


def test_the_public_names_bring_in_nothing_but_torch():
    """Counted in modules, not in seconds: whoever imports deltune beside torch pays for deltune's own files alone."""
    code = (
        "import json, sys, torch; before = set(sys.modules); import deltune; [getattr(deltune, name) for name in deltune.__all__]; "
        "new = set(sys.modules) - before; print(json.dumps([len(new), sorted({name.partition('.')[0] for name in new} - {'deltune', *sys.stdlib_module_names})]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    count, foreign = json.loads(done.stdout)
    assert foreign == [] and count < 100
