"""Mistyped keys and keys of other tools: the right one is among the first three suggestions."""

from __future__ import annotations

import random
import re

import pytest

from deltune import settings
from deltune.config.fields import walk
from deltune.config.foreign import ABSENT, DIFFERENT, FOREIGN, SAME
from deltune.config.suggest import distance, nearest, nearest_keys
from deltune.errors import ConfigError
from deltune.settings import Run, load

KEYS = sorted({key.dotted for key in walk(Run)})
ALL_KEYS = {key.dotted for name in dir(settings) if name == "Run" or name.endswith("Settings") for key in walk(getattr(settings, name))}
LETTERS = "abcdefghijklmnopqrstuvwxyz_"
NUM_TYPOS = 200


def edited(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word))
    kind = rng.choice(["replace", "insert", "delete"])
    letter = rng.choice(LETTERS)
    return {"replace": word[:at] + letter + word[at + 1 :], "insert": word[:at] + letter + word[at:], "delete": word[:at] + word[at + 1 :]}[kind]


def swapped(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word) - 1)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def typo(key: str, rng: random.Random) -> str:
    """One of the mistakes people make, in the leaf of a key; keys of four letters or fewer get one edit, others up to two."""
    section, dot, leaf = key.rpartition(".")
    kind = rng.choice(["edits", "swap", "underscore", "section", "plural", "hyphen"])
    if kind == "edits":
        for _ in range(rng.randint(1, 2) if len(leaf) > 4 else 1):
            leaf = edited(leaf, rng)
    elif kind == "swap":
        leaf = swapped(leaf, rng)
    elif kind == "underscore":
        at = rng.randrange(1, len(leaf))
        leaf = leaf.replace("_", "", 1) if "_" in leaf and rng.random() < 0.5 else leaf[:at] + "_" + leaf[at:]
    elif kind == "section":
        section, dot = rng.choice(["model", "data", "optim", "train", "training", "trainer", "args", "config", "schedule"]), "."
    elif kind == "plural":
        leaf = leaf[:-1] if leaf.endswith("s") else leaf + "s"
    else:
        leaf = leaf.replace("_", "-") if "_" in leaf else leaf + "-"
    return section + dot + leaf


def typos(seed: int) -> list[tuple[str, str]]:
    """200 mistyped keys, each with the key that was meant; half of them with their section, half without."""
    rng = random.Random(seed)
    leaves = {key.rpartition(".")[2]: 0 for key in KEYS}
    for key in KEYS:
        leaves[key.rpartition(".")[2]] += 1
    found = []
    while len(found) < NUM_TYPOS:
        key = rng.choice(KEYS)
        wrong = typo(key, rng)
        if rng.random() < 0.5 and leaves[key.rpartition(".")[2]] == 1:
            wrong = wrong.rpartition(".")[2]
        names = {wrong, wrong.replace("-", "_")}
        if not names & set(KEYS) and wrong not in leaves and not names & set(FOREIGN):
            found.append((wrong, key))
    return found


@pytest.mark.parametrize("seed", range(2))
def test_the_key_that_was_meant_is_among_the_first_three(seed):
    found = [(wrong, key, nearest_keys(wrong, set(KEYS))) for wrong, key in typos(seed)]
    missed = [case for case in found if case[1] not in case[2][:3]]
    assert len(missed) <= 0.05 * NUM_TYPOS, missed


def test_typos_on_the_command_line_end_in_one_message_with_the_suggestion():
    right = 0
    cases = typos(seed=99)[:NUM_TYPOS]
    for wrong, key in cases:
        with pytest.raises(ConfigError) as caught:
            load(Run, [f"{wrong}=1"])
        message = str(caught.value)
        named = re.split(r"; nearest: |write one of ", message)[-1].split(", ")
        right += key in named[:3]
        assert message.startswith(f"{wrong}=1 (command line): ")
    assert right >= 0.95 * len(cases)


def test_distance_is_the_shortest_way_of_edits():
    """Against a search over all single edits, breadth first, on short words of a small alphabet."""

    def neighbours(word):
        for i in range(len(word) + 1):
            yield from (word[:i] + c + word[i:] for c in "ab")
            if i < len(word):
                yield word[:i] + word[i + 1 :]
                yield from (word[:i] + c + word[i + 1 :] for c in "ab")
        yield from (word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1))

    reached, ring = {"abab": 0}, ["abab"]
    for steps in (1, 2):
        ring = [new for word in ring for new in neighbours(word) if reached.setdefault(new, steps) == steps]
    for word, steps in reached.items():
        # the restricted form may count an edit more where a swapped pair is edited again
        assert distance("abab", word) in (steps, steps + 1)
        if steps <= 1:
            assert distance("abab", word) == steps
    assert (distance("", "abc"), distance("abc", ""), distance("ca", "ac")) == (3, 3, 1)


def test_nothing_is_suggested_for_what_is_like_nothing():
    assert nearest("zzzzqqqq", KEYS) == []
    with pytest.raises(ConfigError, match="see `deltune list keys`"):
        load(Run, ["zzzzqqqq=1"])


# -- names of other tools ---------------------------------------------------------------------------------------

FROM_OTHER_TOOLS = {
    "cutoff_len": "data.max_length", "lora_r": "adapter.rank", "lora_rank": "adapter.rank", "lora_alpha": "adapter.alpha",
    "learning_rate": "optim.lr", "per_device_train_batch_size": "train.micro_batch", "gradient_accumulation_steps": "train.accumulate",
    "num_train_epochs": "train.epochs", "max_steps": "train.steps", "model_name_or_path": "model.path", "base_model": "model.path",
    "output_dir": "output", "sequence_len": "data.max_length", "max_seq_length": "data.max_length", "save_steps": "checkpoint.every",
    "eval_steps": "eval.every", "warmup_ratio": "schedule.warmup", "warmup_steps": "schedule.warmup", "lr_scheduler_type": "schedule.name",
    "bf16": "engine.precision", "fp16": "engine.precision", "val_set_size": "data.eval_size", "dataset": "data.train", "datasets": "data.train",
    "micro_batch_size": "train.micro_batch", "num_epochs": "train.epochs", "target_modules": "adapter.targets",
    "lora_target_modules": "adapter.targets", "lora_target": "adapter.targets", "adam_beta1": "optim.beta1", "logging_steps": "log.every",
    "early_stopping_patience": "eval.patience", "train_iters": "train.steps", "replace_modules": "adapter.targets",
    "batch_size_per_gpu": "train.micro_batch", "clip_grad_max_norm": "optim.max_grad_norm", "enable_list": "model.enable",
    "train_on_inputs": "data.train_on_source", "source_max_len": "data.max_source_length", "report_to": "log.sinks", "lr_decay_ratio": "schedule.floor",
    "group_by_length": "data.batching", "packing": "data.batching", "sample_packing": "data.batching", "padding_free": "data.batching",
    "neat_packing": "data.batching", "max_tokens_per_batch": "train.micro_batch_tokens",
    "per_gpu_train_batch_size": "train.micro_batch", "warmup_proportion": "schedule.warmup", "resume_from_checkpoint": "resume",
}  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours"), FROM_OTHER_TOOLS.items())
def test_a_name_of_another_tool_is_answered_with_ours(theirs, ours):
    for word in (theirs, f"train.{theirs}", theirs.replace("_", "-")):
        with pytest.raises(ConfigError) as caught:
            load(Run, [f"{word}=1"])
        assert f"of other tools is {ours} here" in str(caught.value)


def test_a_mistyped_name_of_another_tool_still_leads_to_ours():
    for wrong, ours in [("learing_rate", "optim.lr"), ("gradient_acumulation_steps", "train.accumulate"), ("cutof_len", "data.max_length")]:
        assert ours in nearest_keys(wrong, set(KEYS))


def test_the_table_names_real_keys_and_no_name_twice():
    names = [name for alike in SAME.values() for name in alike.split()] + list(DIFFERENT) + list(ABSENT)
    assert len(names) == len(set(names)) >= 100
    assert {foreign.target for foreign in FOREIGN.values() if foreign.target} <= ALL_KEYS
    leaves = {key.rpartition(".")[2] for key in KEYS}
    assert not leaves & set(FOREIGN), "a key of ours can never be reached through the table"


def test_notes_write_values_that_are_accepted():
    """Where a note shows `key=value`, the key is real and the value is taken."""
    for foreign in FOREIGN.values():
        for key, value in re.findall(r"\b([a-z]+\.[a-z_0-9]+)=(\{.*?\}|\[.*?\]|[\w-]+)", foreign.note):
            if key != "schedule.decay" and "column" not in value:
                load(Run, [f"{key}={value}"])
