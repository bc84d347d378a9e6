"""The tasks that a model can be asked, one entry each: how its files are read, how it is asked and how it is scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltune.evaluation.tasks import readers, readers_mmlu
from deltune.evaluation.tasks.item import PROTOCOLS, Item, Task
from deltune.evaluation.tasks.reading import chosen


def released(reader: Callable[[Path], list[Item]], *names: str, train: str) -> dict[str, Any]:
    """`read` and `exemplars` of a task whose folder holds these files: the first that is there is asked (the test split,
    where it was released with answers), and the training split beside it gives the exemplars."""

    def read(path: Path) -> list[Item]:
        return reader(chosen(path, names))

    def exemplars(path: Path) -> list[Item]:
        file = chosen(path, names)
        beside = file.with_name(train)
        return reader(beside) if beside.is_file() and beside != file else []

    return {"read": read, "exemplars": exemplars, "files": names, "train": train}


TASKS: dict[str, Task] = {
    "mmlu": Task(
        name="mmlu",
        help="57 subjects of school, university and profession, four choices (Hendrycks et al. 2021)",
        read=readers_mmlu.read,
        exemplars=readers_mmlu.exemplars,
        files=("test/*_test.csv", *readers_mmlu.PROMPTS),
        train="dev/*_dev.csv",
        template="mmlu",
        protocols=PROTOCOLS,
        mean="macro",
        language="en",
    ),
    "c3-d": Task(
        name="c3-d",
        help="Chinese dialogues, two to four choices (Sun et al. 2020)",
        template="panda-zh",
        protocols=PROTOCOLS,
        mean="micro",
        language="zh",
        **released(readers.dialogues, "c3-d-test.json", "c3-d-dev.json", train="c3-d-train.json"),
    ),
    "c3-m": Task(
        name="c3-m",
        help="Chinese passages of mixed kinds, two to four choices (Sun et al. 2020)",
        template="panda-zh",
        protocols=PROTOCOLS,
        mean="micro",
        language="zh",
        **released(readers.dialogues, "c3-m-test.json", "c3-m-dev.json", train="c3-m-train.json"),
    ),
    "dream": Task(
        name="dream",
        help="English dialogues, three choices (Sun et al. 2019)",
        template="plain",
        protocols=PROTOCOLS,
        mean="micro",
        language="en",
        **released(readers.dialogues, "test.json", "dev.json", train="train.json"),
    ),
    "logiqa": Task(
        name="logiqa",
        help="logical reading, four choices, in eight-line form (Liu et al. 2020)",
        template="plain",
        protocols=PROTOCOLS,
        mean="micro",
        language="en",
        **released(readers.logiqa, "Test.txt", "Eval.txt", train="Train.txt"),
    ),
    "logiqa-zh": Task(
        name="logiqa-zh",
        help="the same in Chinese",
        template="panda-zh",
        protocols=PROTOCOLS,
        mean="micro",
        language="zh",
        **released(readers.logiqa, "zh_test.txt", "zh_eval.txt", train="zh_train.txt"),
    ),
    "logiqa2": Task(
        name="logiqa2",
        help="logical reading, four choices, second edition (Liu et al. 2023)",
        template="plain",
        protocols=PROTOCOLS,
        mean="micro",
        language="en",
        **released(readers.logiqa2, "test.txt", "dev.txt", train="train.txt"),
    ),
    "logiqa2-zh": Task(
        name="logiqa2-zh",
        help="the same in Chinese",
        template="panda-zh",
        protocols=PROTOCOLS,
        mean="micro",
        language="zh",
        **released(readers.logiqa2, "test_zh.txt", "dev_zh.txt", train="train_zh.txt"),
    ),
    "reclor": Task(
        name="reclor",
        help="logical reading from admission tests, four choices (Yu et al. 2020)",
        template="reclor",
        protocols=PROTOCOLS,
        mean="micro",
        language="en",
        **released(readers.reclor, "val.json", train="train.json"),
    ),
    "lsat": Task(
        name="lsat",
        help="analytical reasoning of the LSAT, five choices (Zhong et al. 2022)",
        template="plain",
        protocols=PROTOCOLS,
        mean="micro",
        language="en",
        **released(readers.lsat, "AR_TestData.json", "AR_DevelopmentData.json", train="AR_TrainingData.json"),
    ),
    "strategyqa": Task(
        name="strategyqa",
        help="yes or no by steps that the question does not name (Geva et al. 2021)",
        template="yes-no",
        protocols=PROTOCOLS,
        mean="micro",
        language="en",
        **released(readers.strategyqa, "strategyqa_train.json", train="strategyqa_train.json"),
    ),
    "gsm8k": Task(
        name="gsm8k",
        help="sums in words, scored by the final number (Cobbe et al. 2021)",
        template="gsm8k",
        protocols=("generation",),
        mean="micro",
        language="en",
        **released(readers.gsm8k, "test.jsonl", train="train.jsonl"),
    ),
}
