"""The `train`, `eval`, `checkpoint` and `log` sections. Light to import."""

from __future__ import annotations

from dataclasses import dataclass

from deltune.config.fields import option


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what batches, and what happens when numbers break."""

    steps: int | None = option(None, "Optimizer steps; not together with epochs.", gt=0)
    epochs: float | None = option(None, "Passes over the training data; null (with steps null) is 1.", gt=0)
    micro_batch: int = option(8, "Examples in one forward pass on one device.", gt=0)
    micro_batch_tokens: int | None = option(None, "In place of micro_batch: as many whole examples as best fill this many tokens, packed. A step is then accumulate x processes such bins.", gt=0, unit="tokens")
    accumulate: int = option(1, "Forward passes per optimizer step.", gt=0)
    nonfinite: str = option("stop", "Loss or gradient not finite: stop; skip the update; or roll back to the last checkpoint and skip the batch.", choices=("stop", "skip", "rollback"))
    max_nonfinite: int = option(10, "Stop all the same after so many steps that were not finite.", ge=1)


@dataclass(frozen=True)
class TaskConfig:
    """A task with right answers, and how it is put to the model."""

    task: str = option(help="Task: `deltune list tasks`.")
    data: str = option(help="Its file, or the folder of its release.")
    name: str | None = option(None, "Name of its metrics; null takes the task's.")
    protocol: str = option("auto", "letters: log-probabilities of the choices' letters; likelihood: of the choices themselves; generation: an answer is written and read; auto: the task's own.", choices=("auto", "letters", "likelihood", "generation"))
    likelihood: str = option("sum", "With protocol=likelihood: choices are compared by the sum of their log-probabilities, or by that divided by their tokens or their UTF-8 bytes.", choices=("sum", "tokens", "bytes"))
    shots: int = option(0, "Solved examples before each question.", ge=0)
    shots_data: str | None = option(None, "File or folder that the examples come from; null takes those that the data brings.")
    template: str | None = option(None, "Prompt template: `deltune list templates`, or a file of your own; null takes the task's.")
    permute: int | None = option(None, "Seed of an order drawn for each question's choices, its answer moved along; null leaves them as the data has them.", ge=0)
    limit: int | None = option(None, "So many items only, spread evenly over all.", gt=0)
    max_new_tokens: int | None = option(None, "With protocol=generation: longest generated answer; null takes the template's.", gt=0, unit="tokens")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training, on the whole evaluation set, and on tasks."""

    tasks: list[TaskConfig] = option([], "Tasks with right answers, each a mapping such as {task: mmlu, data: FILE, shots: 5}; a task gives the metrics mmlu_accuracy and, where options are scored, mmlu_loss.")

    every: int | None = option(None, "Steps between evaluations; null evaluates at start and end only.", gt=0)
    at_start: bool = option(True, "Evaluate before the first step.")
    micro_batch: int | None = option(None, "Examples in one forward pass; null takes train.micro_batch, or fills train.micro_batch_tokens.", gt=0)
    exact_match: bool = option(False, "Also generate an answer to each evaluation prompt and compare.")
    max_new_tokens: int = option(64, "Longest generated answer.", gt=0, unit="tokens")
    samples: int = option(4, "Evaluation prompts answered before and after training, for the report.", ge=0)
    metric: str = option("auto", "Metric that picks the best checkpoint, e.g. loss, perplexity, token_accuracy, exact_match, mmlu_accuracy; auto: loss, or without evaluation data the first task's accuracy.")
    direction: str = option("auto", "Whether smaller or larger is better; auto knows the built-in metrics.", choices=("auto", "min", "max"))
    patience: int | None = option(None, "Stop after so many evaluations without improvement.", gt=0)
    min_delta: float = option(0.0, "Smallest change that counts as improvement.", ge=0)


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and how often."""

    every: int | None = option(None, "Steps between checkpoints; null saves at the end and on signals only.", gt=0)
    save_total_limit: int = option(3, "Whole checkpoints kept besides the best one.", ge=2)
    load_best: bool = option(True, "Export the best evaluated weights at the end rather than the last ones.")
    grace_seconds: float = option(20.0, "After SIGTERM or SIGINT the step in progress may take this long before its work is given up.", gt=0, unit="s")


@dataclass(frozen=True)
class LogConfig:
    """Progress and records."""

    every: int = option(1, "Steps between lines of metrics.jsonl and the sinks.", gt=0)
    progress: str = option("auto", "Console progress; auto is a bar on a terminal, lines elsewhere.", choices=("auto", "bar", "lines", "off"))
    lines_every_seconds: float = option(5.0, "Plain lines: shortest time between two.", ge=0, unit="s")
    sinks: list[str] = option(["tensorboard"], "Where scalars go besides metrics.jsonl: tensorboard, wandb, mlflow, trackio.")
    project: str = option("deltune", "Project name at the sinks that have one.")
    report: bool = option(True, "Write loss.png, report.html and the model card at the end.")
    peak_tflops: float | None = option(None, "Peak of one device, for model-FLOPs utilisation; null measures a matrix product at start.", gt=0, unit="TFLOP/s")
