"""student.compile: the student's layers compiled in place, one code for all layers of a width and a kind.

Layers, not the whole model: what is compiled is short and shared, hooks (taps, lock-step) stay outside between layers,
and embeddings and losses remain as they are. torch's guards look at the shapes of parameters, so a resize event is
noticed at the next call and costs one compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from homodistil.config.schema import StudentConfig
from homodistil.distill import torch_compile
from homodistil.errors import UserError

SPARE_COMPILATIONS = 4
"""Beyond one per width: importance measured in another precision before the engine is there, a control run."""


def check_student_compile(student: StudentConfig, zero_stage: int, device: torch.device) -> None:
    """Raises `UserError` when student.compile is set and cannot work."""
    if not student.compile:
        return
    if zero_stage == 3:
        raise UserError(
            "student.compile: true does not go with ZeRO stage 3, whose parameters are empty between uses; use stage "
            "0, 1 or 2 in the DeepSpeed JSON, or student.compile=false"
        )
    torch_compile.require_compiler("student.compile", device)


class CompiledLayers:
    """Compiles the forward of every layer, in place. Passes without gradients (probe, evaluation) stay uncompiled.

    With layers of the same widths and one micro-batch size between events that is one compilation an event, and one.
    On a CPU it does not pay: matrix products are what a step costs there, and they are the same.

    Args:
        layers: modules of one class.
        num_events: resize events to come; more widths than that are refused by torch.
        backend: of torch.compile.
        num_kinds: codes that layers of one width need (`ModelFamily.num_layer_kinds`).
    """

    def __init__(
        self, layers: Iterable[nn.Module], num_events: int, backend: str = "inductor", num_kinds: int = 1
    ) -> None:
        from torch._dynamo import lookup_backend  # not at import time: most runs compile nothing

        torch_compile.prepare(num_kinds * (num_events + 1) + SPARE_COMPILATIONS)
        self._backend = lookup_backend(backend)
        self._num_compilations = 0
        for layer in layers:
            layer.forward = self._compiled(layer.forward)

    def num_compilations(self) -> int:
        """Graphs compiled so far."""
        return self._num_compilations

    def _compiled(self, forward: Callable) -> Callable:
        # Static shapes: a symbolic width would spare compilations, and lose what is known of it in every kernel.
        compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend=self._count_and_compile)

        def run(*args, **kwargs):
            # Batches of the probe and of evaluations have sizes of their own: each would be one more code a width.
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            with torch_compile.failures_named("student.compile"):
                return compiled(*args, **kwargs)

        return run

    def _count_and_compile(self, graph: torch.fx.GraphModule, inputs: list):
        self._num_compilations += 1
        return self._backend(graph, inputs)
