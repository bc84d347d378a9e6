"""`deltune doctor` tries what it names: what is broken is called so, with its remedy, and nothing else is."""

from __future__ import annotations

import http.server
import importlib.metadata
import json
import threading

import pytest
import torch

from deltune.cli import main
from deltune.commands import checks, doctor
from deltune.errors import ConfigError


@pytest.fixture(autouse=True)
def quick_products(monkeypatch):
    """Rates are not measured in tests that are not about them."""
    monkeypatch.setattr(checks, "_product", lambda device, dtype: 1e10)


def states(found):
    return {check.name: check.state for checks_ in found.values() for check in checks_}


def remedy_of(found, name):
    return next(check.remedy for checks_ in found.values() for check in checks_ if check.name == name)


def installed(monkeypatch, **versions):
    """Pretend other versions; None is not installed."""
    real = importlib.metadata.version

    def version(name):
        if name not in versions:
            return real(name)
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


# -- the verb ---------------------------------------------------------------------------------------------------


def test_all_that_a_run_needs_works_where_the_tests_run(capsys):
    assert main(["doctor", "quick=true"]) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith("Everything that a run needs works here.")
    for name in ("torch", "fp32 on cpu", "sdpa", "single", "runs", "bundled model"):
        assert f"ok      {name} " in out


def test_programs_get_the_same_as_json(capsys):
    assert main(["doctor", "quick=true", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    one = found["sections"]["Software"][0]
    assert set(one) == {"name", "state", "found", "remedy"} and one["name"] == "python"
    assert {c["state"] for s in found["sections"].values() for c in s} <= {"ok", "absent", "note", "broken"}


def test_a_broken_part_is_named_and_the_exit_code_says_so(capsys, monkeypatch):
    installed(monkeypatch, pyarrow=None)
    assert main(["doctor", "quick=true"]) == 1
    out = capsys.readouterr().out
    assert "broken  pyarrow" in out and "pip install 'pyarrow" in out and out.rstrip().endswith("Broken: pyarrow.")
    assert main(["doctor", "quick=true", "json=true"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize("word", ["jsn=true", "quick=maybe", "quick", "verbose=true"])
def test_other_words_are_refused(word):
    with pytest.raises(ConfigError, match=r"doctor .*quick=true.*json=true"):
        doctor.read_words([word])


def test_its_help_names_its_words(capsys):
    assert main(["doctor", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"{word}=true" in out for word in doctor.WORDS)


# -- software ---------------------------------------------------------------------------------------------------


def test_every_requirement_of_the_package_is_looked_at():
    names = {check.name for check in checks.software()}
    required = {text.partition(">")[0] for text in importlib.metadata.requires("deltune") if "extra" not in text}
    assert required < names and {"wandb", "datasets"} < names and "pytest" not in names


def test_an_old_version_is_broken_and_a_missing_option_is_absent(monkeypatch):
    installed(monkeypatch, transformers="4.40.0", wandb=None, safetensors="99.0")
    found = {check.name: check for check in checks.software()}
    assert found["transformers"].state == "broken" and "4.40.0; >=5.10 is needed" in found["transformers"].found
    assert (found["wandb"].state, found["wandb"].remedy) == ("absent", "pip install 'deltune[wandb]'")
    assert found["safetensors"].state == "ok"


def test_without_torch_nothing_else_is_tried(monkeypatch):
    monkeypatch.setattr(checks, "_fault_of_import", lambda name: "libfoo.so: cannot open" if name == "torch" else "")
    found = checks.sections(quick=True)
    assert list(found) == ["Software"] and states(found)["torch"] == "broken"


# -- devices and types ------------------------------------------------------------------------------------------


def test_more_threads_than_cores_are_pointed_out(monkeypatch):
    monkeypatch.setattr(checks, "_usable_cores", lambda: 3.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    found = {"Devices": list(checks.devices())}
    assert states(found)["cpu"] == "note" and remedy_of(found, "cpu").endswith("engine.threads=3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert states({"Devices": list(checks.devices())})["cpu"] == "ok"


def test_a_gpu_that_torch_cannot_use_is_pointed_out(monkeypatch):
    monkeypatch.setattr(checks.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (found,) = checks._cuda()
    assert found.state == "note" and "built for CPUs" in found.found


def test_a_type_that_fails_or_is_slower_is_said_to_be(monkeypatch):
    def product(device, dtype):
        if dtype == torch.float16:
            raise RuntimeError('"addmm" not implemented for Half\nmore')
        return 5e9 if dtype == torch.bfloat16 else 1e10

    monkeypatch.setattr(checks, "_product", product)
    found = {check.name: check for check in checks.types()}
    assert (found["fp32 on cpu"].state, found["fp32 on cpu"].found) == ("ok", "10 GFLOP/s")
    assert found["bf16 on cpu"].state == "note" and "slower than fp32" in found["bf16 on cpu"].found
    assert found["fp16 on cpu"].state == "absent" and "not implemented for Half more" in found["fp16 on cpu"].found
    monkeypatch.setattr(checks, "_product", lambda device, dtype: product(device, torch.float16))
    assert {check.name: check.state for check in checks.types()}["fp32 on cpu"] == "broken"


def test_a_product_really_runs(monkeypatch):
    monkeypatch.undo()
    assert checks._product(torch.device("cpu"), torch.float32) > 1e6


# -- engines, places, hub ---------------------------------------------------------------------------------------


def test_two_processes_are_really_started():
    assert checks.two_processes() == "two processes summed a tensor"


def test_processes_that_fail_are_a_note_with_what_they_said(monkeypatch):
    monkeypatch.setattr(checks, "PEER", "raise SystemExit('no route to myself')")
    found = {check.name: check for check in checks.engines(quick=False)}
    assert found["single"].state == "ok" and found["ddp with gloo"].state == "note"
    assert found["ddp with gloo"].found == "no route to myself" and "GLOO_SOCKET_IFNAME" in found["ddp with gloo"].remedy


def test_processes_that_do_not_meet_are_given_up_and_ended(monkeypatch):
    monkeypatch.setattr(checks, "PEER", "import time; time.sleep(60)")
    monkeypatch.setattr(checks, "PROCESS_SECONDS", 0.3)
    with pytest.raises(OSError, match="did not find each other"):
        checks.two_processes()


def test_a_folder_that_cannot_be_written_to_breaks_runs_but_not_the_cache(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    assert {check.name: check.state for check in checks.places()}["runs"] == "ok"
    assert not list(tmp_path.iterdir())  # looking leaves nothing behind
    monkeypatch.setattr(checks.tempfile, "NamedTemporaryFile", refuse)
    found = {check.name: check for check in checks.places()}
    assert (found["runs"].state, found["token cache"].state) == ("broken", "note") and "Permission denied" in found["runs"].found
    monkeypatch.undo()
    monkeypatch.setattr("deltune.commands.estimate.free_disk", lambda folder: 1e6)
    assert {check.name: check.state for check in checks.places()}["runs"] == "note"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_hub_is_there_if_anything_answers(monkeypatch):
    from huggingface_hub import constants

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    try:
        found = {check.name: check for check in checks.models(quick=False)}
        assert (found["hub"].state, found["hub"].found) == ("ok", f"{address} answers (404)")
    finally:
        server.shutdown()
        server.server_close()
    found = {check.name: check for check in checks.models(quick=False)}
    assert found["hub"].state == "absent" and "refused" in found["hub"].found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in {check.name: check for check in checks.models(quick=False)}["hub"].found


def test_a_damaged_bundled_model_is_a_note(monkeypatch, tmp_path):
    monkeypatch.setattr("deltune.models.folder.BUNDLED", tmp_path)
    found = {check.name: check for check in checks.models(quick=True)}
    assert found["bundled model"].state == "note" and "anew" in found["bundled model"].remedy
