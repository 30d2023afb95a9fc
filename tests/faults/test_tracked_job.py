"""run.trackers in a real job: failed and resumed it is one run of the tracker, with every value of metrics.jsonl."""

import importlib.util
import json

import pytest
from support.small_job import STEPS, TRAIN, arguments

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")


def test_a_failed_job_goes_on_in_the_same_run_of_mlflow(server, run_inputs, tmp_path, monkeypatch):
    folder = tmp_path / "half"
    env = {"MLFLOW_TRACKING_URI": (tmp_path / "store").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    env["MLFLOW_DISABLE_TELEMETRY"] = "true"
    job_arguments = arguments(run_inputs, folder, "run.resume=auto", "run.trackers=[mlflow]", "run.name=half")
    # It fails in step 6, behind the checkpoint of step 3: steps 4 and 5 come again.
    job = server.start(TRAIN, job_arguments, env=env | {"HOMODISTIL_FAULT": "train.step:rank=0:hit=6:action=raise"})
    assert 0 not in job.wait(timeout_s=180), job.output()
    run_id = json.loads((folder / "trackers.json").read_text())["mlflow"]
    job = server.start(TRAIN, job_arguments, env=env)
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    assert "run.trackers" not in job.output(), job.output()

    for name, value in env.items():
        monkeypatch.setenv(name, value)
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("homodistil").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "half", "FINISHED")
    values = {m.step: m.value for m in client.get_metric_history(run_id, "loss/total")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert values == {line["step"]: line["loss/total"] for line in lines if line["kind"] == "train"}
    assert sorted(values) == list(range(1, STEPS + 1))
    row = json.loads((folder / "row.json").read_text())
    assert run.data.metrics["result/parameters"] == row["parameters"]
