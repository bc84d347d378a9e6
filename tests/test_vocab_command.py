"""`deltune vocab`: sentencepiece itself says what a merged vocabulary does, and transformers' tokenizer must say the same."""

from __future__ import annotations

import json
import random
import re

import pytest

from deltune.cli import main
from deltune.errors import ModelError
from deltune.models import pieces

LATIN = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "seven", "gulls", "walk", "along", "the", "harbour", "wall", "and", "argue", "about", "nets"]
OTHER = ["море", "спит", "у", "старой", "стены", "и", "рыбак", "чинит", "сети", "пока", "чайки", "гуляют", "по", "берегу", "the", "dog", "walks"]


def trained(folder, words, name, kind="bpe", size=340, **more):
    """A sentencepiece model of a few words, trained here."""
    import sentencepiece

    order = random.Random(0)
    text = [" ".join(order.choices(words, k=8)) for _ in range(400)]
    settings = dict(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / name), vocab_size=size, model_type=kind, minloglevel=2, **(settings | more)
    )
    return folder / f"{name}.model"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    return {
        "base": trained(folder, LATIN, "base"),
        "other": trained(folder, OTHER, "other", user_defined_symbols=["<turn>"], control_symbols=["<mask>"]),
        "unigram": trained(folder, OTHER, "unigram", "unigram", size=300),
    }


def rows(proto):
    return [(piece.piece, piece.score, piece.type) for piece in proto.pieces]


def words_of(vocabulary, count=60, seed=1):
    order = random.Random(seed)
    return [" ".join(order.choices(vocabulary, k=order.randrange(1, 9))) for _ in range(count)]


def holds_to_the_base(base, merged, texts):
    """Old texts in which no added piece occurs are cut as before; every text comes back whole."""
    before, after = pieces.processor_of(base), pieces.processor_of(merged.proto)
    added = [piece.piece for piece in list(merged.proto.pieces)[merged.num_base :]]
    untouched = 0
    for text in texts:
        written = "▁" + text.replace(" ", "▁")
        if not any(piece in written for piece in added):
            untouched += 1
            assert after.encode(text) == before.encode(text), text
        assert after.decode(after.encode(text)) == text
    return untouched


@pytest.mark.parametrize("scores", pieces.SCORES)
def test_base_pieces_stay_and_the_others_follow_in_their_order(models, scores):
    base, other = (pieces.read(models[name], name) for name in ("base", "other"))
    merged = pieces.merge(base, other, scores=scores)
    there = {piece.piece for piece in base.pieces}
    expected = [piece for piece in other.pieces if piece.type in (1, 4) and piece.piece not in there]
    assert rows(merged.proto)[: len(base.pieces)] == rows(base)
    new = rows(merged.proto)[len(base.pieces) :]
    assert [(name, kind) for name, _, kind in new] == [(piece.piece, piece.type) for piece in expected]
    lowest = min(piece.score for piece in base.pieces if piece.type == 1)
    top = max(piece.score for piece in base.pieces if piece.type == 1) + len(other.pieces)
    wanted = {"kept": [piece.score for piece in expected], "above": [top - i for i in range(len(expected))], "below": [lowest - 1 - i for i in range(len(expected))]}
    assert [score for _, score, _ in new] == pytest.approx(wanted[scores], abs=1e-3)
    assert len({score for _, score, kind in rows(merged.proto) if kind == 1}) == sum(kind == 1 for *_, kind in rows(merged.proto))
    assert len({name for name, _, _ in rows(merged.proto)}) == len(merged.proto.pieces) == merged.proto.trainer_spec.vocab_size
    assert merged.specials == ("<mask>",) and ("<turn>", 4) in {(name, kind) for name, _, kind in new}
    assert merged.num_there == sum(piece.piece in there and piece.type == 1 for piece in other.pieces)


@pytest.mark.parametrize("scores", pieces.SCORES)
def test_old_texts_are_cut_as_before_and_new_ones_shorter(models, scores):
    base, other = (pieces.read(models[name], name) for name in ("base", "other"))
    merged = pieces.merge(base, other, scores=scores, scripts=["Cyrillic"])
    texts = words_of(LATIN) + words_of(OTHER, seed=2) + ["", "a\nb\tc", "海面 🎣", "the море dog"]
    assert holds_to_the_base(base, merged, texts) >= len(LATIN)
    before, after = pieces.processor_of(base), pieces.processor_of(merged.proto)
    assert sum(len(after.encode(text)) for text in words_of(OTHER)) < 0.7 * sum(len(before.encode(text)) for text in words_of(OTHER))


@pytest.mark.parametrize("scores", pieces.SCORES)
def test_transformers_cuts_texts_as_sentencepiece_does(models, scores, tmp_path):
    code = main(["vocab", "merge", f"base={models['base']}", f"other={models['other']}", f"out={tmp_path / 'merged'}", f"scores={scores}"])
    assert code == 0
    from transformers import AutoTokenizer

    fast, itself = AutoTokenizer.from_pretrained(tmp_path / "merged"), pieces.processor_of(pieces.read(tmp_path / "merged", "merged"))
    assert (fast.bos_token, fast.eos_token, fast.unk_token) == ("<s>", "</s>", "<unk>")
    for text in [*words_of(LATIN), *words_of(OTHER), "two  spaces", " a space first", "a\nb\tc", "海面 🎣", "чай gull<turn>"]:
        assert fast(text, add_special_tokens=False)["input_ids"] == itself.encode(text), text
        assert fast(text)["input_ids"] == [itself.bos_id(), *itself.encode(text)]
        assert fast.decode(itself.encode(text)) == itself.decode(itself.encode(text))


def test_a_script_takes_only_its_own_letters(models):
    base, other = (pieces.read(models[name], name) for name in ("base", "other"))
    merged = pieces.merge(base, other, scripts=["cyrillic"])
    added = [piece.piece for piece in list(merged.proto.pieces)[merged.num_base :]]
    assert added and all(any("а" <= letter <= "я" for letter in piece) and not any("a" <= letter <= "z" for letter in piece) for piece in added)
    assert [pieces.script_of(letter) for letter in "aЯ海ひ한1_ "] == ["latin", "cyrillic", "han", "hiragana", "hangul", None, None, None]


def test_a_unigram_base_keeps_its_normaliser_and_is_written_for_sentencepiece(models, tmp_path, capsys):
    assert main(["vocab", "merge", f"base={models['unigram']}", f"other={models['base']}", f"out={tmp_path / 'merged'}"]) == 0
    assert [file.name for file in (tmp_path / "merged").iterdir()] == ["tokenizer.model"]
    told = capsys.readouterr().out
    assert "tokenizer.model alone" in told and "log-probabilities" in told
    base, merged = pieces.read(models["unigram"], "base"), pieces.read(tmp_path / "merged", "merged")
    assert merged.normalizer_spec == base.normalizer_spec and rows(merged)[: len(base.pieces)] == rows(base)


def test_pieces_that_are_not_reached_are_told(models):
    """A piece of three letters of which no two are a piece can never be joined."""
    base, other = pieces.read(models["base"], "base"), pieces.read(models["other"], "other")
    lone = type(other)()
    lone.CopyFrom(other)
    del lone.pieces[:]
    lone.pieces.add(piece="жщэ", score=-1.0, type=1)
    assert pieces.merge(base, lone).unreached == ("жщэ",)


def test_what_does_not_fit_is_one_message(models, tmp_path, capsys):
    base, other = (pieces.read(models[name], name) for name in ("base", "other"))
    with pytest.raises(ModelError, match=r"nothing to add: of the other's .* are in the base already"):
        pieces.merge(base, base)
    with pytest.raises(ModelError, match="scripts names 'cyrilic', which no letter is of; nearest: cyrillic"):
        pieces.merge(base, other, scripts=["cyrilic"])
    other.normalizer_spec.add_dummy_prefix = False
    with pytest.raises(ModelError, match="only the base puts a space before a text"):
        pieces.merge(base, other)
    (tmp_path / "text").write_text("no model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for words, message in [
        ([], "what to do is missing; there are merge and stats"),
        (["join"], "join is nothing that it does"),
        (["merge", f"base={tmp_path}/text", f"other={models['other']}", f"out={tmp_path}/x"], "base=.*not a sentencepiece model"),
        (["merge", f"base={models['base']}", f"other={tmp_path}/none", f"out={tmp_path}/x"], "other=.*there is no none"),
        (["merge", f"base={models['base']}", f"other={models['other']}", f"out={tmp_path}/full"], "something is there already"),
        (["stats", f"tokenizer={models['base']}", f"file={tmp_path}/none"], "cannot be read as UTF-8"),
    ]:
        assert main(["vocab", *words]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "x").exists()


def test_stats_count_tokens_before_and_after(models, tmp_path, capsys):
    text = "\n".join(words_of(OTHER))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    main(["vocab", "merge", f"base={models['base']}", f"other={models['other']}", f"out={tmp_path / 'merged'}"])
    capsys.readouterr()
    assert main(["vocab", "stats", f"tokenizer={tmp_path / 'merged'}", f"against={models['base']}", f"file={tmp_path / 'text.txt'}"]) == 0
    before, after = (len(pieces.processor_of(pieces.read(model, "x")).encode(text)) for model in (models["base"], tmp_path / "merged"))
    told = capsys.readouterr().out
    assert f"{before:,}" in told and f"{after:,}" in told and f"{100 * (after / before - 1):+.1f} % tokens" in told
    assert f"{len(text) / after:.3f}" in told


def test_a_real_vocabulary_takes_another(real_data, tmp_path):
    """Llama 2's 32,000 pieces and 2,000 of a small unigram model, held to sentencepiece on real text."""
    base, other = (pieces.read(real_data / f"tokenizers/{name}.model", name) for name in ("llama2", "m"))
    merged = pieces.merge(base, other)
    assert rows(merged.proto)[:32000] == rows(base)
    there = {piece.piece for piece in base.pieces}
    new, wanted = rows(merged.proto)[32000:], [row for row in rows(other) if row[2] == 1 and row[0] not in there]
    assert [(name, kind) for name, _, kind in new] == [(name, kind) for name, _, kind in wanted]
    assert [score for _, score, _ in new] == pytest.approx([score for _, score, _ in wanted], abs=1e-3)
    prose = [row["output"] for row in json.loads((real_data / "alpaca/alpaca_en_demo.json").read_text())[:40]]
    chinese = [row["output"] for row in json.loads((real_data / "alpaca/alpaca_zh_demo.json").read_text())[:10]]
    assert holds_to_the_base(base, merged, [*chinese, *(word for text in prose for word in text.split())]) > 1000
    fast, itself = pieces.fast(merged.proto), pieces.processor_of(merged.proto)
    for text in prose + chinese:
        assert fast.encode(text, add_special_tokens=False).ids == itself.encode(text)
