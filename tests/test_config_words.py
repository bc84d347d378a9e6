"""Words of the command line: text stays as it stands, the rest is Hydra's grammar, and sweeps expand in order."""

from __future__ import annotations

import pytest

from deltune.config.words import expand_sweep, read_value, read_word, split
from deltune.errors import ConfigError


@pytest.mark.parametrize(
    "text",
    [
        "a,b", "What is 3+4 (in words)?", "C:\\new\\x", "https://a/b?x=1&y=2", "数据.jsonl", "[INST] hi", "/abs/path", "123", "true", "1e-4",
        '"Hello," she said', "{not a mapping", "choice(a,b)", "  ", "a=b", "$5", "~/x", "x\ty", "-1",
    ],
)  # fmt: skip
def test_text_stays_as_it_stands(text):
    assert read_value("key", text, str) == text
    assert read_value("key", text, str | None) == text


def test_quotes_around_text_are_taken_off_and_make_anything_text():
    assert read_value("key", "'a, b'", str) == "a, b"
    assert read_value("key", '"null"', str | None) == "null"
    assert read_value("key", "null", str | None) is None
    assert read_value("key", "'[a, b]'", list[str] | str) == "[a, b]"


@pytest.mark.parametrize(
    ("text", "hint", "meant"),
    [
        ("1e-4", float, 1e-4), ("8", int, 8), ("1_000", int, 1000), ("true", bool, True), ("null", int | None, None), ("int(3.0)", int, 3),
        ("[a.jsonl,{path: b.jsonl,weight: 2}]", list[str], ["a.jsonl", {"path": "b.jsonl", "weight": 2}]),
        ("{*lora_B*: 16, lm_head: 2.5}", dict[str, float], {"*lora_B*": 16, "lm_head": 2.5}),
        ("a.jsonl", list[str], "a.jsonl"), ("C:\\x y.jsonl", list[str], "C:\\x y.jsonl"), ("数据.jsonl", list[str], "数据.jsonl"),
        ('["数据.jsonl"]', list[str], ["数据.jsonl"]), ("[q_proj,v_proj]", list[str] | str, ["q_proj", "v_proj"]),
        (r".*\.(q|v)_proj", list[str] | str, r".*\.(q|v)_proj"), ("{1: a}", None, {"1": "a"}), ("a(b", None, "a(b"),
        ("${train.steps}", int, "${train.steps}"), ("abc", int, "abc"),
    ],
)  # fmt: skip
def test_other_values_are_hydras(text, hint, meant):
    assert read_value("key", text, hint) == meant


@pytest.mark.parametrize(
    ("text", "hint", "reason"),
    [
        ("1,2", int, "needs -m"), ("a,b", list[str], "needs -m"), ("q_proj,v_proj", list[str] | str, "needs -m"), ("[a(b]", list[str], "needs quotes"),
        ("range(1,3)", int, "needs -m"), ("[[" * 30, list[str], "nested"), ("{a: }", dict[str, float], "cannot be read"), ("[数]", list[str], "quotes"),
    ],
)  # fmt: skip
def test_what_has_no_single_meaning_is_refused(text, hint, reason):
    with pytest.raises(ConfigError) as caught:
        read_value("key", text, hint)
    assert str(caught.value).startswith(f"key={text} (command line)")
    assert reason in str(caught.value)


def test_keys_are_paths():
    word = read_word("optim.lr_scales.layers.0.*=2", lambda path: float)
    assert (word.path, word.value) == (("optim", "lr_scales", "layers", "0", "*"), 2)


@pytest.mark.parametrize(
    ("text", "fits"),
    [("--lr=3", "lr=3"), ("--learning-rate", "learning_rate=VALUE"), ("-x", "x=VALUE"), ("+a=1", "without +"), ("~a", "key=value"), ("a =1", "spaces"), ("lr", "key=value"), ("=3", "no key"), ("a..b=1", "no key")],
)
def test_words_of_other_programs_are_answered(text, fits):
    with pytest.raises(ConfigError) as caught:
        split(text)
    assert str(caught.value).startswith(f"{text}: ") and fits in str(caught.value)


def test_a_sweep_is_every_combination_with_the_last_word_fastest():
    words = ["data=a.jsonl", "lr=1e-4,2e-4", "seed=range(1,3)", "prompt=hi (there)"]
    expected = [["data=a.jsonl", f"lr={lr}", f"seed={seed}", "prompt=hi (there)"] for lr in ("0.0001", "0.0002") for seed in (1, 2)]
    assert expand_sweep(words) == expected
    assert expand_sweep(["lr=1e-4"]) == [["lr=1e-4"]]


def test_swept_values_read_as_they_were_meant():
    (one,), (two,), (three,) = expand_sweep(["key=a b,'c, d',null"])
    assert [read_word(word, lambda path: str | None).value for word in (one, two, three)] == ["a b", "c, d", None]
    lists = expand_sweep(["key=[a,b],[c]"])
    assert [read_word(word, lambda path: list[str]).value for (word,) in lists] == [["a", "b"], ["c"]]
    assert [read_word(word, lambda path: str).value for (word,) in expand_sweep(["key=a\\,b,C:/x"])] == ["a,b", "C:/x"]
    with pytest.raises(ConfigError, match="quotes"):
        expand_sweep(["key=it's,C:/x"])


def test_a_glob_sweeps_over_a_groups_options():
    names = {"schedule": ["constant", "cosine", "linear"]}
    assert expand_sweep(["schedule=glob(c*)"], names.__getitem__) == [["schedule=constant"], ["schedule=cosine"]]
    with pytest.raises(ConfigError, match="matches none of constant, cosine, linear"):
        expand_sweep(["schedule=glob(x*)"], names.__getitem__)
    with pytest.raises(ConfigError, match="interval"):
        expand_sweep(["lr=interval(0,1)"])
