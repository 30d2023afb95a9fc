"""One rank of test_resize_maps_engine.py: DeepSpeed training with events that contract, reset and rewrite.

    torchrun --nproc_per_node 2 worker_maps.py '[{"stage": 2}]'

At every event all weights, masters and moments are held against float64 (mapped.py); at the end the whole trajectory
is. Prints one line `CASE {json}` a case.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from support import mapped, reference
from support.mapped import Event
from torch import Tensor
from worker_trajectory import NUM_STEPS, Run, distances

from homodistil.engine.build import init_ranks
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.resize_plan import make_plan
from homodistil.resize import check_supported, master_weights, reset_moments, resize, write_weights

RELATIVE = 1e-5
"""fp32 roundings of sums over 36 products, against the largest element."""
BF16 = 2**-8
"""Rounding to bf16."""


class MappedRun(Run):
    def __init__(self, case: dict):
        super().__init__(case | {"events": False})
        self.events = mapped.events()

    def change(self, event: Event) -> dict[str, Tensor]:
        plan = make_plan(bert.axis_table(self.model), event.keep, event.maps)
        cuts, before, objects = mapped.cuts_of(event, self.model), self.everything(), self.what_stays()[:2]
        if event.resets_moments:
            reset_moments(self.engine)
        resize(self.engine, plan)
        bert.refresh(self.model, plan.widths_after)
        if event.maps:
            weights = master_weights(self.engine)
            write_weights(self.engine, {name: mapped.refitted(weights[name]) for name in mapped.REWRITTEN})
        assert self.what_stays()[:2] == objects, "an object was replaced"
        self.check_values(event, cuts, before)
        self.check_padding()
        check_supported(self.engine)
        return master_weights(self.engine)

    def check_values(self, event: Event, cuts: dict, before: dict) -> None:
        found, parameters = self.everything(), dict(self.model.named_parameters())
        assert found.keys() == before.keys()
        for (kind, name), tensor in before.items():
            own = parameters[name].dtype
            if kind == "weight":
                assert torch.equal(found[kind, name], found["master", name].to(own)), name
                continue
            expected = mapped.after(event, cuts, name, tensor, "weight" if kind == "master" else kind)
            # A frozen parameter is its own master: rounded by the maps, and once more by the refit.
            is_rounded = not parameters[name].requires_grad and own == torch.bfloat16
            off = (found[kind, name].double() - expected).abs().max()
            assert off <= (2 * BF16 if is_rounded else RELATIVE) * expected.abs().max(), (kind, name, float(off))


def main() -> None:
    torch.set_num_threads(1)
    init_ranks()
    expected: reference.Trajectory | None = None
    for case in json.loads(sys.argv[1]):
        run = MappedRun(case)
        losses = run.train()
        found = {"loss": losses[-1]}
        if not case.get("bf16"):
            expected = expected or mapped.train(NUM_STEPS, dist.get_world_size())
            found = distances(run, losses, expected)
        if dist.get_rank() == 0:
            print("CASE", json.dumps(case | {"wrapper": type(run.engine.optimizer).__name__} | found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
