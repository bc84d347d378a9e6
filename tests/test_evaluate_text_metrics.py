"""Metrics of texts: against the libraries' corpus scores, slow formulas and hand-worked values; and what others got wrong."""

from __future__ import annotations

import random
import re
import string
import sys
from collections import Counter

import numpy as np
import pytest

from deltune.errors import ConfigError, DataError
from deltune.evaluation.statistics import bootstrap, mean
from deltune.evaluation.text_metrics import (
    TEXT_METRICS,
    bleu,
    exact_match,
    f1,
    is_chinese,
    measured,
    normalised_match,
    recall_at_k,
    rouge,
    token_f1,
    tokens,
)

WORDS = ["the", "cat", "sat", "on", "a", "mat", ",", "dog's", "house", "is", "red", ".", "An", "owl", "said:", "42%", "of", "it", "!"]
HAN = "今天天气很好我们去公园看书吃饭学习中文"


def sentences(count: int, seed: int, words=WORDS, joint: str = " ") -> list[str]:
    draw = random.Random(seed)
    return [joint.join(draw.choice(words) for _ in range(draw.randint(1, 14))) for _ in range(count)]


def changed(texts: list[str], seed: int, words=WORDS, joint: str = " ") -> list[str]:
    """Texts with about a third of their tokens replaced."""
    draw = random.Random(seed)
    split = (lambda text: text.split()) if joint else list
    return [joint.join(draw.choice(words) if draw.random() < 0.3 else word for word in split(text)) for text in texts]


REFERENCES = sentences(60, 1)
PREDICTIONS = changed(REFERENCES, 2)


def squad_normal(text: str) -> str:
    """The steps of SQuAD's published evaluation: lower case, punctuation, articles, white space."""
    text = "".join(sign for sign in text.lower() if sign not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@pytest.mark.parametrize("text", [*REFERENCES[:20], "The  U.S.A.\t(an ally)", "theatre_a the", "A", "", "it's a-the b"])
def test_tokens_of_ascii_are_squads(text):
    assert " ".join(tokens(text)) == squad_normal(text)


def test_tokens_of_chinese_are_characters():
    assert tokens("今天，Deltune 2.0 很“好”！") == ["今", "天", "deltune", "20", "很", "好"]
    assert tokens("GPT模型") == ["gpt", "模", "型"]
    assert tokens("“Quoted” – the naïve café…") == ["quoted", "naïve", "café"]


def test_exact_match_plain_and_normalised():
    ours, wanted = ["The Cat.", " 7\n", "a dog", "北 京。"], [["cat"], ["7"], ["cat", "A dog!"], ["北京"]]
    plain, normal = exact_match(ours, wanted), normalised_match(ours, wanted)
    assert plain.values == [0, 1, 0, 0] and normal.values == [1, 1, 1, 1]
    assert plain.score == mean([0, 1, 0, 0]) and normal.score.n == 4


def test_f1_is_that_of_the_shared_multiset():
    def slow(text: str, wanted: str) -> float:
        ours, theirs = squad_normal(text).split(), squad_normal(wanted).split()
        shared = sum(min(Counter(ours)[word], Counter(theirs)[word]) for word in set(ours))
        if shared == 0:
            return float(ours == theirs)
        precision, recall = shared / len(ours), shared / len(theirs)
        return 2 * precision * recall / (precision + recall)

    found = f1(PREDICTIONS, [[text] for text in REFERENCES])
    assert found.values == pytest.approx([slow(*pair) for pair in zip(PREDICTIONS, REFERENCES, strict=True)])
    assert found.score.value == pytest.approx(np.mean(found.values)) and found.score.low < found.score.value < found.score.high
    assert token_f1("x x x", "x y") == pytest.approx(2 * 1 / 5)
    assert (token_f1("", "the"), token_f1("", "cat"), token_f1("cat", "")) == (1, 0, 0)
    assert f1(["北京市"], [["东京", "北京"]]).values == [pytest.approx(0.8)]


@pytest.mark.parametrize(("tokenizer", "words", "joint"), [("13a", WORDS, " "), ("zh", HAN, "")])
def test_bleu_is_sacrebleus_of_the_corpus(tokenizer, words, joint):
    from sacrebleu.metrics import BLEU

    first, second = sentences(50, 3, words, joint), sentences(50, 4, words, joint)
    ours = changed(first, 5, words, joint)
    found = bleu(ours, [list(pair) for pair in zip(first, second, strict=True)])
    theirs = BLEU(tokenize=tokenizer).corpus_score(ours, [first, second])
    assert found.score.value == pytest.approx(theirs.score, abs=1e-9) and 5 < theirs.score < 95
    assert found.values[7] == pytest.approx(BLEU(tokenize=tokenizer, effective_order=True).sentence_score(ours[7], [first[7], second[7]]).score)
    assert bleu(ours, [[text] for text in first]).score.value == pytest.approx(BLEU(tokenize=tokenizer).corpus_score(ours, [first]).score)


def test_the_interval_of_bleu_is_over_corpora():
    """Each resample is scored as a corpus by sacrebleu itself, on the same draws."""
    from sacrebleu.metrics import BLEU

    found = bleu(PREDICTIONS, [[text] for text in REFERENCES])
    rng, scores, metric = np.random.default_rng(0), [], BLEU()
    for counts in rng.multinomial(60, [1 / 60] * 60, size=2000)[:400]:
        chosen = np.repeat(np.arange(60), counts)
        scores.append(metric.corpus_score([PREDICTIONS[i] for i in chosen], [[REFERENCES[i] for i in chosen]]).score)
    ours = bootstrap(found.table, found.statistic, resamples=2000)
    assert (found.score.low, found.score.high) == (ours.low, ours.high)
    assert np.percentile(scores, [2.5, 97.5]) == pytest.approx([ours.low, ours.high], abs=0.15 * (ours.high - ours.low))


def test_bleu_of_short_or_unlike_texts_is_sacrebleus():
    from sacrebleu.metrics import BLEU

    for ours, wanted in [(["one two"], ["one two"]), (["x"], ["y z"]), ([""], ["y z"]), (["a b c d", ""], ["a b c d", "e f"])]:
        assert bleu(ours, [[text] for text in wanted]).score.value == pytest.approx(BLEU().corpus_score(ours, [wanted]).score)


def test_corpus_bleu_is_no_mean_of_sentences():
    """PandaLLM reports the mean of sentence scores, which lets a two-word row weigh as much as a page."""
    ours = ["yes", "the quick brown fox jumps over the lazy dog today"]
    wanted = [["no"], ["the quick brown fox jumps over the lazy dog today"]]
    found = bleu(ours, wanted)
    assert np.mean(found.values) == pytest.approx(50) and found.score.value > 85


def test_rouge_is_rouge_scores_and_of_the_best_reference():
    from rouge_score.rouge_scorer import RougeScorer

    second = sentences(60, 6)
    found = rouge(PREDICTIONS, [list(pair) for pair in zip(REFERENCES, second, strict=True)])
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name, one in found.items():
        expected = [max(theirs.score(ref, text)[name].fmeasure for ref in refs) for text, *refs in zip(PREDICTIONS, REFERENCES, second, strict=True)]
        assert one.values == pytest.approx(expected)
        assert one.score.value == pytest.approx(np.mean(expected))


def test_rouge_of_chinese_counts_characters():
    """rouge-score's own tokenizer drops every sign that is not a-z or 0-9: equal Chinese texts would score 0."""
    from rouge_score.rouge_scorer import RougeScorer

    assert RougeScorer(["rouge1"]).score("我爱北京", "我爱北京")["rouge1"].fmeasure == 0
    found = rouge(["我爱北京", "我爱北京。"], [["我爱北京"], ["我在北京"]])
    assert found["rouge1"].values == [1, pytest.approx(3 / 4)]
    assert found["rouge2"].values == [1, pytest.approx(1 / 3)]
    assert found["rougeL"].values == [1, pytest.approx(3 / 4)]


def test_the_language_is_told_by_the_references():
    assert is_chinese([["今天 ok"], ["天气"]], "auto") and not is_chinese([["today 好"], ["fine"]], "auto")
    assert is_chinese([["x"]], "zh") and not is_chinese([["天"]], "en") and not is_chinese([["12"]], "auto")
    assert bleu(["x 今天天气很好"], [["今天天气很好"]], language="en").score.value < bleu(["x 今天天气很好"], [["今天天气很好"]]).score.value


def test_recall_is_the_share_of_gold_ids_averaged_over_queries():
    ranked = [["a", "b", "c", "d"], ["x", "y"], ["p", "p", "q"]]
    gold = [["b", "d"], ["z"], ["p"]]
    found = recall_at_k(ranked, gold)
    assert [found[k].score.value for k in (1, 3, 5, 10)] == pytest.approx([1 / 3, (0.5 + 0 + 1) / 3, 2 / 3, 2 / 3])
    assert found[3].values == [0.5, 0, 1] and found[1].score.n == 3
    assert recall_at_k(ranked, [["b", "b", "d"], ["z"], ["p"]], [2])[2].values == [0.5, 0, 1]
    with pytest.raises(DataError, match="query 1: no gold"):
        recall_at_k([[1], [2]], [[1], []])
    with pytest.raises(DataError, match="1 and 2"):
        recall_at_k([[1]], [[1], [2]])


def test_every_row_counts():
    """PandaLLM drops rows with an index it has seen, and counts an empty answer as the first option."""
    assert exact_match(["A", "A", "", ""], [["A"], ["A"], ["A"], ["A"]]).score == mean([1, 1, 0, 0])


def test_two_systems_are_compared_item_by_item():
    wanted = [[text] for text in REFERENCES]
    better, worse = measured(TEXT_METRICS, PREDICTIONS, wanted), measured(TEXT_METRICS, changed(PREDICTIONS, 9), wanted)
    assert list(better) == ["exact_match", "normalised_match", "f1", "bleu", "rouge1", "rouge2", "rougeL"]
    for name, one in better.items():
        found = one.against(worse[name])
        assert found.difference == pytest.approx(one.score.value - worse[name].score.value), name
        assert found.low <= found.difference <= found.high and found.n == 60
        assert found.test == ("mcnemar" if name.endswith("match") else "permutation")
        assert one.against(one).p == 1
    assert better["bleu"].against(worse["bleu"]).p < 0.01
    assert better["bleu"].against(worse["bleu"]).better > 30, "sentences are counted, not their lengths"


def test_faults_are_named(monkeypatch):
    for metric in (exact_match, f1, bleu, rouge):
        with pytest.raises(DataError, match="2 predictions and 1 references"):
            metric(["a", "b"], [["a"]])
        with pytest.raises(DataError, match="item 1: no reference"):
            metric(["a", "b"], [["a"], []])
        with pytest.raises(DataError, match="no predictions"):
            metric([], [])
    with pytest.raises(TypeError, match="lists of texts"):
        f1(["a"], ["a"])
    for module, metric, said in (("sacrebleu", bleu, "sacrebleu"), ("rouge_score.rouge_scorer", rouge, "rouge-score")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=rf"{said}.*deltune\[eval\]"):
            metric(["a"], [["a"]])
