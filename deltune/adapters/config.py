"""The `adapter` section: what every method has, and the tables of what there is. Light to import.

A method's file in `methods/` declares itself in two literals, which are read without importing it:
`DELTAS = {name: class of its config}`, the parametrisations, and `METHODS = {name: facts}`, the named methods, each a
choice on the axes (see `Method`). So a new method is one new file.
"""

from __future__ import annotations

import ast
import dataclasses
import operator
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltune.config.fields import Choice, hints, members, option, section

if TYPE_CHECKING:
    from deltune.adapters.delta import Delta


@dataclass(frozen=True)
class OverTime:
    """What happens to an adapter and its base while it trains."""

    name: str = option("none", "none: nothing; relora: fold the change into the base every so often and begin it anew (arXiv:2307.05695); plora: the same in stages, each with a learning-rate schedule of its own (arXiv:2402.16141); delta_lora: the base follows each step of the change (arXiv:2309.02411).", choices=("none", "relora", "plora", "delta_lora"))
    every: int = option(1000, "relora, plora: optimizer steps from one merge to the next.", gt=0)
    moments: str = option("zero", "relora, plora: what becomes of the optimizer's moments of the adapter at a merge. zero: all are set to zero, the step count stays; forget: as if the parameters were new; random, magnitude: a share of them is set to zero, at random or the smallest.", choices=("zero", "forget", "random", "magnitude"))
    prune: float = option(0.9, "Share that moments=random and magnitude set to zero.", gt=0, le=1)
    rewarm: float = option(0.1, "relora, plora: linear warm-up of the learning rate after a merge: below 1 a fraction of `every`, else a number of steps; 0 for none.", ge=0)
    restart: bool = option(False, "relora, plora: run the whole learning-rate schedule, its warm-up included, anew after each merge, in place of `rewarm`.")
    momentum: float = option(0.0, "plora: share m of the change that stays in the adapter at a merge: W takes (1 - m)·ΔW and B becomes m·B.", ge=0, lt=1)
    begin: int = option(500, "delta_lora: optimizer steps before the base begins to follow.", ge=0)
    ratio: float = option(2.0, "delta_lora: how far the base follows: W takes ratio times each step's change of ΔW.", gt=0)

    def __bool__(self) -> bool:
        return self.name != "none"

    @property
    def merges(self) -> bool:
        """Whether the change is folded into the base from time to time."""
        return self.name in ("relora", "plora")

    @property
    def moves_base(self) -> bool:
        """Whether the base is another one after training, so that the adapter's files alone are not the trained function."""
        return self.merges or self.name == "delta_lora"


@dataclass(frozen=True)
class AdapterConfig:
    """Where an adapter goes. Methods add their own fields."""

    delta: str = option(help="Parametrisation of the change.")
    targets: list[str] | str = option("all-linear", "Modules to adapt: `all-linear` (every linear layer but the output head), module name endings, full names, or one regular expression over the full name.")
    exclude: list[str] = option([], "Module name endings or full names never adapted.")
    modules_to_save: list[str] = option([], "Modules trained in full beside the adapter and saved with it, e.g. lm_head.")
    trainable_token_indices: list[int] | dict[str, list[int]] = option([], "Ids of tokens whose rows are trained and saved beside the adapter, in the input embeddings and a head tied to them; or a list for each table: {embed_tokens: [..], lm_head: [..]}. What model.add_tokens adds is filled in.")
    dropout: float = option(0.0, "Dropout on the adapter's own input while training; an embedding's input has none.", ge=0, lt=1)
    dtype: str = option("auto", "Storage type of the adapter's weights; they compute in the type of the activations. auto: float32, so that small steps count on a base in a short type, or float64 on a base in float64.", choices=("auto", "float32", "bfloat16", "float16"))
    magnitude: bool = option(False, "Learn each output's strength apart from its direction (DoRA, arXiv:2402.09353), around any change that is a matrix.")
    schedule: OverTime = section(OverTime, "What happens over time.", primary="name")

    @staticmethod
    def delta_class() -> type[Delta]:
        """The class that computes this parametrisation."""
        raise NotImplementedError

    def problems(self) -> list[str]:
        """Pairs of choices that do not go together, each beginning with the key it is about."""
        from deltune.adapters.legal import problems

        return problems(self)


@dataclass(frozen=True)
class RankedConfig(AdapterConfig):
    """What methods with a rank have."""

    rank: int = option(8, "Rank of the change.", gt=0)
    alpha: float = option(16.0, "Strength: the change is scaled by alpha / rank, or alpha / √rank with scaling=rslora.", gt=0)
    scaling: str = option("standard", "standard: alpha / rank; rslora: alpha / √rank (arXiv:2312.03732).", choices=("standard", "rslora"))
    rank_pattern: dict[str, int] = option({}, "Regular expression over the end of a module name to its own rank; the first that matches counts.")
    alpha_pattern: dict[str, float] = option({}, "Regular expression over the end of a module name to its own alpha; the first that matches counts.")


@dataclass(frozen=True)
class Method:
    """A named method: what it chooses, and what is said of it."""

    name: str
    choices: Mapping[str, Any]  # keys of the adapter section (dotted below it), and `optim.…` of the optimizer's
    paper: str  # e.g. arXiv:2106.09685
    formula: str
    start: float = 0.0  # largest relative change of a layer's output when it starts, in the tests' toy layers
    small: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # values that fit layers 8 and 12 wide, for tests
    example: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what must be said besides, on a Llama, to put it on
    note: str = ""  # for the catalogue page: what the sources leave open, where we depart from them

    @property
    def adapter_choices(self) -> dict[str, Any]:
        return {key: value for key, value in self.choices.items() if not key.startswith("optim.")}


# filled by `discover` from the files in methods/
DELTAS: dict[str, str] = {}  # parametrisation -> "module:class of its config"
METHODS: dict[str, Method] = {}

ADAPTERS = Choice(
    "delta", DELTAS, default="lora", optional=True, base=AdapterConfig,
    help="Adaptation method and where it goes; null trains the model's own weights.", named={},
)


def discover() -> None:
    """Read what the files in `methods/` (and any folder added to that package's __path__) declare."""
    from deltune.adapters import methods

    for folder in methods.__path__:
        for path in sorted(Path(folder).glob("[a-z]*.py")):
            text = path.read_text(encoding="utf-8")
            for name, config in _literal(text, "DELTAS", path).items():
                DELTAS[name] = f"{methods.__name__}.{path.stem}:{config}"
            for name, facts in _literal(text, "METHODS", path).items():
                METHODS[name] = Method(name, **facts)
    for name, method in METHODS.items():
        ADAPTERS.named[name] = {f"adapter.{key}" if not key.startswith("optim.") else key: value for key, value in method.choices.items()}


def _literal(text: str, name: str, path: Path) -> dict[str, Any]:
    """The dict literal that a file assigns to a name at its top level, up to the line that is its closing brace."""
    head = f"\n{name} = "
    begin = text.find(head + "{")
    if begin < 0:
        return {}
    end = text.find("\n}\n", begin)
    line = text.find("\n", begin + len(head))
    end = line if text[line - 1] == "}" else end + 2
    try:
        return ast.literal_eval(text[begin + len(head) : end])
    except (ValueError, SyntaxError) as error:
        raise RuntimeError(f"{path}: {name} must be a dict literal that ends with a line of its own brace: {error}") from None


def named(name: str, **fields: Any) -> AdapterConfig:
    """The config of a named method: its choices, then these fields. KeyError if there is no such method."""
    values: dict[str, Any] = {}
    over_time: dict[str, Any] = {}
    for key, value in METHODS[name].adapter_choices.items():
        if key.startswith("schedule."):
            over_time[key.removeprefix("schedule.")] = value
        else:
            values[key] = value
    if over_time:
        values["schedule"] = OverTime(**over_time)
    delta = fields.get("delta", values["delta"])
    return ADAPTERS.resolve(delta)(**(values | fields))


def name_of(config: AdapterConfig) -> str:
    """The named method whose choices a config makes; of several the one that says most. Its parametrisation if none."""
    def holds(method: Method) -> bool:
        return all(_value(config, key) == value for key, value in method.adapter_choices.items())

    fitting = [method for method in METHODS.values() if holds(method) and "optim.rule" not in method.choices]
    return max(fitting, key=lambda method: len(method.choices)).name if fitting else config.delta


def _value(config: Any, key: str) -> Any:
    first, _, rest = key.partition(".")
    value = getattr(config, first) if first in {field.name for field in dataclasses.fields(config)} else None
    return _value(value, rest) if rest and value is not None else value


_LIMITS = {"ge": (operator.ge, "at least"), "gt": (operator.gt, "above"), "le": (operator.le, "at most"), "lt": (operator.lt, "below")}


def complaint(config: AdapterConfig) -> str | None:
    """What is wrong with a config's values, if anything. One that was made in Python, or read from a file of another
    program, has not been through the checks of the command line."""
    found = _value_complaint(config)
    if found is None:
        for problem in config.problems():
            return problem
    return found


def _value_complaint(config: Any) -> str | None:
    types = hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            inner = _value_complaint(value)
            if inner is not None:
                return f"{field.name}.{inner}"
            continue
        choices = field.metadata.get("choices")
        if not any(_fits(value, hint) for hint in members(types[field.name])):
            return f"{field.name} is {value!r}; it must be {field.type}"
        if choices:
            for item in value if isinstance(value, list) else [value]:
                if item not in choices and item is not None:
                    return f"{field.name} is {value!r}; it can be {', '.join(map(str, choices))}"
        for key, (holds, words) in _LIMITS.items():
            limit = field.metadata.get(key)
            if limit is not None and value is not None and not holds(value, limit):
                return f"{field.name} is {value!r}; it must be {words} {limit:g}"
    return None


def _fits(value: Any, hint: Any) -> bool:
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and value - value == 0  # finite
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))


discover()
