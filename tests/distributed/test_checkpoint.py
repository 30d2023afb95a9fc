"""Checkpoint folders: what is in them, what may happen to them, and which one is gone on from. A real engine, one rank.

Other layouts and several ranks are in distributed/test_elastic.py, whole runs in distributed/test_job.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.small import small_batch, small_pair

from homodistil.checkpoint import Checkpoints, candidates
from homodistil.checkpoint.reader import StateReader
from homodistil.config.schema import RunConfig, RunFolderConfig
from homodistil.engine.build import build_engine, init_ranks, resolve_engine_config
from homodistil.errors import UserError
from homodistil.resize import engine_state, load_engine_state, master_weights

NUM_STEPS = 3


def make_engine(stage: int = 2):
    init_ranks()
    config = RunConfig()
    config.train.steps, config.train.global_batch_size, config.train.micro_batch_size = 10, 3, 3
    student, teacher = small_pair()
    resolved = resolve_engine_config({"zero_optimization": {"stage": stage}}, config.train, 1)
    return build_engine(student, config.train, config.optimizer, resolved).deepspeed, teacher


def train_step(engine, teacher, seed: int) -> float:
    batch = small_batch(seed)
    total = engine(batch, teacher(batch)).total
    engine.backward(total)
    engine.step()
    return total.item()


@pytest.fixture(scope="module")
def trained():
    """An engine some steps in, and its teacher; tests only look at it."""
    engine, teacher = make_engine()
    for step in range(NUM_STEPS):
        train_step(engine, teacher, step)
    yield engine, teacher
    engine.destroy()


@pytest.fixture
def state() -> dict:
    """What the trainer saves, with one of everything."""
    average = {"hidden": torch.rand(24), "layer.0.qk_dim": torch.rand(4, 6)}
    pruner = {"importance": {"num_updates": 7, "average": average}, "protected": torch.tensor([3], dtype=torch.int64)}
    return {"step": 0, "consumed_samples": 9, "kept": {"hidden": torch.arange(24)}, "pruner": pruner}


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    config = RunConfig()
    config.run.keep_checkpoints = 3
    return Checkpoints(tmp_path / "checkpoints", config.run, config.train.seed, {"config": {"steps": 15}})


@pytest.fixture
def three(checkpoints, trained, state) -> Checkpoints:
    """Checkpoints of steps 5, 10 and 15."""
    for step in (5, 10, 15):
        checkpoints.save(trained[0], step, state | {"step": step})
    return checkpoints


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


# -- what is in a checkpoint


def test_everything_comes_back_from_files_that_are_no_pickles(three, state, trained):
    found = three.load()
    assert found.folder.name == "step-000015" and same(found.state, state | {"step": 15})
    assert found.run["config"] == {"steps": 15} and found.run["versions"]["torch"] == torch.__version__
    names = sorted(path.name for path in found.folder.iterdir())
    assert names == [
        "manifest.json",
        "rank-00000.safetensors",
        "run.json",
        "run.safetensors",
        "state-00000-of-00001.safetensors",
    ]
    manifest = json.loads((found.folder / "manifest.json").read_text())
    assert manifest["format"] == 2 and sorted(manifest["files"]) == names[1:]
    for name, record in manifest["files"].items():
        content = (found.folder / name).read_bytes()
        assert record == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_shards_hold_masters_and_moments_under_their_names(three, trained):
    engine, _ = trained
    saved = load_file(three.load().folder / "state-00000-of-00001.safetensors")
    weights = master_weights(engine)
    assert {key.split("/")[0] for key in saved} == {"weight", "exp_avg", "exp_avg_sq"}
    for name, weight in weights.items():
        assert torch.equal(saved[f"weight/{name}/0"], weight.flatten())
        assert name.startswith("projections") or saved[f"exp_avg_sq/{name}/0"].shape == (weight.numel(),)
    assert saved[f"exp_avg_sq/{name}/0"].abs().max() > 0


def test_a_new_engine_goes_on_bitwise(three, trained, state):
    """Everything the next steps depend on: weights, moments, step counts, learning rates."""
    found = three.load()
    copies = [make_engine() for _ in range(2)]
    for engine, teacher in copies:
        three.restore(engine, found)
        assert engine.global_steps == NUM_STEPS and engine.get_lr() == trained[0].get_lr()
        train_step(engine, teacher, NUM_STEPS)
    reference, teacher = make_engine()
    for step in range(NUM_STEPS + 1):
        train_step(reference, teacher, step)
    for engine, _ in copies:
        assert same(master_weights(engine), master_weights(reference))
        assert engine_state(engine) == engine_state(reference)
    for engine in (reference, *(engine for engine, _ in copies)):
        engine.destroy()


def test_a_checkpoint_before_the_first_step_has_no_moments(checkpoints, state):
    engine, teacher = make_engine()
    checkpoints.save(engine, 0, state)
    found = checkpoints.load()
    with StateReader(found.folder, found.shards) as reader:
        assert reader.state_names == []
    before = master_weights(engine)
    train_step(engine, teacher, 0)
    after = master_weights(engine)
    engine.destroy()
    fresh, teacher = make_engine()
    checkpoints.restore(fresh, found)
    assert same(master_weights(fresh), before)
    train_step(fresh, teacher, 0)
    assert same(master_weights(fresh), after)
    fresh.destroy()


def test_a_checkpoint_of_another_model_is_refused(three):
    found = three.load()
    init_ranks()
    config = RunConfig()
    config.train.global_batch_size = config.train.micro_batch_size = 3
    student, _ = small_pair(hidden=0)  # without most projections
    resolved = resolve_engine_config({"zero_optimization": {"stage": 1}}, config.train, 1)
    engine = build_engine(student, config.train, config.optimizer, resolved).deepspeed
    with pytest.raises(UserError, match=r"holds 576 elements of projections.layer_0.weight, this model has 0"):
        three.restore(engine, found)
    engine.destroy()


def test_loss_scale_goes_on(trained):
    """fp16 needs a GPU to train; its scaler's books do not."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    engine, _ = trained
    fixed = engine.optimizer.loss_scaler
    try:
        make = {"init_scale": 2**16, "scale_window": 5, "min_scale": 1, "delayed_shift": 2}
        engine.optimizer.loss_scaler = scaler = DynamicLossScaler(**make, consecutive_hysteresis=False)
        for overflow in (False, True, True, False):
            scaler.update_scale(overflow)
        saved = json.loads(json.dumps(engine_state(engine)))
        engine.optimizer.loss_scaler = fresh = DynamicLossScaler(**make, consecutive_hysteresis=False)
        load_engine_state(engine, saved)
        assert vars(fresh) == vars(scaler) and fresh.cur_scale == 2**15 and fresh.last_overflow_iter == 2
        engine.optimizer.loss_scaler = fixed
        load_engine_state(engine, saved)  # gone on with in bf16: nothing to scale
        assert fixed.cur_scale == 1.0
    finally:
        engine.optimizer.loss_scaler = fixed


# -- damage


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE = {
    "truncated shard": (
        lambda f: _truncate(f / "state-00000-of-00001.safetensors"),
        r"state-.* has \d+ bytes, \d+ were written",
    ),
    "flipped byte": (lambda f: _flip_a_byte(f / "state-00000-of-00001.safetensors"), r"state-.* \(sha256 differs\)"),
    "flipped byte in run.json": (lambda f: _flip_a_byte(f / "run.json"), "run.json is not what was written"),
    "no shard": (lambda f: (f / "state-00000-of-00001.safetensors").unlink(), "state-00000-of-.* is missing"),
    "no rank file": (lambda f: (f / "rank-00000.safetensors").unlink(), "rank-00000.safetensors is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda f: os.truncate(f / "manifest.json", 50), "manifest.json is damaged"),
    "manifest of another kind": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "empty folder": (lambda f: [path.unlink() for path in f.iterdir()], "manifest.json is missing"),
    "no folder": (shutil.rmtree, "no such folder"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(three, capsys, name):
    damage, reason = DAMAGE[name]
    damage(three.folder / "step-000015")
    assert three.load().state["step"] == 10
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {three.folder / 'step-000015'} is passed over: ")
    assert re.search(reason, warning), warning


def test_none_left(three):
    for step in (5, 10, 15):
        _truncate(three.folder / f"step-{step:06d}" / "run.safetensors")
    with pytest.raises(UserError, match="no whole checkpoint.*step-000015: run.safetensors has .*step-000005: "):
        three.load()


def test_any_single_flipped_bit_is_noticed(three):
    """Wherever it is, manifest included: either found out, or without any effect on what is read."""
    generator, folder = random.Random(0), three.folder / "step-000015"
    whole = three.load()
    for _ in range(40):
        path = generator.choice(sorted(folder.iterdir()))
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        found = three.load()
        assert found.folder.name == "step-000010" or same(found.run, whole.run), path
        path.write_bytes(content)


def test_the_old_pickled_format_is_named(checkpoints, trained, state):
    checkpoints.save(trained[0], 5, state | {"step": 5})
    old = checkpoints.folder / "step-000010"
    (old / "engine").mkdir(parents=True)
    (old / "run.pt").write_bytes(b"pickle")
    (checkpoints.folder / "latest").write_text("step-000010\n")
    with pytest.raises(UserError, match="step-000010: checkpoint format 1"):
        checkpoints.load()


def test_a_later_format_is_not_guessed_at(three, capsys):
    manifest = three.folder / "step-000015" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 3}))
    assert three.load().state["step"] == 10
    assert "says format 3, this version reads 2" in capsys.readouterr().err


# -- which one


def test_candidates(three):
    names = ["step-000015", "step-000010", "step-000005"]
    latest = three.folder / "latest"
    assert candidates(three.folder) == names
    for nonsense in (b"\xff\xfe", b"", b"../../elsewhere", b"step-"):
        latest.write_bytes(nonsense)
        assert candidates(three.folder) == names
    latest.unlink()  # the first checkpoint was just published when the power went
    assert candidates(three.folder) == names
    latest.write_text("step-000010\n")  # gone back by hand
    assert candidates(three.folder) == ["step-000010", "step-000005", "step-000015"]
    assert three.load().state["step"] == 10


def test_latest_that_points_nowhere(three, capsys):
    (three.folder / "latest").write_text("step-000012\n")
    assert three.load().state["step"] == 10
    assert "step-000012 is passed over: no such folder" in capsys.readouterr().err


def test_nothing_there(checkpoints):
    assert checkpoints.load() is None
    (checkpoints.folder / ".step-000005.part").mkdir(parents=True)  # killed within its first checkpoint
    assert checkpoints.load() is None


# -- keeping


def test_the_newest_are_kept_and_what_killed_jobs_left_goes(three, trained, state):
    (three.folder / ".step-000020.part").mkdir()
    (three.folder / ".step-000020.part" / "state-00000-of-00001.safetensors").write_bytes(b"half")
    (three.folder / ".step-000003.old").mkdir()
    three.save(trained[0], 20, state | {"step": 20})
    names = sorted(path.name for path in three.folder.iterdir())
    assert names == ["latest", "step-000010", "step-000015", "step-000020"]


def test_going_back_replaces_what_was_newer_and_loses_nothing_before(three, trained, state):
    (three.folder / "latest").write_text("step-000005\n")
    three.save(trained[0], 10, state | {"step": 10, "consumed_samples": 1})
    assert sorted(path.name for path in three.folder.glob("step-*")) == ["step-000005", "step-000010", "step-000015"]
    found = three.load()
    assert found.state["step"] == 10 and found.state["consumed_samples"] == 1


def test_the_same_step_twice_is_written_once(three, trained, state):
    before = (three.folder / "step-000015" / "manifest.json").stat().st_mtime_ns
    three.save(trained[0], 15, state | {"step": 15})
    assert (three.folder / "step-000015" / "manifest.json").stat().st_mtime_ns == before


# -- writing fails


def test_a_folder_that_cannot_be_made(trained, state, tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="checkpoint: rank 0 cannot make .*File exists|Not a directory"):
        Checkpoints(tmp_path / "checkpoints", RunFolderConfig(), 0, {}).save(trained[0], 1, state)
    assert (tmp_path / "checkpoints").read_text() == "a file"


@pytest.mark.parametrize("is_async", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before(three, trained, state, is_async):
    three.run.async_checkpoints = is_async
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"rank 0 cannot write .*state-00000.*File too large; free disk space"):
            three.save(trained[0], 20, state | {"step": 20})
            three.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert three.load().state["step"] == 15
    assert not list(three.folder.glob(".step-*"))
