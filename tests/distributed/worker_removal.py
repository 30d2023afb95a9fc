"""One rank of test_depth.py: removals that are refused before anything has changed.

    torchrun --nproc_per_node 2 worker_removal.py

Unknown names, ranks that disagree, and a group of the optimizer that would be left empty. Prints `REFUSED`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from distributed.worker_trajectory import Run

from homodistil.engine.build import init_ranks
from homodistil.errors import UserError
from homodistil.resize import check_removable, master_weights, remove_parameters


def check_refusals() -> None:
    run = Run({"stage": 3, "zero": {"sub_group_size": 2000}, "events": False})
    ours = {name for name in run.names if f"layer.{min(dist.get_rank(), 1)}." in name}
    before = master_weights(run.engine)
    for names, error, text in [
        ({"no.such"}, ValueError, "'no.such'"),
        (ours, RuntimeError, "another plan than rank 0"),
    ]:
        try:
            remove_parameters(run.engine, names, lambda: None)
        except error as refusal:
            assert text in str(refusal), refusal
        else:
            raise AssertionError(f"accepted, expected a refusal: {text}")
    assert all(torch.equal(tensor, before[key]) for key, tensor in master_weights(run.engine).items())
    check_removable(run.engine, [name for name in run.names if "layer.0.output" in name])
    try:
        check_removable(run.engine, [name for name in run.names if "encoder.layer" in name])
    except UserError as refusal:
        assert "zero_optimization.sub_group_size: group " in str(refusal) and "\n" not in str(refusal), refusal
    else:
        raise AssertionError("groups may be left empty")


def main() -> None:
    torch.set_num_threads(1)
    init_ranks()
    check_refusals()
    if dist.get_rank() == 0:
        print("REFUSED", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
