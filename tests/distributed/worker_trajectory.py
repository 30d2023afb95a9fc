"""One rank of test_trajectory.py: DeepSpeed training with resize events, checked at every event and at the end.

    torchrun --nproc_per_node 2 worker_trajectory.py '[{"stage": 2}]' [--refusals]      (cases: see test_trajectory.py)

Runs on a GPU as well (DS_ACCELERATOR=cuda); the plain loop stays on the CPU.
Prints one line `CASE {json}` a case, with the distances to the plain loop of reference.py.
"""

from __future__ import annotations

import itertools
import json
import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from support import reference, tiny_bert, zero3_walk
from support.reference import ROWS
from torch import Tensor

from homodistil.engine.build import init_ranks
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.resize_plan import ResizePlan, make_plan
from homodistil.resize import check_supported, master_weights, remove_parameters, resize

NUM_STEPS = 12
STATES = ("exp_avg", "exp_avg_sq")
OPTIMIZERS = {"torch": reference.make_optimizer, "cpu_adam": reference.make_cpu_adam, "fused": reference.make_fused}


class Run:
    """One engine and the checks on it."""

    def __init__(self, case: dict):
        self.accumulation = case.get("accumulation", 1)
        of_depth = case.get("events") == "depth"
        self.events = tiny_bert.depth_events() if of_depth else tiny_bert.events() if case.get("events", True) else {}
        self.device = torch.device(get_accelerator().current_device_name())
        dtype = torch.bfloat16 if case.get("bf16") else torch.float32
        self.model = tiny_bert.make_model(num_layers=tiny_bert.num_layers(self.events))
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=OPTIMIZERS[case.get("optimizer", "torch")](tiny_bert.param_groups(self.model)),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, tiny_bert.lr_factor),
            config={
                "train_micro_batch_size_per_gpu": ROWS,
                "gradient_accumulation_steps": self.accumulation,
                "gradient_clipping": reference.CLIP,
                "bf16": {"enabled": dtype == torch.bfloat16, **case.get("bf16_settings", {})},
                "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
                "zero_force_ds_cpu_optimizer": False,
                "zero_allow_untested_optimizer": True,
                **case.get("config", {}),
            },
        )
        check_supported(self.engine)
        self.names = [name for name, _ in self.model.named_parameters()]

    def train(self) -> list[float]:
        rank, losses = dist.get_rank(), []
        loss = None
        for step in range(NUM_STEPS):
            if step in self.events:
                before = self.change(self.events[step])  # `loss`, and with it the last graph, is still referenced here
            total = torch.zeros(1, device=self.device)
            for micro in range(self.accumulation):
                batch = tiny_bert.make_batch(step * self.accumulation + micro, ROWS * dist.get_world_size())
                mine = slice(rank * ROWS, (rank + 1) * ROWS)
                loss = self.engine(**{k: rows[mine].to(self.device) for k, rows in batch.items()}).loss
                self.engine.backward(loss)
                self.engine.step()
                total += loss.detach().float() / self.accumulation
            if step in self.events:
                self.check_all_move(before)
            dist.all_reduce(total)
            losses.append(total.item() / dist.get_world_size())
        return losses

    def change(self, event: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.remove(event) if "layers" in event else self.resize(event)

    def resize(self, keep: dict[str, Tensor]) -> dict[str, Tensor]:
        """One event and the checks on it. Returns the masters behind it."""
        engine = self.engine
        plan = make_plan(bert.axis_table(self.model), keep)
        hashes = [None] * dist.get_world_size()
        dist.all_gather_object(hashes, plan.hash)
        assert len(set(hashes)) == 1, hashes
        cuts, before, same = tiny_bert.slices(self.model, keep), self.everything(), self.what_stays()
        cost = resize(engine, plan)
        bert.refresh(self.model, plan.widths_after)
        assert cost.milliseconds > 0
        assert self.what_stays() == same, "an object was replaced, or a count changed"
        after = self.everything()
        for (kind, name), tensor in before.items():
            expected = tiny_bert.take(tensor, cuts.get(name, {}))
            assert torch.equal(expected, after[kind, name]), (kind, name, expected.shape, after[kind, name].shape)
        assert after.keys() == before.keys()
        self.check_padding()
        check_supported(engine)  # the layout, once more: it is what a later checkpoint and event rely on
        return {name: tensor for (kind, name), tensor in after.items() if kind == "master"}

    def remove(self, keep: dict[str, list[int]]) -> dict[str, Tensor]:
        """Layers leave as a whole. Returns the masters behind it."""
        kept, before, (objects, parameters, *settings) = keep["layers"], self.everything(), self.what_stays()
        names = {name for name in self.names if tiny_bert.renamed(name, kept) is None}
        cost = remove_parameters(self.engine, names, lambda: tiny_bert.drop_layers(self.model, kept))
        assert cost.milliseconds > 0
        self.names = [name for name, _ in self.model.named_parameters()]
        after, (same_objects, left, *same) = self.everything(), self.what_stays()
        assert (same_objects, same[1:]) == (objects, settings[1:]) and set(left) < set(parameters)
        expected = {(kind, tiny_bert.renamed(name, kept)): tensor for (kind, name), tensor in before.items()}
        expected = {key: tensor for key, tensor in expected.items() if key[1] is not None}
        assert expected.keys() == after.keys()
        assert all(torch.equal(tensor, after[key]) for key, tensor in expected.items())
        assert {name for _, name in after} == set(self.names) == set(self.engine.param_names.values())
        self.check_padding()
        check_supported(self.engine)
        return {name: tensor for (kind, name), tensor in after.items() if kind == "master"}

    def what_stays(self) -> tuple:
        engine, base = self.engine, self.engine.basic_optimizer
        objects = (engine.optimizer, base, engine.lr_scheduler, engine.lr_scheduler.optimizer, engine.module)
        parameters = [id(p) for p in self.model.parameters()] + [id(p) for g in base.param_groups for p in g["params"]]
        steps = [float(state["step"]) for state in base.state.values()]
        settings = [{k: v for k, v in group.items() if k != "params"} for group in base.param_groups]
        counts = (engine.global_steps, engine.micro_steps, engine.lr_scheduler.last_epoch)
        return tuple(map(id, objects)), parameters, steps, settings, counts

    def everything(self) -> dict[tuple[str, str], Tensor]:
        """(kind, parameter name) -> full tensor, copied: model weights, fp32 masters, moments."""
        weights = dict(self.model.named_parameters())
        if zero3_walk.is_zero3(self.engine):
            weights = zero3_walk.full_weights(self.model)
        found = {("weight", name): tensor.detach().clone() for name, tensor in weights.items()}
        found |= {("master", name): tensor for name, tensor in master_weights(self.engine).items()}
        for key in STATES:
            found |= {(key, name): tensor for name, tensor in self.full_state(key).items()}
        return found

    def full_state(self, key: str) -> dict[str, Tensor]:
        """Full optimizer state by parameter name, by a walk along DeepSpeed's own flat buffers."""
        if zero3_walk.is_zero3(self.engine):
            return zero3_walk.full_state(self.engine, self.model, key)
        optimizer, name_of = self.engine.optimizer, {p: n for n, p in self.model.named_parameters()}
        flat_groups = flat_groups_of(optimizer)
        if flat_groups is None:
            pairs = zip(
                getattr(optimizer, "fp16_groups", [g["params"] for g in optimizer.param_groups]),
                [g["params"] for g in optimizer.param_groups],
                strict=True,
            )
            state = self.engine.basic_optimizer.state
            return {
                name_of[p]: state[m][key].clone() for ps, ms in pairs for p, m in zip(ps, ms, strict=True) if m in state
            }
        found = {}
        for params, offsets, weights, master in flat_groups:
            flat = optimizer.optimizer.state[master][key]
            if flat.numel() < weights.numel():
                pieces = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
                dist.all_gather(pieces, flat)
                flat = torch.cat(pieces)
            for p, offset in zip(params, offsets, strict=True):
                found[name_of[p]] = flat[offset : offset + p.numel()].view(p.shape).clone()
        return found

    def check_padding(self) -> None:
        """Whatever no parameter owns in a flat buffer is zero, in weights, masters and moments."""
        if zero3_walk.is_zero3(self.engine):
            return zero3_walk.check_padding(self.engine, self.model, STATES)
        optimizer = self.engine.optimizer
        for params, offsets, flat, partition in flat_groups_of(optimizer) or ():
            start = dist.get_rank() * partition.numel() if partition.numel() < flat.numel() else 0
            free = torch.ones(flat.numel(), dtype=torch.bool)
            for p, offset in zip(params, offsets, strict=True):
                free[offset : offset + p.numel()] = False
            assert not flat[free].any()
            free = free[start : start + partition.numel()]
            for tensor in (partition.detach(), *(optimizer.optimizer.state[partition][key] for key in STATES)):
                assert not tensor[free].any()

    def check_all_move(self, before: dict[str, Tensor]) -> None:
        """After a step: every trainable entry changed (weight decay or gradient), no frozen one did."""
        after = master_weights(self.engine)
        for name in self.names:
            assert after[name].numel() > 0
            if name.endswith("attention.self.key.bias"):
                continue  # the softmax ignores it: its gradient is rounding, or nothing
            still = int((after[name] == before[name]).sum())
            # A single update may be too small to show in fp32.
            allowed = max(1, after[name].numel() // 100)
            frozen = name == tiny_bert.FROZEN
            assert still == after[name].numel() if frozen else still <= allowed, (name, still, after[name].shape)


def flat_groups_of(optimizer) -> list[tuple] | None:
    """(parameters, their offsets, flat weights, our partition of the masters) a group; None if nothing is flat."""
    if hasattr(optimizer, "round_robin_bit16_offsets"):
        fields = ("round_robin_bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups")
    elif hasattr(optimizer, "bf16_groups_flat"):
        fields = ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition")
    elif hasattr(optimizer, "fp16_groups_flat"):
        fields = ("fp16_groups", "fp16_groups_flat", "fp32_groups_flat")
    else:
        return None
    groups, weights, masters = (getattr(optimizer, field) for field in fields)
    end_to_end = [[0, *itertools.accumulate(p.numel() for p in params)][:-1] for params in groups]
    offsets = getattr(optimizer, "round_robin_bit16_offsets", end_to_end)
    return list(zip(groups, offsets, weights, masters, strict=True))


def distances(run: Run, losses: list[float], expected: reference.Trajectory) -> dict[str, float]:
    """Largest differences to the reference; for weights also the mean."""
    weights = {name: weight.cpu() for name, weight in master_weights(run.engine).items()}
    assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in expected.weights.items()}
    off = {name: (weights[name] - expected.weights[name]).abs() for name in weights}
    found = {
        "loss": max(abs(a - b) for a, b in zip(losses, expected.losses, strict=True)),
        "weight": max(d.max().item() for d in off.values()),
        "weight_mean": sum(d.sum().item() for d in off.values()) / sum(d.numel() for d in off.values()),
    }
    for key, tensors in (("exp_avg", expected.exp_avg), ("exp_avg_sq", expected.exp_avg_sq)):
        state = run.full_state(key)
        assert state.keys() == tensors.keys()
        found[key] = max((state[name].cpu() - tensors[name]).abs().max().item() for name in tensors)
    return found


def check_refusals() -> None:
    """A wrong moment, and ranks that disagree, are refused before anything has changed; training goes on."""
    rank = dist.get_rank()
    for case in ({"stage": 0}, {"stage": 1, "accumulation": 2}, {"stage": 2}, {"stage": 3, "accumulation": 2}):
        run = Run(case | {"events": False})
        table, batch = bert.axis_table(run.model), tiny_bert.make_batch(rank, ROWS)
        plan = make_plan(table, {"layer.0.ffn": tiny_bert.pick(55, 50, 0)})
        for _ in range(run.accumulation):
            run.engine.backward(run.engine(**batch).loss)
            if run.accumulation == 1:
                expect_refusal(run, plan, "gradients wait for a step")  # after backward, before step
            run.engine.step()
            if run.engine.micro_steps < run.accumulation:
                expect_refusal(run, plan, "gradients wait for a step")  # in the middle of accumulation
        before = run.everything()
        other = make_plan(table, {"layer.0.ffn": tiny_bert.pick(55, 50, rank // (dist.get_world_size() - 1))})
        expect_refusal(run, other, f"ranks [{dist.get_world_size() - 1}] hold another plan")
        assert all(torch.equal(tensor, before[key]) for key, tensor in run.everything().items())
        resize(run.engine, plan)
        try:
            resize(run.engine, plan)
        except ValueError as error:  # the same event twice
            assert "should be 55" in str(error), error
        else:
            raise AssertionError("a plan for other widths was accepted")
        run.engine.backward(run.engine(**batch).loss)


def expect_refusal(run: Run, plan: ResizePlan, text: str) -> None:
    try:
        resize(run.engine, plan)
    except RuntimeError as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"accepted, expected a refusal: {text}")


def main() -> None:
    torch.set_num_threads(1)
    init_ranks()
    expected: dict[str, reference.Trajectory] = {}
    cases = json.loads(sys.argv[1])
    if "--refusals" in sys.argv:
        check_refusals()
    for case in cases:
        run = Run(case)
        losses = run.train()
        key = json.dumps([case.get(k) for k in ("accumulation", "events", "bf16", "reference")])
        if key not in expected:
            arguments = (dist.get_world_size(), run.events)
            expected[key] = (
                reference.train_bf16(NUM_STEPS, *arguments, run.accumulation, **case.get("reference", {}))
                if case.get("bf16")
                else reference.train(NUM_STEPS, run.accumulation, *arguments)
            )
        found = distances(run, losses, expected[key])
        if dist.get_rank() == 0:
            numbers = {"wrapper": type(run.engine.optimizer).__name__, "first_loss": losses[0], "last_loss": losses[-1]}
            print("CASE", json.dumps(case | numbers | found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
