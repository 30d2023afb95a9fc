"""How a page calls the term of the language-modelling head."""

from __future__ import annotations

import pytest
import yaml

from homodistil.config.schema import RunConfig
from homodistil.metrics.recorder import Recorder
from homodistil.report.curves import curves
from homodistil.report.run import read_run


@pytest.mark.parametrize(("task", "label", "rows"), [("causal", "lm", "rows"), ("mlm", "mlm", "rows with masks that")])
def test_the_language_modelling_term_goes_by_its_task(tmp_path, task, label, rows):
    """Logged as loss/mlm whatever the task is."""
    config = RunConfig()
    config.data.task = task
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    with Recorder(tmp_path, total_steps=20, start_step=0, enabled=True) as recorder:
        for step in (10, 20):
            recorder.log_step(step, {"loss/total": 3.0, "loss/mlm": 2.0, "loss/kl": 1.0})
            recorder.log_evaluation(step, {"kl_to_teacher": 1.0, "gap/mlm": 2.0})
    drawn = {curve.title: curve for curve in curves(read_run(tmp_path))}
    assert [line.label for line in drawn["Losses"].panels[1].lines] == [label, "kl"]
    assert [line.label for line in drawn["Held-out values"].panels[-1].lines] == [label]
    assert drawn["Held-out values"].caption.startswith(f"Held-out {rows}")
