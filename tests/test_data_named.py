"""Public data sets by name: every name asks the hub for its own rows, and rows of its schema train; nothing is downloaded here."""

from __future__ import annotations

import json
import re

import pytest

from deltune.commands import list as listing
from deltune.data.config import DataConfig, Source
from deltune.data.formats import DOCUMENTS, ROLES
from deltune.data.named import NAMED
from deltune.data.prepare import prepare
from deltune.data.sources import resolve
from deltune.errors import DataError
from tests.conftest import ROOT
from tests.encoded import all_marked, prepared, write_rows
from tests.test_data_shapes import EXAM, HH, REFORMULATED, SHAPES, chat
from tests.tiny import tiny_tokenizer

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
ADDED = chat(("Add.\n1 2", "3"))
# name -> what the hub is asked for: (path, other arguments), a row of its schema, the first example that it gives
HUB = {
    "alpaca": (("tatsu-lab/alpaca", {}), ALPACA | {"text": "Below is ..."}, ADDED),
    "alpaca-clean": (("yahma/alpaca-cleaned", {}), ALPACA, ADDED),
    "alpaca-gpt4": (("vicgalle/alpaca-gpt4", {}), ALPACA | {"text": "Below is ..."}, ADDED),
    "chip2": (("json", {"data_files": {"train": "hf://datasets/laion/OIG/unified_chip2.jsonl"}}), SHAPES["chip2"][0][0], chat(("2+2?", "4"))),
    "self-instruct": (
        ("yizhongw/self_instruct", {"name": "self_instruct", "revision": "refs/convert/parquet"}),
        {"prompt": "Add 1 2", "completion": "3"}, chat(("Add 1 2", "3")),
    ),
    "hh-rlhf": (("Anthropic/hh-rlhf", {}), {"chosen": HH, "rejected": HH}, chat(("Hi", "Yo\n\nyo"), ("Bye", "See you"))),
    "longform": (("akoksal/LongForm", {}), SHAPES["longform"][0][0], chat(("Write.", "Text."))),
    "oasst1": (("timdettmers/openassistant-guanaco", {}), SHAPES["guanaco"][0][0], SHAPES["guanaco"][2][0]),
    "unnatural-instructions": (("mrm8488/unnatural-instructions-core", {}), REFORMULATED, ADDED),
    "supernatural-instructions": (("Muennighoff/natural-instructions", {}), SHAPES["supernatural, hub"][0][0], ADDED),
    "flan": (("Muennighoff/flan", {}), SHAPES["flan"][0][0], chat(("2+2?", "4"))),
    "coig": (("json", {"data_files": {"train": "hf://datasets/BAAI/COIG/exam_instructions.jsonl"}}), EXAM, SHAPES["coig exam"][2][0]),
    "c4": (
        ("json", {"data_files": {"train": "hf://datasets/allenai/c4/en/c4-train.*.json.gz"}}),
        {"text": "Some text.", "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"}, "S«ome text.</s>»",
    ),
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The `datasets` library, with rows of ours for what it would download: tables of Arrow, where absent keys are null."""
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[str, dict]] = []
    rows: list[dict] = []

    def load_dataset(path, split, **arguments):
        asked.append((path, {"split": split} | arguments))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked, rows


def test_every_name_is_asked_for_here():
    assert {*HUB, "wudao"} == set(NAMED)
    assert all(format in ROLES for entry in NAMED.values() for format, _ in entry.shapes)


@pytest.mark.parametrize("name", HUB)
@pytest.mark.parametrize("written", ["as listed", "in capitals"])
def test_a_name_loads_its_rows_from_the_hub(hub, name, written):
    asked, rows = hub
    (path, arguments), row, expected = HUB[name]
    rows += [row, row]
    mode = "pretrain" if NAMED[name].shapes[0][0] in DOCUMENTS else "sft"
    source = Source(path=name if written == "as listed" else name.upper(), files="exam_instructions.jsonl" if name == "coig" else None)
    tokenizer = tiny_tokenizer()
    result = prepare(DataConfig(train=[source], mode=mode, cache=None, max_length=4096), tokenizer)
    assert asked and all(call == (path, {"split": "train"} | arguments) for call in asked)
    marked = all_marked(result.train, tokenizer)
    assert marked[0] == expected and (result.report.rows, result.report.used) == (2, 2)
    assert result.train[0].row.endswith("[0]") and NAMED[name].hub in result.train[0].row


@pytest.mark.parametrize("name", [name for name in NAMED if name != "c4"])
def test_local_files_are_read_in_the_shape_of_a_name(tmp_path, name):
    row, expected = HUB[name][1:] if name in HUB else ({"title": "T", "content": "Body"}, "T« Body</s>»")
    file = write_rows(tmp_path / "a.jsonl", [row])
    tokenizer = tiny_tokenizer()
    mode = "pretrain" if name == "wudao" else "sft"
    for settings in ({"format": name}, {"train": [Source(path=file, format=name)]}):
        assert all_marked(prepared(file, tokenizer, mode=mode, max_length=4096, **settings).train, tokenizer)[0] == expected


@pytest.mark.parametrize(("name", "shape"), [("self-instruct", "seed tasks"), ("oasst1", "trees"), ("oasst1", "messages table"), ("coig", "coig translated"), ("coig", "coig rounds")])
def test_a_name_stands_for_all_shapes_that_the_set_was_published_in(tmp_path, name, shape):
    rows, _, expected = SHAPES[shape]
    tokenizer = tiny_tokenizer()
    assert all_marked(prepared(write_rows(tmp_path / "a.jsonl", rows), tokenizer, format=name).train, tokenizer) == expected


def test_rows_of_another_shape_are_refused_by_name(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(DataError, match=r"nearest is dialogue, which lacks 'text'"):
        prepared(file, tiny_tokenizer(), format="chip2")


def test_a_set_of_several_files_is_a_source_of_each(hub, tmp_path):
    sources = resolve([Source(path="coig", weight=2.0)], "data.train")
    assert [source.name for source in sources] == [f"coig/{file}" for file in NAMED["coig"].files]
    assert {source.source.weight for source in sources} == {2.0}
    rows = {"exam.jsonl": EXAM, "human.json": ALPACA, "translated.jsonl": SHAPES["coig translated"][0][0]}
    for name, row in rows.items():
        write_rows(tmp_path / name, [row] * 120)
    result = prepared(tmp_path, tiny_tokenizer(), train=[Source(path=str(tmp_path), format="coig")], max_length=4096)
    assert [source.format.partition(" ")[0] for source in result.report.sources] == ["exam", "alpaca", "alpaca"]
    assert result.report.used == 360


def test_the_format_that_is_given_goes_before_that_of_the_name(hub):
    _, rows = hub
    rows.append({"text": "### Human: Hi### Assistant: Yo"})
    tokenizer = tiny_tokenizer()
    config = DataConfig(train=["oasst1"], mode="pretrain", format="text", cache=None)
    assert all_marked(prepare(config, tokenizer).train, tokenizer) == ["#«## Human: Hi### Assistant: Yo</s>»"]


def test_hub_data_sets_may_be_narrowed(hub):
    asked, rows = hub
    rows.append(ALPACA)
    entries = [Source(path="hf:o/n", split="test", subset="s", revision="r"), Source(path="hf:o/n", files="x/*.parquet", revision="refs/pr/1")]
    prepare(DataConfig(train=entries, cache=None), tiny_tokenizer())
    assert asked[0] == ("o/n", {"split": "test", "name": "s", "revision": "r"})
    assert ("parquet", {"split": "train", "data_files": {"train": "hf://datasets/o/n@refs%2Fpr%2F1/x/*.parquet"}}) in asked
    with pytest.raises(DataError, match=r"files=x\.zip must end in \.jsonl"):
        prepare(DataConfig(train=[Source(path="hf:o/n", files="x.zip")], cache=None), tiny_tokenizer())


def test_names_that_cannot_be_meant_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"cannot be had from the hub: .*data\.baai\.ac\.cn.* with format: wudao"):
        resolve(["WuDao"], "data.train")
    with pytest.raises(DataError, match=r"no file or folder 'alpaca-claen'.*the public data set 'alpaca-clean'\?"):
        resolve(["alpaca-claen"], "data.train")
    (tmp_path / "flan").mkdir()
    with pytest.raises(DataError, match=r"say \./flan for the first, hf:Muennighoff/flan for the second"):
        resolve(["flan"], "data.train")
    write_rows(tmp_path / "flan" / "a.jsonl", [ALPACA])
    assert len(resolve(["./flan"], "data.train")[0].files) == 1
    with pytest.raises(DataError, match=r"subset has no effect on './flan', which is no hub data set"):
        resolve([Source(path="./flan", subset="x")], "data.train")


# ---- real rows


def test_seed_tasks_give_an_example_for_each_instance(real_data):
    path = real_data / "self_instruct/seed_tasks.jsonl"
    tasks = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    tokenizer = tiny_tokenizer(chat_template=None)
    result = prepared(path, tokenizer, max_length=100_000)
    answers = [instance["output"] for task in tasks for instance in task["instances"]]
    assert result.report.sources[0].format == "instances" and (result.report.rows, result.report.rejected) == (175, 0)
    assert [text.partition("«")[2] for text in all_marked(result.train, tokenizer)] == [f"{answer}</s>»" for answer in answers]


@pytest.mark.parametrize(("file", "name", "mode", "count"), [
    ("alpaca/alpaca_en_demo.json", "alpaca", "sft", 999), ("alpaca/alpaca_zh_demo.json", "alpaca-gpt4", "sft", 1000),
    ("self_instruct/prompt_completion.jsonl", "self-instruct", "sft", 200), ("self_instruct/seed_tasks.jsonl", "self-instruct", "sft", 175),
    ("preference/hh_rlhf_tiny.json", "hh-rlhf", "sft", 1), ("corpus/c4_demo.jsonl", "c4", "pretrain", 300),
    ("mmlu/zero_shot_mmlu_val.json", "longform", "sft", 1531),
])  # fmt: skip
def test_real_files_are_read_by_the_name_of_their_shape(real_data, file, name, mode, count):
    report = prepared(real_data / file, tiny_tokenizer(), format=name, mode=mode, max_length=100_000, on_bad="skip").report
    assert report.rows == count and report.used >= 0.99 * count


# ---- what is shown


def test_the_page_shows_the_table():
    """If this fails: `make docs`."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    found = re.search(listing.BETWEEN_MARKS, page)
    assert found and found[0] == found[1] + listing.data_table() + found[2]


def test_names_are_listed(capsys):
    listing.main(["data"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(NAMED)
    assert next(line for line in lines if "hh-rlhf" in line).split(maxsplit=1)[1] == (
        "hf:Anthropic/hh-rlhf; dialogue or messages; MIT; the preferred dialogues; the rejected ones are not read"
    )
