"""What the resize benchmarks train: a BERT on random tokens, under every kind of engine that a user may have.

Small steps on purpose: the less a step costs, the harder an event is to hide behind it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from homodistil.engine.native_ops import load_op
from homodistil.models.axes import AxisTable, outer_axes


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    ffn: int
    heads: int
    vocabulary: int
    rows: int = 2
    """Sequences a rank and step."""
    tokens: int = 32


SIZES = {
    "standard": Size(layers=10, hidden=256, ffn=1024, heads=8, vocabulary=8000),
    "quick": Size(layers=4, hidden=128, ffn=512, heads=4, vocabulary=2000),
    "tiny": Size(layers=2, hidden=48, ffn=64, heads=2, vocabulary=101, tokens=16),
}

_BF16 = {"bf16": {"enabled": True}}
_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
# Nothing stays gathered between steps, and no buffer of 500 M elements (the default): memory is what partitions take.
_STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1_000_000}
ENGINES: dict[str, dict] = {
    "ZeRO-0 fp32": {"zero_optimization": {"stage": 0}},
    "ZeRO-0 bf16": _BF16 | {"zero_optimization": {"stage": 0}},
    "ZeRO-1 fp32": {"zero_optimization": {"stage": 1}},
    "ZeRO-1 bf16": _BF16 | {"zero_optimization": {"stage": 1}},
    "ZeRO-1 bf16, fp32 accumulation": _BF16
    | {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    "ZeRO-2 fp32": {"zero_optimization": {"stage": 2}},
    "ZeRO-2 bf16": _BF16 | {"zero_optimization": {"stage": 2}},
    "ZeRO-2 bf16, offload": _BF16 | {"zero_optimization": {"stage": 2, **_OFFLOAD}},
    "ZeRO-3 fp32": {"zero_optimization": _STAGE_3},
    "ZeRO-3 bf16": _BF16 | {"zero_optimization": _STAGE_3},
    "ZeRO-3 bf16, offload": _BF16 | {"zero_optimization": _STAGE_3 | _OFFLOAD},
}
"""Name -> what its ds_config says beside the batch."""


def stage_of(engine_name: str) -> int:
    return ENGINES[engine_name]["zero_optimization"]["stage"]


def refusal(engine_name: str) -> str | None:
    """Why this version of homodistil does not resize such an engine; None: it does."""
    from homodistil.errors import UserError
    from homodistil.resize import check_config

    try:
        check_config(ENGINES[engine_name])
    except UserError as error:
        return str(error)
    return None


def make_model(size: Size):
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(bert_config(size))


def bert_config(size: Size):
    from transformers import BertConfig

    return BertConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.ffn,
        vocab_size=size.vocabulary,
        max_position_embeddings=64,
        # No dropout: two engines that train on the same tokens stay bitwise equal.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def make_engine(engine_name: str, model, size: Size):
    import deepspeed

    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    config = ENGINES[engine_name] | {
        "train_micro_batch_size_per_gpu": size.rows,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
    }
    if "offload" in engine_name:
        load_op("CPUAdamBuilder")
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def train_step(engine, size: Size, step: int) -> float:
    """Milliseconds of one optimizer step on random tokens, the same for the same `step` and rank."""
    ids = random_ids(size, step).to(engine.device)
    synchronize(engine.device)
    start = time.perf_counter()
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    synchronize(engine.device)
    return (time.perf_counter() - start) * 1e3


def random_ids(size: Size, step: int) -> Tensor:
    """Tokens of this rank, shape (rows, tokens)."""
    import torch.distributed as dist

    generator = torch.Generator().manual_seed((step + 1) * dist.get_world_size() + dist.get_rank())
    return torch.randint(0, size.vocabulary, (size.rows, size.tokens), generator=generator)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def narrower(table: AxisTable, widths: dict[str, int], seed: int) -> dict[str, Tensor]:
    """A keep that leaves random entries of each named axis; heads choose their own dims."""
    generator, outer = torch.Generator().manual_seed(seed), outer_axes(table.widths)

    def pick(size: int, count: int) -> Tensor:
        return torch.randperm(size, generator=generator)[:count].sort().values

    keep = {}
    for axis, width in widths.items():
        size = table.widths[axis]
        if axis in outer:
            keep[axis] = torch.stack([pick(size, width) for _ in range(table.widths[outer[axis]])])
        else:
            keep[axis] = pick(size, width)
    return keep
