"""The main job on two real ranks, with the real packaged teacher and text: files, resume, stops, exit codes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import ROOT, free_port, run_ranks
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, BertForMaskedLM

from homodistil.checkpoint import Checkpoints
from homodistil.errors import UserError

TRAIN = ROOT / "launcher" / "train.py"
STEPS, SAVE_EVERY = 14, 5


def _arguments(run_dir: Path, cache_dir: Path, *overrides: str) -> list[str]:
    fields = {
        "data.cache_dir": cache_dir,
        "data.seq_len": 32,
        "teacher.correction_steps": 0,
        "train.steps": STEPS,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.lr": 1e-3,
        "train.save_every_steps": SAVE_EVERY,
        "train.eval_every_steps": 0,
        "train.log_every_steps": 1,
        "train.keep_checkpoints": 9,
        "train.eval_batch_size": 256,
        "pruning.end_fraction": 0.8,
        "pruning.interval_steps": 2,
        "data.heldout_fraction": 0.01,
        "run.dir": run_dir,
        "run.compare": "[]",
    }
    fields = [f"{name}={value}" for name, value in fields.items()]
    return ["--deepspeed", str(ROOT / "ds_configs" / "zero2_fp32.json"), *fields, *overrides]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache_dir):
    """A whole run, started by DeepSpeed's own launcher."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    port = free_port()
    command = [*launcher, "--master_port", str(port), str(TRAIN)]
    command += _arguments(folder, cache_dir, "run.export_milestones=[0.9]", "run.compare=[one_shot]")
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "shm_comm_op built" in done.stdout and not list(Path("/dev/shm").glob(f"*_{port}_*")), "shared memory left"
    return folder, done.stdout


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_result_table_is_printed_and_stored(finished):
    folder, printed = finished
    rows = {row["name"]: row for row in json.loads((folder / "result.json").read_text())}
    assert list(rows) == ["teacher", "homodistil", "one_shot"]
    assert rows["teacher"]["kl_to_teacher"] == 0 and rows["teacher"]["parameters"] == 4416698
    # 64-wide, 2 layers, 30522 words: formula by hand (tied decoder; biases, LayerNorms, positions, token types).
    layer = 4 * (64 * 64 + 64) + (64 * 256 + 256) + (256 * 64 + 64) + 4 * 64
    expected = (30522 + 512 + 2) * 64 + 2 * 64 + 2 * layer + (64 * 64 + 64 + 2 * 64) + 30522
    assert rows["homodistil"]["parameters"] == rows["one_shot"]["parameters"] == expected
    for row in rows.values():
        assert row["heldout_mlm_loss"] > 1 and 0 < row["masked_top1"] < 1
        assert row["name"] in printed
    assert rows["homodistil"]["tokens_per_s_first"] > 0 and rows["homodistil"]["hidden_size"] == 64


def test_every_term_is_zero_before_the_first_step(finished):
    folder, _ = finished
    start = next(line for line in _lines(folder / "metrics.jsonl") if line["kind"] == "evaluation")
    gap = {name: value for name, value in start.items() if name.startswith("gap/") and name != "gap/mlm"}
    assert start["step"] == 0 and {"gap/kl", "gap/hidden/layer.1", "gap/attention/layer.0"} <= set(gap)
    assert all(abs(value) <= 1e-6 for value in gap.values()), gap


def test_metrics_and_events_tell_the_whole_story(finished):
    folder, _ = finished
    train = [line for line in _lines(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    names = {"loss/total", "loss/mlm", "loss/kl", "loss/hidden/layer.0", "loss/attention/layer.1", "loss/embedding"}
    names |= {"optim/lr", "optim/grad_norm", "speed/tokens_per_s", "speed/mfu", "memory/rss_bytes", "widths/hidden"}
    assert names <= set(train[0])
    events = _lines(folder / "events.jsonl")
    assert len(events) >= 4 and events[-1]["widths_after"]["hidden"] == 64
    assert all(len(event["hash"]) == 64 and event["milliseconds"] > 0 for event in events)
    assert all({"kl", "hidden", "attention"} <= set(event["gap_before"]) & set(event["gap_after"]) for event in events)
    widths = [event["widths_after"]["hidden"] for event in events]
    assert widths == sorted(widths, reverse=True)
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    assert names <= set(board.Tags()["scalars"])
    assert board.Scalars("widths/hidden")[-1].value == 64


def test_export_is_the_engines_model(finished, cache_dir):
    """fp32 logits of the exported file against the master weights in the last checkpoint, on a padded batch."""
    folder, _ = finished
    model = BertForMaskedLM.from_pretrained(folder / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    assert (model.config.hidden_size, model.config.intermediate_size, model.config.num_attention_heads) == (64, 256, 2)
    batch = tokenizer(["The president of the [MASK] states.", "A whale."], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
        trained = _engine_weights(folder / "checkpoints" / f"step-{STEPS:06d}")
        # The engine's model keeps the teacher's softmax scale: 1/sqrt(64) instead of 1/sqrt(32) for 32-wide heads.
        stock = {name.removeprefix("model."): w for name, w in trained.items() if name.startswith("model.")}
        model.load_state_dict(stock, strict=False)
        for layer in model.bert.encoder.layer:
            assert layer.attention.self.scaling == 32**-0.5
            layer.attention.self.scaling = 64**-0.5
        torch.testing.assert_close(logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    assert "fill-mask" in (folder / "export" / "README.md").read_text()


def _engine_weights(checkpoint: Path) -> dict:
    state = torch.load(checkpoint / "engine" / "mp_rank_00_model_states.pt", weights_only=False)
    return state["module"]


def test_report_and_configs_are_in_the_folder(finished):
    folder, _ = finished
    assert "homodistil" in (folder / "report.html").read_text()
    assert json.loads((folder / "ds_config.json").read_text())["gradient_accumulation_steps"] == 2
    assert "seq_len: 32" in (folder / "config.yaml").read_text()
    milestones = list((folder / "export").glob("milestone-*"))
    assert all(BertForMaskedLM.from_pretrained(path).config.hidden_size <= 0.9 * 128 for path in milestones)


def test_resume_after_resizes_is_bitwise_the_uninterrupted_run(finished, tmp_path, cache_dir):
    folder, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    # As a power cut some steps after the checkpoint would leave it, several resizes in.
    for leftover in (f"checkpoints/step-{STEPS:06d}", "checkpoints/step-000010", "export", "compare"):
        shutil.rmtree(copy / leftover)
    (copy / "row.json").unlink()
    (copy / "checkpoints" / "latest").write_text(f"step-{SAVE_EVERY:06d}\n")
    assert sum(event["step"] <= SAVE_EVERY for event in _lines(copy / "events.jsonl")) >= 2
    run_ranks(TRAIN, _arguments(copy, cache_dir, "run.resume=auto"), num_ranks=2, timeout_s=500)
    ours, theirs = (load_file(path / "export" / "model.safetensors") for path in (copy, folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name in ("metrics.jsonl", "events.jsonl"):
        assert _without_speed(_lines(copy / name)) == _without_speed(_lines(folder / name))
    last = f"checkpoints/step-{STEPS:06d}"
    for path in sorted((folder / last / "engine").glob("*optim_states.pt")):
        states = [torch.load(p / last / "engine" / path.name, weights_only=False) for p in (copy, folder)]
        ours, theirs = (s["optimizer_state_dict"] for s in states)
        for key in ("single_partition_of_fp32_groups",):
            assert all(torch.equal(a, b) for a, b in zip(ours[key], theirs[key], strict=True))
        pairs = zip(*(s["base_optimizer_state"]["state"].values() for s in (ours, theirs)), strict=True)
        assert all(torch.equal(a[m], b[m]) for a, b in pairs for m in ("exp_avg", "exp_avg_sq"))


def test_one_rank_follows_the_same_path_as_two(finished, tmp_path, cache_dir):
    """Data order, masks and the mean over the global batch do not depend on ranks or accumulation."""
    folder, _ = finished
    alone = tmp_path / "run"
    run_ranks(TRAIN, _arguments(alone, cache_dir, "train.micro_batch_size=8"), num_ranks=1, timeout_s=500)
    for name in ("loss/total", "loss/mlm", "loss/kl", "loss/attention", "widths/hidden", "optim/grad_norm"):
        ours, theirs = (
            [line[name] for line in _lines(path / "metrics.jsonl") if name in line] for path in (alone, folder)
        )
        # fp32 sums in another order; Adam's normalisation lifts the differences of tiny gradients.
        assert ours == pytest.approx(theirs, rel=2e-3), name


def test_a_checkpoint_of_another_layout_or_a_damaged_one_is_refused(finished, tmp_path):
    folder, _ = finished
    copy = tmp_path / "checkpoints"
    copy.mkdir()
    name = f"step-{SAVE_EVERY:06d}"
    (copy / name).mkdir()
    shutil.copy(folder / "checkpoints" / name / "run.pt", copy / name)
    (copy / "latest").write_text(name)
    layout = {"ranks": 2, "zero_optimization.stage": 2, "precision": "torch.float32"}
    assert Checkpoints(copy, 1, layout).load()[1]["step"] == SAVE_EVERY
    with pytest.raises(UserError, match="written with ranks = 2, this job has 3; resume with the same ranks"):
        Checkpoints(copy, 1, layout | {"ranks": 3}).load()
    (copy / name / "run.pt").write_bytes(b"half a file")
    with pytest.raises(UserError, match="not a whole checkpoint"):
        Checkpoints(copy, 1, layout).load()


def _without_speed(lines: list[dict]) -> list[dict]:
    measured = ("speed/", "memory/", "milliseconds")
    return [{name: value for name, value in line.items() if not name.startswith(measured)} for line in lines]


def _failing(arguments: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += [f"--master_port={free_port()}", str(TRAIN), *arguments]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_a_users_mistake_ends_all_ranks_with_one_line(tmp_path, cache_dir):
    done = _failing(_arguments(tmp_path / "run", cache_dir, "student.hidden_size=4096"))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode != 0
    assert len(errors) == 1 and "student.hidden_size: found 4096, the teacher has 128" in errors[0]
    assert 'Traceback (most recent call last):\n  File "' + str(TRAIN) not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, cache_dir):
    overrides = ("train.lr=1e18", "train.warmup_fraction=0.5", "train.gradient_clipping=0", "train.save_every_steps=1")
    done = _failing(_arguments(tmp_path / "run", cache_dir, *overrides))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode != 0 and len(errors) == 1
    assert "is not finite at step" in errors[0] and "mlm" in errors[0] and "train.lr" in errors[0]
    checkpoints = tmp_path / "run" / "checkpoints"
    latest = checkpoints / (checkpoints / "latest").read_text().strip()
    assert (latest / "run.pt").is_file() and not (tmp_path / "run" / "result.json").exists()
