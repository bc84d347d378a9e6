"""Ratings by a judge: the published percentages, joined by answer ids; verdicts that cannot be read; Elo and Bradley-Terry."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from deltune.commands.ratings import main
from deltune.errors import ConfigError, DataError
from deltune.evaluation import elo as ratings_elo
from deltune.evaluation.elo import bradley_terry, elo, played
from deltune.evaluation.ratings import (
    Match,
    by_category,
    common_opponent,
    matches,
    one_sided,
    percentage,
    place_bias,
    read,
    record,
    systems,
)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reviews(first: str, second: str, scores: list, **more) -> list[dict]:
    """Rows for questions 1, 2 ...: answer ids are made of the system's name and the question."""
    return [
        {"question_id": q, "answer1_id": f"{first}-{q}", "answer2_id": f"{second}-{q}", "score": score, "text": "", **more}
        for q, score in enumerate(scores, 1)
    ]


@pytest.fixture
def three(tmp_path) -> Path:
    """a and b against base, both orders; the order in names of files says nothing. One verdict could not be read."""
    write(tmp_path / "a-vs-base-gpt4-reviewer.jsonl", reviews("base", "a", [[8, 4], [5, 5], [10, 9]]))
    write(tmp_path / "base-vs-a-gpt4-reviewer.jsonl", reviews("a", "base", [[6, 6], [-1, -1], [9, 3]]))
    write(tmp_path / "b-vs-base-gpt4-reviewer.jsonl", reviews("b", "base", [[1, 8], [2, 8], [3, 8]]))
    write(tmp_path / "base-vs-b-gpt4-reviewer.jsonl", reviews("base", "b", [[8, 1], [8, 2], [8, 3]]))
    return tmp_path


def found_in(folder: Path, **more):
    return matches(sorted(folder.glob("*.jsonl")), **more)


# -- the published numbers --------------------------------------------------------------------------------------


def by_hand(folder: Path, model: str, *, of_name: bool) -> float:
    """Both orders' ratios, averaged: the baseline is known by its answers, or (wrongly) by its place in the file's name."""
    everywhere = set.intersection(
        *({row[key] for row in map(json.loads, path.open()) for key in ("answer1_id", "answer2_id")} for path in folder.glob("*.jsonl"))
    )
    ratios = []
    for path in folder.glob(f"*{model}-guanaco*"):
        ours = theirs = 0.0
        for row in map(json.loads, path.open()):
            first = path.name.startswith("gpt-3.5") if of_name else row["answer1_id"] in everywhere
            base, mine = row["score"] if first else row["score"][::-1]
            ours, theirs = ours + mine, theirs + base
        ratios.append(ours / theirs)
    return 100 * sum(ratios) / len(ratios)


@pytest.mark.parametrize(("model", "expected"), [("65b", 99.30), ("7b", 86.95)])
def test_guanaco_against_its_baseline_is_what_was_published(real_data, model, expected):
    folder = real_data / "ratings" / "vicuna_relative_gpt35"
    protocol, found = found_in(folder)
    assert protocol == "relative" and systems(found) == ["gpt-3.5", "65b-guanaco", "7b-guanaco"] and common_opponent(found) == "gpt-3.5"
    score = percentage(found, f"{model}-guanaco", "gpt-3.5")
    assert score.value == pytest.approx(expected, abs=0.05)
    assert score.value == pytest.approx(by_hand(folder, model, of_name=False), abs=1e-9)
    assert abs(by_hand(folder, model, of_name=True) - expected) > 0.5, "the names of these files do not follow the order of answers"
    assert score.n == 80 and score.low < score.value < score.high and 5 < score.high - score.low < 12


def test_the_judge_of_the_published_ratings_favours_the_first(real_data):
    bias = place_bias(found_in(real_data / "ratings" / "vicuna_relative_gpt35")[1])
    assert bias.pairs == 160 and bias.first.low > 0.5 and bias.gap.low > 0 and 0.4 < bias.same.value < 0.8


# -- percentages, records ---------------------------------------------------------------------------------------


def test_percentages_are_summed_for_each_order_and_unread_verdicts_are_in_none(three):
    _, found = found_in(three)
    assert percentage(found, "a", "base").value == pytest.approx(100 * ((4 + 5 + 9) / (8 + 5 + 10) + (6 + 9) / (6 + 3)) / 2)
    assert percentage(found, "b", "base").value == pytest.approx(100 * 6 / 24)
    assert percentage(found, "base", "a").value == pytest.approx(100 * (23 / 18 + 9 / 15) / 2)
    assert percentage(found, "a", "b") is None
    against = record(found, "a", "base")
    assert (against.wins, against.ties, against.losses, against.unread) == (1, 2, 2, 1)
    assert against.points.value == pytest.approx(2 / 5) and against.points.n == 3


def test_the_interval_of_a_percentage_resamples_questions(three):
    """Each resample takes a question with both of its orders."""
    _, found = found_in(three)
    score = percentage(found, "a", "base", resamples=500, seed=3)
    one, two, drawn = np.array([[4, 8], [5, 5], [9, 10]]), np.array([[6, 6], [0, 0], [9, 3]]), []
    for counts in np.random.default_rng(3).multinomial(3, [1 / 3] * 3, size=500):
        sums = [counts @ table for table in (one, two)]
        if all(total[1] for total in sums):
            drawn.append(100 * np.mean([total[0] / total[1] for total in sums]))
    assert len(drawn) < 500 and (score.low, score.high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))


def test_a_record_without_spread_still_has_an_interval(three):
    points = record(found_in(three)[1], "b", "base").points
    assert (points.value, points.low) == (0, 0) and points.high == pytest.approx(1.96**2 / (3 + 1.96**2), abs=1e-3)


def test_pairwise_verdicts_are_first_second_or_tie(tmp_path):
    rows = [row | {"message_id": row.pop("question_id")} for row in reviews("a", "b", [1, 2, 3, -1, 1])]
    write(tmp_path / "a-vs-b-gpt-4-reviewer-threeclass.jsonl", rows)
    write(tmp_path / "a-vs-c-gpt-4-reviewer-threeclass.jsonl", reviews("c", "a", [2, 2, 2, 2, 2]))
    protocol, found = found_in(tmp_path)
    assert protocol == "pairwise"
    against = record(found, "a", "b")
    assert (against.wins, against.ties, against.losses, against.unread, against.points.value) == (2, 1, 1, 1, 2.5 / 4)
    everyone = record(found, "a")
    assert (everyone.wins, everyone.losses, everyone.unread) == (7, 1, 1)
    assert percentage(found, "a", "b") is None, "nothing was scored"


@pytest.mark.parametrize(
    ("text", "points", "scores", "kind"),
    [
        ("8 7.5\nBoth are good.", 1, (8, 7.5), "relative"), ("7, 9", 0, (7, 9), "relative"), ("6 6", 0.5, (6, 6), "relative"),
        ("The first is better.\n\n1", 1, None, "pairwise"), ("They are alike.\n3\n", 0.5, None, "pairwise"), ("I cannot say.", None, None, None),
    ],
)  # fmt: skip
def test_without_a_score_the_judges_text_is_read(tmp_path, text, points, scores, kind):
    rows = [{"question_id": "q", "answer1_id": "x", "answer2_id": "y", "text": text}]
    if kind is None:
        with pytest.raises(DataError, match="not one of its 1 verdicts"):
            read(write(tmp_path / "r.jsonl", rows))
        return
    found, (review,) = read(write(tmp_path / "r.jsonl", rows))
    assert (found, review.points, review.scores, review.answers) == (kind, points, scores, ("x", "y"))


def test_what_the_place_is_worth(tmp_path):
    """A judge who gives the first a point more than it deserves; question 3 was shown in one order only."""
    write(tmp_path / "a-vs-b-gpt4-reviewer.jsonl", reviews("a", "b", [[8, 7], [9, 5], [1, 1]]))
    write(tmp_path / "b-vs-a-gpt4-reviewer.jsonl", reviews("b", "a", [[8, 7], [6, 8]]))
    _, found = found_in(tmp_path, named={"a": ["a-1"]})
    bias = place_bias(found)
    assert bias.pairs == 2 and bias.gap.value == pytest.approx((1 + 1 + 4 - 2) / 4)
    assert bias.first.value == pytest.approx((1 + 1 + 1 + 0) / 4) and bias.same.value == 0.5
    assert one_sided(found) == [] and one_sided(found[:3]) == [("a", "b")]
    assert place_bias(found[:3]) is None


# -- whose answer it is -----------------------------------------------------------------------------------------


def test_systems_are_told_by_ids_and_names_by_what_files_share(three):
    _, found = found_in(three)
    first = {(Path(m.where).name.split("-gpt4")[0]): (m.first, m.second) for m in found}
    assert first == {"a-vs-base": ("base", "a"), "base-vs-a": ("a", "base"), "b-vs-base": ("b", "base"), "base-vs-b": ("base", "b")}


def test_two_files_alone_do_not_tell_who_is_who(three, tmp_path):
    paths = sorted(three.glob("*a-*.jsonl"))
    paths = [path for path in paths if "b-vs" not in path.name.replace("base", "")]
    with pytest.raises(DataError, match=r"whose answer is base-1\?.*a or base.*names="):
        matches(paths[:2])
    assert systems(matches(paths[:2], {"base": ["elsewhere", "base-2"]})[1]) == ["base", "a"]
    assert systems(matches(paths[:2], {"my.base": ["base-1"], "mine": ["a-1"]})[1]) == ["my.base", "mine"]
    with pytest.raises(DataError, match="whose answer is a-1"):
        matches(paths[:2], {"my.base": ["base-1"]})
    with pytest.raises(DataError, match="one and two are said of the same"):
        matches(paths[:2], {"one": ["base-1"], "two": ["base-2"]})
    with pytest.raises(DataError, match="names: base: none of its answer ids"):
        matches(paths[:2], {"base": ["elsewhere"]})


def test_two_systems_may_share_some_answers_and_one_may_have_answered_anew(three, caplog):
    """Ids are made from texts: equal texts of two systems have equal ids, and new texts of one system have new ones."""
    rows = reviews("c", "base", [[1, 8], [2, 8], [3, 8]])
    rows[0]["answer1_id"] = "b-1"
    write(three / "c-vs-base-gpt4-reviewer.jsonl", rows)
    write(three / "base-vs-c-gpt4-reviewer.jsonl", reviews("base", "again", [[8, 1], [8, 2], [8, 3]]))
    with caplog.at_level("WARNING", "deltune"):
        _, found = found_in(three)
    assert set(systems(found)) == {"base", "a", "b", "c", "c (2)"} and "different answers under one name" in caplog.text


def test_a_name_is_passed_on_from_side_to_side(tmp_path):
    """c answered anew for its second file. Only c's first answers are certain by themselves: both files with x name it."""
    write(tmp_path / "c-vs-x-gpt4-reviewer.jsonl", reviews("x", "c", [[1, 2], [3, 4]]))
    write(tmp_path / "base-vs-c-gpt4-reviewer.jsonl", reviews("c", "base", [[1, 2], [3, 4]]))
    write(tmp_path / "c-vs-base-gpt4-reviewer.jsonl", reviews("base", "anew", [[1, 2], [3, 4]]))
    _, found = found_in(tmp_path)
    assert {(m.first, m.second) for m in found} == {("x", "c"), ("c", "base"), ("base", "c (2)")}


def test_long_names_are_shortened_where_they_stay_apart(tmp_path):
    for other in ("y", "z"):
        write(tmp_path / f"x-oa-generations-topp0.9-vs-{other}-oa-generations-gpt-4-reviewer-threeclass.jsonl", reviews("x", other, [1, 2]))
    assert systems(found_in(tmp_path)[1]) == ["x", "y", "z"]
    for beam in ("beam1", "beam2"):
        write(tmp_path / f"x-oa-generations-topp0.9-vs-y-generations-{beam}-gpt-4-reviewer-threeclass.jsonl", reviews("x", beam, [1, 2]))
    assert "y-generations-beam2" in systems(found_in(tmp_path)[1])


# -- faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer2_id": None}, r"f.jsonl:2: no answer2_id"), ({"question_id": None}, r"f.jsonl:2: neither question_id"), ({"question_id": 1}, r"f.jsonl:2: question 1 is reviewed a second time; the first is .*:1"),
        ({"score": 1}, r"mixed protocols: .*:1 is relative and .*:2 is pairwise"), ({"score": [1]}, r"f.jsonl:2: score=\[1\]"), ({"score": "8"}, r'f.jsonl:2: score="8"'), ({"score": None, "text": None}, r"f.jsonl:2: neither score nor text"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named(tmp_path, change, said):
    rows = reviews("a", "b", [[1, 2], [3, 4]])
    rows[1] |= change
    with pytest.raises(DataError, match=said):
        read(write(tmp_path / "f.jsonl", rows))


def test_files_that_do_not_go_together_are_named(three, tmp_path_factory):
    with pytest.raises(DataError, match=r"f.jsonl:2: not JSON"):
        (three / "f.jsonl").write_text('{"question_id": 1, "answer1_id": "a", "answer2_id": "b", "score": 1}\n{')
        read(three / "f.jsonl")
    (three / "f.jsonl").unlink()
    again = write(three / "c-vs-base-gpt4-reviewer.jsonl", reviews("base", "a", [[8, 4], [5, 5]]))
    with pytest.raises(DataError, match=r":1: reviewed twice in this order"):
        found_in(three, named={"a": ["a-1"], "b": ["b-1"], "base": ["base-1"]})
    write(again, reviews("c", "base", [1, 2]))
    with pytest.raises(DataError, match=r"mixed protocols: .* is relative and .*c-vs-base.* is pairwise"):
        found_in(three)
    write(again, reviews("c", "c", [[1, 2]]))
    with pytest.raises(DataError, match="both sides show the same answers"):
        found_in(three)
    empty = tmp_path_factory.mktemp("empty") / "f.jsonl"
    with pytest.raises(DataError, match="no reviews"):
        read(write(empty, []))
    with pytest.raises(DataError, match="cannot be read"):
        read(empty.with_name("none.jsonl"))


# -- ratings ----------------------------------------------------------------------------------------------------


def games(results: list[tuple[str, str, float]], questions: list[str] | None = None):
    return played([Match("f:1", questions[i] if questions else str(i), one, two, None, points) for i, (one, two, points) in enumerate(results)])


def slow_elo(results, names) -> dict[str, float]:
    rating = dict.fromkeys(names, 1000.0)
    for one, two, points in results:
        change = 32 * (points - 1 / (1 + 10 ** ((rating[two] - rating[one]) / 400)))
        rating[one] += change
        rating[two] -= change
    return rating


RESULTS = [("a", "b", 1.0), ("b", "c", 0.5), ("c", "a", 0.0), ("a", "b", 0.0), ("b", "a", 1.0)]


def test_elo_is_the_mean_over_orders_of_play():
    exact = defaultdict(float)
    for order in itertools.permutations(RESULTS):
        for name, rating in slow_elo(order, "abc").items():
            exact[name] += rating / math.factorial(len(RESULTS))
    found = elo(games(RESULTS), orders=4000, seed=0)
    assert {name: score.value for name, score in found.items()} == pytest.approx(exact, abs=0.2)
    assert found["a"].n == 4 and sum(score.value for score in found.values()) == pytest.approx(3000)
    assert elo(games(RESULTS), orders=50, seed=1) == elo(games(RESULTS), orders=50, seed=1)


def test_one_order_of_elo_is_played_match_by_match():
    schedule = np.array([[3, 1, 0, 2, 4], [0, 1, 2, -1, -1]], dtype=np.int32)
    found = ratings_elo._play(games(RESULTS), schedule, 32.0, 1000.0)
    assert found[0] == pytest.approx(list(slow_elo([RESULTS[i] for i in schedule[0]], "abc").values()))
    assert found[1] == pytest.approx(list(slow_elo(RESULTS[:3], "abc").values())), "-1 is no match"


def test_chunks_of_orders_change_nothing_but_the_draws(monkeypatch):
    whole = elo(games(RESULTS * 4), orders=3000, seed=0)
    monkeypatch.setattr(ratings_elo, "CHUNK", 1000)
    parts = elo(games(RESULTS * 4), orders=3000, seed=0)
    assert parts["a"].value == pytest.approx(whole["a"].value, abs=2)
    assert parts["a"].high - parts["a"].low == pytest.approx(whole["a"].high - whole["a"].low, rel=0.25)


def test_bradley_terry_is_the_maximum_of_its_likelihood():
    found = bradley_terry(games(RESULTS), resamples=100, seed=0)

    def loss(theta):
        at = dict(zip("abc", theta, strict=True))
        return -sum(points * -math.log1p(math.exp(at[two] - at[one])) + (1 - points) * -math.log1p(math.exp(at[one] - at[two])) for one, two, points in RESULTS)

    best = minimize(loss, np.zeros(3), tol=1e-12).x
    expected = 1000 + 400 / math.log(10) * (best - best.mean())
    assert [found[name].value for name in "abc"] == pytest.approx(expected, abs=0.01)


def test_bradley_terry_of_two_systems_is_the_odds_and_knows_no_order():
    results = [("a", "b", 1.0)] * 30 + [("b", "a", 1.0)] * 9 + [("a", "b", 0.5)] * 2
    found = bradley_terry(games(results), resamples=400, seed=2)
    assert found["a"].value - found["b"].value == pytest.approx(400 * math.log10(31 / 10))
    assert bradley_terry(games(results[::-1]), resamples=100, seed=0)["a"].value == pytest.approx(found["a"].value)
    points = np.array([points if one == "a" else 1 - points for one, _, points in results])
    drawn = [counts @ points for counts in np.random.default_rng(2).multinomial(41, [1 / 41] * 41, size=400)]
    ends = np.percentile([1000 + 200 * math.log10(won / (41 - won)) for won in drawn], [2.5, 97.5])
    assert (found["a"].low, found["a"].high) == pytest.approx(tuple(ends))


def test_bradley_terry_needs_a_way_from_each_to_each():
    assert bradley_terry(games([("a", "b", 1.0), ("b", "c", 1.0), ("a", "c", 1.0)]), resamples=100, seed=0) is None
    assert bradley_terry(games([("a", "b", 1.0), ("b", "c", 1.0), ("c", "a", 1.0)]), resamples=100, seed=0) is not None
    assert bradley_terry(games([("a", "b", 0.5), ("c", "d", 0.5)]), resamples=100, seed=0) is None


def test_questions_are_resampled_with_all_their_matches():
    """Ten matches on one question are worth one: the interval is as wide as with one match each."""
    rng = np.random.default_rng(0)
    results = [("a", "b", float(won)) for won in rng.random(40) < 0.6]
    once = bradley_terry(games(results), resamples=1000, seed=0)["a"]
    tenfold = bradley_terry(games(results * 10, [str(i) for i in range(40)] * 10), resamples=1000, seed=0)["a"]
    assert tenfold.value == pytest.approx(once.value) and (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high))


def test_strengths_are_found_again():
    truth = {"a": 1150.0, "b": 1000.0, "c": 850.0}
    rng, results, questions = np.random.default_rng(1), [], []
    for question in range(150):
        for one, two in itertools.permutations(truth, 2):
            results.append((one, two, float(rng.random() < 1 / (1 + 10 ** ((truth[two] - truth[one]) / 400)))))
            questions.append(str(question))
    table = games(results, questions)
    for found in (bradley_terry(table, resamples=300, seed=0), elo(table, orders=200, seed=0)):
        assert all(score.low < truth[name] < score.high and score.high - score.low < 150 for name, score in found.items())


# -- the verb ---------------------------------------------------------------------------------------------------


def test_the_verb_prints_and_writes_what_was_found(three, tmp_path, capsys):
    questions = write(tmp_path / "questions.json", [{"question_id": q, "category": c} for q, c in ((1, "maths"), (2, "maths"), (3, "prose"))])
    out = tmp_path / "out"
    assert main([f"files=[{three}]", f"questions={questions}", f"out={out}", "orders=50", "resamples=200"]) == 0
    printed, result = capsys.readouterr().out, json.loads((out / "ratings.json").read_text())
    _, found = found_in(three)
    assert result["baseline"] == "base" and (result["num_reviews"], result["num_unread"], result["num_questions"]) == (12, 1, 3)
    assert result["systems"]["a"]["percent"] == percentage(found, "a", "base", resamples=200).as_dict()
    assert result["categories"]["prose"]["a"]["percent"]["value"] == pytest.approx(100 * (9 / 10 + 9 / 3) / 2)
    assert [(pair["system"], pair["against"]) for pair in result["pairs"]] == [("base", "a"), ("base", "b")]
    assert result["bradley_terry"] is None and "No Bradley-Terry" in printed and set(result["elo"]) == {"base", "a", "b"}
    assert f"{result['systems']['a']['percent']['value']:.2f} %" in printed and "1 verdicts could not be read" in printed and "maths" in printed
    assert (out / "ratings.png").read_bytes().startswith(b"\x89PNG")


def test_the_verb_reads_names_from_files_of_answers(three, tmp_path, capsys):
    answers = write(tmp_path / "answers.json", [{"answer_id": "base-2", "text": "..."}])
    files = ",".join(str(three / f"{name}-gpt4-reviewer.jsonl") for name in ("a-vs-base", "base-vs-a"))
    assert main([f"files=[{files}]", f"names={{base: {answers}}}", "baseline=base", "orders=0"]) == 0
    assert "against base" in capsys.readouterr().out


def test_faults_of_the_verb_are_named(three, tmp_path):
    with pytest.raises(ConfigError, match=r"baseline=bse: there are .*base"):
        main([f"files=[{three}]", "baseline=bse"])
    with pytest.raises(ConfigError, match="no such file"):
        main([f"files=[{tmp_path / 'none.jsonl'}]"])
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"no \.jsonl file"):
        main([f"files=[{tmp_path / 'none'}]"])
    with pytest.raises(ConfigError, match="at least one file"):
        main(["files=[]"])
    questions = write(tmp_path / "questions.json", [{"question_id": 1, "category": "maths"}])
    with pytest.raises(DataError, match="question 2 is not among the questions"):
        main([f"files=[{three}]", f"questions={questions}", "orders=0"])
    with pytest.raises(DataError, match=r"questions.json:1: a question needs"):
        main([f"files=[{three}]", f"questions={write(questions, [{'question_id': 1}])}", "orders=0"])
    with pytest.raises(DataError, match="no answer_id"):
        main([f"files=[{three}]", f"names={{a: {questions}}}", "orders=0"])
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="out="):
        main([f"files=[{three}]", "orders=0", f"out={tmp_path / 'taken'}"])


def test_categories_hold_their_own_matches(three):
    parts = by_category(found_in(three)[1], {"1": "x", "2": "y", "3": "x"})
    assert {name: len(part) for name, part in parts.items()} == {"x": 8, "y": 4}
