"""Text of arriving tokens: pieces joined are the decoded whole, and stop strings never show."""

from __future__ import annotations

import random

import pytest

from deltune.models.text import AnswerText
from tests.tiny import tiny_tokenizer


def metaspace_tokenizer():
    """As sentencepiece's: words carry their leading space, unknown characters fall back to bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁", "▁the", "▁cat", "cat", "s", ".", "▁sat", "é", "<0x0A>"]
    vocabulary = {w: i for i, w in enumerate(["<unk>", *words, *(f"<0x{b:02X}>" for b in range(256) if b != 10)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_ids(tokenizer, character: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids([f"<0x{b:02X}>" for b in character.encode()])


def real_tokenizer(real_data):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(real_data / "tokenizers" / "torchtune_tokenizer.json"))


def streamed(tokenizer, ids, stop=()) -> tuple[list[str], AnswerText]:
    answer, pieces = AnswerText(tokenizer, stop), []
    for token in ids:
        answer.push(token)
        pieces.append(answer.take())
        if answer.stopped:
            break
    answer.finish()
    return [*pieces, answer.take_rest()], answer


def whole(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "real"])
def test_pieces_join_to_the_decoded_whole(kind, request):
    """Random ids: broken characters, special tokens in between, leading spaces.

    Decoders with byte fallback turn a whole run of bytes into U+FFFD for one broken byte in it, also characters that
    were whole and have been given out; there the runs are whole characters.
    """
    if kind == "real":
        tokenizer = real_tokenizer(request.getfixturevalue("real_data"))
    else:
        tokenizer = {"bytes": tiny_tokenizer, "metaspace": metaspace_tokenizer}[kind]()
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(1, 25))]
        if kind == "metaspace":
            words = [[i] for i in range(1, 9)] + [[tokenizer.eos_token_id], *(byte_ids(tokenizer, c) for c in "汉ß\n🙂")]
            ids = [i for _ in range(draw.randrange(1, 25)) for i in draw.choice(words)]
        pieces, answer = streamed(tokenizer, ids)
        assert "".join(pieces) == answer.text == whole(tokenizer, ids), ids


def test_a_character_comes_once_it_is_whole():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a汉é")["input_ids"]
    pieces, _ = streamed(tokenizer, ids)
    assert pieces == ["a", "", "", "汉", "", "é", ""]


def test_words_keep_their_spaces():
    tokenizer = metaspace_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["▁the", "▁cat", "s", "▁sat", "."])
    assert streamed(tokenizer, ids)[0] == ["the", " cat", "s", " sat", ".", ""]


def test_text_ends_before_the_first_stop_string_and_shows_nothing_of_it():
    tokenizer = tiny_tokenizer()
    stops = ["\nUser:", "\n\n", "STOP"]
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choice(["\n", "User", ":", "a", "ST", "OP", "é"]) for _ in range(draw.randrange(1, 14)))
        expected = text[: min((text.find(s) for s in stops if s in text), default=len(text))]
        pieces, answer = streamed(tokenizer, tokenizer(text)["input_ids"], stops)
        assert answer.text == expected, text
        assert answer.stopped == (expected != text)
        assert "".join(pieces) == expected
        assert all(expected.startswith("".join(pieces[:n])) for n in range(len(pieces))), text


def test_only_what_may_be_a_stop_string_is_held_back():
    tokenizer = tiny_tokenizer()
    pieces, _ = streamed(tokenizer, tokenizer("aEE.b")["input_ids"], ["EE!"])
    assert pieces == ["a", "", "", "EE.", "b", ""]
