"""Builds real engines that resizing must refuse, one rank. Prints `CASE {"name": ..., "message": ...}` for each.

    torchrun --nproc_per_node 1 worker_refusals.py

Message null: the engine was accepted.
"""

from __future__ import annotations

import json
import warnings

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from support import reference, tiny_bert

from homodistil.engine.build import init_ranks
from homodistil.errors import UserError
from homodistil.resize import check_supported

BF16 = {"bf16": {"enabled": True}}
CONFIGS = {
    "supported": {"zero_optimization": {"stage": 2}},
    "bf16 accumulation": {"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}},
    "autocast": {"zero_optimization": {"stage": 2}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "unmanaged": {"zero_optimization": {"stage": 2}, "managed_gradient_accumulation": False},
}


def make_engine(config: dict):
    model = tiny_bert.make_model()
    optimizer = reference.make_optimizer(tiny_bert.param_groups(model))
    config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, **config}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


class OtherBooks(DeepSpeedZeroOptimizer):
    """A wrapper that DeepSpeed might derive from the known one."""


def tampered() -> dict[str, object]:
    """Engines that are right except for one thing, as after an upgrade of DeepSpeed."""
    engines = {
        name: make_engine(CONFIGS["supported"])
        for name in ("class", "field", "type", "layout", "view", "values", "alignment")
    }
    engines["class"].optimizer.__class__ = OtherBooks
    del engines["field"].optimizer.round_robin_bit16_offsets
    engines["type"].optimizer.partition_size = tuple(engines["type"].optimizer.partition_size)
    engines["layout"].optimizer.round_robin_bit16_offsets[0][1] += 1
    param = engines["view"].optimizer.bit16_groups[0][3]
    param.data = param.data.clone()
    engines["alignment"].optimizer.nccl_start_alignment_factor = 7  # sizes predicted with it differ from the real ones
    with torch.no_grad():
        engines["values"].optimizer.bit16_groups[0][3].mul_(2)
    return engines


def report_other_deepspeed() -> None:
    """A DeepSpeed whose methods changed: nothing is wrong with the engine until a resize uses them."""
    known, known_mapping = (
        DeepSpeedZeroOptimizer._update_model_bit16_weights,
        DeepSpeedZeroOptimizer._create_param_mapping,
    )
    engine = make_engine(CONFIGS["supported"])
    del DeepSpeedZeroOptimizer._create_param_mapping
    report("method", engine)
    DeepSpeedZeroOptimizer._create_param_mapping = known_mapping

    def shifted(self, group: int) -> None:
        known(self, group)
        self.bit16_groups[group][0].data = self.bit16_groups_flat[group][1:][: self.bit16_groups[group][0].numel()]

    engine = make_engine(CONFIGS["supported"])
    DeepSpeedZeroOptimizer._update_model_bit16_weights = shifted
    report("meaning", engine)
    DeepSpeedZeroOptimizer._update_model_bit16_weights = known


def report(name: str, engine) -> None:
    try:
        check_supported(engine)
        message = None
    except UserError as error:
        message = str(error)
    print("CASE", json.dumps({"name": name, "message": message}), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    init_ranks()
    for name, config in CONFIGS.items():
        report(name, make_engine(config))
    for name, engine in tampered().items():
        report(name, engine)
    report_other_deepspeed()
    engine = make_engine(CONFIGS["supported"])
    deepspeed.__version__ = "0.20.1"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report("untested version", engine)
    said = [str(warning.message) for warning in caught if "self-check" in str(warning.message)]
    print("CASE", json.dumps({"name": "warning of the untested version", "message": "".join(said)}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
