"""Real runs of a study, and what a worker remembers from one to the next."""

from __future__ import annotations

import shutil
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForMaskedLM

from experiments.quality import fine_tuning
from experiments.quality.arms import ARMS, BASE, SHAPES
from experiments.quality.jobs import ERROR_FILE, Keep, Train
from experiments.quality.measured_run import RememberedLogits, halves
from experiments.quality.options import QUICK
from experiments.quality.pool import Pool, spawner
from experiments.quality.probing import Probe
from experiments.quality.specs import RunSpec
from homodistil.data.sources.assets import teacher_folder
from homodistil.evaluation.glue import fine_tuning as glue
from homodistil.evaluation.glue import sources
from homodistil.evaluation.probe.examples import load_examples
from homodistil.evaluation.probe.features import SentenceFeatures
from homodistil.evaluation.probe.scores import probe
from homodistil.training.inputs import prepare_inputs

ROOT = Path(__file__).resolve().parents[2]


def test_a_real_study_of_two_methods(tmp_path, cache_dir):
    """3 steps each in a worker under DeepSpeed: both halves are measured right, and nothing is trained twice."""

    small = (*QUICK, "teacher.correction_steps=0", "data.sources=[embedded:moby-dick]", f"data.cache_dir={cache_dir}")
    jobs = [
        Train(
            RunSpec.of(name, BASE, SHAPES["half"].overrides, ARMS[name].overrides, small, steps=3, lr=1e-3, seed=1),
            Keep.YES,
            eval_blocks=6,
        )
        for name in ("one_shot", "homodistil")
    ]
    lines = []
    start = spawner(tmp_path, ROOT / "ds_configs" / "zero2.json")
    with Pool(tmp_path, start, 1, lines.append) as pool:
        one_shot, gradual = pool.run("tiny", jobs)
    assert not pool.errors, (pool.errors, (tmp_path / "worker-0.log").read_text()[-3000:])
    assert one_shot["parameters"] == gradual["parameters"] and one_shot["hidden_size"] == 64
    assert gradual["flops"] > 0 and gradual["cpu_s"] > 0 and gradual["tokens"] == 3 * 8 * 64
    assert not (jobs[0].folder(tmp_path) / "checkpoints").exists()

    run_inputs = prepare_inputs(jobs[0].spec.config(), torch.device("cpu"))
    for half, name in zip(halves(run_inputs, 6), ("validation", "test"), strict=True):
        batches = half.heldout(jobs[1].spec.config())
        loss, kl = _by_stock_models(jobs[1].export(tmp_path), run_inputs.teacher, batches)
        # The run measured in bf16: 8 bits of mantissa on each logit of about 10, averaged over 50 rows.
        assert gradual[name]["mlm_loss"] == pytest.approx(loss, abs=0.02)
        # The second run of the worker: the teacher's logits are those that the first one has left.
        assert gradual[name]["kl_to_teacher"] == pytest.approx(kl, abs=0.02)
    assert abs(gradual["validation"]["mlm_loss"] - gradual["test"]["mlm_loss"]) > 0.02  # or the check says nothing

    def no_start(connection: Connection, number: int):
        raise AssertionError("a worker was started though all is done")

    with Pool(tmp_path, no_start, 1, lines.append) as pool:
        assert pool.run("tiny", jobs) == [one_shot, gradual]
    assert not (jobs[0].folder(tmp_path) / ERROR_FILE).exists()


@torch.no_grad()
def _by_stock_models(export: Path, teacher: str, batches) -> tuple[float, float]:
    """(MLM loss, KL to the teacher), fp32, all positions."""

    models = [AutoModelForMaskedLM.from_pretrained(folder).eval() for folder in (export, teacher)]
    loss, kl, rows = 0.0, 0.0, 0
    for batch in batches:
        outputs = [model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits for model in models]
        student, expected = (logits.flatten(0, 1)[batch.target_index].double().log_softmax(-1) for logits in outputs)
        loss -= float(student.gather(1, batch.target_ids[:, None]).sum())
        kl += float((expected.exp() * (expected - student)).sum())
        rows += len(batch.target_ids)
    return loss / rows, kl / rows


def test_probes_are_of_the_exported_student_and_kept(tmp_path, cache_dir):
    """A job on the folder where a run leaves its student; here the packaged BERT-tiny stands there."""
    overrides = (BASE, SHAPES["half"].overrides, (f"data.cache_dir={cache_dir}",))
    train = Train(RunSpec.of("x", *overrides, steps=3, lr=1e-3, seed=0), Keep.YES)
    shutil.copytree(teacher_folder("embedded:bert-tiny", cache_dir), train.export(tmp_path))
    job, context = Probe(train, 16), SimpleNamespace(work=tmp_path, device=torch.device("cpu"))
    result = job.run(context)
    features = SentenceFeatures(str(train.export(tmp_path)))
    assert result["scores"] == pytest.approx(probe(features, load_examples(cache_dir, 16))._asdict(), abs=1e-5)
    assert job.result(tmp_path) == result and Probe(train).result(tmp_path) is None


def test_a_task_is_encoded_once_for_all_students_of_one_tokenizer(tmp_path, monkeypatch):

    encoded = []
    monkeypatch.setattr(sources, "load_task", lambda *_: "data")
    monkeypatch.setattr(glue, "encode", lambda checkpoint, *_: encoded.append(checkpoint.name) or checkpoint.name)
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)
        (tmp_path / name / "config.json").write_text(name)
    fine_tuning._encoded.cache_clear()
    found = [
        fine_tuning._encoded(fine_tuning._Tokenizer(tmp_path / name), task, False, tmp_path)
        for name, task in (("a", "stsb"), ("a", "movie"), ("b", "stsb"), ("b", "movie"), ("c", "movie"))
    ]
    fine_tuning._encoded.cache_clear()
    assert found == ["a", "a", "a", "a", "c"]
    assert encoded == ["a", "a", "c"]


def test_a_teacher_is_asked_once_for_each_batch():

    asked = []

    def predict(batch):
        asked.append(batch)
        return torch.tensor([float(batch)])

    remembered = RememberedLogits()
    walks = [list(map(remembered.of(predict), batches)) for batches in ([3, 1], [3, 1, 2])]
    assert asked == [3, 1, 2] and walks[0] == walks[1][:2] == [3.0, 1.0] and walks[1][2] == 2.0
