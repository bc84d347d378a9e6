"""Config files: what is read is what was written, and nothing that could grow, run or be misread gets in."""

from __future__ import annotations

import random

import pytest
import yaml

from deltune.config import references, yaml_file
from deltune.config.yaml_file import MAX_BYTES, parse, read, write
from deltune.errors import ConfigError

AWKWARD = [
    "yes", "no", "on", "1e-4", "null", "~", "", "true", "12:30", "2024-01-01", "0x1f", "010", "=", "<<", "a: b", "x\ny\n", " lead",
    "#c", "- d", "数据", "\u2028", "1_000", "1.", ".5", "\t", "'", '"', "[a, b]", "{a: b}", "&x", "*x", "!t", "%", "@", "`", "\x07", "-",
]  # fmt: skip


def test_written_values_read_back_equal():
    values = {"text": AWKWARD, "numbers": [1e-8, 1e300, 5.0, 3, -0.0, 1e22, 0.1], "rest": [True, None, {}, []], "map": {k: 1 for k in AWKWARD if k}}
    found, _ = parse(write(values), "x.yaml")
    found = references.follow(found, lambda key: pytest.fail("no reference was meant"))
    assert found == values
    assert [type(number) for number in found["numbers"]] == [type(number) for number in values["numbers"]]


def test_text_with_dollars_braces_and_backslashes_round_trips():
    rng = random.Random(5)
    for _ in range(300):
        text = "".join(rng.choice("\\${}a. ") for _ in range(rng.randint(1, 12)))
        found, _ = parse(write({"key": text}), "x.yaml")
        assert references.follow(found["key"], lambda key: pytest.fail("no reference was meant")) == text


def test_scalars_follow_yaml_1_2():
    found, _ = parse("a: yes\nb: 1e-4\nc: 12:30\nd: 010\ne: true\nf: ~\ng: 1_000\nh: .inf\ni: 2024-01-01", "x.yaml")
    assert found == {"a": "yes", "b": 1e-4, "c": "12:30", "d": 10, "e": True, "f": None, "g": 1000, "h": float("inf"), "i": "2024-01-01"}


def test_lines_are_those_of_the_keys():
    _, lines = parse("# c\na: 1\n\nb:\n  c: 2\n  d: {e: 3}\n", "x.yaml")
    assert lines == {("a",): 2, ("b",): 4, ("b", "c"): 5, ("b", "d"): 6, ("b", "d", "e"): 6}


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("a: [", ":1:", "not valid YAML"),
        ("a: 1\nb: 2\na: 3", ":3:1", "given twice; first in line 1"),
        ("s:\n  k: 1\n  k: 2", ":3:3", "given twice; first in line 2"),
        (BOMB, ":1:", "aliases"),
        ("a: *b", ":1:4", "aliases"),
        ("a: !!python/object/apply:os.system [id]", ":1:4", "refused"),
        ("a: !!python/name:os.system x", ":1:4", "refused"),
        ("a: !!binary aGk=", ":1:4", "refused"),
        ("a: !!set {x}", ":1:4", "refused"),
        ("a:\nb: 1", ":1:", "value is missing"),
        ("a: 1\n---\nb: 2", ":2:1", "document"),
        ("- a", ":1:1", "mapping of keys"),
        ("just text", ":1:1", "mapping of keys"),
        ("[" * 5000, ":1:21", "nested more than"),
        ("a: " + "{x: " * 3000, ":1:", "nested more than"),
        ("? [a]\n: 1", ":1:3", "key must be text"),
        ("a: 1\nb: \x00", ":2", "cannot be in a YAML file"),
        ("a: " + "9" * 5000, ":1:4", "digits"),
    ],
)
def test_what_is_unfit_is_refused_with_its_place(text, place, reason):
    with pytest.raises(ConfigError) as caught:
        parse(text, "my.yaml")
    assert str(caught.value).startswith(f"my.yaml{place}")
    assert reason in str(caught.value)


def test_files_that_cannot_be_configs(tmp_path):
    for name, content, reason in [
        ("big.yaml", b"a: 1\n" + b"#" * MAX_BYTES, "larger than"),
        ("latin.yaml", b"a: \xff\xfe\xfa", "not UTF-8"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=reason):
            read(tmp_path / name)
    with pytest.raises(ConfigError, match=r"no such file; in that folder: big.yaml, latin.yaml"):
        read(tmp_path / "bigg.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path)


def test_an_empty_file_states_nothing_and_a_byte_order_mark_is_no_key(tmp_path):
    (tmp_path / "a.yaml").write_text("# only a comment\n")
    (tmp_path / "b.yaml").write_bytes(b"\xef\xbb\xbfseed: 1\n")
    assert read(tmp_path / "a.yaml") == ({}, {})
    assert read(tmp_path / "b.yaml")[0] == {"seed": 1}


def test_mutated_files_are_read_or_refused_but_never_crash():
    rng = random.Random(11)
    base = write({"model": "x", "optim": {"lr": 1e-4, "lr_scales": {"*a*": 2.0}}, "data": {"train": ["a", {"path": "b"}]}})
    alphabet = "{}[]:,-&*!|>'\"%@#\\\n\t ~=<?a1.é\x00\u2028"
    refusals = 0
    for _ in range(400):
        text = list(base)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(text))
            text[at : at + rng.randint(0, 2)] = rng.choice(alphabet) * rng.randint(0, 3)
        try:
            found, _ = parse("".join(text), "my.yaml")
        except ConfigError as error:
            refusals += 1
            assert str(error).startswith("my.yaml:")
        else:
            assert isinstance(found, dict)
    assert refusals > 100


def test_reading_never_builds_anything_but_plain_values():
    assert issubclass(yaml_file._Loader, yaml.SafeLoader)
    with pytest.raises(ConfigError):
        parse("a: !!python/tuple [1]", "x.yaml")


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "${now:%Y}", "${a", "${}", "${.a}", "${a b}", "x ${hydra:runtime.cwd} y", "${${a}}", "${a.}"])
def test_only_plain_keys_can_be_referred_to(text):
    with pytest.raises(ConfigError, match=r"only \$\{section.key\}"):
        references.follow(text, lambda key: 1)


def test_references_keep_the_type_or_are_written_out():
    values = {"a.b": 4, "c": "${a.b}", "d": [1, "${c}"]}
    assert references.follow("${a.b}", values.__getitem__) == 4
    assert references.follow("x-${c}-${a.b}", values.__getitem__) == "x-4-4"
    assert references.follow({"k": ["${d}"]}, values.__getitem__) == {"k": [[1, 4]]}
    assert references.follow(r"\${a.b} \\${a.b}", values.__getitem__) == "${a.b} \\4"


def test_a_ring_of_references_is_refused():
    values = {"a": "${b}", "b": "${c}", "c": "${a}"}
    with pytest.raises(ConfigError, match="a -> b -> c -> a"):
        references.follow("${a}", values.__getitem__)
