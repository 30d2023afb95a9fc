"""One rank of test_live_resize.py: live events (a layer leaves, widths fall twice), a checkpoint behind them, and the
same run resumed, per family.

    torchrun --nproc_per_node 2 worker_live.py '[["bert", 2], ["llama", 3]]'

Prints `CASE {"model_type": ..., "stage": ..., "events": ..., "widths": ...}` for every pair of model type and ZeRO
stage that passed.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from families.cases import VOCABULARY, batch_of, make_config, make_model
from support.small import random_keep

from homodistil.checkpoint import Checkpoints
from homodistil.config.schema import LossConfig, RunConfig, RunFolderConfig
from homodistil.data.batch import Batch
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.distributed import ranks
from homodistil.engine.build import build_engine, init_ranks, resolve_engine_config
from homodistil.export.stock_model import stock_model
from homodistil.models.axes import Keep, kind_of
from homodistil.models.resize_plan import make_plan, select, slice_module
from homodistil.resize import check_supported, master_weights, owned_state, remove_parameters, resize

ROWS, TOKENS, LAYERS = 2, 11, 3


def make_engine(student: Student, stage: int):
    config = RunConfig()
    config.train.steps, config.train.global_batch_size, config.train.micro_batch_size = 10, 2 * ROWS, ROWS
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    resolved = resolve_engine_config({"zero_optimization": zero}, config.train, dist.get_world_size())
    engine = build_engine(student, config.train, config.optimizer, resolved).deepspeed
    check_supported(engine)
    return engine


def batch_of_step(step: int) -> Batch:
    """Another one on every rank."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    return batch_of(torch.randint(5, VOCABULARY, (ROWS, TOKENS), generator=generator))


def train_step(engine, teacher: Teacher, step: int) -> float:
    batch = batch_of_step(step)
    total = engine(batch, teacher(batch)).total
    engine.backward(total)
    engine.step()
    return total.item()


def full_state(engine) -> dict[tuple[str, str], torch.Tensor]:
    """(weight or name of a moment, parameter) -> all its elements, of all ranks."""
    pieces: list = [None] * dist.get_world_size()
    mine = [(p.name, p.start, {"weight": p.weight, **p.states}) for p in owned_state(engine)]
    dist.all_gather_object(pieces, mine)
    flat: dict[tuple[str, str], list] = {}
    for name, start, tensors in (piece for of_rank in pieces for piece in of_rank):
        for kind, tensor in tensors.items():
            flat.setdefault((kind, name), []).append((start, tensor.clone()))
    return {key: torch.cat([part for _, part in sorted(parts, key=lambda p: p[0])]) for key, parts in flat.items()}


def event(engine, student: Student, seed: int) -> Keep:
    """Two thirds of every axis stay, on the live engine. What survives is bitwise what it was."""
    table = student.axis_table()
    fixed = ("qk_dim", "vo_dim", "head_norm") if student.family.architecture.has_rotary_positions else ()
    widths = {a: max(1, 2 * w // 3) for a, w in table.widths.items() if kind_of(a) not in fixed and w > 1}
    plan = make_plan(table, random_keep(table, widths, seed))
    shapes, before = _shapes(student), full_state(engine)
    resize(engine, plan)
    student.after_resize(plan.keep)
    after = full_state(engine)
    assert before.keys() == after.keys() and len(before) == 3 * len(shapes)
    for (kind, name), flat in before.items():
        expected = select(flat.view(shapes[name]), plan.index.get(name, {}))
        assert torch.equal(expected.flatten(), after[kind, name]), (kind, name)
    return plan.keep


def removal(engine, student: Student, kept: list[int]) -> list[int]:
    """Only the layers `kept` stay. What survives is bitwise what it was, under its new name."""
    name_of, before = {p: name for name, p in student.named_parameters()}, full_state(engine)
    names = student.layer_parameters(set(range(student.num_layers)) - set(kept))
    remove_parameters(engine, names, lambda: student.keep_layers(kept))
    after = full_state(engine)
    now = {name_of[p]: name for name, p in student.named_parameters()}
    assert now.keys() == set(name_of.values()) - names
    assert after.keys() == {(kind, now[name]) for kind, name in before if name in now}
    assert all(torch.equal(flat, after[kind, now[name]]) for (kind, name), flat in before.items() if name in now)
    return kept


def _shapes(student: Student) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in student.named_parameters()}


def resumed(model_type: str, stage: int, kept: list[int], keeps: list[Keep], checkpoints: Checkpoints):
    """A new engine in the state of the newest checkpoint, its student cut as a resumed run cuts it."""
    student = Student(make_model(model_type, layers=LAYERS), LossConfig(kl=1.0))
    student.keep_layers(kept)
    for keep in keeps:
        plan = make_plan(student.axis_table(), keep)
        slice_module(student, plan)
        student.after_resize(plan.keep)
    engine = make_engine(student, stage)
    checkpoints.restore(engine, checkpoints.load())
    return engine


def check_export(engine, student: Student, model_type: str) -> None:
    """The stock class, of fewer layers and narrower, computes what the student does."""
    batch, family, weights = batch_of_step(0), student.family, master_weights(engine)
    hidden_size = student.widths["hidden"]
    if family.stock_head_dim(student.widths) is None:
        return  # no stock class for widths on the way
    stock = stock_model(weights, student, make_config(model_type, LAYERS))
    assert (stock.config.num_hidden_layers, stock.config.hidden_size) == (2, hidden_size)
    with torch.no_grad():
        logits = stock(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.target_index]
    torch.testing.assert_close(student.predict(batch), logits, rtol=1e-3, atol=1e-3)


def check(model_type: str, stage: int, folder: Path) -> None:
    teacher = Teacher(make_model(model_type, layers=LAYERS))
    student = Student(make_model(model_type, layers=LAYERS), LossConfig(kl=1.0))
    engine, keeps = make_engine(student, stage), []
    for step in range(2):
        train_step(engine, teacher, 2 * step)
        if step == 0:
            kept = removal(engine, student, [0, 2])
        keeps.append(event(engine, student, seed=step))
        train_step(engine, teacher, 2 * step + 1)
    check_export(engine, student, model_type)
    checkpoints = Checkpoints(folder, RunFolderConfig(async_checkpoints=False), 0, {})
    checkpoints.save(engine, 4, {"step": 4})
    expected = [train_step(engine, teacher, step) for step in (4, 5)], full_state(engine)
    engine.destroy()
    again = resumed(model_type, stage, kept, keeps, checkpoints)
    assert [train_step(again, teacher, step) for step in (4, 5)] == expected[0]
    state = full_state(again)
    assert state.keys() == expected[1].keys() and all(torch.equal(state[key], expected[1][key]) for key in state)
    again.destroy()
    if dist.get_rank() == 0:
        case = {"model_type": model_type, "stage": stage, "events": len(keeps), "widths": student.widths}
        print("CASE", json.dumps(case), flush=True)


def main(cases: list[tuple[str, int]]) -> None:
    torch.set_num_threads(1)
    init_ranks()
    for model_type, stage in cases:
        folder = Path(ranks.on_rank_zero(functools.partial(tempfile.mkdtemp, prefix="families-")))
        check(model_type, stage, folder)
        dist.barrier()
        ranks.on_rank_zero(functools.partial(shutil.rmtree, folder))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
