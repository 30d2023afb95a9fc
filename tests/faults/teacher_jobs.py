"""What test_teacher_shard.py runs on forked ranks: a teacher shared out over them, beside a whole one."""

from __future__ import annotations

import pytest
import torch
from support.small import small_batch, small_model

from homodistil.config.schema import TeacherConfig
from homodistil.distill.build_teacher import build_teacher
from homodistil.distill.teacher import Teacher
from homodistil.distill.teacher_sharding import num_parameters
from homodistil.engine.build import init_ranks
from homodistil.models.encoders.bert import BERT as bert


def compare_with_a_whole_teacher() -> None:
    device = init_ranks()
    for dtype in (torch.float32, torch.bfloat16):
        for lock_step in (True, False):
            _compare(device, dtype, lock_step)
    print("all is equal", flush=True)


def _compare(device: torch.device, dtype: torch.dtype, lock_step: bool) -> None:
    whole, parts = (
        build_teacher(small_model().to(dtype), TeacherConfig(shard=shard, lock_step=lock_step), device, dtype)
        for shard in (False, True)
    )
    assert num_parameters(parts.model) == num_parameters(whole.model) == sum(p.numel() for p in whole.parameters())
    _assert_shared_out(parts, dtype)
    batch = small_batch()
    for _ in range(2):
        found, expected = parts.run(batch), whole.run(batch)
        for name in ("layers", "queries", "keys"):
            assert all(map(torch.equal, getattr(found, name), getattr(expected, name))), name
        assert torch.equal(parts.predict(batch), whole.predict(batch))
        _assert_shared_out(parts, dtype)
    with pytest.raises(RuntimeError):  # (1, 7) does not go into its matrices
        bert.layers(parts.model)[1](torch.ones(1, 1, 7, dtype=dtype))
    _assert_shared_out(parts, dtype)
    assert torch.equal(parts.predict(batch), whole.predict(batch))


def _assert_shared_out(teacher: Teacher, dtype: torch.dtype) -> None:
    """Nothing whole is left of the layers; a rank's part of each tensor is a third, rounded up."""
    for layer in bert.layers(teacher.model):
        for p in layer.parameters():
            assert p.numel() == 0 and p.ds_tensor.numel() == -(-p.ds_numel // 3) and p.ds_tensor.dtype == dtype
    head = {p.numel() for p in bert.lm_head(teacher.model).parameters()}
    assert 0 not in head
