"""One rank of test_activation_importance.py: scores by activations of this rank's share of the batches.

    torchrun --nproc_per_node 2 worker_activation.py OUT

Writes its scores to OUT/RANK.safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support.small import small_batch, small_pair

from homodistil.data.batch import Batch
from homodistil.engine.build import init_ranks
from homodistil.pruning.activation_scores import activation_scores

LENGTHS = ((7, 11, 4), (16, 9, 2))


def steps_of(ranks: list[int]) -> list[list[Batch]]:
    """Two global batches, with a micro-batch of each of `ranks`."""
    return [[small_batch(10 * step + rank, LENGTHS[rank]) for rank in ranks] for step in range(2)]


def main(out: Path) -> None:
    torch.set_num_threads(1)
    init_ranks()
    rank = dist.get_rank()
    save_file(activation_scores(small_pair()[0], steps_of([rank])), out / f"{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
