"""One rank of test_zero3.py: the student outside of the training step, and books that resizing must not trust.

    torchrun --nproc_per_node 2 worker_zero3.py '["share", "nothing"]'

Prints `CASE {"name": ..., "message": ...}` for every alteration (null: accepted).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import deepspeed
import torch
import torch.distributed as dist
from support.small import random_keep, small_batch, small_pair

from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.engine.build import init_ranks
from homodistil.errors import UserError
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.resize import check_supported, master_weights, resize

WIDTHS = {"hidden": 17, "layer.0.ffn": 29, "layer.1.heads": 3, "layer.2.qk_dim": 5, "layer.2.vo_dim": 5}
LEAN = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
"""Nothing is fetched ahead or kept for later: whatever is gathered after a forward has not been released."""


def make_engine(student: Student, **zero):
    parameters = [p for p in student.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
    }
    return deepspeed.initialize(model=student, optimizer=torch.optim.AdamW(parameters, lr=1e-2), config=config)[0]


def check_student(**zero) -> None:
    """Predictions and distances equal those of a whole model, and neither they nor an event disturb the trace."""
    student, teacher = small_pair()
    plain, _ = small_pair()
    engine = make_engine(student, **zero)
    check_supported(engine)
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    for step in range(8):
        if step == 4:
            plan = make_plan(student.axis_table(), random_keep(student.axis_table(), WIDTHS))
            resize(engine, plan)
            student.after_resize(plan.keep)
            slice_module(plain, plan)
            plain.after_resize(plan.keep)
        train(engine, teacher, step)
        if step < 2:
            continue  # DeepSpeed records the order of modules in the first two steps
        assert coordinator.is_complete_trace()
        expect_like(plain, student, teacher, master_weights(engine), step)
        assert coordinator.is_complete_trace(), "evaluation threw away the order of modules"
        if zero:
            assert not any(p.ds_active_sub_modules for p in student.parameters())
            gathered = [name for name, p in student.named_parameters() if p.ds_status.name != "NOT_AVAILABLE"]
            assert not gathered, gathered
    # DeepSpeed would keep such a weight gathered from then on.
    assert not any(module._external_params for module in student.modules()), "a weight was read outside its own module"
    assert student.num_parameters() == plain.num_parameters() and student.widths == plain.widths


def train(engine, teacher: Teacher, step: int) -> None:
    batch = small_batch(seed=10 * step + dist.get_rank())
    engine.backward(engine(batch, teacher(batch)).total)
    engine.step()


def expect_like(plain: Student, student: Student, teacher: Teacher, weights: dict, step: int) -> None:
    plain.load_state_dict(weights, strict=False)
    batch = small_batch(seed=10 * step + 5)
    torch.testing.assert_close(student.predict(batch), plain.predict(batch), rtol=0, atol=1e-6)
    with torch.no_grad():
        found, expected = (one.compare(batch, teacher(batch), one.objective).terms for one in (student, plain))
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def alter(engine, name: str) -> Callable[[], None]:
    """Change one entry of the books, as an upgrade of DeepSpeed might. Returns what takes it back."""
    optimizer, param = engine.optimizer, engine.optimizer.fp16_groups[0][3]
    gradients = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
    frozen = engine.module.get_parameter("projections.layer_0.weight")
    flat = optimizer.grad_partitions_flat_buffer
    return {
        "share": lambda: _set(param.ds_tensor, "ds_numel", param.ds_tensor.ds_numel + 1),
        "aligned": lambda: _set(param, "ds_numel_aligned", param.ds_numel_aligned + 2),
        "view": lambda: _set(param.ds_tensor, "data", param.ds_tensor.data.clone()),
        "numel": lambda: _put(optimizer.fp16_partitioned_groups_flat_numel, 0, 1),
        "padding": lambda: _put(optimizer.groups_padding[0], 0, 7),
        "position": lambda: _put(optimizer.grad_position[optimizer.get_param_id(param)], 1, 3),
        "gradient": lambda: _put(gradients, param.ds_id, gradients[param.ds_id].clone()),
        "frozen": lambda: _set(frozen, "ds_numel", frozen.ds_numel + 1),
        "buffer": lambda: _set(optimizer, "grad_partitions_flat_buffer", flat[1:]),
        "nothing": lambda: lambda: None,
    }[name]()


def _set(thing: object, field: str, value: object) -> Callable[[], None]:
    known = getattr(thing, field)
    setattr(thing, field, value)
    return lambda: setattr(thing, field, known)


def _put(table: list | dict, key: int, value: object) -> Callable[[], None]:
    known = table[key]
    table[key] = value
    return lambda: table.__setitem__(key, known)


def report_altered(names: list[str]) -> None:
    """Altered on the last rank only: every rank has to refuse."""
    student = small_pair()[0]
    student.projections.requires_grad_(False)
    engine, last = make_engine(student), dist.get_rank() == dist.get_world_size() - 1
    for name in names:
        take_back = alter(engine, name) if last else None
        try:
            check_supported(engine)
            message = None
        except UserError as error:
            message = str(error)
        if last:
            take_back()
        else:
            print("CASE", json.dumps({"name": name, "message": message}), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    init_ranks()
    check_student()
    check_student(**LEAN)
    report_altered(json.loads(sys.argv[1]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
