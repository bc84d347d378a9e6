"""What QLoRA's data path gives, row by row: the same where nothing is cut, and without its faults where something is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from deltune.data.dataset import Example
from deltune.data.loader import Loader
from deltune.data.pack import join, pad
from tests.encoded import all_marked, prepared, write_rows
from tests.tiny import tiny_model, tiny_tokenizer

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


@pytest.fixture(scope="module")
def llama(real_data):
    """Llama 2's vocabulary: a BOS before every text, no pad token."""
    from transformers import LlamaTokenizer

    return LlamaTokenizer.from_pretrained(None, vocab_file=str(real_data / "tokenizers/llama2.model"), add_bos_token=True)


def theirs(source: str, target: str, tokenizer, *, source_max_len=10**6, target_max_len=10**6, train_on_source=False):
    """(ids, labels) as the paper's program makes them: BOS + source and target + EOS, each tokenised by itself and cut
    at its end; labels -100 on the source."""
    ask = [tokenizer.bos_token_id, *tokenizer(source, add_special_tokens=False)["input_ids"]][:source_max_len]
    answer = [*tokenizer(target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:target_max_len]
    return ask + answer, (ask if train_on_source else [-100] * len(ask)) + answer


def alpaca_rows(real_data, number=40):
    rows = json.loads((real_data / "alpaca/alpaca_en_demo.json").read_text("utf-8"))
    return [row for row in rows if not row["output"].startswith((" ", "\n"))][:number]


@pytest.mark.parametrize("train_on_source", [False, True])
def test_alpaca_rows_have_the_tokens_and_labels_of_the_paper(real_data, llama, tmp_path, train_on_source):
    """Their prompt ends after `### Response:`, ours after the line; what follows is compared with the same prompt."""
    rows = alpaca_rows(real_data)
    file = write_rows(tmp_path / "a.jsonl", rows)
    data = prepared(file, llama, max_length=100_000, format="alpaca-clean", train_on_source=train_on_source).train
    for i, row in enumerate(rows):
        prompt = (WITH_INPUT if row["input"] else WITHOUT_INPUT).format_map(row) + "\n"
        ids, labels = theirs(prompt, row["output"], llama, train_on_source=train_on_source)
        labels[0] = -100  # the first token is predicted from nothing: their model drops it when it shifts the labels
        assert data[i].ids.tolist() == ids
        assert data[i].labels.tolist() == labels


def test_pairs_have_them_too_and_an_empty_prompt_is_bos_alone(llama, tmp_path):
    rows = [{"input": "", "output": "### Human: Hi### Assistant: Yo"}, {"input": "2+2=", "output": "4"}]
    data = prepared(write_rows(tmp_path / "a.jsonl", rows), llama, format="longform").train
    for i, row in enumerate(rows):
        ids, labels = theirs(row["input"], row["output"], llama)
        assert (data[i].ids.tolist(), data[i].labels.tolist()) == (ids, labels)


def test_limits_keep_the_end_of_the_prompt_and_the_eos_that_theirs_cut(real_data, llama, tmp_path):
    rows = alpaca_rows(real_data)
    limits = {"max_source_length": 48, "max_target_length": 16}
    result = prepared(write_rows(tmp_path / "a.jsonl", rows), llama, **limits)
    lost = {"prompt": 0, "eos": 0}
    for i, row in enumerate(rows):
        prompt = (WITH_INPUT if row["input"] else WITHOUT_INPUT).format_map(row) + "\n"
        whole, whole_labels = theirs(prompt, row["output"], llama)
        ids, _ = theirs(prompt, row["output"], llama, source_max_len=48, target_max_len=16)
        border = whole_labels.count(-100)
        lost["eos"] += ids[-1] != llama.eos_token_id
        lost["prompt"] += ids[: min(border, 48)] != whole[:border]
        ours, labels = result.train[i].ids.tolist(), result.train[i].labels.tolist()
        kept = labels.count(-100)
        assert ours[0] == llama.bos_token_id and ours[-1] == llama.eos_token_id == labels[-1]
        assert kept <= 48 and len(ours) - kept <= 16
        assert ours[1:kept] == whole[border - kept + 1 : border]  # the prompt's end, with `### Response:`
        assert ours[kept:-1] == whole[border : border + len(ours) - kept - 1]  # the answer's beginning
    assert lost["prompt"] > 10 and lost["eos"] > 10  # rows that the limits meet


def test_guanacos_limits_leave_an_answer(llama, tmp_path):
    """Source 16 and target 512 with empty prompts: the answer is all there is."""
    text = "### Human: " + "tell me more " * 400 + "### Assistant: " + "no " * 400
    result = prepared(
        write_rows(tmp_path / "a.jsonl", [{"text": text}]), llama, format="oasst1", template="plain",
        prefix="### Human: ", postfix="### Assistant: ", max_source_length=16, max_target_length=512, train_on_source=True,
    )  # fmt: skip
    example = result.train[0]
    assert example.ids[-1] == llama.eos_token_id and 16 + 300 < len(example.ids) <= 16 + 512
    assert (example.labels[1:] == example.ids[1:]).all()


def test_pad_tokens_of_the_text_are_seen_and_trained():
    """Theirs masks every token that is the pad token, also the answer's end where that is one and the same."""
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id
    long, short = (np.array([5, eos, *[6] * n, eos], dtype=np.int32) for n in (4, 1))
    examples = [Example(ids, np.where(np.arange(len(ids)) > 0, ids, -100).astype(np.int32), "r") for ids in (long, short)]
    batch = pad(examples, eos)
    assert batch.attention_mask.tolist() == [[1] * 7, [1] * 4 + [0] * 3]
    assert batch.labels.tolist() == [[-100, *long[1:]], [-100, *short[1:], *[-100] * 3]]
    assert batch.num_trained_tokens == join(examples).num_trained_tokens == 9


def test_rows_are_grouped_by_tokens_not_by_characters(tmp_path):
    """A character of Chinese is three tokens here and one of English is one: by characters the groups would mix both."""
    tokenizer = tiny_tokenizer(chat_template=None)
    rows = [{"prompt": "", "completion": "a" * n if n % 2 else "漢" * n} for n in range(2, 66)]
    data = prepared(write_rows(tmp_path / "a.jsonl", rows), tokenizer).train
    characters = np.array([len(row["completion"]) for row in rows])
    assert data.lengths.tolist() == [n * (1 if n % 2 else 3) + 1 for n in range(2, 66)]

    def empty(order) -> int:
        return int(sum(4 * data.lengths[four].max() - data.lengths[four].sum() for four in np.array(order).reshape(-1, 4)))

    loader = Loader(data, micro_batch=4, pad_id=0, seed=1, batching="grouped", num_examples=64)
    found = sum(int((b.attention_mask == 0).sum()) for i in range(16) for b in loader.step(i))
    assert found == empty(np.argsort(-data.lengths, kind="stable")) < empty(np.argsort(-characters, kind="stable")) / 4


def test_the_evaluation_split_is_of_a_size_and_a_seed(tmp_path):
    tokenizer = tiny_tokenizer(chat_template=None)
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "", "completion": f"x{i}"} for i in range(200)])
    split = {seed: prepared(file, tokenizer, eval_size=32, seed=seed) for seed in (42, 43)}
    texts = {seed: (set(all_marked(s.train, tokenizer)), set(all_marked(s.evaluation, tokenizer))) for seed, s in split.items()}
    for train, held in texts.values():
        assert (len(train), len(held)) == (168, 32) and not train & held
    assert texts[42][1] != texts[43][1]
    again = prepared(file, tokenizer, eval_size=32, seed=42, read_nums=200, eval_read_nums=10)
    assert set(all_marked(again.evaluation, tokenizer)) < texts[42][1] and len(again.evaluation) == 10


def test_losses_do_not_depend_on_what_pads():
    """The same numbers whichever token pads, since neither mask nor labels look at it."""
    tokenizer = tiny_tokenizer()
    model = tiny_model().eval()
    ids = [np.arange(3, 3 + n, dtype=np.int32) for n in (9, 4)]
    examples = [Example(i, i.copy(), "r") for i in ids]
    with torch.no_grad():
        found = [model(input_ids=b.input_ids, attention_mask=b.attention_mask).logits for b in (pad(examples, tokenizer.eos_token_id), pad(examples, 7))]
    mask = pad(examples, 7).attention_mask.bool()
    assert torch.equal(found[0][mask], found[1][mask])


def test_guanacos_preset_trains_the_text_of_the_paper(tmp_path):
    from deltune.settings import Run, load

    data = load(Run, ["preset=guanaco_7b"]).data
    assert data.train == ["oasst1"]
    file = write_rows(tmp_path / "a.jsonl", [{"text": "### Human: Hi### Assistant: Yo### Human: Bye### Assistant: See you"}])
    own = {name: getattr(data, name) for name in ("template", "prefix", "postfix", "train_on_source", "max_length")}
    tokenizer = tiny_tokenizer()
    (text,) = all_marked(prepared(file, tokenizer, format="oasst1", **own).train, tokenizer)
    assert text == "#«## Human: Hi### Assistant: Yo</s>### Human: Bye### Assistant: See you</s>»"
