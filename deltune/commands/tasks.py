"""`deltune eval task=...` and `eval.tasks` of a training run: tasks read, put to a model, kept, compared and shown."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltune import dist
from deltune.errors import ConfigError
from deltune.log import logger

if TYPE_CHECKING:
    from deltune.commands.open_model import Opened
    from deltune.evaluation.tasks.item import Item, Task
    from deltune.evaluation.tasks.run import Prediction, Question, Way
    from deltune.evaluation.tasks.store import Store
    from deltune.models.head import Head
    from deltune.settings import EvalSettings, Run
    from deltune.training.config import TaskConfig

# settings that change no answer: where it is kept, how fast it comes, and what stands in the record by its content
CHANGES_NOTHING = (
    "run", "adapter", "data", "engine", "fast", "exact_match", "metrics", "micro_batch", "out", "against", "limit",
    "task", "task_data", "protocol", "likelihood", "shots", "shots_data", "seed", "template", "permute", "max_new_tokens",
)  # fmt: skip
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each weight file, to tell it from another of its size


@dataclass(frozen=True)
class Exam:
    """A task that has been read: what is asked, and how."""

    name: str
    task: Task
    way: Way
    items: list[Item]  # those that are asked
    made_of: dict[str, Any]  # hashes of all that is asked and shown


def read(config: TaskConfig, name: str, seed: int) -> Exam:
    """ConfigError or DataError where there is no such task, template or file, or no exemplars."""
    from deltune.evaluation.tasks.catalogue import TASKS
    from deltune.evaluation.tasks.item import permuted
    from deltune.evaluation.tasks.run import Way
    from deltune.evaluation.tasks.store import fingerprint
    from deltune.evaluation.tasks.templates import template_named

    task = TASKS[config.task]
    template = template_named(config.template or task.template)
    protocol = task.protocols[0] if config.protocol == "auto" else config.protocol
    way = Way(template, protocol, config.shots, config.likelihood, config.max_new_tokens or template.max_new_tokens, seed)
    items = task.read(Path(config.data))
    if config.permute is not None:
        items = [permuted(item, config.permute) for item in items]
    made_of = {"task": config.task, "items": fingerprint(items), "protocol": protocol, "template": asdict(template), "shots": config.shots}
    if config.shots:
        made_of |= {"exemplars": fingerprint(pool_of(config, task)), "seed": seed}
    if protocol == "likelihood":
        made_of["likelihood"] = config.likelihood
    if protocol == "generation":
        made_of["max_new_tokens"] = way.max_new_tokens
    if config.limit is not None and config.limit < len(items):
        items = [items[i * len(items) // config.limit] for i in range(config.limit)]
    return Exam(name, task, way, items, made_of)


def pool_of(config: TaskConfig, task: Task) -> list[Item]:
    """What exemplars are taken from."""
    if config.shots == 0:
        return []
    found = task.exemplars(Path(config.data)) if config.shots_data is None else task.read(Path(config.shots_data))
    if len(found) < config.shots:
        where = config.data if config.shots_data is None else config.shots_data
        raise ConfigError(f"shots={config.shots}: {where} brings {len(found)} solved examples for {config.task}. What fits: shots_data=FILE with more")
    return found


def asked(exam: Exam, config: TaskConfig, tokenizer: Any, window: int | None) -> list[Question]:
    """The questions in tokens; a word in the log where the model's window had no room for all of them."""
    from deltune.evaluation.tasks.run import questions

    found = questions(exam.items, exam.way, pool_of(config, exam.task), tokenizer, window)
    fewer, cut = sum(one.num_shots < exam.way.shots for one in found), sum(one.num_cut > 0 for one in found)
    if fewer:
        logger.warning("%s: the model's window of %d tokens has no room for %d examples before %d of %d questions; these get fewer", exam.name, window, exam.way.shots, fewer, len(found))
    if cut:
        logger.warning("%s: %d of %d questions are longer than the model's window of %d tokens and lose their beginning", exam.name, cut, len(found), window)
    return found


# -- during training --------------------------------------------------------------------------------------------


class Exams:
    """The tasks of a run's `eval.tasks`, read before the model is loaded, and tokenised once."""

    def __init__(self, run: Run):
        from deltune.settings.rules import task_names

        self.configs = run.eval.tasks
        self.exams = [read(config, name, run.seed) for config, name in zip(self.configs, task_names(self.configs), strict=True)]
        self.questions: list[list[Question]] | None = None

    def measure(
        self, model: Any, tokenizer: Any, *, head: Head | None, batch: int, autocast: Callable[[], AbstractContextManager]
    ) -> dict[str, float]:
        """NAME_accuracy of each, and NAME_loss where options are scored; alike on all ranks."""
        from deltune.evaluation.tasks.run import answer
        from deltune.evaluation.tasks.summary import summary
        from deltune.models.generation import context_window

        if self.questions is None:
            window = context_window(model)
            self.questions = [asked(exam, config, tokenizer, window) for exam, config in zip(self.exams, self.configs, strict=True)]
        metrics: dict[str, float] = {}
        for exam, questions in zip(self.exams, self.questions, strict=True):
            rounds = answer(model, tokenizer, questions, exam.way, head=head, batch=batch, autocast=autocast)
            found = summary(in_order(exam, {one.id: one for part in rounds for one in part}), exam.task.mean)
            metrics[f"{exam.name}_accuracy"] = found["accuracy"]["value"]
            if "loss" in found:
                metrics[f"{exam.name}_loss"] = found["loss"]["value"]
        return metrics


def in_order(exam: Exam, found: dict[str, Prediction]) -> list[Prediction]:
    """The predictions of the items that are asked, in their order, whatever else is there."""
    return [found[item.id] for item in exam.items]


# -- the verb ---------------------------------------------------------------------------------------------------


def main(settings: EvalSettings) -> int:
    """`deltune eval task=...`."""
    from deltune.commands.open_model import opened_fast

    exams = [read(config, config.task, settings.seed) for config in settings.tasks]
    for exam, config in zip(exams, settings.tasks, strict=True):
        pool_of(config, exam.task)  # what is missing is told before the model is loaded
    with opened_fast(settings) as place:
        results = {exam.name: measure(settings, config, exam, place) for exam, config in zip(exams, settings.tasks, strict=True)}
    if dist.is_main():
        print(table(results))
        print("".join(f"\n{line}" for line in compared(results)), end="\n" if settings.against else "")
        if settings.out is not None:
            print("\n" + "\n".join(f"wrote {folder_of(settings.out, name, settings) / 'metrics.json'}" for name in results))
    return 0


def folder_of(out: str, name: str, settings: EvalSettings) -> Path:
    """A task's own folder below `out` where there are several."""
    return Path(out) / name if len(settings.task) > 1 else Path(out)


def measure(settings: EvalSettings, config: TaskConfig, exam: Exam, place: Opened) -> dict[str, Any]:
    """metrics.json of one task, which is written if `out` says so, with the answers as they come."""
    from deltune.commands.open_model import provenance
    from deltune.evaluation.tasks import store, summary
    from deltune.evaluation.tasks.score import Work
    from deltune.models.generation import context_window

    began, work = time.perf_counter(), Work()
    produced = provenance(settings)
    made_by = identity(settings, produced, place) | exam.made_of
    questions = asked(exam, config, place.tokenizer, context_window(place.model))
    folder = None if settings.out is None else folder_of(settings.out, exam.name, settings)
    predictions, num_before = answered(settings, exam, questions, place, folder, made_by, work)
    found: dict[str, Any] = {
        "task": exam.name, "protocol": exam.way.protocol, "shots": exam.way.shots, "n": len(predictions), **summary.summary(predictions, exam.task.mean), "chance": summary.chance(exam.items, exam.task.mean),
        "num_fewer_shots": sum(one.num_shots < exam.way.shots for one in questions), "num_cut": sum(one.num_cut > 0 for one in questions),
    }  # fmt: skip
    if settings.against is not None:
        other = folder_of(settings.against, exam.name, settings)
        found["against"] = {"folder": str(other)} | summary.against(predictions, chosen_of(store.read(other), exam), exam.task.mean).as_dict()
    found |= {"num_answered_before": num_before, "seconds": time.perf_counter() - began, "tokens": asdict(work), "made_by": made_by} | produced
    if folder is not None:
        dist.on_main(lambda: str(store.write_metrics(folder, found)))
    return found


def chosen_of(found: dict[str, Prediction], exam: Exam) -> dict[str, Prediction]:
    """Of the other side's answers those to what is asked here: its limit may have been a larger one."""
    wanted = {item.id for item in exam.items}
    return {id: one for id, one in found.items() if id in wanted}


def answered(
    settings: EvalSettings, exam: Exam, questions: Sequence[Question], place: Opened, folder: Path | None, made_by: dict[str, Any], work: Any
) -> tuple[list[Prediction], int]:
    """(answers of all items in their order, how many of them were there before). Rank 0 keeps them in `folder`."""
    from deltune.evaluation.tasks.run import answer
    from deltune.evaluation.tasks.store import Store
    from deltune.models.head import described

    store: Store | None = None

    def opened_store() -> dict[str, Prediction]:
        nonlocal store
        store = Store(folder, made_by)
        return store.found

    found = {} if folder is None else dict(dist.on_main(opened_store))
    try:
        before = sum(item.id in found for item in exam.items)
        if before:
            logger.info("%s: %d of %d answers are in %s already", exam.name, before, len(exam.items), folder)
        head = described(place.model)
        for part in answer(
            place.model, place.tokenizer, questions, exam.way, head=head, batch=settings.micro_batch,
            autocast=place.engine.autocast, done=found.keys(), work=work,
        ):  # fmt: skip
            found |= {one.id: one for one in part}
            if folder is not None:
                dist.on_main(lambda part=part: store.add(part))
            logger.info("%s: %d of %d answered", exam.name, sum(item.id in found for item in exam.items), len(exam.items))
    finally:
        if store is not None:
            store.close()
    return in_order(exam, found), before


def identity(settings: EvalSettings, produced: dict[str, Any], place: Opened) -> dict[str, Any]:
    """What an answer depends on beside the task: the model by its content, the adapter, and each setting of theirs."""
    kept = {key: value for key, value in asdict(settings).items() if key not in CHANGES_NOTHING}
    kept["model"] = {key: value for key, value in kept["model"].items() if key not in ("path", "revision")}
    return {
        "settings": kept,
        "model": {"sha256": produced["model"]["sha256"], "weights": weights_of(settings)},
        "adapter": produced["adapter"],
        "precision": str(place.engine.precision),
    }


def weights_of(settings: EvalSettings) -> dict[str, str]:
    """A hash of each weight file's size and of samples spread over it, which another training changes."""
    from deltune.models import folder as folders

    found = {}
    for file in sorted(folders.find(settings.model.path, settings.model.revision, weights=False).glob("*.safetensors")):
        size, digest = file.stat().st_size, hashlib.sha256()
        digest.update(str(size).encode())
        with open(file, "rb") as stream:
            for i in range(SAMPLES):
                stream.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
        found[file.name] = digest.hexdigest()
    return found


# -- what is shown ----------------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each group of a task, if there are several, and one for its own mean."""
    from deltune.commands.text_scores import columns

    rows = [("task", "group", "protocol", "shots", "n", "accuracy", "95 % interval", "chance")]
    for name, found in results.items():
        shown = [(group, score) for group, score in found.get("groups", {}).items()]
        shown += [(f"{found['mean']} mean" if shown else "", found["accuracy"])]
        for group, score in shown:
            last = score is found["accuracy"]
            guess = "" if found["chance"] is None or not last else f"{found['chance']:.2%}"
            rows.append((name, group, found["protocol"], str(found["shots"]), f"{score['n']:,}", f"{score['value']:.2%}", f"{score['low']:.2%} to {score['high']:.2%}", guess))
    return columns(rows, left=3)


def compared(results: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each comparison with other answers."""
    return [
        f"{name}: {one['difference']:+.2%} against {one['folder']} (95 % interval {one['low']:+.2%} to {one['high']:+.2%}, p = {one['p']:.2g}; "
        f"of {one['n']:,} items {one['better']:,} only right here, {one['worse']:,} only there)"
        for name, found in results.items()
        for one in [found.get("against")]
        if one is not None
    ]
