"""The rules that hold between the sections of a training run.

Every rule refuses a setting that would have no effect. A value that merely asks for nothing (a count of 0, `false`)
is never refused, so that one file can serve several runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from deltune.config.fields import changed
from deltune.data.mix import problems as mix_problems
from deltune.errors import ConfigError
from deltune.models.config import ModelConfig
from deltune.optim.schedules import schedule as build_schedule

if TYPE_CHECKING:
    from deltune.engines.config import EngineConfig
    from deltune.models.config import QuantConfig
    from deltune.settings.run import Run
    from deltune.training.config import TaskConfig

SINKS_WITH_PROJECT = ("wandb", "mlflow", "trackio")
METRICS = ("loss", "perplexity", "token_accuracy", "exact_match")
NAME = re.compile(r"\w[\w.+=-]{0,199}")


def _whole_if_count(key: str, value: float) -> Iterator[str]:
    if value >= 1 and value != int(value):
        yield f"{key} from 1 on is a count, so it must be a whole number"


def length_rules(run: Run) -> Iterator[str]:
    train = run.train
    if train.steps is not None and train.epochs is not None:
        yield "train.steps cannot be given together with train.epochs: set one of them to null"
    if train.nonfinite == "stop" and changed(train, "max_nonfinite"):
        yield "train.max_nonfinite has no effect with train.nonfinite=stop; choose skip or rollback"
    if run.engine.name == "ddp" and run.engine.backend == "nccl" and run.engine.device in ("cpu", "mps"):
        yield f"engine.backend needs CUDA, and engine.device is {run.engine.device}; gloo fits"


def optimizer_rules(run: Run) -> Iterator[str]:
    optim, schedule = run.optim, run.schedule
    if optim.lr_scales and optim.lr_values:
        yield "optim.lr_scales cannot be given together with optim.lr_values: both set the rate of single parameters"
    if optim.rule != "lora_plus" and changed(optim, "rule_ratio"):
        yield f"optim.rule_ratio has no effect with optim.rule={optim.rule}; it belongs to lora_plus"
    if optim.rule != "none":
        from deltune.adapters.legal import rule_problem

        problem = rule_problem(run.adapter, optim.rule)
        if problem:
            yield f"optim.{problem}"
    over_time = run.adapter.schedule if run.adapter is not None else None
    if over_time and over_time.moments in ("random", "magnitude") and optim.name.endswith("_8bit"):
        yield f"adapter.schedule.moments sets single moments to zero, and optim.name={optim.name} holds moments in codes: zero or forget fits, or an optimizer with moments in float32"
    if optim.weight_decay == 0 and changed(optim, "no_decay"):
        yield "optim.no_decay has no effect while optim.weight_decay is 0"
    if optim.name == "sgd" and optim.nesterov and optim.momentum == 0:
        yield "optim.nesterov needs optim.momentum above 0"
    if schedule.auto_warmup_steps == 0 and changed(schedule, "auto_warmup_rate"):
        yield "schedule.auto_warmup_rate has no effect while schedule.auto_warmup_steps is 0"
    yield from _whole_if_count("schedule.warmup", schedule.warmup)
    if run.train.steps is not None:  # with epochs the number of steps is known once the data is
        try:
            build_schedule(schedule, run.train.steps)
        except ConfigError as error:
            yield re.sub(r"=[^:]*:", "", str(error), count=1)  # "key=value: text" to "key text"
    if schedule.name == "wsd":
        yield from _whole_if_count("schedule.decay", schedule.decay)


def model_rules(run: Run) -> Iterator[str]:
    model = run.model
    if run.adapter is not None:
        for key in ("enable", "disable"):
            if getattr(model, key):
                yield f"model.{key} chooses among the model's own weights, which an adapter leaves frozen: use adapter=null, or adapter.modules_to_save"
    if changed(model, "new_rows") and not model.has_new_rows:
        yield "model.new_rows has no effect without new tokens: model.add_tokens, model.add_special_tokens, model.grow or model.pad_token=add"
    if model.grow and model.tokenizer is None:
        yield "model.grow has no effect without model.tokenizer, which has the tokens that the model lacks"
    yield from revision_rule(model)


def revision_rule(model: ModelConfig) -> Iterator[str]:
    if model.revision is not None and (model.path == "bundled" or os.path.isdir(model.path)):
        yield f"model.revision has no effect: model.path={model.path} is not a hub id"


def quant_rules(run: Run) -> Iterator[str]:
    if run.quant.name == "none":
        return
    if run.adapter is None:
        yield "quant.name leaves nothing to train: codes have no gradient. Choose an adapter, or quant=none"
    elif run.adapter.schedule.moves_base:
        yield f"quant.name does not fit adapter.schedule.name={run.adapter.schedule.name}, which adds to the base's weights again and again: each time they would be rounded to codes anew. quant=none fits"
    yield from compute_rule(run.quant, run.engine)


def compute_rule(quant: QuantConfig, engine: EngineConfig) -> Iterator[str]:
    if quant.name != "none" and quant.compute_dtype != "auto" and engine.precision in ("bf16", "fp16"):
        yield f"quant.compute_dtype has no effect with engine.precision={engine.precision}: under autocast every product is formed in that type"


def data_rules(run: Run) -> Iterator[str]:
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
        for key in ("max_source_length", "max_target_length", "train_on_source", "turns"):
            if changed(data, key):
                yield f"data.{key} has no effect with data.mode=pretrain, which trains every token"
    yield from mix_problems(data)
    tokens = run.train.micro_batch_tokens
    if tokens is not None:
        if data.batching in ("grouped", "padded"):
            yield f"train.micro_batch_tokens needs packed batches: data.batching=auto or packed, not {data.batching}"
        if changed(run.train, "micro_batch"):
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
        if not data.shuffle and changed(data, "stream_block"):
            yield "data.stream_block has no effect with data.shuffle=false"
    elif changed(data, "stream_block"):
        yield "data.stream_block has no effect without data.streaming"


def evaluation_rules(run: Run) -> Iterator[str]:
    settings, names = run.eval, task_names(run.eval.tasks)
    for task in settings.tasks:
        yield from (f"eval.tasks of {task.task}: {problem}" for problem in task_rules(task))
    if len(set(names)) < len(names):
        yield "eval.tasks has two of one name: give each a `name` of its own"
    has_data = bool(run.data.eval or run.data.eval_size)
    if not has_data:
        for key in ("exact_match", "max_new_tokens"):
            if changed(settings, key):
                yield f"eval.{key} has no effect without evaluation data: give data.eval or data.eval_size"
        if run.data.eval_read_nums is not None:
            yield "data.eval_read_nums has no effect without evaluation data: give data.eval or data.eval_size"
    if not has_data and not names:
        for key in ("every", "micro_batch", "metric", "direction", "patience", "min_delta"):
            if changed(settings, key):
                yield f"eval.{key} has no effect without evaluation data: give data.eval, data.eval_size or eval.tasks"
        return
    if settings.patience is not None and settings.every is None:
        yield "eval.patience counts evaluations, so it needs eval.every"
    if has_data and not settings.exact_match and settings.samples == 0 and changed(settings, "max_new_tokens"):
        yield "eval.max_new_tokens has no effect: nothing is generated with eval.exact_match=false and eval.samples=0"
    if settings.metric == "exact_match" and not settings.exact_match:
        yield "eval.metric is only measured with eval.exact_match=true"
    measured = [*(METRICS if has_data else ()), *(f"{name}_{what}" for name in names for what in ("accuracy", "loss"))]
    if settings.metric == "auto":
        return
    if settings.metric in METRICS and not has_data:
        yield f"eval.metric is only measured on evaluation data (data.eval or data.eval_size); eval.tasks give {', '.join(measured)}"
    if settings.metric not in measured and settings.metric not in METRICS and settings.direction == "auto":
        yield f"eval.direction must be min or max for eval.metric={settings.metric}; auto knows {', '.join(measured)}"


def task_names(tasks: list[TaskConfig]) -> list[str]:
    """What the metrics of each begin with."""
    return [task.name or task.task.replace("-", "_") for task in tasks]


def task_rules(task: TaskConfig) -> Iterator[str]:
    """What is wrong with the way a task is asked."""
    from deltune.config.suggest import closest
    from deltune.evaluation.tasks.catalogue import TASKS

    if task.task not in TASKS:
        yield f"task names {task.task!r}; there are {', '.join(TASKS)}{closest(task.task, list(TASKS))}"
        return
    allowed = TASKS[task.task].protocols
    protocol = allowed[0] if task.protocol == "auto" else task.protocol
    if protocol not in allowed:
        yield f"protocol does not fit {task.task}: {', '.join(allowed)} does"
        return
    if protocol != "likelihood" and changed(task, "likelihood"):
        yield f"likelihood has no effect with protocol={protocol}"
    if protocol != "generation" and changed(task, "max_new_tokens"):
        yield f"max_new_tokens has no effect with protocol={protocol}: nothing is generated"
    if task.shots == 0 and changed(task, "shots_data"):
        yield "shots_data has no effect with shots=0"
    if allowed == ("generation",) and changed(task, "permute"):
        yield f"permute has no effect on {task.task}, whose questions have no choices"


def record_rules(run: Run) -> Iterator[str]:
    log = run.log
    if run.name is not None and not NAME.fullmatch(run.name):
        yield "name must be a plain folder name: letters, digits and . _ + = -, not starting with a sign, at most 200"
    from deltune.config.suggest import closest
    from deltune.training.sinks import SINKS

    for sink in log.sinks:
        if sink not in SINKS:
            yield f"log.sinks names {sink!r}; there are {', '.join(SINKS)}{closest(sink, list(SINKS))}"
    if changed(log, "project") and not set(log.sinks) & set(SINKS_WITH_PROJECT):
        yield f"log.project has no effect: none of {', '.join(SINKS_WITH_PROJECT)} is in log.sinks"
    if log.progress in ("bar", "off") and changed(log, "lines_every_seconds"):
        yield f"log.lines_every_seconds has no effect with log.progress={log.progress}"
