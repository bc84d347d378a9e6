"""The token cache: the same examples as fresh, found again by content only, and never believed when damaged."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from deltune.data import cache
from deltune.data.encode import Encoder
from tests.encoded import all_marked, prepared, write_rows
from tests.tiny import tiny_tokenizer

ROWS = [{"prompt": f"q{i}", "completion": "a" * (i % 7)} for i in range(40)]  # every seventh has an empty answer


@pytest.fixture
def file(tmp_path):
    return write_rows(tmp_path / "a.jsonl", ROWS)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tokens"


@pytest.fixture
def encoded(monkeypatch):
    """Counts conversations that are tokenised."""
    counter = []
    real = Encoder.encode

    def encode(self, conversations):
        counter.extend(conversations)
        return real(self, conversations)

    monkeypatch.setattr(Encoder, "encode", encode)
    return counter


def load(file, cached, tokenizer=None, **settings):
    return prepared(file, tokenizer or tiny_tokenizer(), cache=str(cached) if cached else None, on_bad="skip", **settings)


def entries(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir())


def test_cached_examples_equal_fresh_ones(file, folder, encoded, tmp_path):
    fresh, first = load(file, None), load(file, folder, folder=tmp_path / "run1")
    num_encoded = len(encoded)
    again = load(file, folder, folder=tmp_path / "run2")
    assert len(encoded) == num_encoded  # nothing was tokenised
    assert isinstance(again.train.parts[0].ids, np.memmap)
    for other in (first, again):
        assert all_marked(other.train, tiny_tokenizer()) == all_marked(fresh.train, tiny_tokenizer())
        assert [other.train[i].row for i in range(34)] == [fresh.train[i].row for i in range(34)]
        assert other.train.fingerprint == fresh.train.fingerprint
        assert other.train.lengths.tolist() == fresh.train.lengths.tolist()
        assert other.train.num_trained.tolist() == fresh.train.num_trained.tolist()
        assert other.report.to_dict() == fresh.report.to_dict()
    assert (tmp_path / "run1/rejects.jsonl").read_bytes() == (tmp_path / "run2/rejects.jsonl").read_bytes()


def test_bad_rows_stop_a_run_that_finds_them_in_the_cache(file, folder):
    load(file, folder)
    from deltune.errors import DataError

    with pytest.raises(DataError, match=rf"{file}:1: completion is empty"):
        prepared(file, tiny_tokenizer(), cache=str(folder))


def test_an_entry_is_found_by_content_not_by_name(file, folder, encoded, tmp_path):
    load(file, folder)
    count = len(encoded)
    moved = shutil.copy(file, tmp_path / "other.jsonl")
    assert load(moved, folder).train[0].row == f"{moved}:2"
    assert len(encoded) == count
    with open(moved, "a") as stream:
        stream.write('{"prompt": "x", "completion": "y"}\n')
    load(moved, folder)
    assert len(encoded) > count


OTHER_SETTINGS = [
    {"max_length": 20}, {"max_source_length": 20}, {"max_target_length": 2}, {"train_on_source": True}, {"system": "s"},
    {"meta_prompt": "m"}, {"prefix": "p"}, {"postfix": "p"}, {"template": "plain"}, {"template": "alpaca"}, {"mode": "pretrain"},
    {"overlong": "skip"}, {"read_nums": 10}, {"fields": {"prompt": "completion", "completion": "prompt"}},
]  # fmt: skip


@pytest.mark.parametrize("settings", OTHER_SETTINGS, ids=str)
def test_settings_that_change_tokens_have_entries_of_their_own(file, folder, encoded, settings):
    load(file, folder)
    count = len(encoded)
    assert all_marked(load(file, folder, **settings).train, tiny_tokenizer()) == all_marked(load(file, None, **settings).train, tiny_tokenizer())
    assert len(entries(folder)) == 2 and len(encoded) > count


def test_the_tokenizer_is_part_of_the_key(file, folder):
    other = tiny_tokenizer()
    other.add_tokens(["aa"])
    template = tiny_tokenizer("{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}")
    for tokenizer in (tiny_tokenizer(), other, template):
        load(file, folder, tokenizer)
    assert len(entries(folder)) == 3
    padded = tiny_tokenizer()
    padded(["a", "bb"], padding=True, truncation=True, max_length=4)  # leaves its marks in the tokenizer's own state
    load(file, folder, padded)
    assert len(entries(folder)) == 3


def test_settings_that_change_no_token_share_an_entry(file, folder, encoded):
    load(file, folder)
    count = len(encoded)
    load(file, folder, seed=7, shuffle=False, batching="grouped", eval_size=3)
    assert len(encoded) == count


@pytest.mark.parametrize("name", ["ids.bin", "trained.bin", "offsets.bin", "counts.bin", "numbers.bin", "about.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "grow"])
def test_a_damaged_entry_is_made_anew(file, folder, encoded, name, damage):
    before = load(file, folder)
    expected, count = all_marked(before.train, tiny_tokenizer()), len(encoded)
    del before
    (entry,) = entries(folder)
    path = entry / name
    body = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        body[len(body) // 2] ^= 0x10
        path.write_bytes({"flip": bytes(body), "cut": path.read_bytes()[:-3], "grow": path.read_bytes() + b"1"}[damage])
    assert all_marked(load(file, folder).train, tiny_tokenizer()) == expected
    assert len(encoded) == 2 * count
    load(file, folder)
    assert len(encoded) == 2 * count  # and it is whole again


def test_a_build_that_dies_leaves_nothing_that_is_believed(file, folder, monkeypatch):
    def die(self, conversations):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", die)
        with pytest.raises(KeyboardInterrupt):
            load(file, folder)
    assert not entries(folder)
    name = "0" * 64
    (folder / f"{name}.tmp-1-dead").mkdir()  # a process that was killed
    load(file, folder)
    assert len([p for p in entries(folder) if ".tmp-" not in p.name]) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("where", ["mkdir", "write"])
def test_a_full_or_read_only_cache_costs_time_only(file, folder, monkeypatch, caplog, code, where):
    fresh = load(file, None)

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("deltune.log.logger.propagate", True)
    monkeypatch.setattr(*{"mkdir": (Path, "mkdir", fail), "write": (cache, "_write", fail)}[where])
    found = load(file, folder)
    assert found.train.fingerprint == fresh.train.fingerprint
    assert "tokens cannot be cached" in caplog.text and os.strerror(code) in caplog.text
    monkeypatch.undo()
    assert not folder.exists() or not entries(folder)


def _load_in_process(file, folder, queue):
    queue.put(load(file, folder).train.fingerprint)


def test_processes_that_start_together_get_the_same_tokens(file, folder):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_load_in_process, args=(file, folder, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    prints = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(timeout=60)
    assert prints == {load(file, None).train.fingerprint}
    assert len(entries(folder)) == 1


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("DELTUNE_CACHE", str(tmp_path / "own"))
    assert cache.cache_folder("auto") == tmp_path / "own"
    monkeypatch.delenv("DELTUNE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder("auto") == tmp_path / ".cache" / "deltune" / "tokens"
    assert cache.cache_folder(None) is None
    assert cache.cache_folder("~/x") == tmp_path / "x"
