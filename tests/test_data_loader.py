"""Steps of a loader: the same examples for any split into micro-batches and ranks, at any step, streamed or not."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from deltune.data.config import Source
from deltune.data.dataset import Example
from deltune.data.loader import Loader, eval_batches
from deltune.data.pack import pad
from deltune.errors import DataError
from tests.encoded import prepared, write_rows
from tests.tiny import tiny_tokenizer

PAD = 258


def rows(n=23, tag="q"):
    return [{"prompt": f"{tag}{i}", "completion": "a" * (1 + (7 * i) % 19)} for i in range(n)]


@pytest.fixture
def file(tmp_path):
    return write_rows(tmp_path / "a.jsonl", rows())


def load(file, **settings):
    return prepared(file, tiny_tokenizer(), **settings).train


def names(batches):
    return [row.rpartition("/")[2] for batch in batches for row in batch.rows]


def loader(data, **settings):
    return Loader(data, **({"micro_batch": 2, "accumulate": 1, "pad_id": PAD, "seed": 3} | settings))


# ---- batches


def test_padding_is_masked_and_untrained_even_where_pad_is_a_real_token():
    example = lambda ids, labels: Example(np.array(ids, np.int32), np.array(labels, np.int32), "r")  # noqa: E731
    batch = pad([example([5, 9, 9], [-100, 9, 9]), example([9], [9])], pad_id=9)
    assert batch.input_ids.tolist() == [[5, 9, 9], [9, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[-100, 9, 9], [9, -100, -100]]
    assert (batch.num_tokens, batch.num_trained_tokens) == (4, 2)  # a label in the first column has nothing to be predicted from
    assert {str(t.dtype) for t in (batch.input_ids, batch.labels, batch.attention_mask)} == {"torch.int64"}


def test_batches_hold_what_the_examples_hold(file):
    data = load(file)
    (batch,) = loader(data, micro_batch=23, shuffle=False).step(0)
    for i in range(23):
        n = len(data[i].ids)
        assert batch.input_ids[i, :n].tolist() == data[i].ids.tolist()
        assert batch.labels[i, :n].tolist() == data[i].labels.tolist()
        assert batch.attention_mask[i].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
    assert batch.input_ids.shape[1] == data.lengths.max()
    assert batch.num_tokens == data.lengths.sum() and batch.num_trained_tokens == data.num_trained.sum()


# ---- splits and seeking


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_accumulation_and_ranks_are_the_same_thing(file, shuffle, grouped):
    data = load(file)
    common = {"shuffle": shuffle, "batching": "grouped" if grouped else "padded", "num_examples": 41}
    whole = loader(data, micro_batch=12, **common)
    for micro, accumulate, world in ((2, 6, 1), (2, 3, 2), (2, 2, 3), (4, 1, 3), (1, 4, 3), (12, 1, 1)):
        ranks = [loader(data, micro_batch=micro, accumulate=accumulate, rank=r, world_size=world, **common) for r in range(world)]
        for i in range(4):
            steps = [rank.step(i) for rank in ranks]
            slices = [steps[r][k] for k in range(accumulate) for r in range(world) if k < len(steps[r])]
            assert names(slices) == names(whole.step(i))


def test_all_ranks_together_see_every_row_once(file):
    data = load(file)
    for world in (1, 2, 3, 5):
        seen: Counter[str] = Counter()
        for rank in range(world):
            mine = loader(data, rank=rank, world_size=world, num_examples=23)
            seen.update(name for i in range(mine.num_steps(1)) for name in names(mine.step(i)))
        assert seen == Counter(f"a.jsonl:{i + 1}" for i in range(23))


def test_only_the_last_step_is_short(file):
    data = load(file)
    ranks = [loader(data, accumulate=2, rank=r, world_size=3, num_examples=26) for r in range(3)]
    assert ranks[0].num_steps(1) == 2 and ranks[0].num_steps(2) == 3
    sizes = [[[len(b.rows) for b in rank.step(i)] for rank in ranks] for i in range(4)]
    assert sizes == [[[2, 2]] * 3, [[2, 2]] * 3, [[2], [], []], [[], [], []]]


def test_steps_run_through_the_ends_of_epochs(file):
    walked = [n for i in range(23) for n in names(loader(load(file), micro_batch=4).step(i))]
    epochs = [walked[k * 23 : (k + 1) * 23] for k in range(4)]
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs) and len({tuple(e) for e in epochs}) == 4


def test_any_step_is_found_at_once_and_again(file):
    data = load(file)
    far = names(loader(data, micro_batch=8).step(10_000_000))
    assert far == [n for k in range(8) for n in names(loader(data, micro_batch=1).step(80_000_000 + k))]
    assert far == names(loader(data, micro_batch=8).step(10_000_000))
    assert far != names(loader(data, micro_batch=8, seed=4).step(10_000_000))
    grouped = loader(data, micro_batch=8, batching="grouped")
    assert len(names(grouped.step(10_000_000))) == 8


def test_a_resumed_loader_refuses_other_data_or_batches(file, tmp_path):
    data = load(file)
    state = json.loads(json.dumps(loader(data, micro_batch=4).state()))
    loader(data, micro_batch=2, accumulate=2).load_state(state)  # the same examples per step
    loader(data, micro_batch=2, rank=1, world_size=2).load_state(state)
    other = load(write_rows(tmp_path / "b.jsonl", rows(24)))
    for changed, word in ((loader(other, micro_batch=4), "training data"), (loader(data, micro_batch=3), "examples per step"), (loader(data, micro_batch=4, seed=9), "data.seed")):
        with pytest.raises(DataError, match=word):
            changed.load_state(state)


def test_evaluation_sees_every_example_once_longest_first(file):
    data = load(file)
    for world in (1, 2, 3):
        per_rank = [list(eval_batches(data, micro_batch=4, rank=r, world_size=world, pad_id=PAD)) for r in range(world)]
        assert sorted(n for batches in per_rank for n in names(batches)) == sorted(f"a.jsonl:{i + 1}" for i in range(23))
        assert max(map(len, per_rank)) - min(map(len, per_rank)) <= 1
    lengths = [int(m) for b in eval_batches(data, micro_batch=4, pad_id=PAD) for m in b.attention_mask.sum(1)]
    assert lengths == sorted(lengths, reverse=True)


# ---- sources and held-out rows


def two_sources(tmp_path, **settings):
    a, b = write_rows(tmp_path / "a.jsonl", rows(10)), write_rows(tmp_path / "b.jsonl", rows(6, "x"))
    return load("", train=[Source(path=a, weight=0.5), Source(path=b, weight=2.0)], **settings)


def test_weights_reach_the_loader(tmp_path):
    data = two_sources(tmp_path)
    assert data.examples_per_epoch == 5 + 12 and len(data) == 16
    steps = loader(data, micro_batch=17)
    first, second = (Counter(names(steps.step(i))) for i in range(2))
    assert {first[f"b.jsonl:{i}"] for i in range(1, 7)} == {2}
    in_a = [{n for n in c if n.startswith("a")} for c in (first, second)]
    assert len(in_a[0]) == len(in_a[1]) == 5 and not in_a[0] & in_a[1]


def test_held_out_rows_are_seeded_whole_and_apart(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i} " + "word " * (i % 30) + "\n" for i in range(50)))
    result = prepared(tmp_path / "a.txt", tiny_tokenizer(), mode="pretrain", max_length=32, eval_size=0.2)
    train, held = ({d[i].row for i in range(len(d))} for d in (result.train, result.evaluation))
    assert len(held) == 10 and len(train) == 40 and not train & held
    report = result.report
    assert (report.rows, report.used, report.held_out, report.evaluation.used) == (50, 40, 10, 10)
    assert report.examples == len(result.train) and report.evaluation.examples == len(result.evaluation)
    assert report.tokens == result.train.lengths.sum()
    again = prepared(tmp_path / "a.txt", tiny_tokenizer(), mode="pretrain", max_length=32, eval_size=0.2)
    assert again.evaluation.fingerprint == result.evaluation.fingerprint != again.train.fingerprint
    other = prepared(tmp_path / "a.txt", tiny_tokenizer(), mode="pretrain", max_length=32, eval_size=10, seed=1)
    assert len({other.evaluation[i].row for i in range(len(other.evaluation))}) == 10
    assert other.evaluation.fingerprint != result.evaluation.fingerprint
    with pytest.raises(DataError, match="none would be left to train on"):
        prepared(tmp_path / "a.txt", tiny_tokenizer(), mode="pretrain", eval_size=50)


def test_row_limits_count_rows_from_the_beginning(tmp_path):
    a, b = write_rows(tmp_path / "a.jsonl", rows(10)), write_rows(tmp_path / "b.jsonl", rows(6, "x"))
    result = prepared("", tiny_tokenizer(), train=[a, b], eval=[b], read_nums=12, eval_read_nums=2)
    assert [result.train[i].row.rpartition("/")[2] for i in (0, 9, 10, 11)] == ["a.jsonl:1", "a.jsonl:10", "b.jsonl:1", "b.jsonl:2"]
    assert (len(result.train), len(result.evaluation), result.report.rows) == (12, 2, 12)


def test_examples_of_files_are_told_apart(tmp_path):
    data = two_sources(tmp_path)
    assert [data[i].row.rpartition("/")[2] for i in (0, 9, 10, 15, -1)] == ["a.jsonl:1", "a.jsonl:10", "b.jsonl:1", "b.jsonl:6", "b.jsonl:6"]
    with pytest.raises(IndexError):
        data[16]


# ---- streams


def stream_names(data, n):
    return [e.row.rpartition("/")[2] for e in data.take(n)]


def test_an_unshuffled_stream_equals_the_data_in_memory(tmp_path):
    sources = [write_rows(tmp_path / "a.jsonl", rows(10)), write_rows(tmp_path / "b.jsonl", rows(6, "x"))]
    whole = load("", train=sources)
    settings = {"micro_batch": 3, "accumulate": 2, "shuffle": False}
    for rank in range(2):
        stream = load("", train=sources, shuffle=False, streaming=True, stream_block=4)
        mine, theirs = (loader(d, rank=rank, world_size=2, **settings) for d in (stream, whole))
        for i in range(6):
            for x, y in zip(mine.step(i), theirs.step(i), strict=True):
                assert x.rows == y.rows
                assert x.input_ids.equal(y.input_ids) and x.labels.equal(y.labels) and x.attention_mask.equal(y.attention_mask)


def test_a_shuffled_stream_sees_every_row_once_an_epoch(file):
    stream = load(file, streaming=True, stream_block=8)
    epochs = [stream_names(stream, 23) for _ in range(3)]
    in_order = [f"a.jsonl:{i + 1}" for i in range(23)]
    assert all(sorted(e) == sorted(in_order) for e in epochs)
    for epoch in epochs:  # blocks of 8 rows, each shuffled in itself
        assert sorted(epoch[:8]) == sorted(in_order[:8]) and epoch[:8] != in_order[:8]
    assert epochs[0][:8] != epochs[1][:8]
    assert epochs[0] == stream_names(load(file, streaming=True, stream_block=8), 23)
    assert epochs[0] != stream_names(load(file, streaming=True, stream_block=8, seed=1), 23)


def test_sources_of_a_stream_are_mixed_by_weight(tmp_path):
    stream = two_sources(tmp_path, streaming=True, stream_block=6)
    counts = [Counter(), Counter(), Counter()]
    while stream.state()["epoch"] < 2:
        (name,) = stream_names(stream, 1)
        counts[stream.state()["epoch"]][name] += 1
    counts.pop()
    for c in counts:
        assert {c[f"b.jsonl:{i}"] for i in range(1, 7)} == {2}
    in_a = [{n for n in c if n.startswith("a")} for c in counts]
    assert in_a[0] | in_a[1] == {f"a.jsonl:{i + 1}" for i in range(10)} and not in_a[0] & in_a[1]  # halves take turns
    first_block = {n[0] for n in stream_names(two_sources(tmp_path, streaming=True, stream_block=6), 6)}
    assert first_block == {"a", "b"}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json", "txt"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_resumes_where_it_was(tmp_path, kind, shuffle, monkeypatch):
    body = {
        "jsonl": "".join(json.dumps(r) + "\n" for r in rows()),
        "csv": "prompt,completion\n" + "".join(f'{r["prompt"]},"{r["completion"]}\nx"\n' for r in rows()),
        "json": json.dumps(rows()),
        "txt": "".join(f"{r['prompt']} {r['completion'] * 5}\n" for r in rows()),
    }[kind]
    (tmp_path / f"a.{kind}").write_text(body)
    settings = {"streaming": True, "stream_block": 5, "shuffle": shuffle, "mode": "pretrain" if kind == "txt" else "sft", "max_length": 48}
    make = lambda: loader(load(tmp_path / f"a.{kind}", **settings), micro_batch=3, shuffle=shuffle)  # noqa: E731
    straight, states, steps = make(), [], []
    for i in range(20):
        states.append(json.loads(json.dumps(straight.state())))
        steps.append(straight.step(i))
    from deltune.data.encode import Encoder

    for k in (0, 1, 2, 7, 8, 13, 19):
        resumed, encoded = make(), []
        with monkeypatch.context() as patch:
            real = Encoder.encode
            patch.setattr(Encoder, "encode", lambda self, c, real=real, encoded=encoded: encoded.extend(c) or real(self, c))
            resumed.load_state(states[k])
            assert len(encoded) <= 5  # at most the block is tokenised again
        for i in range(k, 20):
            assert names(resumed.step(i)) == names(steps[i])
        assert resumed.dataset.counts == straight.dataset.counts


def test_a_stream_goes_forward_only(file):
    steps = loader(load(file, streaming=True))
    steps.step(0)
    with pytest.raises(ValueError, match="gives step 1 next, not step 5"):
        steps.step(5)
    assert steps.examples_per_epoch is None
    with pytest.raises(DataError, match=r"train\.steps"):
        steps.num_steps(1)
    state = steps.state()
    with pytest.raises(DataError, match="training data changed"):
        loader(load(file, streaming=True, max_length=9)).load_state(state)


def test_a_stream_writes_each_reject_once_however_often_it_is_resumed(tmp_path):
    bad = [{"prompt": f"q{i}", "completion": "a" if i % 4 else ""} for i in range(40)]
    file = write_rows(tmp_path / "a.jsonl", bad)
    make = lambda: loader(  # noqa: E731
        prepared(file, tiny_tokenizer(), folder=tmp_path, streaming=True, on_bad="skip", stream_block=6).train, micro_batch=2
    )
    steps = make()
    for i in range(40):  # two epochs and more
        if i % 3 == 0:
            state = json.loads(json.dumps(steps.state()))
            if i % 2:
                steps.step(i)  # goes further than was saved
            steps = make()
            steps.load_state(state)
        steps.step(i)
    written = [json.loads(line)["line"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert written == list(range(1, 41, 4))
    assert (steps.dataset.counts.rows, steps.dataset.counts.rejected) == (40, 10)


def test_a_stream_stops_at_a_bad_row_when_it_comes(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a" if i < 9 else ""} for i in range(12)])
    stream = load(file, streaming=True, stream_block=4)
    stream.take(8)
    with pytest.raises(DataError, match=rf"{file}:10: completion is empty"):
        stream.take(1)


def test_pairs_of_settings_that_exclude_each_other(file):
    for settings, word in (
        ({"streaming": True, "eval_size": 3}, "data.eval_size"),
        ({"streaming": True, "batching": "grouped"}, "data.batching"),
        ({"eval": [file], "eval_size": 3}, "data.eval_size"),
        ({"eval_size": 2.5}, "a whole number"),
        ({"train": []}, "data.train is empty"),
    ):
        with pytest.raises(DataError, match=word):
            load(file, **settings)
