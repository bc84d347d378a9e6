"""Limits: what is cut, what is never cut, and that no token of a long document is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltune.data.config import DataConfig
from deltune.data.conversation import BadRow, Conversation, Message
from deltune.data.encode import Encoder
from deltune.errors import DataError
from tests.encoded import all_marked, prepared, write_rows
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat_template=None)
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def cut(tmp_path, prompt, answer, **limits):
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": answer}])
    result = prepared(file, TOKENIZER, **limits)
    (text,) = all_marked(result.train, TOKENIZER)
    return text, result.report.truncated


CASES = [
    # what fits stays
    ("12345678", "abcdefg", {"max_length": 16}, "12345678«abcdefg</s>»", 0),
    # the prompt gives way first, at its beginning
    ("12345678", "abc", {"max_length": 10}, "345678«abc</s>»", 1),
    # down to half of max_length, then the answer, at its end, but for its EOS
    ("12345678", "abcdefg", {"max_length": 14}, "2345678«abcdef</s>»", 1),
    ("12345678", "abcdefg", {"max_length": 10}, "45678«abcd</s>»", 1),
    ("12", "abcdefghij", {"max_length": 10}, "12«abcdefg</s>»", 1),
    ("12345678", "a", {"max_length": 4}, "78«a</s>»", 1),
    ("12345678", "abcdefg", {"max_length": 2}, "8«</s>»", 1),
    ("12345678", "abcdefg", {"max_source_length": 3}, "678«abcdefg</s>»", 1),
    ("12345678", "abcdefg", {"max_target_length": 3}, "12345678«ab</s>»", 1),
    ("12345678", "abcdefg", {"max_target_length": 1}, "12345678«</s>»", 1),
    ("12345678", "abcdefg", {"max_source_length": 4, "max_target_length": 4, "max_length": 7}, "678«abc</s>»", 1),
    ("12345678", "abcdefg", {"max_source_length": 8, "max_target_length": 8}, "12345678«abcdefg</s>»", 0),
]


@pytest.mark.parametrize(("prompt", "answer", "limits", "expected", "truncated"), CASES)
def test_prompts_lose_their_beginning_and_answers_their_end(tmp_path, prompt, answer, limits, expected, truncated):
    assert cut(tmp_path, prompt, answer, **limits) == (expected, truncated)


def test_bos_stays_when_a_prompt_is_cut(tmp_path):
    tokenizer = tiny_tokenizer()  # its template writes BOS
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "x" * 50, "completion": "y"}])
    for limits in ({"max_source_length": 20}, {"max_length": 22}):
        (text,) = all_marked(prepared(file, tokenizer, **limits).train, tokenizer)
        assert text == "<s>" + "x" * 4 + "\n<|assistant|>\n«y</s>»"  # 20 tokens before the answer


def test_a_long_conversation_keeps_whole_turns_from_its_beginning(tmp_path):
    rows = [{"messages": [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 3, ["ab", "cd", "ef", "ghi", "j", "k"], strict=True)]}]
    file = write_rows(tmp_path / "a.jsonl", rows)
    whole = "ab«cd</s>»ef«ghi</s>»j«k</s>»"  # 5, 11 and 14 tokens
    for max_length, expected in ((14, whole), (13, "ab«cd</s>»ef«ghi</s>»"), (10, "ab«cd</s>»"), (5, "ab«cd</s>»"), (4, "ab«c</s>»"), (3, "b«c</s>»")):
        assert all_marked(prepared(file, TOKENIZER, max_length=max_length).train, TOKENIZER) == [expected]


def test_overlong_rows_can_be_left_out_or_refused(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "a" * n, "completion": "b"} for n in (3, 30, 5, 40)])
    counts = prepared(file, TOKENIZER, max_length=10, overlong="skip").report.counts
    assert (counts.rows, counts.used, counts.overlong, counts.rejected, counts.truncated) == (4, 2, 2, 0, 0)
    with pytest.raises(DataError) as error:
        prepared(file, TOKENIZER, max_length=10, overlong="error", on_bad="skip")
    assert f"{file}:2: 32 tokens, data.max_length is 10" in str(error.value) and f"{file}:4" in str(error.value)
    with pytest.raises(DataError, match="a prompt of 30 tokens, the limit is 8"):
        prepared(file, TOKENIZER, max_source_length=8, overlong="error")


turn_lengths = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12), st.booleans()), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(turns=turn_lengths, max_length=st.integers(2, 40), source=st.none() | st.integers(1, 12), target=st.none() | st.integers(1, 12))
def test_whatever_the_limits_an_example_keeps_an_answer_with_its_end(turns, max_length, source, target):
    """Held to the uncut example: within the limits, in order, nothing trained that was not, something trained."""
    letters = iter("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789" * 3)
    text = lambda n: "".join(next(letters) for _ in range(n))  # noqa: E731
    messages = [m for p, a, train in turns for m in (Message("user", text(p)), Message("assistant", text(a), train=train))]
    config = DataConfig(template="plain", max_length=max_length, max_source_length=source, max_target_length=target)
    ((examples, _),) = Encoder(config, TOKENIZER, "messages").encode([[Conversation(tuple(messages))]])
    ((uncut, _),) = Encoder(DataConfig(template="plain", max_length=10**6), TOKENIZER, "messages").encode([[Conversation(tuple(messages))]])
    if isinstance(uncut, BadRow):  # nothing is trained in it, limits or not
        assert isinstance(examples, BadRow)
        return
    if isinstance(examples, BadRow):  # all that was left to train is its first token
        assert "no token of it would be trained" in str(examples)
        assert turns[0][0] == 0 and turns[0][2] and target == 1
        return
    (example,), (whole,) = examples, uncut
    assert 2 <= len(example.ids) <= max_length
    assert example.trained.any() and not example.trained[0]
    pairs = iter(zip(whole.ids.tolist(), whole.trained.tolist(), strict=True))
    for token, trained in zip(example.ids[1:].tolist(), example.trained[1:].tolist(), strict=True):
        assert any(pair == (token, trained) for pair in pairs)  # a subsequence of the whole, with the same labels
    ends = np.flatnonzero(example.trained & ~np.append(example.trained[1:], False))
    assert all(example.ids[e] == EOS for e in ends)
    assert example.truncated == (len(example.ids) < len(whole.ids))


@settings(max_examples=100, deadline=None)
@given(num_tokens=st.integers(1, 300), max_length=st.integers(2, 60))
def test_every_token_of_a_document_but_the_first_is_predicted_once(num_tokens, max_length):
    text = "".join(chr(33 + i % 90) for i in range(num_tokens))
    encoder = Encoder(DataConfig(mode="pretrain", max_length=max_length), TOKENIZER, "text")
    ((pieces, _),) = encoder.encode([[Conversation(text=text)]])
    whole = [*TOKENIZER(text)["input_ids"], EOS]
    assert [int(i) for p in pieces for i in p.ids[p.trained]] == whole[1:]
    assert all(2 <= len(p.ids) <= max_length for p in pieces)
    start = 0
    for piece in pieces:  # pieces are stretches of the document
        assert piece.ids.tolist() == whole[start : start + len(piece.ids)]
        start += len(piece.ids) - 1


def test_a_split_document_keeps_its_row(tmp_path):
    (tmp_path / "a.txt").write_text("short\n" + "long " * 100 + "\n")
    result = prepared(tmp_path / "a.txt", TOKENIZER, mode="pretrain", max_length=64)
    assert {result.train[i].row for i in range(1, len(result.train))} == {f"{tmp_path / 'a.txt'}:2"}
    assert (result.report.rows, result.report.used, result.report.truncated) == (2, 2, 0)
    assert result.report.trained_tokens == (5 + 1 - 1) + (500 + 1 - 1)
    skipped = prepared(tmp_path / "a.txt", TOKENIZER, mode="pretrain", max_length=64, overlong="skip").report
    assert (skipped.used, skipped.overlong) == (1, 1)
