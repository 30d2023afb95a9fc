"""GLUE runs: nine tasks end to end, a kill in the middle, early stopping, mistakes before training, the table."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

import pytest
import torch
from families.cases import write_export
from safetensors.torch import load_file
from support.glue_files import write_checkpoint, write_glue

from homodistil.errors import UserError
from homodistil.evaluation.glue import published
from homodistil.evaluation.glue.checkpoint import load_classifier
from homodistil.evaluation.glue.fine_tuning import Settings, _best, encode, fine_tune
from homodistil.evaluation.glue.grid import Grid, run_grid
from homodistil.evaluation.glue.result_table import summarise, write_table
from homodistil.evaluation.glue.sources import TaskData
from homodistil.evaluation.glue.tasks import TASKS
from homodistil.evaluation.glue.tsv import Split

pytestmark = pytest.mark.process

LAUNCHER = Path(__file__).parents[3] / "launcher" / "glue.py"
SHARED = Settings(max_length=32, device="cpu")
ONE_RUN = Grid(lrs=[1e-3], batch_sizes=[4], epochs=[1], seeds=[0], shared=SHARED)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tokenizer))


@pytest.fixture(scope="module")
def glue_data(tmp_path_factory) -> str:
    return str(write_glue(tmp_path_factory.mktemp("glue_data")))


def sentiment(num_examples: int, flipped: bool = False) -> Split:
    """One word decides."""
    labels = [i % 2 for i in range(num_examples)]
    texts = [(f"the film number {i} was {'good' if label else 'bad'}",) for i, label in enumerate(labels)]
    return Split(texts, [1 - label for label in labels] if flipped else labels)


def run(checkpoint, data, out, names=("rte",), grid=ONE_RUN, said=None):
    tasks = [TASKS[name] for name in names]
    say = (lambda line: None) if said is None else said.append
    return run_grid(checkpoint, tasks, data, grid, Path(out), Path(out), say)


def test_all_nine_tasks_end_to_end(checkpoint, glue_data, tmp_path):
    said = []
    records = run(checkpoint, glue_data, tmp_path / "out", TASKS, said=said)
    assert len(records) == 9 and sum("seed0" in line for line in said) == 9
    for record in records:
        task, result = TASKS[record["task"]], record["result"]
        assert set(task.result_names) <= set(result) and result["steps"] == 2 and result["epoch"] == 1
        assert all(-1 <= result[name] <= 1 for name in task.result_names)
    mnli = next(record["result"] for record in records if record["task"] == "mnli")
    assert mnli["score"] == mnli["accuracy_m"]
    text = write_table(records, tmp_path / "out")
    assert "-" not in next(line for line in text.splitlines() if checkpoint in line).replace(checkpoint, "").split()
    assert json.loads((tmp_path / "out" / "glue.json").read_text())["tasks"].keys() == TASKS.keys()
    assert (tmp_path / "out" / "glue.md").read_text() == text


def test_training_learns_and_leaves_nothing_behind(checkpoint, tmp_path, monkeypatch):
    """Also inside a job of several ranks, whose process group Trainer must not join."""
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    data = TaskData(sentiment(64), {"": sentiment(32)})
    settings = dataclasses.replace(SHARED, lr=1e-2, batch_size=8, epochs=6)
    result = fine_tune(checkpoint, "sst2", data, settings)
    assert result["accuracy"] == 1.0 and result["steps"] == 48 and result["epoch"] == 6
    assert not list(tmp_path.iterdir())
    assert {name: os.environ[name] for name in ranks} == ranks
    again = fine_tune(checkpoint, TASKS["sst2"], data, dataclasses.replace(settings, epochs=1))
    same = fine_tune(checkpoint, TASKS["sst2"], data, dataclasses.replace(settings, epochs=1))
    assert {**again, "seconds": 0} == {**same, "seconds": 0}


@pytest.mark.parametrize("model_type", ["distilbert", "electra", "mpnet"])
def test_other_families_are_fine_tuned(model_type, tmp_path, tokenizer):
    """Exports of other classes: the encoder as it is stored, a head of its own kind, with or without token types."""
    write_export(model_type, tokenizer, tmp_path)
    stored, model = load_file(tmp_path / "model.safetensors"), load_classifier(str(tmp_path), TASKS["rte"])
    inside = {name: weight for name, weight in model.state_dict().items() if name.startswith(model.base_model_prefix)}
    assert all(torch.equal(weight, stored[name]) for name, weight in inside.items())
    assert len(inside) < len(model.state_dict())
    pairs = Split([(f"number {i}", "a film, good or bad") for i in range(8)], [0, 1] * 4)
    settings = dataclasses.replace(SHARED, lr=1e-3, batch_size=4, epochs=1)
    result = fine_tune(str(tmp_path), TASKS["rte"], TaskData(pairs, {"": pairs}), settings)
    assert result["steps"] == 2 and 0 <= result["accuracy"] <= 1


def test_similarities_are_standardised_by_train(checkpoint):
    pair = ("one", "two")
    data = TaskData(Split([pair] * 4, [1.0, 3.0, 5.0, 5.0]), {"": Split([pair], [0.0])})
    encoded = encode(checkpoint, TASKS["stsb"], data, 32)
    deviation = math.sqrt((2.5**2 + 0.5**2 + 2 * 1.5**2) / 4)
    expected = [value / deviation for value in (-2.5, -0.5, 1.5, 1.5)]
    assert [example["labels"] for example in encoded.train] == pytest.approx(expected)
    assert encoded.dev["dev"][0]["labels"] == pytest.approx(-3.5 / deviation)
    same = TaskData(Split([pair] * 2, [2.0, 2.0]), data.dev)
    assert [e["labels"] for e in encode(checkpoint, TASKS["stsb"], same, 32).train] == [0.0, 0.0]
    classes = encode(checkpoint, TASKS["mnli"], TaskData(Split([pair], [2]), {"m": Split([pair], [1])}), 32)
    assert classes.train[0]["labels"] == 2


def test_early_stopping_reports_the_best_epoch(checkpoint):
    """Dev labels are turned round: the better the training, the worse the score."""
    data = TaskData(sentiment(64), {"": sentiment(32, flipped=True)})
    settings = dataclasses.replace(SHARED, lr=1e-2, batch_size=8, epochs=8, patience=2)
    result = fine_tune(checkpoint, "sst2", data, settings)
    assert result["steps"] == 8 * (result["epoch"] + 2) < 64
    last = fine_tune(checkpoint, "sst2", data, dataclasses.replace(settings, patience=None))
    assert last["steps"] == 64 and last["accuracy"] < result["accuracy"]


def test_best_epoch_is_that_of_the_first_dev_set():
    history = [
        {"epoch": 1.0, "eval_m_accuracy": 0.5, "eval_m_score": 0.5},
        {"epoch": 1.0, "eval_mm_accuracy": 0.9, "eval_mm_score": 0.9},
        {"epoch": 2.0, "eval_m_accuracy": 0.6, "eval_m_score": 0.6},
        {"epoch": 2.0, "eval_mm_accuracy": 0.3, "eval_mm_score": 0.3},
        {"epoch": 2.0, "train_loss": 1.0},
    ]
    assert _best(TASKS["mnli"], history) == {"accuracy_m": 0.6, "accuracy_mm": 0.3, "score": 0.6, "epoch": 2.0}


def test_a_killed_command_goes_on(server, checkpoint, tmp_path):
    data = write_glue(tmp_path / "glue_data", num_train=160)
    out = tmp_path / "out"
    command = ["--checkpoint", checkpoint, "--tasks", "rte", "--data", str(data), "--out", str(out)]
    command += "--lr 1e-3 --batch-size 4 --epochs 1 --patience 0 --seeds 0 1 2 --max-length 32 --device cpu".split()
    job, deadline = server.start(LAUNCHER, command, num_ranks=1), time.monotonic() + 120
    while not (done := list(out.glob("*/*.json"))) and job.is_running() and time.monotonic() < deadline:
        time.sleep(0.01)
    job.kill()
    assert job.wait(timeout_s=60) == [-signal.SIGKILL], job.output()
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/*.json")}
    assert done and 1 <= len(before) < 3 and not (out / "glue.md").exists()

    grid = dataclasses.replace(ONE_RUN, seeds=[0, 1, 2])
    said = []
    records = run(checkpoint, str(data), out, grid=grid, said=said)
    assert len(records) == 3 and said[0] == f"RTE: {3 - len(before)} runs to do, {len(before)} finished before"
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert run(checkpoint, str(data), out, grid=grid, said=said) == records
    assert said[-1] == "RTE: 0 runs to do, 3 finished before"


def test_results_of_another_run_are_not_overwritten(checkpoint, glue_data, tmp_path, tokenizer):
    out = tmp_path / "out"
    (record,) = run(checkpoint, glue_data, out)
    (file,) = out.glob("rte/*.json")
    before = file.read_text()

    def refuse(pattern, *arguments, **options):
        with pytest.raises(UserError, match=pattern) as caught:
            run(*arguments, **options)
        assert "\n" not in str(caught.value) and file.read_text() == before

    other = str(write_checkpoint(tmp_path / "other", tokenizer, seed=1))
    refuse(r"result of another run \(checkpoint: found .*, now .*; give another --out", other, glue_data, out)
    refuse(r"checkpoint: found", other, glue_data, out, names=["cola"])
    data = str(write_glue(tmp_path / "more", num_train=9))
    refuse(r"\(data: found", checkpoint, data, out)
    longer = dataclasses.replace(ONE_RUN, shared=dataclasses.replace(SHARED, max_length=16, patience=1))
    refuse(r"\(max_length: found 32, now 16, patience: found None, now 1\)", checkpoint, glue_data, out, grid=longer)
    # Another task and another setting of the same checkpoint join the table.
    assert len(run(checkpoint, glue_data, out, ["cola"])) == 2
    assert len(run(checkpoint, glue_data, out, grid=dataclasses.replace(ONE_RUN, lrs=[1e-4]))) == 3
    file.write_text("{}")
    with pytest.raises(UserError, match="found no result of a run; delete the file"):
        run(checkpoint, glue_data, out)


def test_mistakes_are_found_before_the_first_run(checkpoint, tmp_path, tokenizer):
    data = write_glue(tmp_path / "glue_data")
    (data / "WNLI" / "dev.tsv").unlink()
    out = tmp_path / "out"

    def refuse(pattern, checkpoint, names=("cola",), grid=ONE_RUN):
        with pytest.raises(UserError, match=pattern) as caught:
            run(checkpoint, str(data), out, names, grid)
        assert "\n" not in str(caught.value) and not out.exists()

    refuse(r"WNLI/dev\.tsv: not found", checkpoint, names=["cola", "wnli"])
    refuse("--checkpoint: no folder '/nowhere'", "/nowhere")
    refuse("--checkpoint: found 'embedded:bert', packaged are .*did you mean 'embedded:bert-tiny'", "embedded:bert")
    long = dataclasses.replace(ONE_RUN, shared=dataclasses.replace(SHARED, max_length=33))
    refuse("--max-length: found 33, .* allows 32", checkpoint, grid=long)
    gpu = dataclasses.replace(ONE_RUN, shared=dataclasses.replace(SHARED, device="cuda"))
    import torch

    if not torch.cuda.is_available():
        refuse("--device: found cuda, but torch sees no GPU", checkpoint, grid=gpu)
    broken = write_checkpoint(tmp_path / "broken", tokenizer)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    refuse("word_embeddings.weight is 30522 x 16 in the weights, 100 x 16 by config.json", str(broken))
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "model.safetensors").unlink()
    refuse("--checkpoint: cannot load", str(broken))


def record(task, lr, seed, **metrics):
    result = {"score": sum(metrics.values()) / len(metrics), "epoch": 1, "parameters": 14_100_000, **metrics}
    setting = {"lr": lr, "batch_size": 32, "epochs": 3, "seed": seed}
    return {"task": task, "checkpoint": "runs/a|b", "identity": {}, "setting": setting, "result": result}


def test_table_by_hand(tmp_path):
    low, high = [0.60, 0.70, 0.62], [0.61, 0.65, 0.66]
    records = [record("rte", 1e-5, i, accuracy=value) for i, value in enumerate(low)]
    records += [record("rte", 5e-5, i, accuracy=value) for i, value in enumerate(high)]
    records += [record("stsb", 1e-5, 0, pearson=0.9, spearman=0.8)]
    summary = summarise(records)
    best = summary["rte"]["best"]
    assert best["lr"] == 5e-5 and best["seeds"] == [0, 1, 2], "by the median (.65), not the best seed (.70)"
    assert best["metrics"]["accuracy"] == {
        "median": 0.65,
        "standard_deviation": pytest.approx(statistics.stdev(high)),
        "min": 0.61,
        "max": 0.66,
    }
    text = write_table(records, tmp_path)
    assert "| runs/a\\|b | 14.1 | - | - | - | 90.0 / 80.0 | - | - | - | 65.0 +- 2.6 | - | measured here |" in text
    assert "| RTE | 5e-05 | 32 | 3 | 3 | acc | 65.0 | 61.0 | 66.0 | 2.6 | best |" in text
    assert "| STS-B | 1e-05 | 32 | 3 | 1 | Pearson | 90.0 | 90.0 | 90.0 | - | best |" in text
    distilbert = "| 66 | 51.3 | 91.3 | 87.5 | 86.9 | 88.5 | 82.1 | 89.2 | 59.9 | - | README of Hugging Face's"
    assert f"| DistilBERT uncased {distilbert}" in text
    assert "VERIFIED" not in text and "memory" not in text and "HomoBERT" not in text
    assert all(len(row.scores) >= 7 and row.source.startswith("README of ") for row in published.ROWS)
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {13, 12}, "every line of a table has its columns"
