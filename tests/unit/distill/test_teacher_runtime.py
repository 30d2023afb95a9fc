"""Teacher runtimes: equal to the plain module, refused where they cannot be; and the self-check against real errors."""

from __future__ import annotations

import pytest
import torch
from support.small import small_batch, small_model
from torch import nn
from torch._dynamo.utils import counters

from homodistil.config.schema import RunConfig, TeacherConfig
from homodistil.distill.runtime import (
    SideStream,
    build_runtime,
    check_teacher_runtime,
    compiled,
    deepspeed_inference,
    self_check,
)
from homodistil.distill.runtime.deepspeed_inference import HiddenStates, InjectedRuntime
from homodistil.errors import UserError
from homodistil.models.attention import keeps_probabilities
from homodistil.models.encoders import bert

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # states are about 1: a few roundings of 2^-24, 2^-9
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def frozen(dtype=torch.float32, **changes) -> nn.Module:
    return small_model(**changes).to(dtype).eval().requires_grad_(False)


def runtime_of(name: str, dtype=torch.float32, device=CPU, **changes):
    config = TeacherConfig(runtime=name)
    return build_runtime(frozen(dtype, **changes).to(device), bert, config, device, dtype)


def assert_same(found, expected, valid, tolerance: float) -> None:
    """Valid rows only: what padding holds is nobody's business."""
    assert found.scale == expected.scale and len(found.layers) == len(expected.layers)
    for ours, theirs in zip([found.embedding, *found.layers], [expected.embedding, *expected.layers], strict=True):
        torch.testing.assert_close(ours[valid], theirs[valid], rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(found.queries + found.keys, expected.queries + expected.keys, strict=True):
        ours, theirs = ours.transpose(1, 2)[valid], theirs.transpose(1, 2)[valid]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_deepspeed_without_injection_is_the_plain_module(dtype):
    batch = small_batch()
    found = runtime_of("deepspeed", dtype)(batch.input_ids, batch.attention_mask)
    expected = runtime_of("torch", dtype)(batch.input_ids, batch.attention_mask)
    assert found.last.dtype == dtype and not found.last.requires_grad
    assert_same(found, expected, batch.attention_mask.bool(), 0.0)  # the same kernels


def test_compiled_is_the_plain_module_and_the_number_of_shapes_is_bounded(monkeypatch):
    monkeypatch.setattr(compiled, "MAX_SHAPES", 1)
    ours, plain = runtime_of("compile", num_hidden_layers=2), runtime_of("torch", num_hidden_layers=2)
    before = counters["stats"]["unique_graphs"]
    for seed, lengths in enumerate([(7, 11, 4), (11, 2, 9), (5, 3)]):
        batch = small_batch(seed, lengths)
        found = ours(batch.input_ids, batch.attention_mask)
        expected = plain(batch.input_ids, batch.attention_mask)
        assert_same(found, expected, batch.attention_mask.bool(), TOLERANCE[torch.float32])
        assert not any(t.requires_grad for t in [found.embedding, *found.layers, *found.queries, *found.keys])
        found.layers[0] = found.queries[0] = None  # whoever has used a tensor lets go of it: no later call may care
    assert counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_shape_is_compiled_once(dtype):
    ours, plain = runtime_of("compile", dtype), runtime_of("torch", dtype)
    before = counters["stats"]["unique_graphs"]
    for seed, lengths in enumerate([(7, 11), (5, 3, 3), (11, 2), (5, 5, 1)]):
        batch = small_batch(seed, lengths)
        expected = plain(batch.input_ids, batch.attention_mask)
        found = ours(batch.input_ids, batch.attention_mask)
        assert_same(found, expected, batch.attention_mask.bool(), TOLERANCE[dtype])
    assert counters["stats"]["unique_graphs"] == before + 2


# -- the self-check


class MaskBlind(nn.Module):
    """A layer that ignores its padding mask."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden, _attention_mask, *args, **kwargs):
        return self.layer(hidden, None, *args, **kwargs)


class Passing(MaskBlind):
    """Another class, the same numbers."""

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


class BooleanMaskAdded(MaskBlind):
    """What DeepSpeed's kernels do with SDPA's mask: True is added to a score as 1, False as 0."""

    def forward(self, hidden, attention_mask, *args, **kwargs):
        return self.layer(hidden, attention_mask.to(hidden.dtype), *args, **kwargs)


def with_first_layer(wrap) -> nn.Module:
    model = frozen()
    model.bert.encoder.layer[0] = wrap(model.bert.encoder.layer[0])
    return model


def with_relu() -> nn.Module:
    model = frozen()
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()
    return model


def with_nan() -> nn.Module:
    model = frozen()
    model.bert.encoder.layer[2].output.dense.bias[0] = torch.nan
    return model


def check(model: nn.Module) -> None:
    """Of `model` against the plain one."""
    probe = self_check.Probe.make(model.config, CPU)
    expected = HiddenStates(plain := frozen(), bert, plain.bert)(probe.input_ids, probe.attention_mask)
    self_check.check_same(HiddenStates(model, bert, model.bert), expected, probe, "teacher.kernel_inject")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: with_first_layer(MaskBlind), ["padding leaks", "layer 0"]),
        (lambda: with_first_layer(BooleanMaskAdded), ["padding leaks", "layer 0"]),
        (with_relu, ["differ", "layer 1"]),
        (with_nan, ["layer 2 by nan"]),
    ],
    ids=["mask ignored", "boolean mask added", "another activation", "not a number"],
)
def test_the_self_check_refuses_wrong_layers(make, words):
    with pytest.raises(UserError, match="^teacher.kernel_inject: .*teacher.kernel_inject=false") as refused:
        check(make())
    message = str(refused.value)
    assert all(word in message for word in words) and "\n" not in message
    assert ("padding leaks" in message) == ("padding leaks" in words)


def test_the_self_check_accepts_other_kernels():
    model = frozen()
    model.set_attn_implementation("eager")
    check(model)


@pytest.mark.parametrize("dtype", self_check.TOLERANCE)
def test_its_tolerance_covers_roundings_over_twelve_layers(dtype):
    """Another order of the same sums (attention's other way) stays below half of what is allowed."""
    plain, other = (frozen(dtype, num_hidden_layers=12, initializer_range=0.05) for _ in range(2))
    other.set_attn_implementation("sdpa" if keeps_probabilities("cpu", dtype) else "eager")
    probe = self_check.Probe.make(plain.config, CPU)
    found, expected = (HiddenStates(m, bert, m.bert)(probe.input_ids, probe.attention_mask) for m in (other, plain))
    valid = probe.attention_mask.bool()
    assert self_check.first_difference(found, expected, valid, self_check.TOLERANCE[dtype] / 2) is None
    assert not torch.equal(found[-1], expected[-1])  # it was indeed another order


def swap_layers(wrap):
    """Stands where DeepSpeed would put its kernels, which need a GPU."""

    def inject(model, _family, _device, _dtype):
        for i, layer in enumerate(model.bert.encoder.layer):
            model.bert.encoder.layer[i] = wrap(layer)
        return model.bert

    return inject


def test_injected_layers_show_hidden_states_only(monkeypatch):
    monkeypatch.setattr(deepspeed_inference, "inject_kernels", swap_layers(Passing))
    runtime, batch = InjectedRuntime(frozen(), bert, CPU, torch.float32), small_batch()
    found = runtime(batch.input_ids, batch.attention_mask)
    expected = runtime_of("torch")(batch.input_ids, batch.attention_mask)
    assert not runtime.shows_attention and runtime.scale == expected.scale
    assert found.queries == found.keys == [None] * 3
    for ours, theirs in zip([found.embedding, *found.layers], [expected.embedding, *expected.layers], strict=True):
        assert torch.equal(ours, theirs)


def test_injected_layers_that_leak_are_refused(monkeypatch):
    monkeypatch.setattr(deepspeed_inference, "inject_kernels", swap_layers(MaskBlind))
    with pytest.raises(UserError, match="padding leaks"):
        InjectedRuntime(frozen(), bert, CPU, torch.float32)


# -- refusals


@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed's kernels exist on a GPU")
def test_injection_on_the_cpu_is_one_clear_line():
    config = TeacherConfig(runtime="deepspeed", kernel_inject=True)
    with pytest.raises(UserError, match="^teacher.kernel_inject: .* on cpu .*teacher.kernel_inject=false$") as refused:
        build_runtime(frozen(), bert, config, CPU, torch.float32)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("teacher", "attention", "expected"),
    [
        ({"own_stream": True}, 1.0, "teacher.own_stream: .*GPU.* cpu"),
        ({"kernel_inject": True}, 0.0, "teacher.kernel_inject: .*teacher.runtime=deepspeed"),
        ({"runtime": "deepspeed", "kernel_inject": True}, 0.5, "teacher.kernel_inject: .*loss.attention=0.5"),
    ],
    ids=["own stream on the CPU", "injection without deepspeed", "injection with attention loss"],
)
def test_settings_that_cannot_work_are_refused(teacher, attention, expected):
    config = RunConfig(teacher=TeacherConfig(**teacher))
    config.loss.attention = attention
    with pytest.raises(UserError, match=expected):
        check_teacher_runtime(config, CPU)


def test_settings_that_can_work_are_not_refused():
    for teacher in ({}, {"runtime": "compile"}, {"runtime": "deepspeed"}):
        check_teacher_runtime(RunConfig(teacher=TeacherConfig(**teacher)), CPU)


def test_no_compiler_is_said_by_name(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="^teacher.runtime: .*'no-such-compiler' is not on the PATH"):
        check_teacher_runtime(RunConfig(teacher=TeacherConfig(runtime="compile")), CPU)


def test_a_stream_of_its_own_needs_a_gpu():
    with pytest.raises(UserError, match="teacher.own_stream"):
        SideStream(runtime_of("torch"), CPU)


# -- on a GPU


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["torch", "compile"])
def test_beside_other_work_on_the_gpu_the_numbers_are_the_same(name):
    """The current stream is kept busy and its memory in use while the teacher runs, as by a student's forward."""
    cuda = torch.device("cuda")
    runtime, plain = runtime_of(name, device=cuda), runtime_of("torch", device=cuda)
    stream = SideStream(runtime, cuda)
    noise = torch.randn(2048, 2048, device=cuda)
    for seed in range(20):
        batch = small_batch(seed).to(cuda)
        expected = plain(batch.input_ids, batch.attention_mask)
        pending = stream.start(batch.input_ids, batch.attention_mask)
        for _ in range(10):
            noise = (noise @ noise).tanh()
        assert_same(pending.result(), expected, batch.attention_mask.bool(), 1e-4)  # TF32 is off, kernels differ
