"""Items become predictions: as row by row by plain transformers, for every batch size, in one process and in two, and
what a kill has left is gone on with."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from deltune.errors import ConfigError, DataError
from deltune.evaluation.tasks import run as module
from deltune.evaluation.tasks.item import Item
from deltune.evaluation.tasks.run import Prediction, Way, answer, questions
from deltune.evaluation.tasks.store import Store, read
from deltune.evaluation.tasks.summary import against, chance, summary
from deltune.evaluation.tasks.templates import TEMPLATES, options, prompt, shots_for
from tests.tiny import tiny_model, tiny_tokenizer

ITEMS = [
    Item(f"f:{i + 1}", ("physics", "law")[i % 2], "" if i % 3 else "A passage. " * (i + 1), f"Question {i}?", choices, i % len(choices))
    for i, choices in enumerate([("one", "two", "three"), ("yes", "no"), ("a", "longer choice", "b c", "four"), ("x", "yy")] * 3)
]  # fmt: skip
POOL = [Item(f"dev:{i}", ("physics", "law")[i % 2], "", f"Solved {i}?", ("p", "q"), i % 2) for i in range(6)]
WAYS = [Way(TEMPLATES["mmlu"], "letters", shots=2), Way(TEMPLATES["plain"], "likelihood", shots=1, likelihood="bytes"), Way(TEMPLATES["plain"], "generation", max_new_tokens=6)]


def answers(way, model=None, **settings) -> dict[str, Prediction]:
    model, tokenizer = model or tiny_model(), tiny_tokenizer()
    asked = questions(ITEMS, way, POOL, tokenizer, 512)
    return {one.id: one for part in answer(model, tokenizer, asked, way, **settings) for one in part}


def by_hand(item, way) -> list[float]:
    """Summed log-probability of each option, tokenised with its prompt as one text."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = prompt(item, way.template, shots_for(item, POOL, way.shots, way.seed), way.protocol)
    found = []
    for option in options(item, way.template, way.protocol):
        first, ids = len(tokenizer(before)["input_ids"]), tokenizer(before + option)["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(sum(log_p[i - 1, ids[i]].item() for i in range(first, len(ids))))
    return found


@pytest.mark.parametrize("way", WAYS[:2], ids=lambda way: way.protocol)
def test_scores_are_those_of_plain_transformers(way):
    found = answers(way)
    for item in ITEMS:
        one, expected = found[item.id], by_hand(item, way)
        if way.protocol == "letters":
            expected = (torch.tensor(expected).log_softmax(0)).tolist()
            best = expected.index(max(expected))
        else:
            each = [value / len(option.encode()) for value, option in zip(expected, options(item, way.template, "likelihood"), strict=True)]
            best = each.index(max(each))
        assert one.scores == pytest.approx(expected, abs=1e-5)
        assert (one.prediction, one.correct) == (best, best == item.answer)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.protocol)
def test_batches_and_rounds_change_nothing(way, monkeypatch):
    whole = answers(way, batch=32)
    assert len(whole) == len(ITEMS)
    monkeypatch.setattr(module, "ROUND_TOKENS", 50)
    assert_alike(answers(way, batch=1), whole)
    rest = answers(way, batch=3, done=set(list(whole)[:5]))
    assert rest.keys() == whole.keys() - set(list(whole)[:5])


def assert_alike(found, expected):
    assert found.keys() == expected.keys()
    for id, one in found.items():
        assert (one.prediction, one.text, one.num_bytes) == (expected[id].prediction, expected[id].text, expected[id].num_bytes)
        assert one.scores == (None if one.scores is None else pytest.approx(expected[id].scores, abs=1e-5))


def test_two_ranks_answer_as_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in ("0", "1"):
        command = [sys.executable, "-m", "tests.test_tasks_run", str(tmp_path / rank)]
        ranks.append(subprocess.Popen(command, env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        assert process.wait(120) == 0, process.stderr.read()[-3000:]
        process.stderr.close()
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in ("0", "1"))
    assert first == second
    for way in WAYS:
        found = {id: Prediction(**values) for id, values in first[way.protocol].items()}
        assert_alike(found, answers(way))
    assert first["share"][0] + first["share"][1] == len(ITEMS) and min(first["share"]) > 0


def on_this_rank(out: str) -> None:
    from deltune import dist
    from deltune.engines.build import build
    from deltune.engines.config import DDP

    engine = build(DDP(device="cpu"))
    model = engine.place(tiny_model())
    module.ROUND_TOKENS = 400
    shares = []
    inner = module._chosen
    module._chosen = lambda question, *rest: (shares.append(question.item.id), inner(question, *rest))[1]
    found = {way.protocol: {id: asdict(one) for id, one in answers(way, model).items()} for way in WAYS[:1]}
    found["share"] = dist.gather_objects(len(shares))
    found |= {way.protocol: {id: asdict(one) for id, one in answers(way, model).items()} for way in WAYS[1:]}
    engine.close()
    with open(out, "w") as file:
        json.dump(found, file)


def test_exemplars_are_left_out_where_the_window_ends():
    way, tokenizer = Way(TEMPLATES["mmlu"], "letters", shots=3), tiny_tokenizer()
    whole = questions(ITEMS, way, POOL, tokenizer, None)
    window = sorted(len(question.prompt) for question in whole)[5]
    found = questions(ITEMS, way, POOL, tokenizer, window)
    for question, before in zip(found, whole, strict=True):
        assert len(question.prompt) <= window
        if question.num_shots < 3 and not question.num_cut:
            pool = shots_for(question.item, POOL, 3, 42)[3 - question.num_shots :]
            assert tokenizer.decode(question.prompt) == prompt(question.item, way.template, pool, "letters")
        assert (question == before) == (module._length(before) <= window)
    assert {question.num_shots for question in found} >= {2, 3}
    short = questions(ITEMS[:1], way, [], tokenizer, 40)[0]
    assert short.num_cut == len(questions(ITEMS[:1], way, [], tokenizer, None)[0].prompt) - 39  # a letter has two tokens here
    assert len(short.prompt) == 39 and tokenizer.decode(short.prompt).endswith("Answer:")
    with pytest.raises(ConfigError, match="max_new_tokens"):
        questions(ITEMS, Way(TEMPLATES["plain"], "generation", max_new_tokens=64), [], tokenizer, 64)


def test_a_token_across_the_border_is_counted_with_every_option():
    """With a merge over the last character of the prompt, all options are compared from before it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(["a", "b", ":", "x", ":x"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "x")])))
    template = TEMPLATES["plain"].__class__(context="", question="{question}", cue=":", space="", choice="", labels=["x", "b"])
    item = Item("i:1", "", "", "ab", ("", ""), 0)
    (question,) = questions([item], Way(template, "letters"), [], tokenizer, None)
    assert question.prompt == [0, 1] and question.options == [[4], [2, 1]]


# -- what is kept -----------------------------------------------------------------------------------------------


def some(count: int, right: int = 2) -> list[Prediction]:
    return [Prediction(f"f:{i}", "g" if i % 2 else "h", "letters", 0, int(i >= right), i < right, [-0.1, -2.4]) for i in range(count)]


def test_a_torn_end_is_repaired_and_gone_on_with(tmp_path):
    made_by = {"model": {"path": "m"}, "shots": 0}
    store = Store(tmp_path, made_by)
    store.add(some(3))
    store.close()
    whole = (tmp_path / "predictions.jsonl").read_bytes()
    for torn in (b'{"id": "f:3", "gro', b"\0\0\0\0", b'{"id": "f:3"}\n\0\0'):
        (tmp_path / "predictions.jsonl").write_bytes(whole + torn)
        assert list(read(tmp_path).values()) == some(3)
        store = Store(tmp_path, made_by)
        assert list(store.found.values()) == some(3) and (tmp_path / "predictions.jsonl").read_bytes() == whole
        store.close()
    store = Store(tmp_path, made_by)
    store.add(some(5)[3:])
    store.close()
    assert list(read(tmp_path).values()) == some(5)
    lines = whole.split(b"\n")
    (tmp_path / "predictions.jsonl").write_bytes(b"\n".join([lines[0], b"{broken", *lines[2:]]))
    with pytest.raises(DataError, match=r"predictions\.jsonl:2"):
        Store(tmp_path, made_by)


def test_other_settings_never_mix(tmp_path):
    store = Store(tmp_path, {"model": {"path": "m"}, "shots": 0})
    store.add(some(1))
    store.close()
    with pytest.raises(ConfigError, match=r"shots: 0 there, 5 now"):
        Store(tmp_path, {"model": {"path": "m"}, "shots": 5})
    (tmp_path / "made_by.json").unlink()
    with pytest.raises(ConfigError, match="not known"):
        Store(tmp_path, {"model": {"path": "m"}, "shots": 0})


# -- what it comes to -------------------------------------------------------------------------------------------


def test_summary_by_hand():
    from scipy.stats import binomtest

    found = summary(some(5, right=3), "macro")
    assert found["micro"]["value"] == 0.6 and found["micro"]["n"] == 5
    interval = binomtest(3, 5).proportion_ci(method="wilson")
    assert (found["micro"]["low"], found["micro"]["high"]) == pytest.approx((interval.low, interval.high))
    assert {name: score["value"] for name, score in found["groups"].items()} == {"g": 0.5, "h": pytest.approx(2 / 3)}
    assert found["accuracy"] == found["macro"] and found["macro"]["value"] == pytest.approx((0.5 + 2 / 3) / 2)
    share = math.exp(-0.1) / (math.exp(-0.1) + math.exp(-2.4))
    assert found["loss"]["value"] == pytest.approx(-(3 * math.log(share) + 2 * math.log(1 - share)) / 5)
    assert chance(ITEMS, "micro") == pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2) / 4)
    with pytest.raises(DataError):
        summary([], "micro")


def test_likelihoods_are_compared_each_way():
    sums, tokens, num_bytes = [-4.0, -5.0, -6.0], [2, 2, 4], [4, 10, 8]
    ways = {"sum": 0, "tokens": 2, "bytes": 1}
    for name, best in ways.items():
        assert module.place_of_best(sums, tokens, num_bytes, name) == best
    one = Prediction("f:1", "", "likelihood", 2, 2, True, sums, tokens, num_bytes)
    assert {name: score["value"] for name, score in summary([one], "micro")["by"].items()} == {"sum": 0.0, "tokens": 1.0, "bytes": 0.0}


def test_a_comparison_joins_by_id():
    ours, theirs = some(40, right=40), some(40, right=40)
    worse = {one.id: Prediction(**asdict(one) | {"correct": i >= 12, "prediction": int(i < 12)}) for i, one in enumerate(theirs)}
    found = against(list(reversed(ours)), worse, "micro")
    assert (found.difference, found.better, found.worse) == (0.3, 12, 0) and found.p == pytest.approx(2 / 2**12)
    with pytest.raises(DataError, match="same items"):
        against(ours[1:], worse, "micro")
    with pytest.raises(DataError, match="right answer"):
        against(some(40, right=20), worse, "micro")


if __name__ == "__main__":
    on_this_rank(sys.argv[1])
