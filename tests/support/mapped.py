"""Events with linear maps, and the plain single-process loop in float64 that DeepSpeed is held against.

No homodistil in here. `Event.maps` says for every parameter which dimension is contracted with which matrix, spelt out
for BERT; rows that are merely selected are a hand-written `tiny_bert.slices`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from support import reference, tiny_bert
from support.reference import CLIP, EPS, LR, ROWS, Trajectory

REWRITTEN = ["bert.encoder.layer.0.intermediate.dense.weight", "cls.predictions.bias", tiny_bert.FROZEN]
"""Stand for what a refit changes: a matrix, a vector, a frozen parameter."""

Maps = dict[str, dict[int, Tensor]]


@dataclass
class Event:
    keep: dict[str, Tensor] = field(default_factory=dict)
    """Mapped axes: the leading entries."""
    selected: tuple[str, ...] = ()
    """Axes of `keep` that are selected from."""
    maps: Maps = field(default_factory=dict)
    resets_moments: bool = False


def events() -> dict[int, Event]:
    """Step -> event at its beginning."""
    hidden, again = orthonormal(36, 29, 1), orthonormal(29, 20, 2)
    ffn = {"layer.0.ffn": tiny_bert.pick(55, 41, 3)}
    return {
        2: Event({"hidden": torch.arange(29), **ffn}, ("layer.0.ffn",), hidden_maps(hidden)),
        5: _attention_event(),
        7: Event({"hidden": torch.arange(20)}, (), hidden_maps(again)),
        10: Event({"layer.1.ffn": tiny_bert.pick(55, 31, 4)}, ("layer.1.ffn",), resets_moments=True),
    }


def orthonormal(size: int, width: int, seed: int) -> Tensor:
    """(size, width) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, width, generator=generator, dtype=torch.float64)).Q


def hidden_maps(p: Tensor) -> Maps:
    """Every dimension of the residual stream is contracted with `p`; LayerNorm's weight with its square."""
    cuts: dict[str, dict[int, Tensor]] = {}
    tiny_bert.cut_hidden(cuts, torch.arange(p.shape[1]))
    gamma = p.square()
    return {n: {dim: gamma if n.endswith("LayerNorm.weight") else p for dim in dims} for n, dims in cuts.items()}


def _attention_event() -> Event:
    """Layer 0: heads 0, 2, 3 stay, each with matrices of its own, 9 -> 7. Layer 1: an exact rotation of Q and K."""
    maps: Maps = {}
    for part, seed in (("query", 10), ("key", 20), ("value", 30)):
        matrix = _heads([orthonormal(9, 7, seed + head) for head in range(4)], [0, 2, 3])
        maps |= {f"bert.encoder.layer.0.attention.self.{part}.{kind}": {0: matrix} for kind in ("weight", "bias")}
    maps["bert.encoder.layer.0.attention.output.dense.weight"] = {1: matrix}
    blocks = [torch.eye(9, dtype=torch.float64) + 0.3 * orthonormal(9, 9, 40 + head) for head in range(4)]
    inverse = [torch.linalg.inv(block).T for block in blocks]
    for part, each in (("query", blocks), ("key", inverse)):
        matrix = _heads(each, [0, 1, 2, 3])
        maps |= {f"bert.encoder.layer.1.attention.self.{part}.{kind}": {0: matrix} for kind in ("weight", "bias")}
    dims = torch.arange(7).expand(4, 7)
    heads = {"layer.0.heads": torch.tensor([0, 2, 3])}
    return Event({**heads, "layer.0.qk_dim": dims, "layer.0.vo_dim": dims}, (), maps)


def _heads(blocks: list[Tensor], kept: list[int]) -> Tensor:
    """(heads x old, kept heads x new): the block of each head that stays, zero elsewhere."""
    rows, columns = blocks[0].shape
    matrix = torch.zeros(len(blocks) * rows, len(kept) * columns, dtype=torch.float64)
    for place, head in enumerate(kept):
        matrix[head * rows : (head + 1) * rows, place * columns : (place + 1) * columns] = blocks[head]
    return matrix


def refitted(value: Tensor) -> Tensor:
    return 0.9 * value + 0.01


def after(event: Event, cuts: dict[str, dict[int, Tensor]], name: str, tensor: Tensor, kind: str) -> Tensor:
    """What is to become of a whole tensor, in float64. `shrinker`: of the axes that are selected from."""
    tensor = tensor.double()
    if kind.startswith("exp_avg") and event.resets_moments:
        tensor = torch.zeros_like(tensor)
    for dim, matrix in event.maps.get(name, {}).items():
        matrix = matrix.square() if kind == "exp_avg_sq" else matrix
        tensor = torch.einsum("i...,ij->j..." if dim == 0 else "ai,ij->aj", tensor, matrix)
    tensor = tiny_bert.take(tensor, cuts.get(name, {}))
    return refitted(tensor) if kind == "weight" and name in REWRITTEN and event.maps else tensor


def cuts_of(event: Event, model: nn.Module) -> dict[str, dict[int, Tensor]]:
    return tiny_bert.slices(model, {axis: event.keep[axis] for axis in event.selected}) if event.selected else {}


def train(num_steps: int, world: int) -> Trajectory:
    """float64, whole global batches; at an event everything is contracted, cut and refitted by hand."""
    model, due = tiny_bert.make_model(torch.float64), events()
    optimizer = torch.optim.AdamW(tiny_bert.param_groups(model), lr=LR, eps=EPS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, tiny_bert.lr_factor)
    losses = []
    for step in range(num_steps):
        if step in due:
            _change(model, optimizer, due[step])
        optimizer.zero_grad()
        losses.append(reference.backward(model, tiny_bert.make_batch(step, ROWS * world)))
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
    return reference.trajectory(model, {p: p for p in model.parameters()}, optimizer, losses)


@torch.no_grad()
def _change(model: nn.Module, optimizer: torch.optim.Optimizer, event: Event) -> None:
    cuts = cuts_of(event, model)
    for name, param in model.named_parameters():
        state = optimizer.state.get(param, {})
        for kind in ("exp_avg", "exp_avg_sq"):
            if kind in state:
                state[kind] = after(event, cuts, name, state[kind], kind)
        if state and event.resets_moments:
            state["step"].zero_()
        param.grad = None
        param.data = after(event, cuts, name, param.data, "weight")
    tiny_bert.refresh(model, event.keep)
