"""What `eval` is told."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from deltune.config.fields import changed, choice, option, section
from deltune.data.config import DataConfig
from deltune.engines.config import ENGINES, EngineConfig
from deltune.settings.rules import task_rules
from deltune.settings.trained import Trained
from deltune.training.config import TaskConfig

TEXT_METRICS = ("exact_match", "normalised_match", "f1", "bleu", "rouge")  # the table in deltune.evaluation.text_metrics


def of_task(name: str) -> Any:
    """The field of TaskConfig, for all tasks of the command."""
    found = next(one for one in fields(TaskConfig) if one.name == name)
    return field(default=found.default, metadata=found.metadata)


# what `task` alone gives a meaning to
OF_TASKS = ("task_data", "protocol", "likelihood", "shots", "shots_data", "template", "permute", "seed", "limit", "against")


@dataclass(frozen=True)
class EvalSettings(Trained):
    """Loss, perplexity, token accuracy and generated answers on evaluation data; or the accuracy on tasks."""

    engine: EngineConfig = choice(ENGINES)
    data: DataConfig = section(DataConfig, "Evaluation data: `eval`, or `eval_size` of the training rows.", primary="eval")
    task: list[str] = option([], "In place of data: tasks with right answers, see `deltune list tasks`.")
    task_data: list[str] = option([], "A file, or the folder of the release, for each of `task`.")
    protocol: str = of_task("protocol")
    likelihood: str = of_task("likelihood")
    shots: int = of_task("shots")
    shots_data: str | None = of_task("shots_data")
    template: str | None = of_task("template")
    permute: int | None = of_task("permute")
    seed: int = option(42, "Seed of examples from other groups than the question's own, where its own are too few.", ge=0)
    limit: int | None = of_task("limit")
    against: str | None = option(None, "The `out` of another evaluation of the same tasks: differences, with a paired test.")
    micro_batch: int = option(8, "Examples in one forward pass; with `task`, as much as so many of the longest prompts.", gt=0)
    fast: str = option("auto", "auto computes attention, norms and adapters in their fast forms wherever these are exact; off runs the plain ones.", choices=("auto", "off"))
    exact_match: bool = option(False, "Also generate an answer to each prompt and compare.")
    metrics: list[str] = option([], "Also generate an answer to each prompt and measure it against the reference; normalised_match and f1 as SQuAD, bleu and rouge by sacrebleu and rouge-score.", choices=TEXT_METRICS)
    max_new_tokens: int | None = option(None, "Longest generated answer; null: 64, or with `task` what the template says.", gt=0, unit="tokens")
    out: str | None = option(None, "Folder, or JSON file, for the metrics and the answers. With `task` answers are kept as they come, and the same command goes on.")

    @property
    def generates(self) -> bool:
        return self.exact_match or bool(self.metrics)

    @property
    def tasks(self) -> list[TaskConfig]:
        """Each task, asked as the settings say."""
        return [
            TaskConfig(
                task, data, protocol=self.protocol, likelihood=self.likelihood, shots=self.shots, shots_data=self.shots_data,
                template=self.template, permute=self.permute, limit=self.limit, max_new_tokens=self.max_new_tokens,
            )
            for task, data in zip(self.task, self.task_data, strict=True)
        ]  # fmt: skip

    def problems(self) -> list[str]:
        return super().problems() + (self._task_problems() if self.task else self._data_problems())

    def _data_problems(self) -> list[str]:
        found = []
        if not self.data.eval and not self.data.eval_size:
            found.append("data.eval must name evaluation data: data=FILE; or a task: task=mmlu task_data=FILE")
        if self.data.eval and self.data.eval_size:
            found.append("data.eval_size has no effect, since data.eval is given")
        if not self.generates and changed(self, "max_new_tokens"):
            found.append("max_new_tokens has no effect without exact_match or metrics: nothing is generated")
        return found + [f"{key} has no effect without task" for key in OF_TASKS if changed(self, key)]

    def _task_problems(self) -> list[str]:
        found = [f"data.{field.name} has no effect with task, whose files task_data names" for field in fields(self.data) if changed(self.data, field.name)]
        found += [f"{key} has no effect with task, whose right answers are known" for key in ("exact_match", "metrics") if changed(self, key)]
        if self.shots == 0 and changed(self, "seed"):
            found.append("seed has no effect with shots=0")
        if len(self.task_data) != len(self.task):
            return [*found, f"task_data must name {len(self.task)} files or folders, one for each task"]
        if len(set(self.task)) < len(self.task):
            found.append("task names one twice; ask it in two evaluations")
        if self.out is not None and self.out.endswith(".json"):
            found.append("out must be a folder with task: it gets the answers as they come")
        # what one task has no use for may be there for another
        each = [set(task_rules(task)) for task in self.tasks]
        return found + sorted(set.intersection(*each) | {problem for problems in each for problem in problems if problem.startswith(("task ", "protocol "))})
