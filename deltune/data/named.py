"""Public data sets by name: where each is, what shape its rows have, and under which licence. Light to import.

An entry is data, not code: a name stands for a place on the Hugging Face hub and for the formats (see formats.py) in
which the set is published, the hub's own first. The same name in a source's `format` reads local files of that shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[str, Mapping[str, str]]  # a format, and the column of each role that has another name there


@dataclass(frozen=True)
class Named:
    """A public data set. `hub` is None where it cannot be had from the hub."""

    hub: str | None
    shapes: tuple[Shape, ...]
    licence: str
    note: str
    subset: str = ""
    revision: str = ""
    files: tuple[str, ...] = ("",)  # patterns inside the repository, each a source of its own; "" is what the hub declares


_ALPACA: Shape = ("alpaca", {})
_TRANSLATED: Shape = ("alpaca", {"instruction": "trans_instruction", "input": "trans_input", "output": "trans_output"})
_EXAM: Shape = (
    "exam",
    {
        "instruction": "textbox_q_instruction", "context": "textbox_q_context", "question": "textbox_question",
        "answer": "textbox_answer", "analysis": "textbox_answer_analysis",
    },
)  # fmt: skip
_PARQUET = "refs/convert/parquet"  # the hub's own conversion of sets that were published with a loading script

NAMED: dict[str, Named] = {
    "alpaca": Named("tatsu-lab/alpaca", (_ALPACA,), "CC BY-NC 4.0", "52,002 instructions, answers by text-davinci-003"),
    "alpaca-clean": Named("yahma/alpaca-cleaned", (_ALPACA,), "CC BY 4.0", "alpaca with faulty rows mended"),
    "alpaca-gpt4": Named("vicgalle/alpaca-gpt4", (_ALPACA,), "CC BY-NC 4.0", "alpaca's instructions, answers by GPT-4"),
    "chip2": Named("laion/OIG", (("dialogue", {}),), "Apache-2.0", "short dialogues of OIG, `<human>:` and `<bot>:`", files=("unified_chip2.jsonl",)),
    "self-instruct": Named(
        "yizhongw/self_instruct", (("prompt_completion", {}), ("instances", {})), "Apache-2.0",
        "instructions made by GPT-3; local files may be its seed tasks", subset="self_instruct", revision=_PARQUET,
    ),
    "hh-rlhf": Named(
        "Anthropic/hh-rlhf", (("dialogue", {"text": "chosen"}), ("messages", {"messages": "chosen"})), "MIT",
        "the preferred dialogues; the rejected ones are not read",
    ),
    "longform": Named("akoksal/LongForm", (("input_output", {}),), "MIT", "long texts with instructions made for them"),
    "oasst1": Named(
        "timdettmers/openassistant-guanaco", (("dialogue", {}), ("tree", {}), ("tree_rows", {})), "Apache-2.0",
        "conversations along the best replies of OpenAssistant; local files may be its trees or its messages",
    ),
    "unnatural-instructions": Named(
        "mrm8488/unnatural-instructions-core", (("instances", {}),), "MIT",
        "66,010 rows of one or more instances; unnatural-instructions-full has reformulations",
    ),
    "supernatural-instructions": Named(
        "Muennighoff/natural-instructions",
        (("task", {"definition": "definition", "input": "inputs", "output": "targets"}), ("task", {"definition": "Definition"})), "Apache-2.0",
        "some 1,600 tasks, column `task_name`; local files may be its tasks/*.json, whose file name is column `task`",
    ),
    "flan": Named(
        "Muennighoff/flan", (("input_output", {"input": "inputs", "output": "targets"}),), "of each task",
        "FLAN 2021, column `task`; see data.mix_by",
    ),
    "coig": Named(
        "BAAI/COIG", (_TRANSLATED, _EXAM, _ALPACA, ("rounds", {})), "Apache-2.0, parts MIT or CC BY-SA 4.0",
        "Chinese instructions in five files, each a source; the chats are to be unpacked from their archive and read with format=rounds",
        files=(
            "exam_instructions.jsonl", "human_value_alignment_instructions_part1.json", "human_value_alignment_instructions_part2.json",
            "leetcode_instructions.jsonl", "translated_instructions.jsonl",
        ),
    ),
    "wudao": Named(
        None, (("titled", {}),), "of data.baai.ac.cn, after registration",
        "Chinese web text, 200 GB; download it from https://data.baai.ac.cn/details/WuDaoCorporaText and name its folder",
    ),
    "c4": Named(
        "allenai/c4", (("text", {}),), "ODC-BY", "English web text, 1,024 files, 305 GB; files=en/c4-train.00000-of-01024.json.gz is the first",
        files=("en/c4-train.*.json.gz",),
    ),
}  # fmt: skip


def named(name: str) -> Named | None:
    """The data set of a name, in whatever case it is written."""
    return NAMED.get(name.lower())
