"""Agreement on the step at which all ranks stop: an asynchronous all-reduce per step, read one step later."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, distributed

from homodistil.distributed import ranks


class Agreement:
    """Exchanges the stop requests of the ranks once per step; the result is read one step later.

    Args:
        device: device of the collectives.
        local_signal: returns the number of the signal that this rank has received, 0 if none.
    """

    def __init__(self, device: torch.device, local_signal: Callable[[], int]) -> None:
        self._own = local_signal
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: Callable[[], int] | None = None

    def exchange(self) -> int:
        """The highest signal number of any rank at the previous boundary. Every rank calls it at each step boundary."""
        number = self._pending() if self._pending else 0
        self._pending = self._start()
        return number

    def last(self) -> int:
        """After the last boundary: a signal number from the last exchange or received since then by this rank, or 0."""
        return max(self._pending() if self._pending else 0, self._own())

    def _start(self) -> Callable[[], int]:
        if ranks.world_size() == 1:
            return self._own
        signal_number = self._own()
        return (
            _start_on_gpu(signal_number, self._device, self._stream)
            if self._stream
            else _start_on_cpu(signal_number, self._device)
        )


def _start_on_cpu(signal_number: int, device: torch.device) -> Callable[[], int]:
    flag = torch.tensor([signal_number], device=device)
    work = distributed.all_reduce(flag, distributed.ReduceOp.MAX, async_op=True)

    def result() -> int:
        work.wait()
        return int(flag)

    return result


def _start_on_gpu(signal_number: int, device: torch.device, side: torch.cuda.Stream) -> Callable[[], int]:
    """All-reduce and copy to pinned memory on a side stream, so that the host does not wait for the step's kernels."""
    with torch.cuda.stream(side):
        flag = torch.full((1,), signal_number, dtype=torch.int32, device=device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, async_op=True).wait()  # the stream waits, not the host
        copy: Tensor = torch.empty(1, dtype=torch.int32, pin_memory=True)
        copy.copy_(flag, non_blocking=True)
        done = side.record_event()

    def result() -> int:
        done.synchronize()
        return int(copy)

    return result
