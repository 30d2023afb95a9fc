"""One rank of test_micro_batch_growth.py: real engines and real runs whose micro-batch grows, next to ones that stay.

    torchrun --nproc_per_node 2 worker_micro_batch.py '[{"stage": 2}]' folder

Prints one line `CASE {json}` for each engine; leaves the run folders `grown`, `resumed` and `steady` in `folder`,
which has a teacher and text.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from support import reference, tiny_bert

from homodistil.config.schema import RunConfig
from homodistil.distributed import ranks
from homodistil.engine.batch_size import set_micro_batch_size
from homodistil.engine.build import init_ranks, resolve_engine_config
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.memory import state_bytes
from homodistil.models.resize_plan import make_plan
from homodistil.resize import check_supported, master_weights, resize
from homodistil.training.inputs import prepare_inputs
from homodistil.training.micro_batch import state_layout
from homodistil.training.run import DistillationRun

NUM_STEPS, MICRO_BATCH, ACCUMULATION = 6, 1, 4
GROWTH = {2: 2, 5: 4}
"""Step -> micro-batch from there on; both are steps with a resize."""
RUN_STEPS, SAVE_EVERY = 7, 5


class Run:
    """An engine trained over whole global batches, its micro-batch growing at `growth`."""

    def __init__(self, case: dict, growth: dict[int, int]):
        self.growth, self.model = growth, tiny_bert.make_model()
        self.config = {
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "gradient_clipping": reference.CLIP,
            "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
            "zero_force_ds_cpu_optimizer": False,
            "zero_allow_untested_optimizer": True,
            **case.get("engine", {}),
        }
        self.engine, *_ = deepspeed.initialize(
            model=self.model, optimizer=reference.make_optimizer(tiny_bert.param_groups(self.model)), config=self.config
        )
        check_supported(self.engine)
        self.global_batch_size = MICRO_BATCH * ACCUMULATION * dist.get_world_size()

    def train(self) -> list[float]:
        losses, events = [], tiny_bert.events()
        for step in range(NUM_STEPS):
            if step in events:
                plan = make_plan(bert.axis_table(self.model), events[step])
                resize(self.engine, plan)
                bert.refresh(self.model, plan.widths_after)
            if step in self.growth:
                set_micro_batch_size(self.engine, self.growth[step])
            losses.append(self.step(tiny_bert.make_batch(step, self.global_batch_size)))
        return losses

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        size, before = self.engine.train_micro_batch_size_per_gpu(), self.engine.global_steps
        total = torch.zeros(1)
        for micro in range(self.engine.gradient_accumulation_steps()):
            start = (micro * dist.get_world_size() + dist.get_rank()) * size  # as data/loader.py shares samples out
            loss = self.engine(**{k: rows[start : start + size] for k, rows in batch.items()}).loss
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach().float() / self.engine.gradient_accumulation_steps()
        assert self.engine.global_steps == before + 1, "a global batch is one step"
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()

    def held_bytes(self) -> int:
        """Weights, masters and moments on this rank, each storage once."""
        optimizer = self.engine.basic_optimizer
        tensors = [p.data for p in self.model.parameters()]
        tensors += [p.data for group in optimizer.param_groups for p in group["params"]]
        tensors += [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        tensors += [p.ds_tensor for p in self.model.parameters() if hasattr(p, "ds_tensor")]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def predicted_bytes(self) -> float:
        """The same by the formula, which counts gradients as well."""
        layout = state_layout(self.config, dist.get_world_size())
        sizes = {True: 0, False: 0}
        for p in self.model.parameters():
            sizes[p.requires_grad] += getattr(p, "ds_numel", p.numel())
        share = dist.get_world_size() if layout.stage >= 2 else 1
        gradients = layout.accumulation_dtype.itemsize * sizes[True] / share
        return state_bytes(sizes[True], sizes[False], layout) - gradients


def compare(case: dict) -> dict:
    """Largest differences between growing and not, relative memory errors before and after all events."""
    grown, steady = Run(case, GROWTH), Run(case, {})
    found = {"loss": max(abs(a - b) for a, b in zip(grown.train(), steady.train(), strict=True))}
    assert grown.engine.gradient_accumulation_steps() == 1 and steady.engine.gradient_accumulation_steps() == 4
    weights, others = master_weights(grown.engine), master_weights(steady.engine)
    off = [(weights[name] - others[name]).abs() for name in weights]
    found["weight"] = max(d.max().item() for d in off)
    found["weight_mean"] = sum(d.sum().item() for d in off) / sum(d.numel() for d in off)
    found["held_bytes"], found["predicted_bytes"] = grown.held_bytes(), grown.predicted_bytes()
    return found


def check_refusals() -> None:
    """A wrong moment and sizes that do not divide are refused, and nothing has changed."""
    run = Run({"stage": 2}, {})
    numbers = run.engine.train_micro_batch_size_per_gpu(), run.engine.gradient_accumulation_steps()
    for size, text in ((3, "does not divide 8"), (8, "does not divide 8")):
        expect_refusal(run, size, ValueError, text)
    run.engine.backward(run.engine(**tiny_bert.make_batch(dist.get_rank(), 1)).loss)
    run.engine.step()
    expect_refusal(run, 2, RuntimeError, "gradients wait for a step")
    assert numbers == (run.engine.train_micro_batch_size_per_gpu(), run.engine.gradient_accumulation_steps())
    assert run.engine.train_batch_size() == run.global_batch_size


def expect_refusal(run: Run, size: int, kind: type[Exception], text: str) -> None:
    try:
        set_micro_batch_size(run.engine, size)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"accepted, expected a refusal: {text}")


def distil(folder: Path, grow: bool, workers: int = 0) -> None:
    """A whole run of the product; goes on from a checkpoint found in `folder`. Teacher and text are beside it."""
    config, materials = RunConfig(), folder.parent
    config.teacher.name, config.data.sources = str(materials / "teacher"), [str(materials / "text")]
    config.data.cache_dir, config.data.seq_len, config.data.heldout_fraction = str(materials / "cache"), 16, 0.2
    config.data.workers = workers
    config.student.hidden_size, config.student.intermediate_size, config.student.num_attention_heads = 16, 20, 2
    config.pruning.ffn_multiple = 1
    config.train.steps, config.train.save_every_steps, config.train.log_every_steps = RUN_STEPS, SAVE_EVERY, 1
    config.train.global_batch_size, config.train.micro_batch_size, config.train.eval_batch_size = 16, 1, 256
    config.train.lr, config.pruning.interval_steps, config.pruning.end_fraction = 1e-3, 2, 1.0
    config.pruning.compensation, config.loss.kl, config.run.report = "none", 1.0, False
    config.pruning.max_event_fraction, config.run.grow_micro_batch = 0.5, grow
    engine_config = resolve_engine_config({"zero_optimization": {"stage": 2}}, config.train, ranks.world_size())
    run_inputs = prepare_inputs(config, torch.device("cpu"))
    DistillationRun(config, engine_config, run_inputs, folder, "").run()


def rewind(source: Path, target: Path) -> None:
    """The run as a power cut some steps after the checkpoint in the middle would leave it."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / f"step-{RUN_STEPS:06d}")
    shutil.rmtree(target / "export")
    (target / "row.json").unlink()
    (target / "checkpoints" / "latest").write_text(f"step-{SAVE_EVERY:06d}\n")


def main() -> None:
    torch.set_num_threads(1)
    init_ranks()
    for case in json.loads(sys.argv[1]):
        found = compare(case)
        if dist.get_rank() == 0:
            print("CASE", json.dumps(case | found), flush=True)
    check_refusals()
    if len(sys.argv) > 2:
        folder = Path(sys.argv[2])
        distil(folder / "grown", grow=True)
        ranks.on_rank_zero(lambda: rewind(folder / "grown", folder / "resumed"))
        distil(folder / "steady", grow=False)
        # Last: the garbage collector ends a loader's process in ten seconds, which a run behind it would wait for.
        distil(folder / "resumed", grow=True, workers=1)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
