"""Real files: every row of them is used, its text comes back, and what is trained is the answer and its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltune.data.loader import Loader
from deltune.errors import DataError
from tests.encoded import marked, prepared
from tests.test_data_templates import TOOLS, tokenizer_with
from tests.tiny import tiny_tokenizer


def rows_of(path: Path) -> list[dict]:
    text = path.read_text("utf-8")
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]


def trained_parts(data, i, tokenizer):
    return [part.partition("»")[0] for part in marked(data[i], tokenizer).split("«")[1:]]


def bpe(real_data, template=None):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(real_data / "tokenizers/torchtune_tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


PAIRS = {
    "gsm8k/test.jsonl": ("input_output (input=question, output=answer)", "answer", 1319),
    "alpaca/alpaca_en_demo.json": ("alpaca", "output", 999),
    "alpaca/alpaca_zh_demo.json": ("alpaca", "output", 1000),
    "alpaca/alpaca_tiny.json": ("alpaca", "output", 100),
    "mmlu/zero_shot_mmlu_val.json": ("input_output", "output", 1531),
    "self_instruct/prompt_completion.jsonl": ("prompt_completion", "completion", 200),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_row_of_instruction_files_is_used(real_data, name):
    format, column, count = PAIRS[name]
    rows, tokenizer = rows_of(real_data / name), tiny_tokenizer()
    empty = [i for i, row in enumerate(rows) if not row[column].strip()]
    result = prepared(real_data / name, tokenizer, max_length=100_000, on_bad="skip" if empty else "stop")
    assert result.report.sources[0].format == format
    assert (len(rows), result.report.rows, result.report.rejected) == (count, count, len(empty))
    used = [row for i, row in enumerate(rows) if i not in empty]
    assert len(result.train) == len(used) and not result.report.truncated
    for i in range(0, len(used), 37):
        assert trained_parts(result.train, i, tokenizer) == [used[i][column] + "</s>"]
    assert result.report.trained_tokens == sum(len(row[column].encode()) + 1 for row in used)  # a token a byte, and EOS


def test_real_bpe_tokens_say_the_answers(real_data):
    """A tokenizer of another making: merges of 2,000 tokens, no chat template, so the Alpaca frame."""
    tokenizer = bpe(real_data)
    path = real_data / "alpaca/alpaca_en_demo.json"
    result = prepared(path, tokenizer, max_length=100_000)
    assert result.report.sources[0].template == "alpaca"
    for i in range(0, 999, 101):
        row, (_, labels, place) = rows_of(path)[i], result.train[i]
        assert place == f"{path}[{i}]"
        answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
        assert [int(x) for x in labels if x != -100] == [*answer, tokenizer.eos_token_id]


def test_conversations_honour_their_loss_weights(real_data):
    rows, tokenizer = rows_of(real_data / "chat/v1_sft_demo.jsonl"), tiny_tokenizer()
    result = prepared(real_data / "chat/v1_sft_demo.jsonl", tokenizer, max_length=100_000)
    assert result.report.sources[0].format == "messages" and len(result.train) == 500
    for i, row in enumerate(rows):
        expected = [m["content"][0]["value"] + "</s>" for m in row["messages"] if m["loss_weight"]]
        assert trained_parts(result.train, i, tokenizer) == expected


def test_a_tiny_chat(real_data):
    tokenizer = tiny_tokenizer()
    data = prepared(real_data / "chat/chat_tiny.json", tokenizer).train
    assert trained_parts(data, 0, tokenizer) == ["The meaning of life is 42.</s>", "I agree.</s>"]
    assert marked(data[0], tokenizer).startswith("<s><|system|>\nYou are an AI assistant.\n<|user|>\nWhat is")


def test_tool_calls_are_answers_and_observations_are_not(real_data):
    rows, tokenizer = rows_of(real_data / "chat/glaive_toolcall_en_demo.json"), tokenizer_with(TOOLS)
    result = prepared(real_data / "chat/glaive_toolcall_en_demo.json", tokenizer, max_length=100_000)
    assert (result.report.rows, len(result.train), result.report.notes) == (300, 300, {})
    for i in range(0, 300, 7):
        turns = [t for t in rows[i]["conversations"] if t["from"] in ("gpt", "function_call")]
        parts = trained_parts(result.train, i, tokenizer)
        assert len(parts) == len(turns)
        for turn, part in zip(turns, parts, strict=True):
            if turn["from"] == "gpt":
                assert part == turn["value"] + "<|im_end|>"
            else:
                call = json.loads(turn["value"])
                body = part.removeprefix("<tool_call>").removesuffix("</tool_call><|im_end|>")
                name, _, arguments = body.partition(" ")
                assert (name, json.loads(arguments)) == (call["name"], call["arguments"])


@pytest.mark.parametrize(("name", "count"), [("corpus/wiki_demo.txt", 30), ("corpus/c4_demo.jsonl", 300)])
def test_corpora_are_trained_to_the_last_token(real_data, name, count):
    tokenizer = tiny_tokenizer()
    result = prepared(real_data / name, tokenizer, mode="pretrain", max_length=512)
    raw = (real_data / name).read_text("utf-8")
    texts = [line for line in raw.split("\n") if line.strip()] if name.endswith("txt") else [r["text"] for r in rows_of(real_data / name)]
    assert (result.report.rows, len(texts)) == (count, count)
    assert result.report.trained_tokens == sum(len(text.encode()) for text in texts)  # bytes and EOS, but for the first token
    assert result.train.lengths.max() == 512 and result.train.num_trained.min() >= 1


def test_plain_text_for_pretraining_reads_40_thousand_lines(real_data):
    report = prepared(real_data / "corpus/tiny_shakespeare.txt", bpe(real_data), mode="pretrain", read_nums=2000).report
    assert report.rows == report.used == report.examples == 2000


REFUSED = {
    "preference/dpo_en_demo.json": "preference pairs (chosen, rejected)",
    "preference/hh_rlhf_tiny.json": "preference pairs (chosen, rejected)",
    "preference/kto_en_demo.json": "KTO",
    "chat/mllm_demo.json": "the row has images; only text is read",
    "c3/c3-d-dev.json": "no row is an object with named values",
    "logiqa2/dev.txt": "multiple-choice questions",
    "ratings/vicuna_questions.jsonl": "data.mode=pretrain",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_of_data_are_told_what_they_are(real_data, name):
    with pytest.raises(DataError) as error:
        prepared(real_data / name, tiny_tokenizer())
    assert REFUSED[name] in str(error.value) and name in str(error.value)


def test_a_folder_of_real_files_is_one_source(real_data):
    result = prepared(real_data / "alpaca", tiny_tokenizer(), read_nums=1200, max_length=256)
    assert result.report.sources[0].num_files == 3 and len(result.train) == 1200
    assert result.train[999].row.endswith("alpaca_tiny.json[0]")
    batches = Loader(result.train, micro_batch=4, pad_id=258, batching="grouped").step(3)
    assert len(batches[0].rows) == 4


@pytest.mark.parametrize("name", ["gsm8k/test.jsonl", "alpaca/alpaca_en_demo.json", "alpaca/alpaca_zh_demo.json"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_bins_of_real_rows_are_full_to_one_percent(real_data, name, epochs):
    data = prepared(real_data / name, bpe(real_data), max_length=1024).train
    capacity = 4096
    loader = Loader(data, micro_batch=8, micro_batch_tokens=capacity, batching="packed", pad_id=0, num_examples=epochs * len(data))
    found = [batch.num_tokens for i in range(loader.num_steps(epochs)) for batch in loader.step(i)]
    assert sum(found) == epochs * data.lengths.sum()
    assert 1 - sum(found) / (len(found) * capacity) <= 0.01
