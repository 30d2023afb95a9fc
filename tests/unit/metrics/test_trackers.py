"""Trackers: they get what TensorBoard gets, a resumed run is the same run, and no failure reaches the training."""

import importlib.util
import json
import math
import sys
import threading
import time

import pytest
import torch

from homodistil.config.command_line import parse
from homodistil.errors import UserError
from homodistil.metrics.recorder import Recorder
from homodistil.metrics.trackers import background
from homodistil.metrics.trackers.background import BackgroundTracker
from homodistil.metrics.trackers.registry import open_trackers
from homodistil.metrics.trackers.run_ids import keep_run_id, kept_run_id
from homodistil.metrics.trackers.tracker import TrackedRun
from homodistil.training.settings import settings_checks
from homodistil.training.step_logger import run_recorder


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


class Failing:
    """A tracker whose server goes away behind `num_calls` calls."""

    def __init__(self, num_calls: int) -> None:
        self.num_calls, self.steps = num_calls, []

    def log(self, step, values):
        if len(self.steps) == self.num_calls:
            raise ConnectionError("no route\nto host")
        self.steps.append(step)

    def finish(self, result):
        self.steps.append("the end")


class Hanging:
    """A tracker whose server takes a call and never answers."""

    def __init__(self) -> None:
        self.answer = threading.Event()

    def log(self, step, values):
        self.answer.wait()

    def finish(self, result):
        pass


def log_steps(folder, tracker, num_steps=5):
    with Recorder(folder, total_steps=60, start_step=0, enabled=True, trackers=[tracker]) as recorder:
        for step in range(1, num_steps + 1):
            recorder.log_step(step, {"loss/total": 1.0 / step})
        recorder.log_result({"name": "homodistil", "parameters": 7})
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == num_steps


def warnings_in(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("warning")]


def off(reason: str) -> str:
    return (
        f"warning: run.trackers: mlflow is off for the rest of this run ({reason}); training goes on, and "
        f"metrics.jsonl has every value"
    )


@pytest.mark.parametrize("name, package", [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_package_that_is_missing_is_one_line_before_the_run(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, name, None)  # how Python notes that there is no such module
    config = parse([f"run.trackers=[{name}]"])
    with pytest.raises(UserError) as failure:
        for check in settings_checks(config, None, torch.device("cpu")):
            check()
    assert str(failure.value) == (
        f"run.trackers: found {name}, whose package is not installed; install it with pip install {package} "
        f"(in a checkout: pip install -e '.[{name}]'), or leave it out"
    )


def test_a_package_that_cannot_be_imported_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.delitem(sys.modules, "homodistil.metrics.trackers.mlflow_tracker", raising=False)
    assert open_trackers(["mlflow"], TrackedRun(tmp_path, "run", {})) == []
    (line,) = warnings_in(capsys.readouterr().err)
    assert line.startswith("warning: run.trackers: mlflow is off for the rest of this run (ModuleNotFoundError: ")


@pytest.mark.parametrize("num_calls", [0, 2])
def test_a_call_that_fails_turns_the_tracker_off_with_one_warning(tmp_path, capsys, num_calls):
    tracker = Failing(num_calls)
    log_steps(tmp_path, BackgroundTracker("mlflow", lambda: tracker))
    assert tracker.steps == list(range(1, num_calls + 1))
    assert warnings_in(capsys.readouterr().err) == [off("ConnectionError: no route to host")]


def test_a_server_that_cannot_be_reached_at_the_start_is_one_warning(tmp_path, capsys):
    def begin():
        raise TimeoutError("30 s")

    log_steps(tmp_path, BackgroundTracker("mlflow", begin))
    assert warnings_in(capsys.readouterr().err) == [off("TimeoutError: 30 s")]


def test_a_server_that_does_not_answer_delays_the_end_alone_and_not_for_long(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(background, "FINISH_S", 0.2)
    tracker = Hanging()
    log_steps(tmp_path, BackgroundTracker("mlflow", lambda: tracker))  # would wait for ever
    tracker.answer.set()
    assert warnings_in(capsys.readouterr().err) == [off("it has not taken everything within 0 s")]


def test_lines_that_wait_do_not_fill_the_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(background, "MAX_WAITING", 3)
    tracker = Hanging()
    log_steps(tmp_path, BackgroundTracker("mlflow", lambda: tracker), num_steps=20)
    tracker.answer.set()
    assert warnings_in(capsys.readouterr().err) == [off("3 lines wait for it")]


def test_ids_of_trackers_are_kept_beside_each_other(tmp_path):
    assert kept_run_id(tmp_path, "wandb") is None
    keep_run_id(tmp_path, "wandb", "a1")
    keep_run_id(tmp_path, "mlflow", "b2")
    keep_run_id(tmp_path, "wandb", "c3")
    assert (kept_run_id(tmp_path, "wandb"), kept_run_id(tmp_path, "mlflow")) == ("c3", "b2")
    (tmp_path / "trackers.json").write_text('{"wandb": ')
    assert kept_run_id(tmp_path, "wandb") is None


def train(folder, config, start_step: int, last: int) -> None:
    """What a run does on rank 0 from a checkpoint at `start_step` until it is done, or is stopped behind `last`."""
    with run_recorder(folder, config, start_step) as recorder:
        for step in range(start_step + 1, last + 1):
            recorder.log_step(step, {"loss/total": step / 4 + start_step, "widths/layer.0.ffn": 16 - step})
        recorder.log_evaluation(last, {"mlm_loss": math.nan})
        if last == 6:
            recorder.log_result({"name": "run", "parameters": 11, "kl_to_teacher": 0.5, "note": None})


def run_config(tmp_path, tracker):
    fields = [f"run.trackers=[{tracker}]", "run.name=half", "train.steps=6", "train.lr=0.25"]
    return parse([*fields, f"run.dir={tmp_path / 'half'}"])


@needs("mlflow")
def test_mlflow_gets_config_values_and_result_of_a_resumed_run_as_one(tmp_path, monkeypatch, capsys):
    for name, value in {"TRACKING_URI": (tmp_path / "store").as_uri(), "EXPERIMENT_NAME": "small ones"}.items():
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    folder, config = tmp_path / "half", run_config(tmp_path, "mlflow")
    train(folder, config, start_step=0, last=4)
    run_id = json.loads((folder / "trackers.json").read_text())["mlflow"]
    assert MlflowClient().get_run(run_id).info.status == "KILLED"
    config.run.keep_checkpoints = 5  # free on resume, and another value than MLflow knows
    train(folder, config, start_step=2, last=6)
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("small ones").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "half", "FINISHED")
    assert (run.data.params["train.lr"], run.data.params["run.name"]) == ("0.25", "half")
    history = [(m.step, m.value) for m in client.get_metric_history(run_id, "loss/total")]
    first, resumed = [(s, s / 4) for s in (1, 2, 3, 4)], [(s, s / 4 + 2) for s in (3, 4, 5, 6)]
    assert sorted(history) == sorted(first + resumed)
    assert run.data.metrics["model/width_ffn"] == run.data.metrics["per_layer/widths/layer.0.ffn"] == 10
    assert math.isnan(run.data.metrics["heldout/mlm_loss"])
    results = {name: value for name, value in run.data.metrics.items() if name.startswith("result/")}
    assert results == {"result/parameters": 11, "result/kl_to_teacher": 0.5}
    assert warnings_in(capsys.readouterr().err) == []


def wandb_records(path):
    """(type, record) of a file of W&B: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts, first, last = path.read_bytes(), 7, b"", 1, 4
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:  # a record's header is never split over two blocks
            position += left
            continue
        size, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        parts += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (first, last):  # a whole record, or the last part of one
            record, parts = Record.FromString(parts), b""
            yield (name := record.WhichOneof("record_type")), getattr(record, name)


def wandb_values(record) -> dict:
    """The values of a record of W&B's by their names, without W&B's own."""
    items = record.item if hasattr(record, "item") else record.update
    values = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in items}
    return {name: value for name, value in values.items() if not name.startswith("_")}


@needs("wandb")
def test_wandb_gets_config_values_and_result_of_a_resumed_run_as_one(tmp_path, monkeypatch, capsys):
    for name, value in {"MODE": "offline", "PROJECT": "small ones", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    folder, config = tmp_path / "half", run_config(tmp_path, "wandb")
    train(folder, config, start_step=0, last=4)
    time.sleep(1.01 - time.time() % 1)  # W&B names its folders by the second
    train(folder, config, start_step=2, last=6)
    run_id = json.loads((folder / "trackers.json").read_text())["wandb"]
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    parts = [list(wandb_records(path)) for path in files]
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 2
    for part in parts:
        (run,) = (record for name, record in part if name == "run")
        assert (run.run_id, run.project, run.display_name) == (run_id, "small ones", "half")
        sent = {update.key: json.loads(update.value_json) for update in run.config.update}
        assert sent["train"]["lr"] == 0.25 and sent["run"]["name"] == "half"
        (axis,) = (record for name, record in part if name == "metric" and record.glob_name == "*")
        assert axis.step_metric == "step"
    history = [[wandb_values(record) for name, record in part if name == "history"] for part in parts]
    losses = [[(v["step"], v["loss/total"]) for v in values if "loss/total" in v] for values in history]
    assert losses == [[(s, s / 4) for s in (1, 2, 3, 4)], [(s, s / 4 + 2) for s in (3, 4, 5, 6)]]
    assert history[1][0]["model/width_ffn"] == history[1][0]["per_layer/widths/layer.0.ffn"] == 13
    assert math.isnan(history[1][-1]["heldout/mlm_loss"])
    summaries = [wandb_values(record) for name, record in parts[1] if name == "summary"]
    result = {name: value for part in summaries for name, value in part.items() if name.startswith("result/")}
    assert result == {"result/parameters": 11, "result/kl_to_teacher": 0.5}
    assert [record.exit_code for part in parts for name, record in part if name == "exit"] == [1, 0]
    assert warnings_in(capsys.readouterr().err) == []
