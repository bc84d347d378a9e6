"""Mixing: what the formula gives is held to the papers' numbers, and what a loader and a stream give to the formula."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltune.data.config import DataConfig, Source
from deltune.data.loader import Loader
from deltune.data.mix import Task, visits
from deltune.errors import DataError
from tests.encoded import prepared, write_rows
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat_template=None)


def config(**settings) -> DataConfig:
    return DataConfig(train=["a", "b"], **settings)


def test_a_cap_and_a_temperature_are_those_of_the_paper():
    """r_m = min(e_m, K) / sum of min(e_n, K), to the power of 1/T and renormalised (Raffel et al. 2020, section 3.5.2)."""
    sizes, cap, heat = [1000, 300, 8], 400, 2.0
    tasks = [Task(0, str(i), n) for i, n in enumerate(sizes)]
    found = visits(tasks, [1.0], config(mix_by="task", mix_cap=cap, mix_temperature=heat))
    limited = np.minimum(sizes, cap)
    rates = (limited / limited.sum()) ** (1 / heat)
    np.testing.assert_allclose(np.array(found) / sum(found), rates / rates.sum(), rtol=1e-12)
    assert visits(tasks, [1.0], config(mix_by="task", mix_cap=cap)) == pytest.approx([400, 300, 8])  # once each, or the cap


def test_shares_are_of_the_examples_whatever_the_sizes():
    """FLAN's: 0.40 flan, 0.32 t0, 0.20 niv2, 0.05 cot, 0.03 dialog."""
    shares, sizes = [0.40, 0.32, 0.20, 0.05, 0.03], [5000, 90, 700, 40, 1]
    found = visits([Task(i, "", n) for i, n in enumerate(sizes)], shares, config(weights="shares"))
    np.testing.assert_allclose(np.array(found) / sum(found), shares, rtol=1e-12)
    assert sum(found) == pytest.approx(sum(sizes))


sources = st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=4), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(sizes=sources, cap=st.none() | st.integers(1, 300), heat=st.floats(1, 8), shares=st.booleans(), data=st.data())
def test_visits_keep_their_order_and_sum(sizes, cap, heat, shares, data):
    weights = [data.draw(st.floats(0.1, 4)) for _ in sizes]
    tasks = [Task(i, str(j), n) for i, group in enumerate(sizes) for j, n in enumerate(group)]
    found = visits(tasks, weights, config(weights="shares" if shares else "passes", mix_by="t", mix_cap=cap, mix_temperature=heat))
    counted = [min(t.num_rows, cap or t.num_rows) for t in tasks]
    assert all(n > 0 for n in found)
    assert sum(found) == pytest.approx(sum(counted) if shares else sum(weights[t.source] * m for t, m in zip(tasks, counted, strict=True)))
    for a, x, m in zip(tasks, found, counted, strict=True):
        for b, y, n in zip(tasks, found, counted, strict=True):
            if a.source == b.source and m < n:  # within a source a larger task is visited more, each of its rows less
                assert x <= y * (1 + 1e-9) and x / m >= y / n * (1 - 1e-9)
    if shares:
        for i, weight in enumerate(weights):
            assert sum(x for t, x in zip(tasks, found, strict=True) if t.source == i) / sum(found) == pytest.approx(weight / sum(weights))


# ---- through files

SIZES = {"big": 120, "mid": 30, "small": 6}


def task_rows(sizes=SIZES, source="s"):
    """Rows of several tasks, one after another as in a file of tasks; the answer names task and row."""
    rows = [{"inputs": "", "targets": f"{source}:{task}:{i}", "task": task} for task, n in sizes.items() for i in range(n)]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def names(examples) -> list[str]:
    return [TOKENIZER.decode([int(i) for i in e.ids], skip_special_tokens=True) for e in examples]


def epochs(result, num_epochs, per_epoch, streaming):
    if streaming:
        return [names(result.train.take(per_epoch)) for _ in range(num_epochs)]
    loader = Loader(result.train, micro_batch=1, pad_id=0, seed=3, batching="padded")
    assert loader.examples_per_epoch == per_epoch
    found = [TOKENIZER.decode(loader.step(i)[0].input_ids[0].tolist(), skip_special_tokens=True) for i in range(num_epochs * per_epoch)]
    return [found[i * per_epoch : (i + 1) * per_epoch] for i in range(num_epochs)]


def test_an_epoch_sees_a_capped_task_in_part_and_others_whole(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", task_rows())
    result = prepared(file, TOKENIZER, mix_by="task", mix_cap=40)
    assert {g.name.rpartition("/")[2]: g.num_per_epoch for g in result.train.groups} == {"big": 40, "mid": 30, "small": 6}
    seen = Counter()
    for epoch in epochs(result, 3, 76, streaming=False):
        assert Counter(name.split(":")[1] for name in epoch) == {"big": 40, "mid": 30, "small": 6}
        assert max(Counter(epoch).values()) == 1
        seen.update(epoch)
    assert len(seen) == 156 and {n for name, n in seen.items() if ":big:" in name} == {1}  # in three epochs each of the 120 once


def test_the_order_of_a_mixture_is_a_function_of_the_seed_and_the_step(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", task_rows())
    a, b = (prepared(file, TOKENIZER, mix_by="task", mix_cap=40, mix_temperature=2.0) for _ in range(2))
    assert a.train.fingerprint == b.train.fingerprint != prepared(file, TOKENIZER).train.fingerprint
    first = Loader(a.train, micro_batch=4, pad_id=0, seed=3)
    steps = [first.step(i)[0].rows for i in range(60)]
    assert Loader(b.train, micro_batch=4, pad_id=0, seed=3).step(47)[0].rows == steps[47]
    assert steps != [Loader(b.train, micro_batch=4, pad_id=0, seed=4).step(i)[0].rows for i in range(60)]


def test_what_is_held_out_is_no_part_of_the_mixture(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", task_rows())
    plain = prepared(file, TOKENIZER, eval_size=20, seed=5)
    mixed = prepared(file, TOKENIZER, eval_size=20, seed=5, mix_by="task", mix_cap=40)
    held = names(mixed.evaluation[i] for i in range(20))
    assert held == names(plain.evaluation[i] for i in range(20))
    assert not set(held) & set(names(mixed.train[i] for i in range(len(mixed.train)))) and len(mixed.train) == 136


def sources_of(tmp_path, sizes, weights, **more):
    return [
        Source(path=write_rows(tmp_path / f"{name}.jsonl", [{"inputs": "", "targets": f"{name}:t:{i}", "task": "t"} for i in range(n)]), weight=w, **more)
        for (name, n), w in zip(sizes.items(), weights, strict=True)
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_shares_hold_in_every_stretch_of_the_order(tmp_path, streaming):
    """Small sources come again, large ones in part, as often as their shares say."""
    entries = sources_of(tmp_path, {"x": 300, "y": 40, "z": 10}, [0.5, 0.3, 0.2])
    result = prepared("", TOKENIZER, train=entries, weights="shares", streaming=streaming, stream_block=64)
    found = [name for epoch in epochs(result, 3, 350, streaming) for name in epoch]
    counts = Counter(name.split(":")[0] for name in found)
    if not streaming:
        assert counts == {"x": 525, "y": 315, "z": 210}
    for name, share in {"x": 0.5, "y": 0.3, "z": 0.2}.items():
        assert counts[name] / len(found) == pytest.approx(share, abs=0.02)
        for start in range(0, 1000, 250):
            assert sum(n.startswith(name) for n in found[start : start + 250]) / 250 == pytest.approx(share, abs=0.08 if not streaming else 0.06)
    times = Counter(found)
    assert max(n for name, n in times.items() if name.startswith("x")) - min(times[f"x:t:{i}"] for i in range(300)) <= (2 if streaming else 1)


def test_a_stream_mixes_tasks_with_a_cap_and_takes_turns(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", task_rows({"big": 2000, "small": 100}))
    result = prepared(file, TOKENIZER, mix_by="task", mix_cap=500, streaming=True, stream_block=100)
    found = names(result.train.take(2400))  # four epochs of about 500 and 100
    counts = Counter(name.split(":")[1] for name in found)
    assert counts["big"] / 2400 == pytest.approx(5 / 6, abs=0.02)
    # drawn shares of a circle: over four epochs each of the big task's rows once, but for the rows of the last epoch's end
    assert {n for name, n in Counter(found).items() if ":big:" in name} <= {1, 2} and len({n for n in found if ":big:" in n}) > 1850
    for start in range(0, 2400, 300):
        assert sum(":big:" in n for n in found[start : start + 300]) / 300 == pytest.approx(5 / 6, abs=0.09)


def test_a_hot_mixture_of_a_stream_repeats_small_tasks_by_passing_over_the_file_again(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", task_rows({"big": 900, "small": 100}))
    result = prepared(file, TOKENIZER, mix_by="task", mix_temperature=2.0, streaming=True, stream_block=50)
    found = names(result.train.take(2000))
    assert sum(":big:" in n for n in found) / 2000 == pytest.approx(0.75, abs=0.03)  # sqrt(900) : sqrt(100)
    assert {n for name, n in Counter(found).items() if ":small:" in name} <= {4, 5, 6}  # 500 visits of 100 rows
    halves = [sum(":big:" in n for n in part) / 1000 for part in (found[:1000], found[1000:])]
    assert halves == pytest.approx([0.75, 0.75], abs=0.04)


def test_a_mixed_stream_resumes(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", task_rows())
    mixture = {"mix_by": "task", "mix_cap": 40, "mix_temperature": 1.5, "streaming": True, "stream_block": 16}
    whole = names(prepared(file, TOKENIZER, **mixture).train.take(400))
    stream = prepared(file, TOKENIZER, **mixture).train
    stream.take(123)
    other = prepared(file, TOKENIZER, **mixture).train
    other.load_state(stream.state())
    assert names(other.take(277)) == whole[123:]
    with pytest.raises(DataError, match="are not those of the checkpoint"):
        prepared(file, TOKENIZER, **mixture | {"mix_cap": 41}).train.load_state(stream.state())


def test_the_cache_keeps_the_tasks(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", task_rows())
    found = [prepared(file, TOKENIZER, mix_by="task", mix_cap=40, cache=str(tmp_path / "cache")).train for _ in range(2)]
    assert found[0].groups == found[1].groups and found[0].fingerprint == found[1].fingerprint
    whole = prepared(file, TOKENIZER, mix_cap=40, cache=str(tmp_path / "cache")).train
    assert [group.num_per_epoch for group in whole.groups] == [40]  # not the tasks' entry


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_without_its_task_is_named(tmp_path, streaming):
    file = write_rows(tmp_path / "a.jsonl", [*task_rows({"a": 3}), {"inputs": "", "targets": "x"}])
    mixture = {"mix_by": "task", "mix_cap": 2, "streaming": streaming}
    with pytest.raises(DataError, match=r":4: 'task' \(data\.mix_by\) must be a name or a number, but is null; keys found: inputs, targets"):
        prepared(file, TOKENIZER, **mixture).train.take(1)
    result = prepared(file, TOKENIZER, **mixture, on_bad="skip")
    if streaming:
        result.train.take(2)
    assert result.report.rejected == 1


WITHOUT_EFFECT = [
    ({"mix_temperature": 2.0, "weights": "shares"}, "the shares of sources do not depend on their rows"),
    ({"mix_temperature": 2.0}, "there is one source"),
    ({"mix_cap": 2, "weights": "shares"}, "mix_cap has no effect"),
    ({"mix_by": "task"}, "mix_by has no effect without data.mix_cap or data.mix_temperature"),
]


@pytest.mark.parametrize(("mixture", "reason"), WITHOUT_EFFECT)
def test_settings_of_a_mixture_without_effect_are_refused(tmp_path, mixture, reason):
    with pytest.raises(DataError, match=reason):
        prepared(write_rows(tmp_path / "a.jsonl", task_rows()), TOKENIZER, **mixture)
