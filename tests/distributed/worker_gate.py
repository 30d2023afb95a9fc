"""One of two ranks of test_resize_gate.py: rank 1 comes out of a resize event spoilt, in one way after the other.

    torchrun --nproc_per_node 2 worker_gate.py

Prints `CASE {"name": ..., "messages": [of rank 0, of rank 1]}`; null: the gate let it pass.
"""

from __future__ import annotations

import json

import deepspeed
import torch
import torch.distributed as dist
from support import reference, tiny_bert
from support.reference import ROWS

from homodistil.engine.build import init_ranks
from homodistil.errors import CheckFailed
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.resize_plan import make_plan
from homodistil.resize import check_supported, resize
from homodistil.resize.adapters.zero import ZeroAdapter


def spoil_nothing(_optimizer) -> None: ...


def spoil_moment(optimizer) -> None:
    optimizer.optimizer.state[optimizer.single_partition_of_fp32_groups[1]]["exp_avg_sq"][3] = float("inf")


def spoil_weight(optimizer) -> None:
    """In the masters and in what the model computes with, as a real error would."""
    optimizer.single_partition_of_fp32_groups[0].data[7] = float("nan")
    optimizer.parallel_partitioned_bit16_groups[0][dist.get_rank()][7] = float("nan")


def spoil_padding(optimizer) -> None:
    """The last partition of the small group ends in padding."""
    optimizer.optimizer.state[optimizer.single_partition_of_fp32_groups[2]]["exp_avg"][-1] = 1e-3


def spoil_shape(optimizer) -> None:
    param = optimizer.bit16_groups[1][0]
    param.data = param.data[:-1]


def spoil_cast(optimizer) -> None:
    optimizer.single_partition_of_fp32_groups[0].data[5] += 1


SPOILERS = [spoil_nothing, spoil_moment, spoil_weight, spoil_padding, spoil_shape, spoil_cast]


def make_engine():
    model = tiny_bert.make_model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=reference.make_optimizer(tiny_bert.param_groups(model)),
        config={"train_micro_batch_size_per_gpu": ROWS, "zero_optimization": {"stage": 2}},
    )
    check_supported(engine)
    return engine


def message_of(spoil) -> str | None:
    engine, rebuild = make_engine(), ZeroAdapter.rebuild_maps
    engine.backward(engine(**tiny_bert.make_batch(dist.get_rank(), ROWS)).loss)
    engine.step()

    def rebuild_and_spoil(adapter) -> None:
        rebuild(adapter)
        if dist.get_rank() == 1:
            spoil(adapter.optimizer)

    ZeroAdapter.rebuild_maps = rebuild_and_spoil
    try:
        resize(engine, make_plan(bert.axis_table(engine.module), {"hidden": tiny_bert.pick(36, 29, 2)}))
    except CheckFailed as error:
        return str(error)
    finally:
        ZeroAdapter.rebuild_maps = rebuild
    return None


def main() -> None:
    torch.set_num_threads(1)
    init_ranks()
    for spoil in SPOILERS:
        messages: list[str | None] = [None, None]
        dist.all_gather_object(messages, message_of(spoil))
        if dist.get_rank() == 0:
            print("CASE", json.dumps({"name": spoil.__name__, "messages": messages}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
