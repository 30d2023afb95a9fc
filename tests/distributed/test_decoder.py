"""A decoder with grouped heads through the launcher's own script: events on a live engine, resume, stock export."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.fork_server import ROOT, ForkServer
from support.tiny_decoder import write_decoder, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, pipeline

TRAIN = ROOT / "launcher" / "train.py"
STEPS, SAVE_EVERY = 10, 4


@pytest.fixture(scope="module")
def materials(tmp_path_factory) -> Path:
    """`teacher` and `text`."""
    folder = tmp_path_factory.mktemp("decoder")
    write_decoder(folder / "teacher", LlamaConfig, write_text(folder / "text"))
    return folder


def _arguments(materials: Path, run_dir: Path, stage: int, *overrides: str) -> list[str]:
    fields = {
        "teacher.name": materials / "teacher",
        "data.sources": f"[{materials / 'text'}]",
        "data.cache_dir": materials / "cache",
        "data.seq_len": 32,
        "student.hidden_size": 36,
        "student.intermediate_size": 48,
        "student.num_attention_heads": 4,
        "train.steps": STEPS,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.save_every_steps": SAVE_EVERY,
        "train.eval_every_steps": 5,
        "train.log_every_steps": 1,
        "pruning.end_fraction": 0.8,
        "pruning.interval_steps": 2,
        "loss.kl": 1.0,
        "run.dir": run_dir,
        "run.keep_checkpoints": 9,
        "run.compare": "[]",
    }
    values = [f"{name}={value}" for name, value in fields.items()]
    return ["--deepspeed", str(ROOT / "ds_configs" / f"zero{stage}_fp32.json"), *values, *overrides]


def _run(server: ForkServer, arguments: list[str]) -> str:
    job = server.start(TRAIN, arguments)
    assert job.wait(timeout_s=300) == [0, 0], job.output()
    return job.output(0)


@pytest.fixture(scope="module")
def runs(server, materials) -> dict[int, Path]:
    """ZeRO stage -> finished run folder."""
    for stage in (2, 3):
        output = _run(server, _arguments(materials, materials / f"run{stage}", stage))
        (materials / f"zero{stage}.txt").write_text(output)
    return {stage: materials / f"run{stage}" for stage in (2, 3)}


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stage", [2, 3])
def test_groups_and_heads_in_them_fall_in_events(runs, stage):
    events = _lines(runs[stage] / "events.jsonl")
    assert len(events) >= 3
    last = events[-1]["widths_after"]
    assert (last["layer.0.kv_heads"], last["layer.0.heads_in_group"], last["layer.1.qk_dim"]) == (2, 2, 8)
    assert (last["hidden"], last["layer.1.ffn"]) == (36, 48)


def test_stages_agree_and_the_start_is_the_teacher(runs):
    lines = (_lines(runs[stage] / "metrics.jsonl") for stage in (2, 3))
    two, three = ([line for line in of_run if "loss/total" in line] for of_run in lines)
    assert len(two) == STEPS
    assert two[0]["loss/kl"] == two[0]["loss/attention"] == two[0]["loss/hidden"] == 0
    for a, b in zip(two, three, strict=True):
        # The same sums in another order: fp32.
        assert a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-3), a["step"]


def test_the_table_has_the_numbers_of_its_task(runs, materials):
    teacher, student = json.loads((runs[2] / "result.json").read_text())
    for row in (teacher, student):
        assert row["perplexity"] == pytest.approx(math.exp(row["heldout_lm_loss"]))
        assert 0 < row["bits_per_byte"] < 8 and "masked_top1" not in row and "heldout_mlm_loss" not in row
    assert teacher["kl_to_teacher"] == 0 and student["kl_to_teacher"] > 0
    output = (materials / "zero2.txt").read_text()
    assert "bits per byte" in output and "masked" not in output


def test_the_teachers_loss_is_the_librarys(runs, materials):
    """On the held-out blocks, by the stock model's own shifted loss, and its bytes by decoding."""
    import numpy as np

    (blocks,) = (np.load(path) for path in materials.glob("cache/corpora/*/heldout.npy"))
    ids = torch.from_numpy(blocks.astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(materials / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(materials / "teacher")
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    row = json.loads((runs[2] / "result.json").read_text())[0]
    assert row["heldout_lm_loss"] == pytest.approx(loss, rel=1e-5)
    text = [tokenizer.decode(row[1:], skip_special_tokens=True) for row in ids]
    num_bytes = sum(len(t.encode()) for t in text)
    assert row["bits_per_byte"] == pytest.approx(loss * ids[:, 1:].numel() / math.log(2) / num_bytes, rel=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
def test_resume_is_bitwise(server, runs, materials, tmp_path, stage):
    copy = tmp_path / "run"
    shutil.copytree(runs[stage], copy)
    for leftover in (f"checkpoints/step-{STEPS:06d}", f"checkpoints/step-{2 * SAVE_EVERY:06d}", "export"):
        shutil.rmtree(copy / leftover)
    (copy / "row.json").unlink()
    (copy / "checkpoints" / "latest").write_text(f"step-{SAVE_EVERY:06d}\n")
    _run(server, _arguments(materials, copy, stage, "run.resume=auto"))
    ours, theirs = (load_file(path / "export" / "model.safetensors") for path in (copy, runs[stage]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_export_generates_without_our_code(runs):
    model = AutoModelForCausalLM.from_pretrained(runs[2] / "export")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (4, 2, 8)
    text = pipeline("text-generation", model=str(runs[2] / "export"))("the cat", max_new_tokens=4)
    assert text[0]["generated_text"].startswith("the cat")
    card = (runs[2] / "export" / "README.md").read_text()
    assert "text-generation" in card and "AutoModelForCausalLM" in card and "perplexity" in card
