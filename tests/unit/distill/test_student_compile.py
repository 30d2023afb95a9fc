"""The student's compiled layers: one code a width, the same numbers, gradients and taps, resize events noticed."""

from __future__ import annotations

import os
from dataclasses import dataclass

import deepspeed
import pytest
import torch
import torch._dynamo.config
import torch._inductor.config
from support import tiny_bert
from support.small import small_batch, small_model
from torch import Tensor, nn

from homodistil.config.schema import RunConfig
from homodistil.distill import torch_compile
from homodistil.distill.student_compile import CompiledLayers, check_student_compile
from homodistil.engine.build import init_ranks
from homodistil.errors import UserError
from homodistil.models.activations import ATTENTION, ActivationHooks, ActivationVisitor, LayerActivations
from homodistil.models.axes import widths_after
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.resize_plan import make_plan
from homodistil.resize import resize

pytestmark = pytest.mark.process

CPU = torch.device("cpu")
NUM_STEPS = 9


def alike(axes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same of every layer, as a width schedule has it."""
    return {f"layer.{i}.{axis}": index for i in range(tiny_bert.NUM_LAYERS) for axis, index in axes.items()}


DIMS = tiny_bert.pick_per_head(4, 9, 7, seed=3)
EVENTS = {
    2: alike({"ffn": tiny_bert.pick(55, 41, seed=1)}),
    4: {"hidden": tiny_bert.pick(36, 29, seed=2)},
    6: alike({"heads": tiny_bert.pick(4, 3, seed=4), "qk_dim": DIMS, "vo_dim": DIMS}),
}
"""Before which step what stays."""


class Seen(ActivationVisitor):
    """A loss over everything that the taps show, as distillation has."""

    def __init__(self) -> None:
        self.taps: list[LayerActivations] = []

    def layer(self, _i: int, tap: LayerActivations) -> None:
        self.taps.append(tap)

    def loss(self) -> Tensor:
        return torch.stack(
            [part.float().square().mean() for tap in self.taps for part in tap if part is not None]
        ).sum()


def loss_and_gradients(model: nn.Module, taps: ActivationHooks) -> tuple[Tensor, list[Tensor]]:
    batch, seen = small_batch(), Seen()
    taps.visit(batch.input_ids, batch.attention_mask, seen)
    parameters = list(model.bert.encoder.parameters())
    return seen.loss(), torch.autograd.grad(seen.loss(), parameters)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layers_share_one_code_and_give_the_same_loss_and_gradients(backend):
    plain, model = small_model(), small_model()
    expected_loss, expected = loss_and_gradients(plain, ActivationHooks(plain, bert))
    taps, compiled = ActivationHooks(model, bert), CompiledLayers(bert.layers(model), num_events=0, backend=backend)
    for _ in range(2):
        loss, gradients = loss_and_gradients(model, taps)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # fp32, sums in another order
    assert compiled.num_compilations() == 1


def test_passes_without_gradients_compile_nothing():
    model = small_model()
    taps, compiled = ActivationHooks(model, bert), CompiledLayers(bert.layers(model), num_events=0, backend="aot_eager")
    seen = Seen()
    for seed, lengths in enumerate([(7, 11), (5, 3, 3)]):
        batch = small_batch(seed, lengths)
        with torch.no_grad():
            taps.visit(batch.input_ids, batch.attention_mask, seen)
    assert compiled.num_compilations() == 0 and len(seen.taps) == 6


@dataclass
class Run:
    losses: list[float]
    weights: dict[str, Tensor]
    num_compilations: int | None


def train(engine_config: dict, backend: str | None) -> Run:
    """NUM_STEPS steps of a real engine with EVENTS; `backend` None: nothing is compiled."""
    init_ranks()
    model = tiny_bert.make_model()
    model.set_attn_implementation(ATTENTION)
    taps = ActivationHooks(model, bert)
    compiled = CompiledLayers(bert.layers(model), len(EVENTS), backend) if backend else None
    optimizer = torch.optim.AdamW(tiny_bert.param_groups(model), lr=1e-3, eps=1e-6)
    config = {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
    config |= {"zero_allow_untested_optimizer": True, **engine_config}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = [loss for step in range(NUM_STEPS) for loss in train_step(engine, taps, step)]
    weights = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    engine.destroy()
    return Run(losses, weights, compiled.num_compilations() if compiled else None)


def train_step(engine, taps: ActivationHooks, step: int) -> list[float]:
    if step in EVENTS:
        table = bert.axis_table(engine.module)
        resize(engine, make_plan(table, EVENTS[step]))
        bert.refresh(engine.module, widths_after(table.widths, EVENTS[step]))
    losses = []
    for micro in range(2):
        with taps.shown_to(seen := Seen()):
            loss = engine(**tiny_bert.make_batch(2 * step + micro, 3)).loss + seen.loss()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def assert_same_trajectory(engine_config: dict, backend: str, tolerance: float) -> None:
    expected, found = train(engine_config, None), train(engine_config, backend)
    assert found.weights["bert.encoder.layer.1.attention.self.query.weight"].shape == (21, 29)
    assert found.num_compilations == len(EVENTS) + 1
    torch.testing.assert_close(found.losses, expected.losses, rtol=tolerance, atol=0)
    for name, weight in found.weights.items():
        torch.testing.assert_close(weight, expected.weights[name], rtol=0, atol=tolerance)


def test_three_events_in_a_live_engine_are_three_more_compilations_and_the_same_trajectory():
    """dynamo, its guards and AOT autograd, without inductor's kernels: eager's own, so only sums' order may differ."""
    assert_same_trajectory({}, "aot_eager", 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_with_inductor_at_every_stage(stage):
    assert_same_trajectory({"zero_optimization": {"stage": stage}}, "inductor", 1e-5)


@pytest.mark.full
def test_with_inductor_in_bf16():
    # Losses to 2 of bf16's 3 digits; weights: one rounding of a weight of about 0.1, and Adam's first steps of lr.
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    assert_same_trajectory(config, "inductor", 2e-2)


def compiled_config() -> RunConfig:
    config = RunConfig()
    config.student.compile = True
    return config


def test_parameters_that_come_and_go_are_refused():
    with pytest.raises(UserError, match="^student.compile: .*stage 3"):
        check_student_compile(compiled_config().student, 3, CPU)
    check_student_compile(RunConfig().student, 3, CPU)
    check_student_compile(compiled_config().student, 2, CPU)


def test_no_compiler_is_said_by_name(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="^student.compile: .*'no-such-compiler'"):
        check_student_compile(compiled_config().student, 0, CPU)


def test_ranks_of_a_machine_share_its_cores_when_they_compile(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(12)))
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    with (
        torch._inductor.config.patch({"compile_threads": 5, "cpp.threads": -1}),
        torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256),
    ):
        for ranks, expected in ((1, torch_compile.MAX_COMPILE_THREADS), (4, 3), (24, 1)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
            torch_compile.prepare(10)
            assert torch._inductor.config.compile_threads == expected
        assert torch._dynamo.config.recompile_limit == 8 + 3 * 10
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "7")  # read by torch itself at its start: not overruled
        torch._inductor.config.compile_threads = 7
        torch_compile.prepare(1)
        assert torch._inductor.config.compile_threads == 7
