"""Metrics of generated texts: each is a score over all items with its interval, and each item's own value.

An item has one prediction and one or more references; where there are several, the best counts. Text in Chinese is
compared character by character, words in other scripts within it whole. exact_match, normalised_match, f1 and rouge
are shares of 1; bleu is on sacrebleu's scale of 100. n items, k numbers per item.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from deltune.errors import ConfigError, DataError
from deltune.evaluation.statistics import Paired, Score, Statistic, bootstrap, first_column, mean, paired

References = Sequence[Sequence[str]]
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_HAN_SIGN = re.compile(f"[{HAN}]")
_TOKEN = re.compile(f"[{HAN}]|[^{HAN}\\s]+")
ARTICLES = frozenset(("a", "an", "the"))
ROUGES = ("rouge1", "rouge2", "rougeL")
RANKS = (1, 3, 5, 10)


@dataclass(frozen=True)
class Measured:
    """A score, each item's own value, and what the score is a statistic of: `table` [n, k] whose means it maps."""

    score: Score
    values: list[float]
    table: np.ndarray
    statistic: Statistic = first_column

    def against(self, other: Measured) -> Paired:
        """This system minus the other, on the same items in the same order."""
        if self.statistic is first_column:
            return paired(self.values, other.values)
        found = paired(self.table, other.table, self.statistic)
        ours, theirs = np.array(self.values), np.array(other.values)
        return replace(found, better=int((ours > theirs).sum()), worse=int((ours < theirs).sum()))


def exact_match(predictions: Sequence[str], references: References) -> Measured:
    """Whether the prediction is a reference, apart from white space around it."""
    return _by_item(predictions, references, lambda text, wanted: float(text.strip() == wanted.strip()))


def normalised_match(predictions: Sequence[str], references: References) -> Measured:
    """Whether they are equal without case, punctuation, articles and white space (SQuAD, arXiv:1606.05250; see `tokens`)."""
    return _by_item(predictions, references, lambda text, wanted: float(tokens(text) == tokens(wanted)))


def f1(predictions: Sequence[str], references: References) -> Measured:
    """Mean over items of the F1 of tokens shared, as a multiset, with the best reference (SQuAD; see `tokens`)."""
    return _by_item(predictions, references, token_f1)


def token_f1(prediction: str, reference: str) -> float:
    """2 x shared / (tokens of both); 1 where both have none (SQuAD 2.0), 0 where only one has."""
    ours, wanted = tokens(prediction), tokens(reference)
    if not ours or not wanted:
        return float(ours == wanted)
    return 2 * sum((Counter(ours) & Counter(wanted)).values()) / (len(ours) + len(wanted))


def tokens(text: str) -> list[str]:
    """Lower case, no punctuation (of ASCII, and Unicode's category P), no English articles; words, and single Han signs.

    On ASCII text these are the words of SQuAD's normalisation; beyond it, those of MLQA's (arXiv:1910.07475).
    """
    kept = "".join(sign for sign in text.lower() if sign not in string.punctuation and unicodedata.category(sign)[0] != "P")
    return [token for token in _TOKEN.findall(kept) if token not in ARTICLES]


def bleu(predictions: Sequence[str], references: References, *, language: str = "auto") -> Measured:
    """BLEU of the whole corpus by sacrebleu, 0 to 100, with its 13a tokenizer, or zh where the references are Chinese.

    n-gram counts and lengths are added up over items before any ratio is taken; the mean of sentences' BLEU is another
    number. Each item's value is its sentence BLEU of effective order. Interval: bootstrap over items.
    """
    _same_items(predictions, references)
    sacrebleu = _library("sacrebleu")
    metric = sacrebleu.BLEU(tokenize="zh" if is_chinese(references, language) else "13a", effective_order=True)
    rows, values = [], []
    for text, wanted in zip(predictions, references, strict=True):
        one = metric.sentence_score(text, list(wanted))
        rows.append([one.sys_len, one.ref_len, *one.counts, *one.totals])
        values.append(float(one.score))
    count = len(rows)

    def corpus(means: np.ndarray) -> np.ndarray:
        sums = np.rint(means * count).astype(int).tolist()
        return np.array([metric.compute_bleu(s[2:6], s[6:10], s[0], s[1], smooth_method="exp").score for s in sums])

    table = np.array(rows, dtype=np.float64)
    return Measured(bootstrap(table, corpus), values, table, corpus)


def rouge(predictions: Sequence[str], references: References, *, language: str = "auto") -> dict[str, Measured]:
    """Mean F-measure of ROUGE-1, -2 and -L by rouge-score, without stemming; the best reference for each.

    Its own tokenizer keeps a-z and 0-9 alone, so Chinese would always score 0: there, `tokens` stands in.
    """
    _same_items(predictions, references)
    scorer = _library("rouge_score.rouge_scorer")
    own = _Tokens() if is_chinese(references, language) else None
    metric = scorer.RougeScorer(list(ROUGES), use_stemmer=False, tokenizer=own)
    found = [metric.score_multi(list(wanted), text) for text, wanted in zip(predictions, references, strict=True)]
    return {name: _mean([float(one[name].fmeasure) for one in found]) for name in ROUGES}


def recall_at_k(
    ranked: Sequence[Sequence[Hashable]], gold: Sequence[Sequence[Hashable]], ks: Sequence[int] = RANKS
) -> dict[int, Measured]:
    """For each k the share of a query's gold ids among the first k of its ranked ids, averaged over queries."""
    if len(ranked) != len(gold):
        raise DataError(f"recall needs ranked and gold ids of the same queries: {len(ranked)} and {len(gold)} were given")
    for place, wanted in enumerate(gold):
        if not wanted:
            raise DataError(f"query {place}: no gold ids, so there is nothing to recall")
    return {
        k: _mean([len(set(found[:k]) & set(wanted)) / len(set(wanted)) for found, wanted in zip(ranked, gold, strict=True)])
        for k in ks
    }


# name in `metrics` -> (predictions, references, language) -> name of each score -> what was measured
TEXT_METRICS: dict[str, Callable[[Sequence[str], References, str], dict[str, Measured]]] = {
    "exact_match": lambda ours, wanted, _: {"exact_match": exact_match(ours, wanted)},
    "normalised_match": lambda ours, wanted, _: {"normalised_match": normalised_match(ours, wanted)},
    "f1": lambda ours, wanted, _: {"f1": f1(ours, wanted)},
    "bleu": lambda ours, wanted, language: {"bleu": bleu(ours, wanted, language=language)},
    "rouge": lambda ours, wanted, language: rouge(ours, wanted, language=language),
}


def measured(names: Sequence[str], predictions: Sequence[str], references: References, language: str = "auto") -> dict[str, Measured]:
    """The scores of several metrics of TEXT_METRICS, by name; rouge gives three."""
    return {key: value for name in names for key, value in TEXT_METRICS[name](predictions, references, language).items()}


def is_chinese(references: References, language: str) -> bool:
    """`zh`, or `auto` where more than half of all letters in the references are Han signs."""
    if language != "auto":
        return language == "zh"
    text = "".join(text for wanted in references for text in wanted)
    return 2 * len(_HAN_SIGN.findall(text)) > sum(map(str.isalpha, text))


class _Tokens:
    """rouge-score's interface of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)


def _by_item(predictions: Sequence[str], references: References, value: Callable[[str, str], float]) -> Measured:
    _same_items(predictions, references)
    return _mean([max(value(text, one) for one in wanted) for text, wanted in zip(predictions, references, strict=True)])


def _mean(values: list[float]) -> Measured:
    return Measured(mean(values), values, np.array(values, dtype=np.float64)[:, None])


def _same_items(predictions: Sequence[str], references: References) -> None:
    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions and {len(references)} references: each prediction needs its own")
    for place, wanted in enumerate(references):
        if isinstance(wanted, str):
            raise TypeError("references are lists of texts, one list for each prediction")
        if not wanted:
            raise DataError(f"item {place}: no reference, so there is nothing to compare with")
    if not predictions:
        raise DataError("there are no predictions, so there is nothing to measure")


def _library(name: str):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        package = {"sacrebleu": "BLEU needs sacrebleu", "rouge_score.rouge_scorer": "ROUGE needs rouge-score"}[name]
        raise ConfigError(f'metrics: {package}, which is not installed: pip install "deltune[eval]"') from None
