"""teacher.runtime=compile: the whole backbone with its taps as one compiled graph; on a GPU replayed as a CUDA graph.

The taps' hooks are traced along: what passes by becomes outputs of the graph, in the same order as without.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from homodistil.distill import torch_compile
from homodistil.models.activations import ActivationHooks, Activations
from homodistil.models.family import ModelFamily

MAX_SHAPES = 8
"""Different (B, T) that are compiled: micro-batches, the probe, evaluation and their last parts. Others run plainly."""


class CompiledRuntime:
    """On a GPU the tensors of an `Activations` live until the next call, which replays the graph over the same
    memory."""

    def __init__(self, model: nn.Module, family: ModelFamily, device: torch.device) -> None:
        self._taps = ActivationHooks(model, family)
        self.scale = self._taps.scale
        self._shapes: set[torch.Size] = set()
        self._replays = device.type == "cuda"
        torch_compile.prepare(MAX_SHAPES)
        # Static shapes: CUDA graphs want them, and every batch but an evaluation's last has one of a few.
        options = {"triton.cudagraphs": True} if self._replays else None
        self._compiled = torch.compile(self._taps.run, fullgraph=True, dynamic=False, options=options)

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_types: Tensor | None = None
    ) -> Activations:
        if not self._is_compiled(input_ids.shape):
            return self._taps.run(input_ids, attention_mask, token_types)
        if self._replays:
            # Says that nobody needs the last outputs any more: their memory may be written. Using them all the same
            # is an error of torch's, not silently another batch's numbers.
            torch.compiler.cudagraph_mark_step_begin()
        with torch_compile.failures_named("teacher.runtime"):
            return self._compiled(input_ids, attention_mask, token_types)

    def _is_compiled(self, shape: torch.Size) -> bool:
        if len(self._shapes) < MAX_SHAPES:
            self._shapes.add(shape)
        return shape in self._shapes
