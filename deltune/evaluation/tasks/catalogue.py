"""The tasks that a model can be asked, one entry each: how its files are read, how it is asked and how it is scored."""

from __future__ import annotations

from deltune.evaluation.tasks import readers_mmlu
from deltune.evaluation.tasks.item import Task

TASKS: dict[str, Task] = {
    "mmlu": Task(
        name="mmlu",
        help="57 subjects of school, university and profession, four choices",
        read=readers_mmlu.read,
        exemplars=readers_mmlu.exemplars,
        template="mmlu",
        protocols=("letters", "likelihood", "generation"),
        mean="macro",
        language="en",
    ),
}
