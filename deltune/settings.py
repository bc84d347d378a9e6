"""What each verb is told: sections put together, the rules that hold between them, and how words become settings.

Every rule refuses a setting that would have no effect. A value that merely asks for nothing (a count of 0, `false`)
is never refused, so that one file can serve several runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from deltune.adapters.config import ADAPTERS, AdapterConfig, name_of
from deltune.config.fields import choice, option, section
from deltune.data.config import DataConfig, Source
from deltune.engines.config import ENGINES, EngineConfig, Single
from deltune.errors import ConfigError
from deltune.models.config import ModelConfig
from deltune.optim.config import OPTIMIZERS, SCHEDULES, OptimConfig, ScheduleConfig
from deltune.optim.schedules import schedule as build_schedule
from deltune.training.config import CheckpointConfig, EvalConfig, LogConfig, TrainConfig

SINKS_WITH_PROJECT = ("wandb", "mlflow", "trackio")
METRICS = ("loss", "perplexity", "token_accuracy", "exact_match")
S = TypeVar("S")
NAME = re.compile(r"\w[\w.+=-]{0,199}")


@dataclass(frozen=True)
class Run:
    """A training run."""

    name: str | None = option(None, "Folder below `output`; null makes one of model, method, data and a hash of the config.")
    output: str = option("runs", "Folder of all runs.")
    seed: int = option(42, "Seed of adapter start, dropout and random model starts.", ge=0)
    fast: str = option("auto", "auto computes attention, norms, loss and adapters in their fast forms wherever these are exact; off runs the plain ones.", choices=("auto", "off"))
    resume: str = option("auto", "Continue the run that is in the folder: if there is one; never (a run there is an error); must be there.", choices=("auto", "never", "must"))
    model: ModelConfig = section(ModelConfig, "Base model.", primary="path")
    data: DataConfig = section(DataConfig, "Training and evaluation data.", primary="train")
    adapter: AdapterConfig | None = choice(ADAPTERS)
    optim: OptimConfig = choice(OPTIMIZERS)
    schedule: ScheduleConfig = choice(SCHEDULES)
    engine: EngineConfig = choice(ENGINES)
    train: TrainConfig = section(TrainConfig, "Length, batches, policy for numbers that break.")
    eval: EvalConfig = section(EvalConfig, "Evaluation during training.")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "Checkpoints.")
    log: LogConfig = section(LogConfig, "Progress and records.")

    @property
    def folder(self) -> Path:
        """Where the run leaves everything, relative to the current folder unless `output` is absolute."""
        return Path(self.output) / (self.name or self._made_name())

    @property
    def result(self) -> str:
        """What the run leaves in its folder: `adapter`, or `model` where the model's own weights have moved."""
        return "model" if self.adapter is None or self.adapter.schedule.moves_base else "adapter"

    def _made_name(self) -> str:
        content = {key: value for key, value in self.to_dict().items() if key not in ("name", "output", "resume")}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        first = self.data.train[0]
        source = first.path if isinstance(first, Source) else first
        parts = (Path(self.model.path).name, name_of(self.adapter) if self.adapter else "full", Path(source).stem)
        return "-".join([*(re.sub(r"[^\w.]+", "-", part).strip("-.")[:40] or "x" for part in parts), digest])

    def to_dict(self) -> dict[str, Any]:
        """The resolved config as plain values."""
        return asdict(self)

    def to_yaml(self) -> str:
        """The resolved config as text that `deltune train FILE` reads back to an equal Run."""
        from deltune.config.yaml_file import write

        return write(self.to_dict())

    def problems(self) -> list[str]:
        rules = (_length_rules, _optimizer_rules, _model_rules, _data_rules, _evaluation_rules, _record_rules)
        return [problem for rule in rules for problem in rule(self)]


def _changed(value: Any, key: str) -> bool:
    """Whether a section's field differs from its default."""
    field = next(field for field in fields(value) if field.name == key)
    default = field.default if field.default is not MISSING else field.default_factory()
    return getattr(value, key) != default


def _whole_if_count(key: str, value: float) -> Iterator[str]:
    if value >= 1 and value != int(value):
        yield f"{key} from 1 on is a count, so it must be a whole number"


def _length_rules(run: Run) -> Iterator[str]:
    train = run.train
    if train.steps is not None and train.epochs is not None:
        yield "train.steps cannot be given together with train.epochs: set one of them to null"
    if train.nonfinite == "stop" and _changed(train, "max_nonfinite"):
        yield "train.max_nonfinite has no effect with train.nonfinite=stop; choose skip or rollback"
    if run.engine.name == "ddp" and run.engine.backend == "nccl" and run.engine.device in ("cpu", "mps"):
        yield f"engine.backend needs CUDA, and engine.device is {run.engine.device}; gloo fits"


def _optimizer_rules(run: Run) -> Iterator[str]:
    optim, schedule = run.optim, run.schedule
    if optim.lr_scales and optim.lr_values:
        yield "optim.lr_scales cannot be given together with optim.lr_values: both set the rate of single parameters"
    if optim.rule != "lora_plus" and _changed(optim, "rule_ratio"):
        yield f"optim.rule_ratio has no effect with optim.rule={optim.rule}; it belongs to lora_plus"
    if optim.rule != "none":
        from deltune.adapters.legal import rule_problem

        problem = rule_problem(run.adapter, optim.rule)
        if problem:
            yield f"optim.{problem}"
    if optim.weight_decay == 0 and _changed(optim, "no_decay"):
        yield "optim.no_decay has no effect while optim.weight_decay is 0"
    if optim.name == "sgd" and optim.nesterov and optim.momentum == 0:
        yield "optim.nesterov needs optim.momentum above 0"
    if schedule.auto_warmup_steps == 0 and _changed(schedule, "auto_warmup_rate"):
        yield "schedule.auto_warmup_rate has no effect while schedule.auto_warmup_steps is 0"
    yield from _whole_if_count("schedule.warmup", schedule.warmup)
    if run.train.steps is not None:  # with epochs the number of steps is known once the data is
        try:
            build_schedule(schedule, run.train.steps)
        except ConfigError as error:
            yield re.sub(r"=[^:]*:", "", str(error), count=1)  # "key=value: text" to "key text"
    if schedule.name == "wsd":
        yield from _whole_if_count("schedule.decay", schedule.decay)


def _model_rules(run: Run) -> Iterator[str]:
    model = run.model
    if run.adapter is not None:
        for key in ("enable", "disable"):
            if getattr(model, key):
                yield f"model.{key} chooses among the model's own weights, which an adapter leaves frozen: use adapter=null, or adapter.modules_to_save"
    yield from _revision_rule(model)


def _revision_rule(model: ModelConfig) -> Iterator[str]:
    if model.revision is not None and (model.path == "bundled" or os.path.isdir(model.path)):
        yield f"model.revision has no effect: model.path={model.path} is not a hub id"


def _data_rules(run: Run) -> Iterator[str]:
    data = run.data
    if not data.train:
        yield "data.train needs at least one file"
    if data.eval and data.eval_size:
        yield "data.eval_size has no effect, since data.eval is given"
    yield from _whole_if_count("data.eval_size", data.eval_size)
    for key in ("max_source_length", "max_target_length"):
        limit = getattr(data, key)
        if limit is not None and limit >= data.max_length:
            yield f"data.{key} has no effect: it must be below data.max_length, which is {data.max_length}"
    if data.mode == "pretrain":
        for key in ("max_source_length", "max_target_length", "train_on_source"):
            if _changed(data, key):
                yield f"data.{key} has no effect with data.mode=pretrain, which trains every token"
    tokens = run.train.micro_batch_tokens
    if tokens is not None:
        if data.batching in ("grouped", "padded"):
            yield f"train.micro_batch_tokens needs packed batches: data.batching=auto or packed, not {data.batching}"
        if _changed(run.train, "micro_batch"):
            yield "train.micro_batch cannot be given together with train.micro_batch_tokens: a micro-batch is filled by examples or by tokens"
        if data.max_length > tokens:
            yield f"data.max_length must be at most train.micro_batch_tokens={tokens}: a micro-batch holds whole examples only"
    if data.streaming:
        if data.batching == "grouped":
            yield "data.batching cannot be grouped with data.streaming, which does not know the lengths of all rows beforehand"
        if data.eval_size:
            yield "data.eval_size needs all rows, which data.streaming does not know beforehand: name a file in data.eval"
        if run.train.steps is None:
            yield "train.steps must be given with data.streaming: the number of rows is not known beforehand"
        if not data.eval and data.cache not in ("auto", None):
            yield "data.cache has no effect with data.streaming, which keeps no tokens"
        if not data.shuffle and _changed(data, "stream_block"):
            yield "data.stream_block has no effect with data.shuffle=false"
    elif _changed(data, "stream_block"):
        yield "data.stream_block has no effect without data.streaming"


def _evaluation_rules(run: Run) -> Iterator[str]:
    settings = run.eval
    if not run.data.eval and not run.data.eval_size:
        for key in ("every", "micro_batch", "exact_match", "max_new_tokens", "metric", "direction", "patience", "min_delta"):
            if _changed(settings, key):
                yield f"eval.{key} has no effect without evaluation data: give data.eval or data.eval_size"
        if run.data.eval_read_nums is not None:
            yield "data.eval_read_nums has no effect without evaluation data: give data.eval or data.eval_size"
        return
    if settings.patience is not None and settings.every is None:
        yield "eval.patience counts evaluations, so it needs eval.every"
    if not settings.exact_match and settings.samples == 0 and _changed(settings, "max_new_tokens"):
        yield "eval.max_new_tokens has no effect: nothing is generated with eval.exact_match=false and eval.samples=0"
    if settings.metric == "exact_match" and not settings.exact_match:
        yield "eval.metric is only measured with eval.exact_match=true"
    if settings.metric not in METRICS and settings.direction == "auto":
        known = ", ".join(METRICS)
        yield f"eval.direction must be min or max for eval.metric={settings.metric}; auto knows {known}"


def _record_rules(run: Run) -> Iterator[str]:
    log = run.log
    if run.name is not None and not NAME.fullmatch(run.name):
        yield "name must be a plain folder name: letters, digits and . _ + = -, not starting with a sign, at most 200"
    from deltune.config.suggest import closest
    from deltune.training.sinks import SINKS

    for sink in log.sinks:
        if sink not in SINKS:
            yield f"log.sinks names {sink!r}; there are {', '.join(SINKS)}{closest(sink, list(SINKS))}"
    if _changed(log, "project") and not set(log.sinks) & set(SINKS_WITH_PROJECT):
        yield f"log.project has no effect: none of {', '.join(SINKS_WITH_PROJECT)} is in log.sinks"
    if log.progress in ("bar", "off") and _changed(log, "lines_every_seconds"):
        yield f"log.lines_every_seconds has no effect with log.progress={log.progress}"


@dataclass(frozen=True)
class Trained:
    """The base model, and what a run made of it."""

    run: str | None = option(None, "A run's folder: model, adapter and the way prompts are written come from it.")
    model: ModelConfig = section(ModelConfig, "Base model.", primary="path")
    adapter: str | None = option(None, "Folder of an adapter, or of the run that made it; null uses the model as it is.")
    engine: Single = section(Single, "Device and precision.")

    def problems(self) -> list[str]:
        found = list(_revision_rule(self.model))
        for key in ("enable", "disable", "gradient_checkpointing"):
            if getattr(self.model, key) not in ([], "auto"):
                found.append(f"model.{key} has no effect: nothing is trained here")
        if self.engine.compile:
            found.append("engine.compile has no effect: nothing is trained here")
        return found


@dataclass(frozen=True)
class Generation(Trained):
    """How prompts are written and answers drawn."""

    template: str = option("auto", "Frame of a prompt, as data.template.", choices=("auto", "chat", "alpaca", "plain"))
    system: str | None = option(None, "System message.")
    meta_prompt: str = option("", "Text before the whole prompt.")
    prefix: str = option("", "Text right before the user's text.")
    postfix: str = option("", "Text right after the user's text.")
    max_new_tokens: int = option(256, "Longest answer.", gt=0, unit="tokens")
    temperature: float = option(0.0, "0 takes the most probable token each time; above 0 draws.", ge=0)
    top_p: float = option(1.0, "Draw from the smallest set of tokens with this much probability.", gt=0, le=1)
    top_k: int = option(0, "Draw from this many most probable tokens; 0 from all.", ge=0)
    repetition_penalty: float = option(1.0, "Above 1 makes tokens that already appeared less probable (arXiv:1909.05858).", gt=0)
    seed: int = option(42, "Seed of the draws.", ge=0)
    stop: list[str] = option([], "Texts that end an answer; they are not part of it.")

    @property
    def do_sample(self) -> bool:
        return self.temperature > 0

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.do_sample:
            for key in ("top_p", "top_k"):
                if _changed(self, key):
                    found.append(f"{key} has no effect while temperature is 0: nothing is drawn")
        return found


@dataclass(frozen=True)
class GenerateSettings(Generation):
    """Answers to one prompt, or to a file of them."""

    prompt: str | None = option(None, "The prompt.")
    file: str | None = option(None, "File of prompts: JSONL with `prompt` (or rows as for training), or text with one prompt a line.")
    out: str | None = option(None, "JSONL file for the answers to `file`; null prints them.")
    batch: int = option(8, "Prompts answered together.", gt=0)

    def problems(self) -> list[str]:
        found = super().problems()
        if (self.prompt is None) == (self.file is None):
            found.append("prompt must be given, or file=prompts.jsonl, and not both")
        if self.file is None and self.out is not None:
            found.append("out has no effect without file: a single prompt's answer is printed")
        if self.file is None and _changed(self, "batch"):
            found.append("batch has no effect without file")
        return found


@dataclass(frozen=True)
class ChatSettings(Generation):
    """A conversation at the terminal."""


@dataclass(frozen=True)
class EvalSettings(Trained):
    """Loss, perplexity, token accuracy and exact match of a model on evaluation data."""

    data: DataConfig = section(DataConfig, "Evaluation data: `eval`, or `eval_size` of the training rows.", primary="eval")
    micro_batch: int = option(8, "Examples in one forward pass.", gt=0)
    exact_match: bool = option(False, "Also generate an answer to each prompt and compare.")
    max_new_tokens: int = option(64, "Longest generated answer.", gt=0, unit="tokens")
    out: str | None = option(None, "JSON file for the metrics; with exact_match also the answers.")

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.data.eval and not self.data.eval_size:
            found.append("data.eval must name evaluation data: data=FILE")
        if self.data.eval and self.data.eval_size:
            found.append("data.eval_size has no effect, since data.eval is given")
        if not self.exact_match and _changed(self, "max_new_tokens"):
            found.append("max_new_tokens has no effect without exact_match: nothing is generated")
        return found


@dataclass(frozen=True, kw_only=True)
class MergeSettings(Trained):
    """An adapter folded into its base model, written as a Hugging Face model folder."""

    out: str = option(help="Folder for the merged model; must not exist or be empty.")
    dtype: str = option("auto", "Storage type of the merged weights; auto keeps the base model's.", choices=("auto", "float32", "bfloat16", "float16"))

    def problems(self) -> list[str]:
        found = super().problems()
        if self.adapter is None:
            found.append("adapter must name the adapter's folder: adapter=FOLDER or run=RUN")
        return found


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(Trained):
    """An adapter of any method whose change is a matrix, written as plain LoRA."""

    out: str = option(help="Folder for the LoRA; must not exist or be empty.")
    rank: int | None = option(None, "Rank of each layer, less where its change has less; null keeps all of the change.", gt=0)
    svd: str = option("fast", "With a rank, how the best factors are found: fast is randomised, full is exact and slow.", choices=("fast", "full"))

    def problems(self) -> list[str]:
        found = super().problems()
        if self.adapter is None:
            found.append("adapter must name the adapter's folder: adapter=FOLDER or run=RUN")
        if self.rank is None and _changed(self, "svd"):
            found.append("svd has no effect without rank, for then the whole change is kept")
        return found


@dataclass(frozen=True)
class PreviewSettings:
    """The tokenised examples as the trainer will see them."""

    model: ModelConfig = section(ModelConfig, "Model whose tokenizer is used.", primary="path")
    data: DataConfig = section(DataConfig, "Data to look at.", primary="train")
    train: TrainConfig = section(TrainConfig, "Micro-batches, for step.")
    step: int | None = option(None, "Show the batches of this optimizer step of one process, the first being 1, instead of single examples.", gt=0)
    rows: int = option(3, "Examples shown.", gt=0)
    start: int = option(0, "First example shown.", ge=0)
    part: str = option("train", "Training or evaluation rows.", choices=("train", "eval"))
    color: str = option("auto", "Colour; auto looks whether the output is a terminal.", choices=("auto", "always", "never"))

    def problems(self) -> list[str]:
        keys = [key for key in ("rows", "start", "part") if self.step is not None and _changed(self, key)]
        return [f"{key} has no effect with step, which shows whole batches of the training data" for key in keys]


@dataclass(frozen=True)
class InitSettings:
    """A starter config from a look at a model and a data file."""

    model: str | None = option(None, "Model folder, hub id or `bundled`; null asks.")
    data: str | None = option(None, "Data file; null asks.")
    out: str = option("deltune.yaml", "The file to write.")
    overwrite: bool = option(False, "Replace the file if it is there.")


# -- from words, files and mappings ---------------------------------------------------------------------------------


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
        return
    config = folder / "config.yaml"
    run = load_run(file=config)
    label = str(config)
    stated["adapter"] = _only_if_there(folder / "adapter") if run.result == "adapter" else None
    taken: dict[str, dict[str, Any]] = {"model": asdict(run.model), "engine": {"precision": run.engine.precision}}
    # what only training reads has no meaning here
    taken["model"] |= {"enable": [], "disable": [], "gradient_checkpointing": "auto", "start": "pretrained"}
    if run.result == "adapter" and run.model.start == "random":
        raise ConfigError(f"{label}: the run's base weights were drawn at random (model.start=random) and not kept, so its adapter fits nothing")
    if run.result == "model":
        taken["model"] |= {"path": _only_if_there(folder / "model"), "revision": None}
    if cls is EvalSettings:
        taken["data"] = asdict(run.data)
        if "eval" in stated.get("data", {}):
            taken["data"]["eval_size"] = 0.0
    _lay_under(stated, origins, taken, label)
    if issubclass(cls, Generation):
        for key in ("template", "system", "meta_prompt", "prefix", "postfix"):
            stated.setdefault(key, getattr(run.data, key))
            origins.setdefault((key,), label)


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
