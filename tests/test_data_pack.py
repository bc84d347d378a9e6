"""Packing: rows without padding that hold what the examples hold, and bins that are full, whole and the same for any split."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from deltune.data.bins import best_fit
from deltune.data.config import Source
from deltune.data.dataset import Example
from deltune.data.loader import Loader, eval_batches
from deltune.data.pack import join, pad
from deltune.errors import DataError
from tests.encoded import prepared, write_rows
from tests.tiny import tiny_tokenizer

PAD = 258


def example(ids, labels=None, row="r"):
    return Example(np.array(ids, np.int32), np.array(ids if labels is None else labels, np.int32), row)


def rows(n=60, tag="q", longest=40):
    return [{"prompt": f"{tag}{i}", "completion": "a" * (1 + (7 * i) % longest)} for i in range(n)]


def load(file, **settings):
    return prepared(file, tiny_tokenizer(), **settings).train


def bins(data, **settings):
    return Loader(data, **({"micro_batch": 8, "micro_batch_tokens": 160, "batching": "packed", "pad_id": PAD, "seed": 3} | settings))


def names(batches):
    return [row.rpartition("/")[2] for batch in batches for row in batch.rows]


def rows_of(batches):
    return [names([batch]) for batch in batches]


@pytest.fixture
def file(tmp_path):
    return write_rows(tmp_path / "a.jsonl", rows())


# ---- one row


def test_a_packed_row_holds_its_documents_one_after_another():
    batch = join([example([5, 6, 7], [-100, 6, 7], "a:1"), example([8], [8], "a:2"), example([9, 5], [9, 5], "a:3")])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]] and batch.segments == (0, 3, 4, 6)
    assert batch.labels.tolist() == [[-100, 6, 7, -100, -100, 5]]  # what comes first is predicted from nothing
    assert (batch.num_tokens, batch.num_trained_tokens, batch.rows) == (6, 3, ["a:1", "a:2", "a:3"])
    assert batch.row_of_tokens().tolist() == [[0, 0, 0, 1, 2, 2]]
    assert {str(t.dtype) for t in (batch.input_ids, batch.labels, batch.position_ids, batch.row_of_tokens())} == {"torch.int64"}


def test_joined_and_padded_count_the_same():
    examples = [example(range(1, n), [-100] * (n // 3) + list(range(1, n))[n // 3 :]) for n in (2, 9, 4, 3, 30)]
    packed, padded = join(examples), pad(examples, PAD)
    assert (packed.num_tokens, packed.num_trained_tokens, packed.rows) == (padded.num_tokens, padded.num_trained_tokens, padded.rows)
    assert padded.row_of_tokens().tolist() == [[i] * 29 for i in range(5)]


def test_a_model_is_told_of_the_documents_by_transformers_names():
    packed = join([example([5, 6, 7]), example([8]), example([9, 5])]).inputs()
    assert packed["attention_mask"] is None and packed["use_cache"] is False
    for side in "qk":
        assert packed[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert packed[f"cu_seq_lens_{side}"].tolist() == [0, 3, 4, 6] and packed[f"max_length_{side}"] == 3
        assert packed[f"cu_seq_lens_{side}"].starts == (0, 3, 4, 6)  # known without asking the device
    padded = pad([example([5, 6, 7]), example([8])], PAD).inputs()
    assert set(padded) == {"input_ids", "attention_mask", "use_cache"} and padded["attention_mask"].sum() == 4


def test_a_batch_moves_whole():
    for batch in (join([example([5, 6]), example([7])]), pad([example([5, 6]), example([7])], PAD)):
        moved = batch.to("meta")
        assert all(v.is_meta for v in moved.inputs().values() if isinstance(v, torch.Tensor)) and moved.labels.is_meta
        assert moved.segments == batch.segments and moved.row_of_tokens().is_meta


def test_a_document_without_tokens_is_named():
    with pytest.raises(DataError, match="a:2: the example has no token"):
        join([example([5], row="a:1"), example([], row="a:2")])


# ---- bins


def slow_best_fit(lengths, capacity):
    """Best fit decreasing by looking at every bin: how full the bins are."""
    fills: list[int] = []
    for length in sorted(lengths, key=lambda length: -(length * 64 // capacity)):
        fitting = [i for i, fill in enumerate(fills) if fill + length <= capacity]
        if fitting:
            fills[max(fitting, key=fills.__getitem__)] += length
        else:
            fills.append(length)
    return sorted(fills)


@pytest.mark.parametrize("capacity", [7, 64, 100, 1000])
def test_best_fit_decreasing_is_as_by_looking_at_every_bin(capacity):
    random = np.random.default_rng(capacity)
    for n in (0, 1, 2, 50, 400):
        lengths = random.integers(1, capacity + 1, n) if n % 4 else np.minimum(random.geometric(5 / capacity, n), capacity)
        found = best_fit(lengths, capacity)
        assert sorted(np.concatenate([*found, np.zeros(0, int)]).tolist()) == list(range(n))
        assert sorted(int(lengths[bin].sum()) for bin in found) == slow_best_fit(lengths.tolist(), capacity)
        assert all((np.diff(bin) > 0).all() for bin in found)


def test_best_fit_leaves_next_to_nothing_empty_where_items_are_short():
    lengths = np.random.default_rng(0).lognormal(4.5, 0.75, 20_000).astype(int).clip(1, 512)
    for capacity in (1024, 4096):
        assert lengths.sum() / (len(best_fit(lengths, capacity)) * capacity) > 0.998


def test_an_item_longer_than_a_bin_is_refused():
    with pytest.raises(DataError, match=r"an example has 9 tokens, and train\.micro_batch_tokens=8"):
        best_fit(np.array([3, 9]), 8)


# ---- packed by examples


def test_packed_steps_have_the_examples_of_padded_ones(file):
    data = load(file)
    settings = {"micro_batch": 4, "accumulate": 2, "pad_id": PAD, "num_examples": 75}
    for world in (1, 2):
        for rank in range(world):
            packed, padded = (Loader(data, batching=b, rank=rank, world_size=world, **settings) for b in ("packed", "padded"))
            assert packed.num_steps(2) == padded.num_steps(2)
            for i in range(11):
                for one, other in zip(packed.step(i), padded.step(i), strict=True):
                    assert one.rows == other.rows and (one.num_tokens, one.num_trained_tokens) == (other.num_tokens, other.num_trained_tokens)
                    assert one.input_ids[0].tolist() == other.input_ids[other.attention_mask == 1].tolist()
                    assert one.input_ids.shape == (1, one.num_tokens)
            packed.load_state(json.loads(json.dumps(padded.state())))  # the same steps, so a run may change between them


# ---- packed by tokens


@pytest.mark.parametrize("shuffle", [True, False])
def test_bins_are_whole_examples_up_to_so_many_tokens(file, shuffle):
    data = load(file)
    steps = bins(data, shuffle=shuffle, num_examples=60)
    found = [batch for i in range(steps.num_steps(1)) for batch in steps.step(i)]
    assert Counter(names(found)) == Counter(f"a.jsonl:{i + 1}" for i in range(60))
    by_row = {data[i].row: data[i].ids.tolist() for i in range(60)}
    for batch in found:
        assert batch.num_tokens <= 160 and batch.input_ids.shape == (1, batch.num_tokens)
        assert [batch.input_ids[0, a:b].tolist() for a, b in pairwise(batch.segments)] == [by_row[row] for row in batch.rows]
    assert len(found) == len(best_fit(data.lengths, 160))
    assert not steps.step(len(found)) and steps.num_steps(1) == len(found)


@pytest.mark.parametrize("shuffle", [True, False])
def test_accumulation_and_ranks_are_the_same_thing_in_bins(file, shuffle):
    data = load(file)
    whole = bins(data, accumulate=6, shuffle=shuffle, num_examples=150)
    for accumulate, world in ((3, 2), (2, 3), (1, 6)):
        ranks = [bins(data, accumulate=accumulate, rank=r, world_size=world, shuffle=shuffle, num_examples=150) for r in range(world)]
        assert {rank.num_steps(2.5) for rank in ranks} == {whole.num_steps(2.5)}
        for i in range(whole.num_steps(2.5) + 1):
            steps = [rows_of(rank.step(i)) for rank in ranks]
            assert [steps[r][k] for k in range(accumulate) for r in range(world) if k < len(steps[r])] == rows_of(whole.step(i))
            assert {rank.epochs_after(i) for rank in ranks} == {whole.epochs_after(i)}


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr("deltune.data.bins.BINS_PER_WINDOW", 4)


def test_every_epoch_has_every_row_once_and_ends_between_bins(file, small_windows):
    steps = bins(load(file))
    epochs, ends = [[], [], []], []
    for i in range(200):
        done = steps.epochs_after(i)
        if done >= 3:
            break
        ends += [done] if done == int(done) else []
        epochs[int(done)] += rows_of(steps.step(i))
        assert steps.epochs_after(i + 1) == pytest.approx(done + len(epochs[int(done)][-1]) / 60)
    assert ends == [0.0, 1.0, 2.0]
    for epoch in epochs:
        assert sorted(n for bin in epoch for n in bin) == sorted(f"a.jsonl:{i + 1}" for i in range(60))
    assert epochs[0] != epochs[1] != epochs[2]
    assert steps._bins.windows_per_epoch > 1


def test_examples_have_other_company_in_each_epoch(tmp_path):
    data = load(write_rows(tmp_path / "a.jsonl", rows(400, longest=397)))
    steps = bins(data, micro_batch_tokens=2000)

    def company(epoch):
        found = set()
        for i in range(1000):
            if int(steps.epochs_after(i)) == epoch:
                found |= {frozenset(pair) for bin in rows_of(steps.step(i)) for pair in combinations(bin, 2)}
            elif steps.epochs_after(i) > epoch:
                return found

    first, second = company(0), company(1)
    assert len(first & second) < 0.35 * len(first)  # 0.97 in strict order of lengths


def test_weights_hold_in_bins(tmp_path, small_windows):
    a, b = write_rows(tmp_path / "a.jsonl", rows(10)), write_rows(tmp_path / "b.jsonl", rows(6, "x"))
    data = load("", train=[Source(path=a, weight=0.5), Source(path=b, weight=2.0)])
    steps = bins(data, num_examples=34)
    seen = [Counter(), Counter()]
    for i in range(steps.num_steps(2)):
        seen[int(steps.epochs_after(i))].update(names(steps.step(i)))
    assert all({counts[f"b.jsonl:{i}"] for i in range(1, 7)} == {2} for counts in seen)
    halves = [{n for n in counts if n.startswith("a")} for counts in seen]
    assert [len(half) for half in halves] == [5, 5] and not halves[0] & halves[1]


def test_a_part_of_an_epoch_ends_after_as_many_examples(file, small_windows):
    steps = bins(load(file), accumulate=2, num_examples=77)
    last = steps.num_steps(77 / 60)
    assert sum(len(names(steps.step(i))) for i in range(last)) == 77 and steps.step(last) == []
    assert steps.epochs_after(last) == 77 / 60
    assert bins(load(file), accumulate=2).num_steps(77 / 60) == last  # asked without an end, the same
    assert len(steps.step(last - 1)) in (1, 2)


def test_any_bin_is_found_without_those_before_it(file, small_windows):
    data = load(file)
    walked = bins(data, accumulate=3)
    steps = [rows_of(walked.step(i)) for i in range(40)]
    for i in (39, 0, 17, 38, 1):
        assert rows_of(bins(data, accumulate=3).step(i)) == steps[i] == rows_of(walked.step(i))
    assert rows_of(bins(data, accumulate=3, seed=4).step(0)) != steps[0]


@pytest.mark.parametrize("bins_per_window", [256, 33])
def test_the_bins_of_a_step_are_filled_alike(tmp_path, monkeypatch, bins_per_window):
    """Examples of which one or two fill a bin: by chance a step of four would have a bin far emptier than the others."""
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a" * (60 + 61 * i % 90)} for i in range(300)])
    monkeypatch.setattr("deltune.data.bins.BINS_PER_WINDOW", bins_per_window)
    data = load(file)
    steps, other = (bins(data, accumulate=2, world_size=2, rank=r, micro_batch_tokens=240, num_examples=600) for r in range(2))
    spread = [np.ptp([b.num_tokens for b in steps.step(i) + other.step(i)]) for i in range(steps.num_steps(2) - 1)]
    assert np.std([b.num_tokens for i in range(20) for b in steps.step(i)]) > 15
    assert np.median(spread) <= 240 / 16


def test_a_step_has_long_and_short_examples(tmp_path):
    """Best fit fills its first bins with few long examples; a step of such alone would see only them."""
    data = load(write_rows(tmp_path / "a.jsonl", rows(900, longest=300)))
    steps = bins(data, accumulate=4, micro_batch_tokens=1000)
    sizes = np.array([[len(b.rows) for b in steps.step(i)] for i in range(int(data.lengths.sum()) // 4000)])
    assert np.var(sizes.mean(axis=1)) < 0.5 * np.var(sizes)  # a quarter by chance


def test_reading_order_is_kept_as_far_as_bins_allow(file, small_windows):
    steps = bins(load(file), shuffle=False, num_examples=60)
    found = [[int(n.rpartition(":")[2]) for n in names(steps.step(i))] for i in range(steps.num_steps(1))]
    window = 60 / steps._bins.windows_per_epoch
    assert all(bin == sorted(bin) and bin[-1] - bin[0] <= window for bin in found)
    assert [n for bin in found for n in bin[:1]] == sorted(bin[0] for bin in found)


def test_a_resumed_loader_of_bins_refuses_other_bins(file):
    data = load(file)
    state = json.loads(json.dumps(bins(data, accumulate=2).state()))
    bins(data, world_size=2).load_state(state)
    bins(data, micro_batch=3, accumulate=2).load_state(state)  # of no effect here
    for changed, word in (
        (bins(data), "bins per step"), (bins(data, accumulate=2, micro_batch_tokens=200), "train.micro_batch_tokens"),
        (bins(data, accumulate=2, seed=9), "data.seed"), (Loader(data, micro_batch=8, pad_id=PAD, seed=3), "examples per step"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=word):
            changed.load_state(state)


def test_an_example_longer_than_a_bin_is_named_with_both_settings(file):
    with pytest.raises(DataError, match=r"a\.jsonl:\d+ has \d+ tokens, and train\.micro_batch_tokens=50 .*data\.max_length=50"):
        bins(load(file), micro_batch_tokens=50)
    bins(load(file, max_length=50), micro_batch_tokens=50)
    with pytest.raises(DataError, match=r"a\.jsonl:\d+ has \d+ tokens, and train\.micro_batch_tokens=50 .*data\.max_length=50"):
        bins(load(file, streaming=True), micro_batch_tokens=50).step(0)


def test_evaluation_in_bins_sees_every_example_once(file):
    data = load(file)
    for world in (1, 2, 3):
        ranks = [list(eval_batches(data, micro_batch=8, micro_batch_tokens=160, packed=True, rank=r, world_size=world, pad_id=PAD)) for r in range(world)]
        assert Counter(n for batches in ranks for n in names(batches)) == Counter(f"a.jsonl:{i + 1}" for i in range(60))
        assert max(map(len, ranks)) - min(map(len, ranks)) <= 1 and all(b.num_tokens <= 160 for batches in ranks for b in batches)
    first = next(eval_batches(data, micro_batch=8, packed=True, pad_id=PAD))
    assert len(first.rows) == 8 and first.num_tokens == np.sort(data.lengths)[-8:].sum()


# ---- streams


@pytest.mark.parametrize("shuffle", [True, False])
def test_bins_of_a_stream_lie_within_blocks_and_hold_every_row_once(file, shuffle):
    settings = {"streaming": True, "stream_block": 15, "shuffle": shuffle}
    found = []
    steps = bins(load(file, **settings), shuffle=shuffle)
    for i in range(60):
        found.append(names(steps.step(i)))
        if sum(map(len, found)) >= 120:
            break
    flat = [int(n.rpartition(":")[2]) for bin in found for n in bin]
    for epoch in range(2):
        for block in range(4):
            chosen = flat[epoch * 60 + block * 15 :][:15]
            assert sorted(chosen) == list(range(block * 15 + 1, block * 15 + 16))
    assert flat[:60] != flat[60:] if shuffle else flat[:60] == flat[60:]
    one = [rows_of(bins(load(file, **settings), shuffle=shuffle, accumulate=4).step(0))]
    two = [rows_of(bins(load(file, **settings), shuffle=shuffle, accumulate=2, rank=r, world_size=2).step(0)) for r in range(2)]
    assert one[0] == [two[r][k] for k in range(2) for r in range(2)] == found[:4]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_of_bins_resumes_where_it_was(file, shuffle):
    make = lambda: bins(load(file, streaming=True, stream_block=13, shuffle=shuffle), shuffle=shuffle, accumulate=2)  # noqa: E731
    straight, states, steps = make(), [], []
    for i in range(30):
        states.append(json.loads(json.dumps(straight.state())))
        steps.append(rows_of(straight.step(i)))
    for k in (0, 1, 2, 3, 9, 10, 28):
        resumed = make()
        resumed.load_state(states[k])
        assert [rows_of(resumed.step(i)) for i in range(k, 30)] == steps[k:]
        assert resumed.dataset.counts == straight.dataset.counts
