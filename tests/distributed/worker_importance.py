"""One rank of test_importance_sums.py: |weight * gradient| per row and column, from fragments and from one process.

    torchrun --nproc_per_node 2 worker_importance.py '[{"stage": 2}]'      (cases: see test_importance_sums.py)

Prints one line `CASE {json}` a case: the largest relative difference of any sum, and of any score of an axis that is
normalised per tensor, and how strongly clipping acted.
"""

from __future__ import annotations

import json
import sys

import deepspeed
import torch
import torch.distributed as dist
from support import reference, tiny_bert
from support.reference import ROWS
from torch import Tensor, nn

from homodistil.config.schema import PruningConfig
from homodistil.engine.build import init_ranks
from homodistil.models.axes import whole
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.resize_plan import make_plan
from homodistil.pruning.importance import Importance
from homodistil.resize import check_supported, gradient_fragments, master_weights, resize

ACCUMULATION, NUM_STEPS, EVENT_STEP = 2, 4, 2
KEEP = {
    "hidden": tiny_bert.pick(36, 29, 1),
    "layer.0.ffn": tiny_bert.pick(55, 41, 2),
    "layer.1.heads": tiny_bert.pick(4, 3, 3),
    "layer.1.qk_dim": tiny_bert.pick_per_head(4, 9, 7, 4),
    "layer.1.vo_dim": tiny_bert.pick_per_head(4, 9, 7, 5),
}


def make_engine(model: nn.Module, case: dict):
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": reference.CLIP,
        "bf16": {"enabled": case.get("bf16", False)},
        "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
        "zero_force_ds_cpu_optimizer": False,
        **case.get("config", {}),
    }
    make_optimizer = reference.make_fused if case.get("fused") else reference.make_optimizer
    optimizer = make_optimizer(tiny_bert.param_groups(model))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def sums_from_fragments(engine, shapes: dict[str, torch.Size]) -> dict[str, list[Tensor]]:
    """Per dimension of every trainable parameter: sum over the other one. One all-reduce each."""
    products = {name: torch.zeros(shape.numel()) for name, shape in shapes.items()}
    counts = {name: torch.zeros(shape.numel()) for name, shape in shapes.items()}
    for name, start, weight, gradient in gradient_fragments(engine):
        assert weight.dtype == gradient.dtype == torch.float32 and weight.shape == gradient.shape and weight.ndim == 1
        products[name][start : start + weight.numel()] += (weight * gradient).abs()
        counts[name][start : start + weight.numel()] += 1
    for name in shapes:
        dist.all_reduce(counts[name])
        assert (counts[name] == 1).all(), f"elements of {name} appear {counts[name].unique()} times"
        dist.all_reduce(products[name])
    return {name: sums(products[name].view(shape)) for name, shape in shapes.items()}


def sums(product: Tensor) -> list[Tensor]:
    return [product] if product.ndim == 1 else [product.sum(1), product.sum(0)]


def sums_in_one_process(model: nn.Module, weights: dict[str, Tensor], step: int) -> tuple[dict, float]:
    """The same sums from a plain model with these weights on the global batch, and the global gradient norm."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    model.zero_grad()
    for micro in range(ACCUMULATION):
        batch = tiny_bert.make_batch(step * ACCUMULATION + micro, ROWS * dist.get_world_size())
        reference.backward(model, batch, ACCUMULATION)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    norm = torch.stack([p.grad.norm() for p in trained.values()]).norm().item()
    return {name: sums((p.detach() * p.grad).abs()) for name, p in trained.items()}, norm


def normalised_scores(engine, model: nn.Module, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """Scores by axis, each parameter with its weight's or its own total over all ranks divided out."""
    table = bert.axis_table(model)
    config = PruningConfig(score_normalisation="per_tensor")
    return Importance(table, config, 0, torch.device("cpu")).measure(gradient_fragments(engine), table, shapes)


def naive_normalised_scores(model: nn.Module, sums: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """The same from whole sums, one use after another."""
    table = bert.axis_table(model)
    scores = {axis: torch.zeros(index.shape) for axis, index in whole(table.widths).items()}
    totals = {name: float(of_dims[0].sum()) for name, of_dims in sums.items()}
    for use in table.uses:
        if use.parameter not in sums:
            continue
        weight, bias = (f"{use.parameter.rpartition('.')[0]}.{kind}" for kind in ("weight", "bias"))
        part = sums[use.parameter][use.dim] / (totals.get(weight, 0) + totals.get(bias, 0))
        grid = part.view([table.widths[axis] for axis in use.axes])
        for axis in use.axes:
            scores[axis] += grid.sum(1) if axis.endswith(".heads") else grid
    return scores


def run_case(case: dict) -> dict:
    model, plain, rank = tiny_bert.make_model(), tiny_bert.make_model(), dist.get_rank()
    engine, worst, smallest_norm, worst_score = make_engine(model, case), 0.0, float("inf"), 0.0
    check_supported(engine)
    for step in range(NUM_STEPS):
        if step == EVENT_STEP:
            plan = make_plan(bert.axis_table(model), KEEP)
            resize(engine, plan)
            bert.refresh(model, plan.widths_after)
            reference.cut(plain, {p: p for p in plain.parameters()}, reference.make_optimizer([{"params": []}]), KEEP)
        expected, norm = sums_in_one_process(plain, master_weights(engine), step)
        for micro in range(ACCUMULATION):
            batch = tiny_bert.make_batch(step * ACCUMULATION + micro, ROWS * dist.get_world_size())
            loss = engine(**{k: v[rank * ROWS : (rank + 1) * ROWS] for k, v in batch.items()}).loss
            engine.backward(loss)
            if micro == ACCUMULATION - 1:
                # ds_shape: under ZeRO-3 a parameter is empty between uses.
                trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
                shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in trained.items()}
                found = sums_from_fragments(engine, shapes)
                scores = normalised_scores(engine, model, shapes)
            engine.step()
        assert found.keys() == expected.keys()
        for name in found:
            if case.get("bf16") and name.endswith("attention.self.key.bias"):
                continue  # the softmax ignores it: nothing but rounding
            for got, wanted in zip(found[name], expected[name], strict=True):
                # Biases start at exactly 0, and a key bias has no gradient but rounding: sums of 0, hence the floor.
                worst = max(worst, ((got - wanted).abs().max() / wanted.max().clamp_min(1e-8)).item())
        for axis, score in naive_normalised_scores(model, expected).items():
            worst_score = max(worst_score, ((scores[axis] - score).abs().max() / score.max()).item())
        smallest_norm = min(smallest_norm, norm)
    wrapper = type(engine.optimizer).__name__
    relative = {"relative": worst, "relative_normalised": worst_score}
    return {"wrapper": wrapper, "smallest_gradient_norm": smallest_norm, "clip": reference.CLIP} | relative


def main() -> None:
    torch.set_num_threads(1)
    init_ranks()
    for case in json.loads(sys.argv[1]):
        result = run_case(case)
        if dist.get_rank() == 0:
            print("CASE", json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
