"""Named methods are sets of choices, from Python and on the command line alike, and choices compose."""

from __future__ import annotations

import pytest

import deltune
from deltune.adapters.config import METHODS
from deltune.errors import AdapterError, ConfigError
from deltune.settings import load_run


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_name_means_the_same_on_the_command_line_in_python_and_in_the_runs_own_record(name, tmp_path):
    run = load_run([f"adapter={name}"])
    assert run.adapter == deltune.method(name)
    for key, value in METHODS[name].choices.items():
        if key.startswith("optim."):
            assert getattr(run.optim, key.removeprefix("optim.")) == value
    assert load_run([f"adapter.method={name}"]) == run
    (tmp_path / "config.yaml").write_text(run.to_yaml(), encoding="utf-8")
    assert load_run(file=tmp_path / "config.yaml") == run


def test_choices_compose_over_a_name(tmp_path):
    adapter = load_run(["adapter=rslora", "adapter.delta=dora", "rank=4"]).adapter
    assert (adapter.delta, adapter.scaling, adapter.magnitude, adapter.rank) == ("dora", "rslora", True, 4)
    assert deltune.method("rslora", delta="dora", rank=4) == adapter
    (tmp_path / "my.yaml").write_text("adapter: {method: rslora, rank: 4}", encoding="utf-8")
    assert load_run(["adapter.delta=dora"], tmp_path / "my.yaml").adapter == adapter


def test_a_name_takes_the_place_of_another_whole(tmp_path):
    (tmp_path / "my.yaml").write_text("adapter: {method: lora_plus, scaling: rslora}\nmodel: bundled", encoding="utf-8")
    run = load_run(["adapter=pissa"], tmp_path / "my.yaml")
    assert run.optim.rule == "none" and run.adapter.init == "pissa"
    assert run.adapter.scaling == "rslora"  # which the file states by itself
    assert load_run(["adapter=lora"], tmp_path / "my.yaml").optim.rule == "none"
    assert load_run([], tmp_path / "my.yaml").optim.rule == "lora_plus"


def test_a_section_within_the_section_is_named_by_its_main_key():
    assert load_run(["adapter=loha", "adapter.schedule=relora", "adapter.schedule.every=7"]).adapter.schedule.every == 7
    with pytest.raises(ConfigError, match=r"adapter\.schedule\.name=reloraa .*relora"):
        load_run(["adapter.schedule=reloraa"])


def test_a_name_or_field_that_does_not_exist_is_refused_with_what_does():
    with pytest.raises(AdapterError, match="no method 'rs_lora'; nearest: rslora"):
        deltune.method("rs_lora")
    with pytest.raises(ConfigError, match=r"adapter=rs_lora .*rslora"):
        load_run(["adapter=rs_lora"])
    with pytest.raises(AdapterError, match=r"lora: .*unexpected keyword argument 'r'"):
        deltune.method("lora", r=4)
    with pytest.raises(AdapterError, match="lora: rank is 0; it must be above 0"):
        deltune.method("lora", rank=0)
