"""Teacher runtimes: equal to the plain module, and refused where they cannot be."""

from __future__ import annotations

import pytest
import torch
from support.small import small_batch, small_model
from torch import nn
from torch._dynamo.utils import counters

from homodistil.config.schema import TeacherConfig
from homodistil.distill.runtime import SideStream, build_runtime, check_teacher_runtime, compiled
from homodistil.errors import UserError
from homodistil.models.encoders.bert import BERT as bert

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
def test_deepspeed_is_the_plain_module(dtype):
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


# -- refusals


def test_a_stream_of_its_own_is_refused_on_the_cpu():
    with pytest.raises(UserError, match="teacher.own_stream: .*GPU.* cpu"):
        check_teacher_runtime(TeacherConfig(own_stream=True), CPU)


def test_settings_that_can_work_are_not_refused():
    for teacher in ({}, {"runtime": "compile"}, {"runtime": "deepspeed"}):
        check_teacher_runtime(TeacherConfig(**teacher), CPU)


def test_no_compiler_is_said_by_name(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="^teacher.runtime: .*'no-such-compiler' is not on the PATH"):
        check_teacher_runtime(TeacherConfig(runtime="compile"), CPU)


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
