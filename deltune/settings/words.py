"""How words of a command line, files and mappings become settings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from deltune.errors import ConfigError
from deltune.models.config import VOCABULARY, ModelConfig
from deltune.models.folder import TOKENIZER_FILES
from deltune.settings.evaluation import EvalSettings
from deltune.settings.generation import Generation
from deltune.settings.run import Run
from deltune.settings.tools import PreviewSettings
from deltune.settings.trained import Trained

S = TypeVar("S")


def load(cls: type[S], words: Sequence[str] = (), file: str | Path | None = None, *, mapping: Mapping[str, Any] | None = None) -> S:
    """The settings of a verb from command-line words over a YAML file or a mapping. ConfigError lists all that is wrong.

    For PreviewSettings file and preset are those of a training run, of which model, data and train are taken.
    """
    from deltune.config.check import build
    from deltune.config.compose import compose

    run = None
    if cls is PreviewSettings and mapping is None:
        presets = [word for word in words if word.startswith("preset=")]
        if file is not None or presets:
            run = load_run(presets, file)
        words, file = [word for word in words if word not in presets], None
    stated, origins = compose(cls, words, file=None if file is None else Path(file), mapping=mapping, presets=cls is Run)
    if run is not None:
        _lay_under(stated, origins, {name: asdict(getattr(run, name)) for name in ("model", "data", "train")}, "the run's config")
    if issubclass(cls, Trained):
        _fill_from_run(cls, stated, origins)
    return build(cls, stated, origins)


def _lay_under(stated: dict[str, Any], origins: dict[tuple[str, ...], str], sections: Mapping[str, dict[str, Any]], label: str) -> None:
    """Add what is not stated of some sections."""
    for name, values in sections.items():
        stated[name] = values | stated.get(name, {})
        for key in values:
            origins.setdefault((name, key), label)


def load_run(words: Sequence[str] = (), file: str | Path | None = None) -> Run:
    """A training run from command-line words, over a YAML file."""
    return load(Run, words, file)


def run_from(config: Run | Mapping[str, Any] | str | Path | Sequence[str]) -> Run:
    """A run from a Run, a mapping (nested or with dotted keys), a YAML file, a run's folder, or the words of a command line.

    A Run made in Python is checked as everything else is.
    """
    if isinstance(config, Run):
        return load(Run, mapping=config.to_dict())
    if isinstance(config, Mapping):
        return load(Run, mapping=config)
    if isinstance(config, (str, Path)):
        path = Path(config)
        return load_run(file=path / "config.yaml" if path.is_dir() else path)
    return load_run(*split_file(config))


def split_file(words: Sequence[str]) -> tuple[list[str], Path | None]:
    """The words of a command line without the config file among them, and that file, if there is one."""
    files = [word for word in words if "=" not in word and (Path(word).suffix in (".yaml", ".yml") or os.path.isfile(word))]
    files = [word for word in files if not word.startswith("-")]
    if len(files) > 1:
        raise ConfigError(f"{' and '.join(files)}: one config file at a time; put what they share into one")
    return [word for word in words if word not in files], Path(files[0]) if files else None


def _fill_from_run(cls: type, stated: dict[str, Any], origins: dict[tuple[str, ...], str]) -> None:
    """Where a run is named, take from it what is not stated: base model, adapter, how prompts are written."""
    folder = _run_folder(stated)
    if folder is None:
        adapter = stated.get("adapter")
        if isinstance(adapter, str) and _has_tokenizer(Path(adapter)):
            _lay_under(stated, origins, {"model": {"tokenizer": adapter}}, adapter)
        return
    config = folder / "config.yaml"
    run = load_run(file=config)
    label = str(config)
    stated["adapter"] = _only_if_there(folder / "adapter") if run.result == "adapter" else None
    taken: dict[str, dict[str, Any]] = {"model": asdict(run.model), "engine": {"precision": run.engine.precision}}
    # what only training reads has no meaning here
    taken["model"] |= {"enable": [], "disable": [], "gradient_checkpointing": "auto", "start": "pretrained"} | _vocabulary_of(run, folder)
    if run.result == "adapter" and run.model.start == "random":
        raise ConfigError(f"{label}: the run's base weights were drawn at random (model.start=random) and not kept, so its adapter fits nothing")
    if "quant" not in stated:
        taken["quant"] = asdict(run.quant)
    if run.result == "model":
        taken["model"] |= {"path": _only_if_there(folder / "model"), "revision": None}
    if cls is EvalSettings and not stated.get("task"):
        taken["data"] = asdict(run.data)
        if "eval" in stated.get("data", {}):
            taken["data"]["eval_size"] = 0.0
    _lay_under(stated, origins, taken, label)
    if issubclass(cls, Generation):
        for key in ("template", "system", "meta_prompt", "prefix", "postfix"):
            stated.setdefault(key, getattr(run.data, key))
            origins.setdefault((key,), label)


def _vocabulary_of(run: Run, folder: Path) -> dict[str, Any]:
    """What says of a run's model which tokens it has, where that added some: they are in the tokenizer that it left."""
    if not run.model.has_new_rows:
        return {}
    default = ModelConfig()
    left = folder / "adapter"
    own = {"tokenizer": str(left) if run.result == "adapter" and _has_tokenizer(left) else None, "pad_token": "auto"}
    return {key: getattr(default, key) for key in VOCABULARY} | own


def _has_tokenizer(folder: Path) -> bool:
    return any(os.path.isfile(folder / name) for name in TOKENIZER_FILES)


def _run_folder(stated: Mapping[str, Any]) -> Path | None:
    """The run that `run=` or `adapter=` names, if any. ConfigError where it is none."""
    run, adapter = stated.get("run"), stated.get("adapter")
    if run is not None and adapter is not None:
        raise ConfigError(f"run={run} cannot be given together with adapter={adapter}: the run's own adapter is used; adapter={run} names it too")
    if isinstance(run, str):
        if not os.path.isfile(Path(run) / "config.yaml"):
            raise ConfigError(f"run={run}: no run's folder, for it has no config.yaml{_runs_beside(Path(run))}")
        return Path(run)
    if isinstance(adapter, str):
        folder = Path(adapter)
        if os.path.isfile(folder / "adapter_config.json") or (folder.suffix == ".ckpt" and os.path.isfile(folder)):
            return None
        if os.path.isfile(folder / "config.yaml"):
            return folder
        raise ConfigError(f"adapter={adapter}: neither an adapter's folder (adapter_config.json) nor a run's (config.yaml){_runs_beside(folder)}")
    return None


def _runs_beside(folder: Path) -> str:
    if not os.path.isdir(folder.parent):
        return ""
    from deltune.config.suggest import nearest

    runs = [path.parent.name for path in folder.parent.glob("*/config.yaml")]
    return f"; did you mean {' or '.join(str(folder.parent / name) for name in nearest(folder.name, runs) or sorted(runs)[:3])}?" if runs else ""


def _only_if_there(folder: Path) -> str:
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder}: does not exist; has the run ended? `deltune train {folder.parent / 'config.yaml'}` goes on with it")
    return str(folder)
