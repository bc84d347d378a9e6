"""What somebody may have meant: the nearest real names to one that does not exist. It guesses, and never decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from deltune.config.foreign import FOREIGN

NUM_SUGGESTIONS = 3
SECTION_WEIGHT = 0.4  # a wrong section is a smaller mistake than a wrong key
REARRANGED = 0.5  # cost of a match that only underscores or whole words separate, or that is another tool's
MAX_FOREIGN_EDITS = 2
LONGEST = 100  # letters of a word that are looked at


def distance(a: str, b: str) -> int:
    """Edits between two texts: insertion, deletion, substitution, and exchange of two neighbours, each counted once.

    Optimal string alignment, the restricted form of Damerau's distance (Commun. ACM 7(3), 1964).
    """
    before, last = [0] * (len(b) + 1), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i] + [0] * len(b)
        for j, y in enumerate(b, 1):
            row[j] = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]


def nearest(word: str, names: Iterable[str], *, limit: int = NUM_SUGGESTIONS) -> list[str]:
    """The names most like a word, best first; dotted names are also compared by their last part. May be empty."""
    word = _plain(word)
    return _best(word, {name: _score(word, name) for name in names}, limit)


def nearest_keys(word: str, names: Set[str], *, limit: int = NUM_SUGGESTIONS) -> list[str]:
    """As `nearest`, for keys: a word may also be near to what another tool calls one of them."""
    word = _plain(word)
    scores = {name: _score(word, name) for name in names}
    leaf = word.rpartition(".")[2]
    for foreign in FOREIGN.values():
        if foreign.target in scores and abs(len(leaf) - len(foreign.name)) <= MAX_FOREIGN_EDITS:
            edits = distance(leaf, foreign.name)
            if edits <= MAX_FOREIGN_EDITS:
                scores[foreign.target] = min(scores[foreign.target], edits + REARRANGED)
    return _best(word, scores, limit)


def _plain(word: str) -> str:
    return word.strip().lower().replace("-", "_").replace(" ", "_").replace("/", ".")[:LONGEST]


def _best(word: str, scores: Mapping[str, float], limit: int) -> list[str]:
    ranked = sorted((score, name) for name, score in scores.items())
    return [name for score, name in ranked if score <= _tolerance(word)][:limit]


def _tolerance(word: str) -> float:
    return max(2.0, len(word.rpartition(".")[2]) / 2)


def _score(word: str, name: str) -> float:
    word_section, _, word_leaf = word.rpartition(".")
    section, _, leaf = name.lower().rpartition(".")
    score = _leaf_score(word_leaf, leaf)
    if word_section and section:
        score += SECTION_WEIGHT * min(distance(word_section, section), 3)
    elif word_section:
        score += SECTION_WEIGHT
    # a lost or misplaced dot: `optimlr`, `train_steps`
    whole = distance(word.replace(".", "_"), name.lower().replace(".", "_"))
    return min(score, float(whole))


def _leaf_score(word: str, leaf: str) -> float:
    plain = float(distance(word, leaf))
    squeezed = distance(word.replace("_", ""), leaf.replace("_", "")) + REARRANGED if "_" in word + leaf else plain
    words, leaves = set(word.split("_")), set(leaf.split("_"))
    missing = len(leaves - words) + len(words - leaves)
    # `length_max`, `learning_max_length`: whole words shared, others missing or added
    by_words = REARRANGED + missing if words & leaves else plain
    return min(plain, squeezed, by_words)


def closest(word: object, names: Sequence[str]) -> str:
    """`; did you mean X?` for the end of a message, or nothing."""
    found = nearest(str(word), names, limit=1)
    return f"; did you mean {found[0]}?" if found else ""
