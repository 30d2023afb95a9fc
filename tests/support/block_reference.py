"""A slow float64 refit of any family's blocks, by `lstsq` on whole passes of the library's own models.

Nothing is shared with pruning/compensation but the plan (which dims, which maps), the order of the parts, and the rows'
weights in streams that no norm ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from homodistil.models.backbone import run_backbone
from homodistil.models.family import ModelFamily
from homodistil.models.resize_plan import ResizePlan

Seen = dict[tuple[nn.Module, str], Tensor]


class BlockReference:
    """`old` and `new` (as the plan has cut it) in fp64, in evaluation mode; `new` is refitted by `run`.

    Args:
        ids: int64 (B, T) each, without padding.
        kept: layers of `old` that `new` has; None: all.
    """

    def __init__(
        self,
        old: nn.Module,
        new: nn.Module,
        family: ModelFamily,
        plan: ResizePlan,
        ids: Sequence[Tensor],
        ridge: float,
        kept: Sequence[int] | None = None,
    ) -> None:
        self.kept = list(range(len(family.layers(old))) if kept is None else kept)
        self.old, self.new, self.family, self.plan, self.ids, self.ridge = old, new, family, plan, ids, ridge
        self._names = {id(p): name for name, p in old.named_parameters()}
        uses = family.axis_table(old).uses
        self._stream = next(
            (u.parameter, u.dim) for u in uses if u.axes == ("hidden",) and old.get_parameter(u.parameter).ndim == 2
        )

    @torch.no_grad()
    def run(self) -> None:
        """All parts of the backbone, in forward order."""
        if (norm := self.family.embedding_norm(self.new)) is not None:
            old = self.family.embedding_norm(self.old).module
            self._norm(norm.module, norm.offset, lambda: self._stream_of(self._seen(self.old, old, "out")))
        for i, kept in enumerate(self.kept):
            next_kept = [*self.kept, len(self.family.layers(self.old))][i + 1]
            for number, new in enumerate(self.family.blocks(self.new, i)):
                last = next_kept - 1 if number else kept  # whose residual stream the block is to leave
                self._block(number, self.family.blocks(self.old, kept)[number], new, last)
        if (final := self.family.norm(self.family.final_norm(self.new))) is not None:
            old = self.family.final_norm(self.old)
            self._norm(final.module, final.offset, lambda: self._stream_of(self._seen(self.old, old, "out")))

    def check_backbone(self, model: nn.Module) -> None:
        """Raise `AssertionError` where a parameter of `model`'s backbone is not that of `new`, after `run`."""
        expected = dict(self.family.backbone(self.new).named_parameters())
        for name, parameter in self.family.backbone(model).named_parameters():
            # Both sides are fp64; what the library's norms do in fp32 inside is the same code. A dozen solves on top
            # of each other carry on what two ways of solving differ by.
            torch.testing.assert_close(
                parameter, expected[name], rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )

    def _block(self, number: int, old, new, last: int) -> None:
        if new.input_norm is not None:
            target = self._stream_of(self._seen(self.old, old.input_norm.module, "out"))
            self._norm(new.input_norm.module, new.input_norm.offset, lambda: target)
        for old_linear, linear in zip(old.inputs, new.inputs, strict=True):
            target = self._changed(old_linear, self._seen(self.old, old_linear, "out"))
            self._linear(linear, target, None)
        ending = self.family.blocks(self.old, last)[number]
        summed = self._stream_of(self._summed(self.old, last, number, ending))
        missing = summed - self._entering(new)
        weights = None if new.stream_norm is not None else size(summed)
        if new.output_norm is None:
            self._linear(new.output, missing, weights)
        else:
            raw = self._seen(self.old, old.output, "out")
            if self._stream[1] in self.plan.maps.get(self._stream[0], {}):
                gain = old.output_norm.module.weight + old.output_norm.offset
                raw = raw * gain / gain.abs().mean()
            self._linear(new.output, self._stream_of(raw), size(self._stream_of(raw)))
            self._norm(new.output_norm.module, new.output_norm.offset, lambda: missing, weights)
        if new.stream_norm is not None:
            target = self._stream_of(self._seen(self.old, ending.stream_norm.module, "out"))
            self._norm(new.stream_norm.module, new.stream_norm.offset, lambda: target)

    def _entering(self, block) -> Tensor:
        return self._seen(self.new, block.entry, "in")

    def _summed(self, model: nn.Module, i: int, number: int, block) -> Tensor:
        """The residual stream behind the sum."""
        if block.stream_norm is not None:
            return self._seen(model, block.stream_norm.module, "in")
        if number == 0:
            return self._seen(model, self.family.blocks(model, i)[1].entry, "in")
        return self._seen(model, self.family.layers(model)[i], "out")

    def _seen(self, model: nn.Module, module: nn.Module, side: str) -> Tensor:
        """What `module` takes in or puts out, (tokens of all batches, K), in a whole pass."""
        rows: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple, kwargs: dict, output) -> None:
            taken = output if side == "out" else (args[0] if args else kwargs["hidden_states"])
            rows.append((taken[0] if isinstance(taken, tuple) else taken).flatten(0, 1))

        handle = module.register_forward_hook(keep, with_kwargs=True)
        for ids in self.ids:
            run_backbone(model, self.family, ids, None)
        handle.remove()
        return torch.cat(rows).double()

    def _linear(self, linear: nn.Module, target: Tensor, weights: Tensor | None) -> None:
        """min sum w^2 |y - W x - b|^2 + ridge n mean(var x) |W - W0|^2, as one least-squares problem."""
        x = self._seen(self.new, linear, "in")
        transposed = isinstance(linear, Conv1D)
        start = linear.weight.T if transposed else linear.weight
        w = torch.ones(len(x), 1, dtype=torch.float64) if weights is None else weights
        mean_x, mean_y = torch.zeros_like(x[0]), torch.zeros_like(target[0])
        if linear.bias is not None:
            share = w.square() / w.square().sum()
            mean_x, mean_y = (share * x).sum(0), (share * target).sum(0)
        a = (x - mean_x) * w
        b = (target - mean_y) * w - a @ start.T
        strength = self.ridge * a.square().sum(0).mean()
        stacked = torch.cat([a, strength.sqrt() * torch.eye(a.shape[1], dtype=torch.float64)])
        change = torch.linalg.lstsq(
            stacked, torch.cat([b, b.new_zeros(a.shape[1], b.shape[1])]), driver="gelsd"
        ).solution
        matrix = start + change.T
        linear.weight.copy_(matrix.T if transposed else matrix)
        if linear.bias is not None:
            linear.bias.copy_(mean_y - matrix @ mean_x)

    def _norm(
        self, norm: nn.Module, offset: float, target: Callable[[], Tensor], weights: Tensor | None = None
    ) -> None:
        """Dim by dim: one gain, and one shift where there is a bias."""
        x, y = self._seen(self.new, norm, "in"), target()
        is_layer_norm = isinstance(norm, nn.LayerNorm)
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        if is_layer_norm:
            x = x - x.mean(-1, keepdim=True)
        z = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        w = torch.ones(len(x), 1, dtype=torch.float64) if weights is None else weights
        share = w.square() / w.square().sum()
        bias = getattr(norm, "bias", None)
        mean_z, mean_y = torch.zeros_like(z[0]), torch.zeros_like(y[0])
        if bias is not None:
            mean_z, mean_y = (share * z).sum(0), (share * y).sum(0)
        variance = (share * (z - mean_z).square()).sum(0)
        covariance = (share * (z - mean_z) * (y - mean_y)).sum(0)
        strength, gain = self.ridge * variance.mean(), norm.weight + offset
        gain = (covariance + strength * gain) / (variance + strength)
        norm.weight.copy_(gain - offset)
        if bias is not None:
            bias.copy_(mean_y - gain * mean_z)

    def _changed(self, linear: nn.Module, rows: Tensor) -> Tensor:
        return self._by(self._names[id(linear.weight)], 1 if isinstance(linear, Conv1D) else 0, rows)

    def _stream_of(self, rows: Tensor) -> Tensor:
        return self._by(*self._stream, rows)

    def _by(self, name: str, dim: int, rows: Tensor) -> Tensor:
        if dim in self.plan.maps.get(name, {}):
            return rows @ self.plan.maps[name][dim].double()
        index = self.plan.index.get(name, {}).get(dim)
        return rows if index is None else rows[:, index]


def size(rows: Tensor) -> Tensor:
    """1 / root mean square of every row, (rows, 1)."""
    return 1 / rows.square().mean(-1, keepdim=True).sqrt()
