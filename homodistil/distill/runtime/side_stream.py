"""teacher.own_stream: the teacher's forward on a CUDA stream of its own, beside the student's on the current one.

pending = stream.start(input_ids, attention_mask)      # returns at once
...                                                    # the student's forward
tapped = pending.result()                              # before the losses; on the host it waits for nothing
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from homodistil.errors import UserError
from homodistil.models.activations import Activations

Call = Callable[[Tensor, Tensor | None, Tensor | None], Activations]


@dataclass(frozen=True)
class Pending:
    """A forward pass under way."""

    tapped: Activations
    done: torch.cuda.Event

    def result(self) -> Activations:
        """What was computed, safe to use on the stream that is current now."""
        current = torch.cuda.current_stream()
        current.wait_event(self.done)
        for tensor in _tensors(self.tapped):
            # The allocator knows the stream that it was made on only: without this the memory of a freed tensor would
            # be given to the teacher's next layer while the student's losses still read it.
            tensor.record_stream(current)
        return self.tapped


class SideStream:
    """Runs a teacher runtime on a CUDA stream of its own.

    Args:
        call: any runtime.
        device: a CUDA device.
    """

    def __init__(self, call: Call, device: torch.device) -> None:
        if device.type != "cuda":
            raise UserError(
                f"teacher.own_stream: true needs an NVIDIA GPU, this run is on {device.type}; set "
                f"teacher.own_stream=false"
            )
        self._call = call
        self._stream = torch.cuda.Stream(device)

    def start(self, input_ids: Tensor, attention_mask: Tensor | None, token_types: Tensor | None = None) -> Pending:
        """Begin once everything queued so far is done: the inputs' copy, and the last step's use of static outputs."""
        self._stream.wait_stream(torch.cuda.current_stream())
        for tensor in _tensors([input_ids, attention_mask, token_types]):
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            tapped = self._call(input_ids, attention_mask, token_types)
            return Pending(tapped, self._stream.record_event())


def _tensors(parts: Iterable) -> Iterator[Tensor]:
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, list | tuple):
            yield from _tensors(part)
