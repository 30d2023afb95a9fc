"""One rank of test_elastic.py: trains through resize events, saves, and goes on in other layouts from what was saved.

    torchrun --nproc_per_node 2 worker_elastic.py FOLDER '[{"do": "write", "run": "a", "stage": 2}, ...]'

"write" trains without interruption, saves after step SAVED_AT and leaves its losses and final state in FOLDER/run.
"resume" builds another engine at the checkpoint's widths, goes on from the checkpoint and compares. "faults" lets one
rank's disk fill up. A line `CASE {json}` each.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support import tiny_bert
from support.reference import CLIP, make_optimizer
from torch import Tensor

from homodistil.checkpoint import Checkpoints
from homodistil.config.schema import RunConfig
from homodistil.engine.build import init_ranks
from homodistil.errors import UserError
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.resize_plan import make_plan
from homodistil.resize import check_supported, master_weights, owned_state, resize

NUM_STEPS, SAVED_AT, GLOBAL_ROWS = 12, 6, 4
EVENTS_BEFORE = 3
FINAL = "final.safetensors"


class Run:
    def __init__(self, case: dict, folder: Path, num_events: int = 0):
        """An engine of `case` whose model has gone through the first `num_events` events by hand."""
        self.case, self.done = case, 0
        self.model = tiny_bert.make_model()
        for keep in list(tiny_bert.events().values())[:num_events]:
            widths = make_plan(bert.axis_table(self.model), keep).widths_after
            for name, cuts in tiny_bert.slices(self.model, keep).items():
                param = self.model.get_parameter(name)
                param.data = tiny_bert.take(param.data, cuts)
            bert.refresh(self.model, widths)
        world = dist.get_world_size()
        self.accumulation = case.get("accumulation", 1)
        self.rows = GLOBAL_ROWS // world // self.accumulation
        dtype = case.get("precision", "fp32")
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=make_optimizer(tiny_bert.param_groups(self.model)),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, tiny_bert.lr_factor),
            config={
                "train_micro_batch_size_per_gpu": self.rows,
                "gradient_accumulation_steps": self.accumulation,
                "gradient_clipping": CLIP,
                "bf16": {"enabled": dtype == "bf16"},
                "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
                **case.get("engine", {}),
            },
        )
        check_supported(self.engine)
        config = RunConfig()
        config.run.async_checkpoints, config.run.keep_checkpoints = case.get("async", False), NUM_STEPS
        notes = {"layout": {"stage": case["stage"], "ranks": world}}
        self.checkpoints = Checkpoints(folder / "checkpoints", config.run, config.train.seed, notes)

    def step(self) -> float:
        if self.done in tiny_bert.events():
            keep = tiny_bert.events()[self.done]
            plan = make_plan(bert.axis_table(self.model), keep)
            resize(self.engine, plan)
            bert.refresh(self.model, plan.widths_after)
        total = torch.zeros(1)
        batch = tiny_bert.make_batch(self.done, GLOBAL_ROWS)
        for micro in range(self.accumulation):
            first = (dist.get_rank() * self.accumulation + micro) * self.rows
            loss = self.engine(**{k: rows[first : first + self.rows] for k, rows in batch.items()}).loss
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach().float() / self.accumulation
        self.done += 1
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()

    def save(self) -> float:
        """Seconds that training stood still."""
        start = time.perf_counter()
        kept = {"hidden": torch.arange(3)}
        self.checkpoints.save(self.engine, self.done, {"step": self.done, "kept": kept, "pruner": None})
        return time.perf_counter() - start

    def go_on(self) -> None:
        found = self.checkpoints.load()
        assert found.state["kept"]["hidden"].tolist() == [0, 1, 2] and found.state["pruner"] is None
        self.checkpoints.restore(self.engine, found)
        check_supported(self.engine)
        self.done = found.state["step"]
        assert self.engine.global_steps == self.done and self.engine.lr_scheduler.last_epoch == self.done

    def settings(self) -> list[dict]:
        groups = self.engine.basic_optimizer.param_groups
        return [{k: g[k] for k in ("lr", "initial_lr", "betas", "eps", "weight_decay")} for g in groups]


def everything(run: Run) -> dict[str, Tensor]:
    """All weights and moments, whole, by a sum over ranks of what each owns."""
    sizes = {name: weight.numel() for name, weight in master_weights(run.engine).items()}
    found: dict[str, Tensor] = {}
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        whole = {name: torch.zeros(numel) for name, numel in sizes.items()}
        for piece in owned_state(run.engine):
            tensor = piece.weight if kind == "weight" else piece.states.get(kind)
            if tensor is not None:
                whole[piece.name][piece.start : piece.start + len(tensor)] = tensor
        for name, tensor in whole.items():
            dist.all_reduce(tensor)
            found[f"{kind}/{name}"] = tensor
    return found


def write(case: dict, folder: Path) -> dict:
    run = Run(case, folder)
    losses, step_s, lost_s = [], [], []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        losses.append(run.step())
        step_s.append(time.perf_counter() - start)
        if run.done == SAVED_AT:
            lost_s, at_save = [run.save()], everything(run)
        elif run.done > SAVED_AT and case.get("async"):
            lost_s.append(run.save())
    run.checkpoints.wait()
    final, settings = everything(run), run.settings()
    if dist.get_rank() == 0:
        save_file(final, folder / FINAL)
        save_file(at_save, folder / f"saved-{FINAL}")
        (folder / "losses.json").write_text(json.dumps({"losses": losses, "settings": settings}))
    dist.barrier()
    numbers = {"save_s": min(lost_s), "step_s": statistics.median(step_s)}
    return {"wrapper": type(run.engine.optimizer).__name__, "losses": losses} | numbers


def resume(case: dict, folder: Path) -> dict:
    before = json.loads((folder / "losses.json").read_text())
    run = Run(case, folder, EVENTS_BEFORE)
    run.go_on()
    restored = _distance(everything(run), load_file(folder / f"saved-{FINAL}"))
    losses = [run.step() for _ in range(SAVED_AT, NUM_STEPS)]
    assert json.loads(json.dumps(run.settings())) == before["settings"], "lr or betas went another way"
    return {
        "wrapper": type(run.engine.optimizer).__name__,
        "ranks": dist.get_world_size(),
        "restored": restored,
        "loss": max(abs(a - b) for a, b in zip(losses, before["losses"][SAVED_AT:], strict=True)),
        **{f"final_{k}": v for k, v in _distance(everything(run), load_file(folder / FINAL)).items()},
    }


def faults(case: dict, folder: Path) -> dict:
    """The last rank's disk is full, synchronously and not: every rank hears of it, the checkpoint before is intact."""
    run, messages = Run(case, folder), []
    run.step()
    run.save()
    run.checkpoints.wait()
    before = sorted(path.name for path in run.checkpoints.folder.iterdir())
    for is_async in (False, True):
        run.checkpoints.run.async_checkpoints = is_async
        run.step()
        with full_disk(on_rank=dist.get_world_size() - 1):
            try:
                run.save()
                assert is_async, "a checkpoint that could not be written was taken for one"
                run.checkpoints.wait()
            except UserError as error:
                messages.append(str(error))
        dist.barrier()
        assert sorted(path.name for path in run.checkpoints.folder.iterdir()) == before
        assert run.checkpoints.load().state["step"] == 1
    run.step()
    run.save()  # room again
    run.checkpoints.wait()
    assert run.checkpoints.load().state["step"] == run.done
    all_messages = [None] * dist.get_world_size()
    dist.all_gather_object(all_messages, messages)
    return {"messages": all_messages}


@contextmanager
def full_disk(on_rank: int) -> Iterator[None]:
    """Files of this process may not grow beyond 1000 bytes: the operating system's own refusal, in mid-file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == on_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference a kind; both must hold the same names and sizes."""
    assert ours.keys() == theirs.keys()
    found: dict[str, float] = {}
    for name, tensor in ours.items():
        kind = name.split("/")[0]
        found[kind] = max(found.get(kind, 0.0), (tensor - theirs[name]).abs().max().item())
    return found


def main() -> None:
    torch.set_num_threads(1)
    init_ranks()
    for case in json.loads(sys.argv[2]):
        folder = Path(sys.argv[1]) / case["run"]
        folder.mkdir(exist_ok=True)
        found = {"write": write, "resume": resume, "faults": faults}[case["do"]](case, folder)
        if dist.get_rank() == 0:
            print("CASE", json.dumps(case | found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
