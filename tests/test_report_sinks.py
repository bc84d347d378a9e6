"""Sinks: TensorBoard for real, the others through stand-ins that keep what they are told; each ends up with each step once."""

import json
import struct
import sys
import types
from pathlib import Path

import pytest

from deltune.errors import ConfigError
from deltune.training import metrics, sinks
from deltune.training.config import LogConfig
from deltune.training.metrics import MetricsFile
from tests import recorded_run as made

NAMES = {"train/loss", "train/grad_norm", "train/lr", "train/tokens_per_second", "train/peak_memory_gb", "train/mfu"}


def run(folder: Path, name: str, first: int, last: int, *, killed: bool = False) -> None:
    """Metrics file and one sink over some steps, told as the loop tells them; `killed` lets nothing be closed."""
    folder.mkdir(exist_ok=True)
    [sink] = sinks.build_sinks(LogConfig(sinks=[name], project="trials"))
    file = MetricsFile(folder / "metrics.jsonl")
    info = made.info(folder, start_step=first - 1)
    for callback in (file, sink):
        callback.on_start(info)
    for callback in (file, sink) if first == 1 else ():
        callback.on_eval(made.eval_record(0))
    made.play([file, sink], folder, first, last, eval_every=10)
    if not killed:
        for callback in (file, sink):
            callback.on_end(made.outcome(folder, last))


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What metrics.jsonl says, by the names at the sinks, written out by hand."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in metrics.read(folder / "metrics.jsonl"):
        if line["kind"] == "step":
            values = {f"train/{key}": line[key] for key in ("loss", "grad_norm", "lr", "tokens_per_second", "mfu")}
            values["train/peak_memory_gb"] = line["peak_memory_bytes"] / 1e9
        elif line["kind"] == "eval":
            values = {f"eval/{key}": value for key, value in line["metrics"].items()}
        else:
            continue
        for key, value in values.items():
            found.setdefault(key, []).append((line["step"], value))
    return found


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def tensorboard_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# -- TensorBoard ------------------------------------------------------------------------------------------------


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path):
    run(tmp_path, "tensorboard", 1, 30)
    truth = expected(tmp_path)
    assert {name for name in truth if name.startswith("train/")} == NAMES
    assert tensorboard_scalars(tmp_path) == {name: [(s, float32(v)) for s, v in points] for name, points in truth.items()}


@pytest.mark.parametrize("killed_at", [20, 25])
def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path, killed_at):
    run(tmp_path, "tensorboard", 1, killed_at, killed=True)
    run(tmp_path, "tensorboard", 21, 40)
    truth = expected(tmp_path)
    assert [step for step, _ in truth["train/loss"]] == list(range(1, 41))
    assert tensorboard_scalars(tmp_path) == {name: [(s, float32(v)) for s, v in points] for name, points in truth.items()}


def test_tensorboard_shows_the_second_try_of_a_step_after_a_rollback(tmp_path):
    [sink] = sinks.build_sinks(LogConfig())
    sink.on_start(made.info(tmp_path))
    made.play([sink], tmp_path, 1, 12)
    for step in range(8, 15):
        sink.on_step(made.step_record(step, loss=float(step)))
    sink.close()
    points = tensorboard_scalars(tmp_path)["train/loss"]
    assert [step for step, _ in points] == list(range(1, 15))
    assert [value for _, value in points[7:]] == [8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0]


def test_scalars_of_a_users_own_step_go_along(tmp_path):
    [sink] = sinks.build_sinks(LogConfig())
    sink.on_start(made.info(tmp_path))
    sink.on_step(made.step_record(1, extra={"aux_loss": 0.25}))
    sink.close()
    assert tensorboard_scalars(tmp_path)["train/aux_loss"] == [(1, 0.25)]


def test_not_finite_values_reach_tensorboard(tmp_path):
    [sink] = sinks.build_sinks(LogConfig())
    sink.on_start(made.info(tmp_path))
    sink.on_step(made.step_record(1, loss=float("nan")))
    sink.close()
    [(step, value)] = tensorboard_scalars(tmp_path)["train/loss"]
    assert step == 1 and value != value


# -- the others, through stand-ins ------------------------------------------------------------------------------


class Recorder:
    """A run at a tracker that keeps every call."""

    def __init__(self, **settings):
        self.settings, self.points, self.finished = settings, [], False

    def log(self, scalars, step):
        self.points += [(name, step, value) for name, value in scalars.items()]

    def finish(self):
        self.finished = True

    def by_name(self):
        found: dict = {}
        for name, step, value in self.points:
            found.setdefault(name, []).append((step, value))
        return found


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.runs = []

    def init(**settings):
        module.runs.append(Recorder(**settings))
        return module.runs[-1]

    module.init = init
    module.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_ERROR_REPORTING"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_wandb_is_offline_and_silent_unless_the_user_set_it_up(tmp_path, wandb, monkeypatch):
    import os

    run(tmp_path / "a", "wandb", 1, 5)
    assert wandb.runs[0].settings["mode"] == "offline"
    assert wandb.runs[0].settings["project"] == "trials"
    assert wandb.runs[0].settings["config"] == made.CONFIG
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert wandb.runs[0].finished
    monkeypatch.setenv("WANDB_MODE", "online")
    run(tmp_path / "b", "wandb", 1, 5)
    assert wandb.runs[1].settings["mode"] is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run(tmp_path / "c", "wandb", 1, 5)
    assert wandb.runs[2].settings["mode"] is None
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "set by the user")
    run(tmp_path / "d", "wandb", 1, 5)
    assert wandb.runs[3].settings["mode"] is None


def test_a_resumed_offline_run_of_wandb_is_whole_under_one_id(tmp_path, wandb):
    run(tmp_path, "wandb", 1, 25, killed=True)
    run(tmp_path, "wandb", 21, 40)
    first, second = wandb.runs
    assert first.settings["id"] == second.settings["id"]
    assert second.by_name() == expected(tmp_path)


def test_a_resumed_online_run_of_wandb_repeats_nothing(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    run(tmp_path, "wandb", 1, 20, killed=True)
    run(tmp_path, "wandb", 21, 40)
    first, second = wandb.runs
    assert second.settings["resume"] == "allow" and first.settings["id"] == second.settings["id"]
    together = first.points + second.points
    assert len({(name, step) for name, step, _ in together}) == len(together)


def test_wandb_that_cannot_start_is_a_message(tmp_path, wandb):
    def refuse(**settings):
        raise wandb.errors.Error("not logged in")

    wandb.init = refuse
    with pytest.raises(ConfigError, match="W&B refused the run: not logged in"):
        run(tmp_path, "wandb", 1, 2)


@pytest.fixture
def mlflow(monkeypatch):
    module = types.ModuleType("mlflow")
    error = type("MlflowException", (Exception,), {})
    module.exceptions = types.SimpleNamespace(MlflowException=error)
    module.points, module.params, module.calls, module.away = {}, {}, [], False

    def start_run(run_id=None, run_name=None):
        module.calls.append(("start_run", run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "r1"))

    def log_metrics(scalars, step, run_id):
        if module.away:
            raise error("server is away")
        for name, value in scalars.items():
            module.points.setdefault(name, []).append((step, value))

    class Client:
        def get_metric_history(self, run_id, name):
            return [types.SimpleNamespace(step=step) for step, _ in module.points.get(name, [])]

    module.MlflowClient = Client
    module.set_experiment = lambda name: module.calls.append(("set_experiment", name))
    module.start_run, module.log_metrics, module.log_params = start_run, log_metrics, module.params.update
    module.end_run = lambda: module.calls.append(("end_run",))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    return module


def test_mlflow_gets_each_step_once_and_the_same_run(tmp_path, mlflow):
    import os

    run(tmp_path, "mlflow", 1, 25, killed=True)
    run(tmp_path, "mlflow", 21, 40)
    assert mlflow.points == expected(tmp_path)
    assert [call for call in mlflow.calls if call[0] == "start_run"] == [("start_run", None, "words"), ("start_run", "r1", None)]
    assert mlflow.calls[0] == ("set_experiment", "trials") and mlflow.calls[-1] == ("end_run",)
    assert mlflow.params["optim.lr"] == "0.002" and mlflow.params["adapter.delta"] == "lora"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_an_mlflow_server_that_is_away_costs_points_and_no_run(tmp_path, mlflow, caplog, monkeypatch):
    from deltune.log import logger

    monkeypatch.setattr(logger, "propagate", True)
    [sink] = sinks.build_sinks(LogConfig(sinks=["mlflow"]))
    sink.on_start(made.info(tmp_path))
    made.play([sink], tmp_path, 1, 3)
    mlflow.away = True
    made.play([sink], tmp_path, 4, 8)
    mlflow.away = False
    made.play([sink], tmp_path, 9, 9)
    sink.close()
    assert [step for step, _ in mlflow.points["train/loss"]] == [1, 2, 3, 9]
    assert "did not take 5 records" in caplog.text


@pytest.fixture
def trackio(monkeypatch):
    module = types.ModuleType("trackio")
    module.runs = []

    def init(project, name, config, embed):
        made_run = Recorder(project=project, config=config)
        made_run.name, made_run.delete = name, lambda: module.runs.remove(made_run)
        module.runs.append(made_run)
        return made_run

    module.init = init
    module.Api = lambda: types.SimpleNamespace(runs=lambda project: list(module.runs))
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def test_trackio_holds_one_whole_run_after_a_resume(tmp_path, trackio):
    run(tmp_path / "mine", "trackio", 1, 25, killed=True)
    run(tmp_path / "another", "trackio", 1, 5)
    run(tmp_path / "mine", "trackio", 21, 40)
    other, mine = trackio.runs
    assert mine.by_name() == expected(tmp_path / "mine")
    assert other.by_name() == expected(tmp_path / "another")
    assert mine.name != other.name and mine.name.startswith("words-")
    assert mine.finished


# -- all --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # Python's own mark of a module that cannot be had
    with pytest.raises(ConfigError, match=rf"'{name}' is not installed.*pip install 'deltune\[{name}\]'"):
        sinks.build_sinks(LogConfig(sinks=[name]))


def test_the_extras_named_are_those_of_the_package():
    import tomllib

    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
    for name, sink in sinks.SINKS.items():
        if sink.install.startswith("deltune["):
            assert any(need.startswith(sink.package) for need in project["optional-dependencies"][name])
        else:
            assert any(need.startswith(sink.install) for need in project["dependencies"])


def test_an_unknown_sink_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"log\.sinks\[1\]: no sink 'wandbb'; did you mean wandb"):
        sinks.build_sinks(LogConfig(sinks=["tensorboard", "wandbb"]))


def test_other_ranks_open_no_sink(tmp_path, monkeypatch, wandb):
    monkeypatch.setenv("RANK", "1")
    run(tmp_path, "wandb", 1, 3)
    assert wandb.runs == [] and not (tmp_path / "sinks.json").exists()


def test_the_ids_of_all_sinks_live_in_one_file(tmp_path, wandb, trackio):
    built = sinks.build_sinks(LogConfig(sinks=["wandb", "trackio"]))
    for sink in built:
        sink.on_start(made.info(tmp_path))
    ids = json.loads((tmp_path / "sinks.json").read_text())
    assert ids == {"wandb": wandb.runs[0].settings["id"], "trackio": trackio.runs[0].name}
