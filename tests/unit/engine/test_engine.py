"""DeepSpeed's JSON and the run config put together; rank variables; optimizer groups and schedule."""

import json
from pathlib import Path

import pytest
import torch
from support.small import small_pair

from homodistil.config.schema import OptimizerConfig, RunConfig, TrainConfig
from homodistil.engine.build import resolve_engine_config
from homodistil.engine.ds_config import student_dtype, teacher_dtype
from homodistil.engine.optimizer import build_optimizer, build_schedule, is_nvidia_apex, rewarm, set_width_share
from homodistil.errors import UserError

DTYPES = {"_fp32": torch.float32, "_fp16": torch.float16}
CONFIGS = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_are_filled_without_auto(path):
    if "fp16" in path.stem and not torch.cuda.is_available():
        with pytest.raises(UserError, match="fp16.enabled: true in the DeepSpeed JSON needs a GPU"):
            resolve_engine_config(json.loads(path.read_text()), RunConfig().train, num_ranks=2)
        return
    resolved = resolve_engine_config(json.loads(path.read_text()), RunConfig().train, num_ranks=2)
    assert "auto" not in json.dumps(resolved)
    assert resolved["zero_force_ds_cpu_optimizer"] is False  # torch's AdamW is welcome in host memory
    assert resolved["train_batch_size"] == 32 and resolved["gradient_accumulation_steps"] == 1
    expected = next((t for n, t in DTYPES.items() if path.stem.endswith(n)), torch.bfloat16)
    assert student_dtype(resolved) == expected


def test_accumulation_follows_from_batch_and_ranks():
    config = RunConfig()
    config.train.global_batch_size, config.train.micro_batch_size = 96, 8
    assert resolve_engine_config({}, config.train, num_ranks=4)["gradient_accumulation_steps"] == 3


def test_equal_values_in_both_places_are_fine_and_different_ones_name_both():
    assert resolve_engine_config({"gradient_clipping": 1.0}, RunConfig().train, 1)["gradient_clipping"] == 1.0
    with pytest.raises(UserError, match="gradient_clipping: the DeepSpeed JSON says 0.5, the run config says 1.0"):
        resolve_engine_config({"gradient_clipping": 0.5}, RunConfig().train, 1)


def test_auto_that_nobody_fills_is_named():
    with pytest.raises(UserError, match='zero_optimization.reduce_bucket_size: "auto"'):
        resolve_engine_config({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, RunConfig().train, 1)


def test_teacher_precision_follows_the_student_on_cpu():
    cpu = torch.device("cpu")
    assert teacher_dtype("auto", {"bf16": {"enabled": True}}, cpu) == torch.bfloat16
    assert teacher_dtype("auto", {}, cpu) == torch.float32
    assert teacher_dtype("float32", {"bf16": {"enabled": True}}, cpu) == torch.float32


def test_vectors_and_projections_do_not_decay():
    student, _ = small_pair()
    names = {id(p): name for name, p in student.named_parameters()}
    decay, rest = build_optimizer(student, TrainConfig(), OptimizerConfig(), {}).param_groups
    assert decay["weight_decay"] == 0.01 and rest["weight_decay"] == 0.0
    assert all(p.ndim == 2 for p in decay["params"])
    assert not any(names[id(p)].startswith("projections.") for p in decay["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(names)


def test_frozen_projections_are_not_trained():
    student, _ = small_pair(projection_learned=False)
    trained = {
        id(p)
        for group in build_optimizer(student, TrainConfig(), OptimizerConfig(), {}).param_groups
        for p in group["params"]
    }
    assert not any(id(p) in trained for p in student.projections.parameters())


def test_learning_rate_rises_and_falls_linearly():
    config = RunConfig()
    config.train.steps, config.train.warmup_fraction, config.train.lr = 20, 0.25, 1.0
    optimizer = build_optimizer(small_pair()[0], config.train, config.optimizer, {})
    schedule = build_schedule(optimizer, config.train)
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:6] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([1 - i / 15 for i in range(15)])


def test_learning_rate_stays_at_its_peak_until_the_decay():
    config = RunConfig()
    config.train.steps, config.train.warmup_fraction, config.train.lr, config.train.decay_fraction = 20, 0.25, 1.0, 0.2
    optimizer = build_optimizer(small_pair()[0], config.train, config.optimizer, {})
    expected = [0, 0.2, 0.4, 0.6, 0.8] + [1.0] * 12 + [0.75, 0.5, 0.25]
    assert _rates(build_schedule(optimizer, config.train), 20) == pytest.approx(expected)


def test_a_decay_as_long_as_the_run_begins_after_the_warm_up():
    config = RunConfig()
    config.train.steps, config.train.warmup_fraction, config.train.decay_fraction = 20, 0.5, 0.9
    optimizer = build_optimizer(small_pair()[0], config.train, config.optimizer, {})
    rates = _rates(build_schedule(optimizer, config.train), 20)
    assert max(rates) == rates[10] == config.train.lr


@pytest.mark.parametrize("stop_at", [3, 8, 9, 15])
def test_learning_rate_at_present_widths_and_after_a_resume(stop_at):
    """A fifth before the first event, then more: of what it would have been, also during the warm-up."""
    plain, whole, first, second = (_schedule(0) for _ in range(4))
    shares = {0: 0.2, 3: 0.6, 8: 1.0}
    expected = [rate * (0.2, 0.6, 1.0)[(step >= 3) + (step >= 8)] for step, rate in enumerate(_rates(plain, 20))]
    assert _rates(whole, 20, shares=shares) == pytest.approx(expected)
    rates = _rates(first, stop_at, shares=shares)
    if stop_at in shares:
        set_width_share(first, shares[stop_at])  # saved right after the event
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for group, saved in zip(second.optimizer.param_groups, first.optimizer.param_groups, strict=True):
        group["lr"] = saved["lr"]  # as resize/engine_state.py does
    later = {step: share for step, share in shares.items() if step > stop_at}
    assert rates + _rates(second, 20 - stop_at, done=stop_at, shares=later) == pytest.approx(expected)


def _rates(schedule, num_updates: int, events: tuple[int, ...] = (), done: int = 0, shares=None) -> list[float]:
    """Rate of every update; `events`: updates done when the student is resized; `shares`: of its new widths."""
    rates = []
    for step in range(done, done + num_updates):
        if step in (shares or {}):
            set_width_share(schedule, shares[step])
        if step in events:
            rewarm(schedule)
        rates.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    assert all(first == second for first, second in rates)
    return [first for first, _ in rates]


def _schedule(rewarm_steps: int):
    config = RunConfig()
    config.train.steps, config.train.warmup_fraction, config.train.lr = 20, 0.25, 1.0
    config.train.rewarm_steps = rewarm_steps
    return build_schedule(build_optimizer(small_pair()[0], config.train, config.optimizer, {}), config.train)


def test_learning_rate_climbs_back_after_an_event_to_where_it_would_have_been():
    plain = _rates(_schedule(0), 20, events=(8, 13))
    assert plain == pytest.approx([0, 0.2, 0.4, 0.6, 0.8] + [1 - i / 15 for i in range(15)])  # nothing falls
    found = _rates(_schedule(3), 20, events=(3, 8, 13, 15))
    shares = [1, 1, 1, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1 / 4, 2 / 4, 3 / 4, 1, 1, 1 / 4, 2 / 4, 1 / 4, 2 / 4, 3 / 4, 1, 1]
    assert found == pytest.approx([rate * share for rate, share in zip(plain, shares, strict=True)])


@pytest.mark.parametrize("stop_at", [8, 9, 12])
def test_learning_rate_goes_on_climbing_after_a_resume(stop_at):
    whole, first, second = (_schedule(4) for _ in range(3))
    expected = _rates(whole, 20, events=(8,))
    found = _rates(first, stop_at, events=(8,))
    if stop_at == 8:
        rewarm(first)  # saved right after the event
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for group, saved in zip(second.optimizer.param_groups, first.optimizer.param_groups, strict=True):
        group["lr"] = saved["lr"]  # as resize/engine_state.py does
    assert found + _rates(second, 20 - stop_at, done=stop_at) == pytest.approx(expected)
    assert expected[8] == pytest.approx((1 - 3 / 15) / 5)


def test_an_impostor_called_apex_is_not_taken_for_nvidias(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('imported an impostor')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_nvidia_apex()


@pytest.mark.parametrize(
    ("stage", "offload", "expected"),
    [
        pytest.param(0, False, "FusedAdam", marks=pytest.mark.full),  # an op that `make test` does not build
        (2, False, "DeepSpeedCPUAdam"),
        (2, True, "DeepSpeedCPUAdam"),
    ],
)
def test_deepspeeds_own_optimizer_follows_stage_and_offload(stage, offload, expected):
    if torch.cuda.is_available() and not offload:
        expected = "FusedAdam"
    config = RunConfig()
    config.optimizer.implementation = "deepspeed_fused"
    zero = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    optimizer = build_optimizer(small_pair()[0], config.train, config.optimizer, {"zero_optimization": zero})
    assert type(optimizer).__name__ == expected
