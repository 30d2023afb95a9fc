"""The array scripts on a real SLURM: pairs dealt out and one table, every line of a file, data in shares."""

import json
import os
import subprocess

import pytest
from slurm_cluster import ROOT
from support.glue_files import write_checkpoint, write_glue
from support.small_job import VOCABULARY, arguments
from transformers import BertTokenizerFast

SCRIPTS = ROOT / "launcher" / "slurm"


@pytest.fixture
def glue(tmp_path):
    """Arguments for a tiny checkpoint and tiny official files."""
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    write_checkpoint(tmp_path / "model", BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")))
    write_glue(tmp_path / "glue_data")
    paths = {"--checkpoint": tmp_path / "model", "--data": tmp_path / "glue_data", "--out": tmp_path / "out"}
    options = {**paths, "--lr": 1e-3, "--epochs": 1, "--batch-size": 4, "--max-length": 16}
    return [str(word) for option in options.items() for word in option]


@pytest.mark.parametrize(("first", "expected"), [(0, ["rte 0", "rte 2", "stsb 1"]), (7, ["rte 1", "stsb 0", "stsb 2"])])
def test_pairs_are_dealt_out_to_the_tasks_of_an_array(first, expected):
    """`first`: of the array, whose task number 7 or 8 this is."""
    numbers = {"SLURM_ARRAY_TASK_ID": "8" if first else "0", "SLURM_ARRAY_TASK_MIN": str(first)}
    program = "tasks=(rte stsb) seeds=(0 1 2); deal_out_pairs; printf '%s\\n' \"${pairs[@]}\""
    command = ["bash", "-euc", f". {SCRIPTS}/arguments.sh; {program}"]
    environment = os.environ | numbers | {"SLURM_ARRAY_TASK_COUNT": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize(("tasks", "seeds"), [(["rte"], [0]), (["rte", "stsb"], [0, 1])], ids=["rte", "rte stsb"])
def test_each_trains_its_pairs_and_the_last_writes_the_table(cluster, site, glue, tmp_path, tasks, seeds):
    """The second task of an array that has one pair has nothing to train, and does not write the table too early."""
    env = site | {"GLUE_TASKS": " ".join(tasks), "GLUE_SEEDS": " ".join(map(str, seeds))}
    job = cluster.submit(SCRIPTS / "glue_array.sbatch", glue, ["--array=0-1", "--time=5"], env)
    assert cluster.wait(job, timeout_s=180) == "COMPLETED", cluster.output(job)
    starts = cluster.output(job).count(", log in ")  # one a pair, and one for the table of all
    assert starts == len(tasks) * len(seeds) + 1, cluster.output(job)
    out = tmp_path / "out"
    runs = [f"{task}-seed{seed}" for task in tasks for seed in seeds]
    assert sorted(file.parent.name + file.stem[-6:] for file in out.glob("*/lr*.json")) == runs
    table = json.loads((out / "glue.json").read_text())["tasks"]
    assert {name: table[name]["best"]["seeds"] for name in table} == dict.fromkeys(tasks, seeds)


@pytest.mark.full
def test_a_sweep_runs_the_line_of_its_number(cluster, site, run_inputs, tmp_path):
    """Line 2 of the file, with a field that holds a space; line 3 is not there."""
    lines = [f"train.steps=3 run.dir='{tmp_path}/run {number}' run.name=line-{number}" for number in (1, 2)]
    (tmp_path / "sweep.txt").write_text("\n".join(lines) + "\n")
    common = [word for word in arguments(run_inputs, tmp_path) if not word.startswith("run.dir=")]
    options = ["--nodes=2", "--array=2-3", "--time=5"]
    job = cluster.submit(SCRIPTS / "sweep.sbatch", [str(tmp_path / "sweep.txt"), *common], options, site)
    assert cluster.wait(job, timeout_s=180) == "COMPLETED+FAILED", cluster.output(job)
    assert "error: sweep: found no line 3" in cluster.output(job)
    assert (tmp_path / "run 2" / "export" / "model.safetensors").is_file() and not (tmp_path / "run 1").exists()


@pytest.mark.full
def test_tasks_of_an_array_prepare_one_corpus(cluster, site, run_inputs, tmp_path):
    fields = [word for word in arguments(run_inputs, tmp_path) if word.startswith(("data.s", "data.h", "teacher."))]
    env = site | {"CACHE_DIR": str(tmp_path / "cache"), "LOG_DIR": str(tmp_path / "logs")}
    own = ["--config", str(run_inputs / "empty.yaml"), *fields]
    job = cluster.submit(SCRIPTS / "prepare_data.sbatch", own, ["--array=0-1", "--time=5"], env)
    assert cluster.wait(job, timeout_s=180) == "COMPLETED", cluster.output(job)
    assert len(list((tmp_path / "cache" / "corpora").glob("[0-9a-f]*/"))) == 1
