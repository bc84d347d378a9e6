"""Settings of the verbs: rules between keys, names and folders of runs, and what a verb takes from a finished run."""

from __future__ import annotations

import dataclasses
import random

import pytest

from deltune.config.fields import default_of, walk
from deltune.errors import ConfigError
from deltune.settings import (
    ChatSettings,
    ConvertSettings,
    EvalSettings,
    GenerateSettings,
    InitSettings,
    MergeSettings,
    PreviewSettings,
    Run,
    load,
    load_run,
    run_from,
    split_file,
)

VERBS = (Run, EvalSettings, GenerateSettings, ChatSettings, MergeSettings, ConvertSettings, PreviewSettings, InitSettings)


def refused(cls, *words, **more) -> str:
    with pytest.raises(ConfigError) as caught:
        load(cls, words, **more)
    return str(caught.value)


# -- rules ------------------------------------------------------------------------------------------------------

# what is refused -> the key that is blamed, and the change that mends it
RULES = [
    ("train.steps=3 train.epochs=2", "train.steps", "train.epochs=null"),
    ("train.max_nonfinite=3", "train.max_nonfinite", "train.nonfinite=skip"),
    ("engine=ddp engine.backend=nccl engine.device=cpu", "engine.backend", "engine.backend=gloo"),
    ("optim.lr_scales={a: 1} optim.lr_values={b: 1}", "optim.lr_scales", "optim.lr_values={}"),
    ("optim.no_decay=[x]", "optim.no_decay", "optim.weight_decay=0.1"),
    ("optim=sgd optim.nesterov=true", "optim.nesterov", "optim.momentum=0.9"),
    ("schedule.auto_warmup_rate=0.1", "schedule.auto_warmup_rate", "schedule.auto_warmup_steps=5"),
    ("schedule.warmup=2.5", "schedule.warmup", "schedule.warmup=2"),
    ("schedule=wsd schedule.decay=1.5", "schedule.decay", "schedule.decay=0.5"),
    ("model.enable=[x]", "model.enable", "adapter=null"),
    ("model.disable=[x]", "model.disable", "adapter=null"),
    ("model.revision=main", "model.revision", "model.path=owner/name"),
    ("data.train=[]", "data.train", "data.train=[a.jsonl]"),
    ("data.eval=[a.jsonl] data.eval_size=4", "data.eval_size", "data.eval_size=0"),
    ("data.eval_size=1.5", "data.eval_size", "data.eval_size=2"),
    ("data.max_source_length=1024", "data.max_source_length", "data.max_length=2048"),
    ("data.max_target_length=5000", "data.max_target_length", "data.max_target_length=10"),
    ("data.mode=pretrain data.train_on_source=true", "data.train_on_source", "data.mode=sft"),
    ("data.mode=pretrain data.max_source_length=9", "data.max_source_length", "data.mode=sft"),
    ("data.streaming=true train.steps=5 data.batching=grouped", "data.batching", "data.batching=packed"),
    ("train.micro_batch_tokens=2048 data.batching=padded", "train.micro_batch_tokens", "data.batching=packed"),
    ("train.micro_batch_tokens=2048 train.micro_batch=4", "train.micro_batch=4", "train.micro_batch=8"),
    ("train.micro_batch_tokens=512 data.max_length=513", "data.max_length", "data.max_length=512"),
    ("data.streaming=true train.steps=5 data.eval_size=4", "data.eval_size", "data.eval_size=0"),
    ("data.streaming=true", "train.steps", "train.steps=5"),
    ("data.streaming=true train.steps=5 data.shuffle=false data.stream_block=9", "data.stream_block", "data.shuffle=true"),
    ("data.streaming=true train.steps=5 data.cache=folder", "data.cache", "data.eval=[bundled]"),
    ("data.stream_block=9", "data.stream_block", "data.stream_block=1024"),
    ("eval.every=5", "eval.every", "data.eval_size=4"),
    ("eval.exact_match=true", "eval.exact_match", "data.eval=[bundled]"),
    ("eval.micro_batch=5", "eval.micro_batch", "data.eval_size=4"),
    ("eval.min_delta=0.1", "eval.min_delta", "data.eval_size=4"),
    ("data.eval_read_nums=5", "data.eval_read_nums", "data.eval_size=9"),
    ("data.eval_size=4 eval.patience=2", "eval.patience", "eval.every=5"),
    ("data.eval_size=4 eval.samples=0 eval.max_new_tokens=9", "eval.max_new_tokens", "eval.samples=1"),
    ("data.eval_size=4 eval.metric=exact_match", "eval.metric", "eval.exact_match=true"),
    ("data.eval_size=4 eval.metric=bleu", "eval.direction", "eval.direction=max"),
    ("name=../x", "name", "name=x"),
    ("name=.hidden", "name", "name=hidden"),
    ("log.sinks=[tensorbord]", "log.sinks", "log.sinks=[tensorboard]"),
    ("log.project=mine", "log.project", "log.sinks=[wandb]"),
    ("log.progress=off log.lines_every_seconds=1", "log.lines_every_seconds", "log.progress=lines"),
]


def words_of(text: str) -> list[str]:
    """Words of a line; a bracket or brace may hold spaces."""
    found: list[str] = []
    for part in text.split(" "):
        if found and found[-1].count("{") > found[-1].count("}"):
            found[-1] += " " + part
        else:
            found.append(part)
    return found


@pytest.mark.parametrize(("line", "blamed", "mended"), RULES, ids=[rule[0] for rule in RULES])
def test_a_setting_without_effect_is_refused_and_one_change_mends_it(line, blamed, mended):
    words = words_of(line)
    message = refused(Run, *words)
    assert message.startswith(blamed), message
    replaced = mended.partition("=")[0]
    load(Run, [word for word in words if word.partition("=")[0] != replaced] + [mended])


@pytest.mark.parametrize(
    ("cls", "line", "blamed"),
    [
        (GenerateSettings, "", "prompt"), (GenerateSettings, "prompt=a file=b", "prompt"), (GenerateSettings, "prompt=a out=b", "out"),
        (GenerateSettings, "prompt=a batch=3", "batch"), (GenerateSettings, "prompt=a top_p=0.5", "top_p"), (ChatSettings, "top_k=5", "top_k"),
        (ChatSettings, "model.gradient_checkpointing=true", "model.gradient_checkpointing"), (ChatSettings, "model.revision=x", "model.revision"),
        (ChatSettings, "engine=ddp", "engine"), (EvalSettings, "", "data.eval"), (EvalSettings, "data=a max_new_tokens=3", "max_new_tokens"),
        (EvalSettings, "data=a data.eval_size=4", "data.eval_size"), (MergeSettings, "out=x", "adapter"), (ConvertSettings, "out=x", "adapter"),
    ],
)  # fmt: skip
def test_other_verbs_refuse_settings_without_effect_too(cls, line, blamed):
    message = refused(cls, *line.split())
    assert message.startswith(blamed), message


def test_what_must_be_given_is_asked_for():
    assert "out: must be given: Folder for the merged model" in refused(MergeSettings, "model=x")


def test_asking_for_nothing_is_never_refused():
    load(Run, ["eval.at_start=false", "eval.samples=0", "checkpoint.load_best=false", "log.report=false", "data.shuffle=false"])


def test_drawing_follows_from_the_temperature():
    assert not load(ChatSettings).do_sample
    assert load(ChatSettings, ["temperature=0.7", "top_p=0.9"]).do_sample


# -- runs -------------------------------------------------------------------------------------------------------


def varied(rng: random.Random) -> list[str]:
    """Random words that fit together: options, and keys in their ranges."""
    words = [f"schedule={rng.choice(['linear', 'cosine', 'wsd', 'cosine_restarts', 'polynomial'])}", f"optim={rng.choice(['adamw', 'sgd'])}"]
    words += [f"optim.lr={rng.random() * 1e-3}", f"seed={rng.randrange(100)}", f"data.prefix='{rng.choice(['${x}', 'no', ' a: b', '1e-3', '', '数'])}'"]
    words += rng.sample(["adapter=null", "log=quiet", "data.train=[a.jsonl,{path: b,weight: 0.5}]", "data.eval=bundled", "engine=ddp", "optim.lr_scales={a*: 2}"], 3)
    return words


def test_a_saved_config_is_the_same_run(tmp_path):
    rng = random.Random(3)
    for i in range(25):
        words = varied(rng)
        words = [w.replace("${", "\\${") for w in words]
        run = load_run(words)
        file = tmp_path / f"{i}.yaml"
        file.write_text(run.to_yaml(), encoding="utf-8")
        again = load_run([], file)
        assert again == run and again.folder == run.folder
        assert again.to_yaml() == run.to_yaml()
        assert run_from(run.to_dict()) == run


def test_a_saved_config_states_every_key():
    run = load_run(["preset=demo"])
    stated = run.to_dict()
    chosen = {"quant": "none", "adapter": "lora", "optim": "adamw", "schedule": "cosine", "engine": "single"}
    for key in walk(Run):
        if len(key.path) == 1 or chosen.get(key.path[0], key.option) == key.option:
            value = stated
            for part in key.path:
                value = value[part]


def test_the_made_name_tells_runs_apart_and_does_not_depend_on_the_place():
    base = load_run()
    assert base.folder.parent.name == "runs"
    assert base.folder.name.startswith("bundled-lora-bundled-")
    assert load_run(["output=elsewhere", "resume=never"]).folder.name == base.folder.name
    assert load_run(["lr=1e-3"]).folder.name != base.folder.name
    assert load_run(["adapter=null"]).folder.name.startswith("bundled-full-bundled-")
    assert load_run(["name=mine"]).folder.as_posix() == "runs/mine"
    odd = load_run(["model=./a b/Qwen:3 (x)", "data=[{path: '../../etc/pass wd.jsonl'}]"])
    assert odd.folder.name.startswith("Qwen-3-x-lora-pass-wd-")
    assert odd.folder.parent.as_posix() == "runs"
    assert load_run(["data=hf:owner/some*name", "model=../.."]).folder.parent.as_posix() == "runs"


def test_a_run_made_in_python_is_checked():
    run = Run()
    assert run_from(run) == run
    broken = dataclasses.replace(run, train=dataclasses.replace(run.train, micro_batch=0))
    with pytest.raises(ConfigError, match=r"train\.micro_batch=0"):
        run_from(broken)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seed = 3


def test_a_run_can_be_named_by_file_folder_or_words(tmp_path):
    run = load_run(["steps=7"])
    (tmp_path / "config.yaml").write_text(run.to_yaml(), encoding="utf-8")
    assert run_from(tmp_path) == run_from(tmp_path / "config.yaml") == run_from(str(tmp_path)) == run
    assert run_from([str(tmp_path / "config.yaml"), "steps=8"]).train.steps == 8


def test_one_file_among_the_words(tmp_path):
    (tmp_path / "conf").write_text("seed: 1")
    assert split_file(["a=1", str(tmp_path / "conf"), "b=2"]) == (["a=1", "b=2"], tmp_path / "conf")
    assert split_file(["a=x.yaml", "-m", "n" * 5000]) == (["a=x.yaml", "-m", "n" * 5000], None)
    with pytest.raises(ConfigError, match="one config file at a time"):
        split_file(["a.yaml", "b.yaml"])
    with pytest.raises(ConfigError, match="no such file"):
        load_run(*split_file([str(tmp_path / "b.yaml")]))


# -- what other verbs take from a run ---------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    """Folders as two runs leave them: one with an adapter, one of the whole model."""

    def make(name, *words):
        run = load_run([f"output={tmp_path}", f"name={name}", *words])
        (run.folder / ("model" if run.adapter is None else "adapter")).mkdir(parents=True)
        (run.folder / "config.yaml").write_text(run.to_yaml(), encoding="utf-8")
        if run.adapter is not None:
            (run.folder / "adapter" / "adapter_config.json").write_text("{}")
        return run.folder

    return make


def test_a_run_gives_model_adapter_and_the_way_prompts_are_written(finished):
    folder = finished("a", "model=./base", "model.dtype=bfloat16", "data.template=alpaca", "data.prefix=Q: ", "data.system=Be kind.", "data.eval=[e.jsonl]")
    for word in (f"run={folder}", f"adapter={folder}"):
        chat = load(ChatSettings, [word, "temperature=0.5"])
        assert (chat.model.path, chat.model.dtype, chat.adapter) == ("./base", "bfloat16", str(folder / "adapter"))
        assert (chat.template, chat.prefix, chat.system, chat.temperature) == ("alpaca", "Q: ", "Be kind.", 0.5)
    assert load(EvalSettings, [f"run={folder}"]).data.eval == ["e.jsonl"]
    assert load(MergeSettings, [f"run={folder}", "out=m"]).adapter == str(folder / "adapter")


def test_words_lie_over_what_the_run_gives(finished):
    folder = finished("a", "model=./base", "data.eval_size=5", "data.max_length=77")
    found = load(EvalSettings, [f"run={folder}", "data=other.jsonl", "model.dtype=float16"])
    assert (found.data.eval, found.data.eval_size, found.data.max_length) == (["other.jsonl"], 0.0, 77)
    assert (found.model.path, found.model.dtype) == ("./base", "float16")
    assert load(GenerateSettings, [f"run={folder}", "prompt=a", "system=Other"]).system == "Other"


def test_a_run_of_the_whole_model_gives_its_exported_model(finished):
    folder = finished("full", "model=owner/base", "model.revision=abc", "adapter=null", "model.enable=[x]", "model.gradient_checkpointing=true")
    chat = load(ChatSettings, [f"run={folder}"])
    assert (chat.model.path, chat.model.revision, chat.adapter) == (str(folder / "model"), None, None)
    assert chat.model.enable == [] and chat.model.gradient_checkpointing == "auto"


def test_an_adapter_folder_is_taken_as_it_is(finished):
    folder = finished("a")
    assert load(ChatSettings, [f"adapter={folder / 'adapter'}"]).adapter == str(folder / "adapter")


def test_a_run_that_is_none_is_answered_with_those_there_are(finished, tmp_path):
    folder = finished("my-run")
    assert f"did you mean {folder}?" in refused(ChatSettings, f"run={tmp_path}/my-rnu")
    assert "neither an adapter's folder" in refused(ChatSettings, f"adapter={tmp_path}")
    assert "cannot be given together" in refused(ChatSettings, f"run={folder}", f"adapter={folder}")
    (folder / "adapter" / "adapter_config.json").unlink()
    (folder / "adapter").rmdir()
    assert "has the run ended?" in refused(ChatSettings, f"run={folder}")
    assert "drawn at random" in refused(ChatSettings, f"run={finished('rnd', 'model.start=random')}")


def test_faults_in_a_runs_config_name_its_file(finished):
    folder = finished("a")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("micro_batch: 8", "micro_batch: 0"))
    assert f"{config}:" in refused(ChatSettings, f"run={folder}")


def test_a_preview_takes_model_and_data_of_a_training_config(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("model: ./base\nseed: 7\nlr: 1e-3\ndata: {train: a.jsonl, max_length: 50}\nadapter: {rank: 3}\n")
    found = load(PreviewSettings, ["rows=5", "data.max_length=60"], file)
    assert (found.model.path, found.data.train, found.data.max_length, found.data.seed, found.rows) == ("./base", ["a.jsonl"], 60, 42, 5)
    assert load(PreviewSettings, ["preset=demo"]).data == load_run(["preset=demo"]).data
    file.write_text("adaptr: {rank: 3}\n")
    assert "adaptr.rank=3 (" in refused(PreviewSettings, file=file)


# -- every class ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", VERBS)
def test_every_field_says_what_it_is_for_and_its_default_fits(cls):
    for key in walk(cls):
        limits = key.field.metadata
        assert limits["help"].endswith(".") and limits["help"][0].isascii(), key.dotted
        default = default_of(key.field)
        if default is not dataclasses.MISSING and default is not None and limits["choices"]:
            assert set(default if isinstance(default, list) else [default]) <= set(limits["choices"]), key.dotted


@pytest.mark.parametrize(
    "words, said",
    [
        (["train.steps=25", "schedule.warmup=100"], "schedule.warmup=100.0 (command line): the run has 25 steps"),
        (["train.steps=25", "schedule=wsd", "schedule.warmup=10", "schedule.decay=20"], "schedule.decay=20.0 (command line): 20 steps of decay"),
    ],
)
def test_a_schedule_that_does_not_fit_the_steps_is_told_before_anything_is_loaded(words, said):
    with pytest.raises(ConfigError) as caught:
        load_run(words)
    assert said in str(caught.value)
