"""MLflow. MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and its other variables are its own.

Import it only where the package is installed (registry.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.utils.time import get_current_time_millis

from homodistil.metrics.trackers.run_ids import keep_run_id, kept_run_id
from homodistil.metrics.trackers.tracker import TrackedRun

# What a server takes in one request, and of one parameter.
_MAX_METRICS, _MAX_PARAMS, _MAX_PARAM_CHARS = 1000, 100, 6000


class MlflowTracker:
    """A run of MLflow; the one of before, if the run folder knows of one.

    Raises:
        RuntimeError: no server is named, and the package cannot do without.
        Exception: whatever the client raises (also in the methods).
    """

    def __init__(self, run: TrackedRun) -> None:
        _require_store()
        self._client, self._step = MlflowClient(), 0
        if run_id := kept_run_id(run.folder, "mlflow"):
            self._id = run_id
            self._client.update_run(run_id, status="RUNNING")
        else:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "homodistil"
            self._id = self._client.create_run(self._experiment_id(experiment), run_name=run.name).info.run_id
            keep_run_id(run.folder, "mlflow", self._id)
            self._send_config(run.config)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A step that comes again has two values; MLflow shows the later one."""
        self._step, now_ms = step, get_current_time_millis()
        metrics = [Metric(tag, value, now_ms, step) for tag, value in values.items()]
        for start in range(0, len(metrics), _MAX_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _MAX_METRICS])

    def finish(self, result: Mapping[str, float] | None) -> None:
        self.log(self._step, result or {})
        self._client.set_terminated(self._id, "KILLED" if result is None else "FINISHED")

    def _experiment_id(self, name: str) -> str:
        experiment = self._client.get_experiment_by_name(name)
        return self._client.create_experiment(name) if experiment is None else experiment.experiment_id

    def _send_config(self, config: Mapping[str, Mapping[str, Any]]) -> None:
        """Once: MLflow refuses another value of a parameter, and a resumed run may have one."""
        params = list(_params(config))
        for start in range(0, len(params), _MAX_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + _MAX_PARAMS])


def _require_store() -> None:
    """mlflow-skinny has no database, which is where MLflow writes unless it is told of a server."""
    if mlflow.get_tracking_uri().startswith("sqlite") and importlib.util.find_spec("sqlalchemy") is None:
        raise RuntimeError("set MLFLOW_TRACKING_URI to the address of a server; MLflow's own database needs sqlalchemy")


def _params(config: Mapping[str, Mapping[str, Any]]) -> Iterator[Param]:
    for section, fields in config.items():
        for name, value in fields.items():
            text = value if isinstance(value, str) else json.dumps(value)
            yield Param(f"{section}.{name}", text[:_MAX_PARAM_CHARS])
