"""The command line: verbs, help, files and words, sweeps, exit codes, and what a fault looks like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import pytest

from deltune import __version__
from deltune.cli import SWEEPABLE, VERBS, main
from deltune.commands import launch
from deltune.errors import ConfigError, Interrupted
from deltune.settings import load_run


@pytest.fixture
def verb(monkeypatch):
    """Puts a stand-in for the train command in place; what it was called with is recorded."""
    calls: list[tuple[list[str], object]] = []

    def put(answer=0):
        def stand_in(words, file):
            calls.append((words, file))
            if isinstance(answer, BaseException):
                raise answer
            return answer

        module = types.ModuleType("deltune.commands.train")
        module.main = stand_in
        monkeypatch.setitem(sys.modules, "deltune.commands.train", module)
        return calls

    return put


def run(*words, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "deltune.cli", *words], capture_output=True, text=True, **more)


# -- verbs and help ---------------------------------------------------------------------------------------------


def test_help_names_every_verb(capsys):
    for words in (["--help"], ["-h"], ["help"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        for verb, (meaning, _) in VERBS.items():
            assert verb in out and meaning in out
    assert main([]) == 2  # nothing asked for is no success


def test_every_verb_has_a_command_and_settings():
    from importlib.util import find_spec

    from deltune import settings

    for verb, (_, name) in VERBS.items():
        assert find_spec(f"deltune.commands.{verb}") is not None, f"deltune {verb} has no command"
        assert name is None or hasattr(settings, name)
    assert set(SWEEPABLE) <= set(VERBS)


@pytest.mark.parametrize("verb", [verb for verb, (_, name) in VERBS.items() if name])
def test_help_of_a_verb_lists_its_keys(verb, capsys):
    from deltune import settings
    from deltune.config.fields import walk

    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"deltune {verb} ")
    for key in walk(getattr(settings, VERBS[verb][1]), load=False):
        assert key.dotted in out
    assert main(["help", verb]) == 0
    assert capsys.readouterr().out == out


def test_help_narrows_to_an_option(capsys):
    assert main(["train", "schedule=wsd", "adapter=lora", "--help"]) == 0
    out = capsys.readouterr().out
    assert "schedule.decay" in out and "schedule.power" not in out and "adapter.rank" in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"deltune {__version__}\n"


@pytest.mark.parametrize(("word", "answer"), [("trian", "train"), ("evaluate", "eval"), ("genrate", "generate"), ("my.yaml", "deltune train my.yaml"), ("lr=1", "deltune train lr=1")])
def test_an_unknown_verb_is_answered_with_the_nearest(word, answer, capsys):
    assert main([word]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"deltune: {word}: ") and answer in error


# -- words, files, faults ---------------------------------------------------------------------------------------


def test_a_verb_is_handed_its_words_and_its_file(verb, tmp_path, monkeypatch):
    calls = verb()
    (tmp_path / "my.yaml").write_text("seed: 1")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "lr=1", "my.yaml", "data=other.yaml"]) == 0
    assert main(["train", "missing.yaml"]) == 0
    ((words, file), (_, missing)) = calls
    assert words == ["lr=1", "data=other.yaml"] and str(file) == "my.yaml" and str(missing) == "missing.yaml"


@pytest.mark.parametrize(("fault", "code", "said"), [(ConfigError("no"), 2, "deltune: no\n"), (Interrupted("stopped", 15), 143, "deltune: stopped\n"), (KeyboardInterrupt(), 130, "deltune: interrupted\n")])
def test_faults_of_users_are_a_line_and_a_code(verb, capsys, fault, code, said):
    verb(fault)
    assert main(["train"]) == code
    assert capsys.readouterr().err == said


def test_a_fault_of_ours_is_a_traceback(verb):
    verb(ValueError("bug"))
    with pytest.raises(ValueError, match="bug"):
        main(["train"])


def test_ranks_sign_their_faults_and_are_interrupted_with_one_voice(verb, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    verb(ConfigError("no"))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "deltune [rank 1]: no\n"
    verb(Interrupted("stopped", 2))
    assert main(["train"]) == 130
    assert capsys.readouterr().err == ""


def test_a_bad_config_ends_with_one_message_and_code_2(tmp_path):
    done = run("train", "lora_r=16", "optim.learing_rate=1e-4", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "adapter.rank" in done.stderr and "optim.lr" in done.stderr
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_a_reader_that_leaves_is_no_fault(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "deltune.cli", "--help"], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


# -- sweeps -----------------------------------------------------------------------------------------------------


def test_a_sweep_runs_every_combination_in_order(verb, capsys):
    calls = verb()
    assert main(["train", "-m", "lr=1e-4,2e-4", "seed=1", "schedule=linear,wsd"]) == 0
    assert [words for words, _ in calls] == [[f"lr={lr}", "seed=1", f"schedule={s}"] for lr in ("0.0001", "0.0002") for s in ("linear", "wsd")]
    assert "[4/4] lr=0.0002 schedule=wsd" in capsys.readouterr().out


def test_a_sweep_over_a_files_option_drops_what_does_not_fit(verb, tmp_path):
    calls = verb()
    (tmp_path / "my.yaml").write_text("schedule: {name: cosine, floor: 0.3}")
    assert main(["train", str(tmp_path / "my.yaml"), "-m", "schedule=glob(co*)"]) == 0
    assert [words for words, _ in calls] == [["schedule=constant"], ["schedule=cosine"], ["schedule=cosine_restarts"]]
    assert load_run(*calls[2]).schedule.floor == 0.3


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["train", "-m", "lr=1,-1"], "optim.lr=-1"), (["train", "-m", "seed=1,2", "name=x"], "share the folder"), (["train", "-m", "seed=1"], "no word has several"),
        (["chat", "-m", "seed=1,2"], "cannot be swept"), (["train", "-m", "lr=interval(0,1)"], "interval"),
    ],
)  # fmt: skip
def test_a_sweep_is_checked_before_its_first_run(verb, capsys, words, reason):
    calls = verb()
    assert main(words) == 2 and not calls
    assert reason in capsys.readouterr().err


def test_a_sweep_stops_at_the_first_failure(verb):
    calls = verb(answer=3)
    assert main(["train", "--multirun", "seed=1,2"]) == 3
    assert len(calls) == 1


# -- list -------------------------------------------------------------------------------------------------------


def test_list_tells_what_there_is_and_narrows(capsys):
    assert main(["list"]) == 0
    everything = capsys.readouterr().out
    for word in ("lora", "cosine_restarts", "adamw", "ddp", "sharegpt", "trackio", "preset=demo", "log=quiet", "bundled"):
        assert word in everything
    assert main(["list", "schedules"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "schedules:"
    assert main(["list", "schedule"]) == 2
    assert "did you mean schedules?" in capsys.readouterr().err
    assert main(["list", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Run"


def test_list_finds_models_in_the_cache(capsys, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["list", "models"]) == 0
    assert "owner/name" in (out := capsys.readouterr().out) and "LlamaForCausalLM" in out


# -- launch -----------------------------------------------------------------------------------------------------


def test_launch_reads_its_own_words_and_leaves_the_rest():
    assert launch.read_arguments(["-n", "2", "--", "train", "a.yaml", "lr=1"]) == (2, ["train", "a.yaml", "lr=1"])
    assert launch.read_arguments(["-n", "2", "train"]) == (2, ["train"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "come first"), (["train"], "come first"), (["-n"], "come first"), (["-n", "two", "train"], "whole number"), (["-n", "0", "train"], "at least 1"),
        (["-n", "2"], "missing"), (["-n", "2", "chat"], "one process"), (["-n", "2", "train", "lr=x", "engine=ddp"], "optim.lr=x"),
        (["-n", "2", "train"], "choose engine=ddp"), (["-n", "2", "train", "-m", "lr=1,2"], "sweep"), (["-n", "2", "train", "no.yaml"], "no such file"),
    ],
)  # fmt: skip
def test_launch_checks_before_it_starts_anything(words, reason, capsys):
    assert main(["launch", *words]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["trian"], 2)])
def test_launch_starts_the_processes_and_passes_their_exit_code_on(words, code):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; from deltune.commands.launch import launch; sys.exit(launch(2, {words!r}))"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    if code == 0:
        assert done.stdout.count(f"deltune {__version__}") == 2
    else:
        assert "trian: no such verb" in done.stderr and "Traceback" not in done.stderr
