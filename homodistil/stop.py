"""Stopping on request: Ctrl-C (SIGINT), SIGTERM or SIGUSR1 to any rank ends all of them at the same step, behind a
checkpoint.

    with on_signals():                            # job.run
        ...                                       # here a signal ends the job at once: there is nothing to save yet
        with at_step_boundaries(device) as stop_agreed:       # Trainer.train
            train_step()
            if stop_agreed(): save and raise StopRequested    # the same step on every rank

A second signal ends the process at once, wherever it is: Python runs its own handlers only between two of its
instructions, which a rank that hangs in a collective never reaches. A thread that reads the wake-up file descriptor
does not depend on that.

Ctrl-C in a terminal reaches the launcher as well, and the launcher then sends SIGTERM to the ranks: `deepspeed` to one
rank after the other, each once the rank before has ended. So one SIGTERM behind a SIGINT is part of the same request,
however late it comes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, distributed

from homodistil import ranks
from homodistil.errors import Interrupted, StopRequested
from homodistil.exit_codes import of_signal

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
HOW_TO_GO_ON = "to go on, type the same command with run.resume=auto"
# A launcher hands on what its whole process group has received already: copies that arrive together are one request.
SAME_REQUEST_S = 2.0


class _Requests:
    """What this process has been asked."""

    def __init__(self, how_to_go_on: str) -> None:
        self.pid = os.getpid()
        self.how_to_go_on = how_to_go_on
        self.number = 0
        """Of the first signal; 0: none yet."""
        self.is_deferred = False


_requests: _Requests | None = None


@contextlib.contextmanager
def on_signals(how_to_go_on: str = HOW_TO_GO_ON) -> Iterator[None]:
    """Handle SIGNALS inside, restore what was there afterwards. Outside the main thread there is nothing to handle.

    A signal that was ignored before (SIGINT, where a shell script has started the job in the background) stays ignored.

    Args:
        how_to_go_on: what the user is told to type when a signal comes while nothing is trained.
    """
    global _requests
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _requests = _Requests(how_to_go_on)
    ours, wakes = socket.socketpair()
    wakes.setblocking(False)
    threading.Thread(target=_end_on_second_signal, args=(ours,), name="second-signal", daemon=True).start()
    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _on_signal) for number in handled}
    woken_before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(woken_before)
        wakes.close()
        _requests = None


def _on_signal(number: int, _frame: object) -> None:
    if os.getpid() != _requests.pid:  # a child that was forked a moment ago, see _forget_in_child
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _requests.number = _requests.number or number
    if not _requests.is_deferred:
        raise _outside_training(number)


def _end_on_second_signal(wakes: socket.socket) -> None:
    first = first_s = None
    expects_launcher = False
    with wakes:
        while received := wakes.recv(64):  # nothing: the other end was closed
            for number in filter(SIGNALS.__contains__, received):
                if first is None:
                    first, first_s = number, time.monotonic()
                    expects_launcher = number == signal.SIGINT
                elif number == signal.SIGTERM and expects_launcher:
                    expects_launcher = False
                elif time.monotonic() - first_s > SAME_REQUEST_S:
                    os._exit(of_signal(number))


_forking = threading.local()
"""mask: signals that the forking thread had blocked before."""


def _hold_signals() -> None:
    """Until parent or child is ready for them. A child that gets SIGTERM before it has forgotten our handlers would
    lose it (Python drops what is pending when it starts a child), and a pool that ends it would wait for ever."""
    if _requests is not None:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_signals_go() -> None:
    mask = getattr(_forking, "mask", None)
    if mask is not None:
        _forking.mask = None
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _forget_in_child() -> None:
    """A forked worker must end on SIGTERM, which pools rely on, and must not write into our wake-up socket."""
    if _requests is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    _let_signals_go()


os.register_at_fork(before=_hold_signals, after_in_parent=_let_signals_go, after_in_child=_forget_in_child)


def ignore_in_worker(_worker: int = 0) -> None:
    """For processes that prepare data: launchers signal whole process trees, and the rank still needs its workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def at_step_boundaries(device: torch.device) -> Iterator[Callable[[], int]]:
    """Inside, a signal waits for the next boundary. Gives the function to call at each, on every rank.

    It returns the number of the signal that some rank had received when the boundary *before* was reached, 0 for none:
    the same on every rank, without waiting for anything that was not long done.
    """
    agreement = _Agreement(device)
    if _requests is not None:
        _requests.is_deferred = True
    try:
        yield agreement.exchange
    finally:
        if _requests is not None:
            _requests.is_deferred = False
    if number := agreement.last():  # it came in the last step, and what follows has nothing to save
        raise _outside_training(number)


def _outside_training(number: int) -> StopRequested:
    return stop_requested(number, f"outside training; {_requests.how_to_go_on if _requests else HOW_TO_GO_ON}")


def stop_requested(number: int, text: str) -> StopRequested:
    """The ending of a job that signal `number` has stopped. After Ctrl-C it is a `KeyboardInterrupt` as well."""
    kind = Interrupted if number == signal.SIGINT else StopRequested
    return kind(f"stopped by {signal.Signals(number).name} {text}")


class _Agreement:
    """The ranks' requests, exchanged once a step and looked at one step later."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pending: Callable[[], int] | None = None

    def exchange(self) -> int:
        found = self._pending() if self._pending else 0
        self._pending = self._start()
        return found

    def last(self) -> int:
        return max(self._pending() if self._pending else 0, _own())

    def _start(self) -> Callable[[], int]:
        if ranks.world_size() == 1:
            return _own
        return _start_on_gpu(self._device, self._stream) if self._stream else _start_on_cpu(self._device)


def _own() -> int:
    return _requests.number if _requests is not None else 0


def _start_on_cpu(device: torch.device) -> Callable[[], int]:
    flag = torch.tensor([_own()], device=device)
    work = distributed.all_reduce(flag, distributed.ReduceOp.MAX, async_op=True)

    def result() -> int:
        work.wait()
        return int(flag)

    return result


def _start_on_gpu(device: torch.device, side: torch.cuda.Stream) -> Callable[[], int]:
    """On a stream of its own, down to pinned memory: the host waits for this copy alone, never for the step's work."""
    with torch.cuda.stream(side):
        flag = torch.full((1,), _own(), dtype=torch.int32, device=device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, async_op=True).wait()  # the stream waits, not the host
        copy: Tensor = torch.empty(1, dtype=torch.int32, pin_memory=True)
        copy.copy_(flag, non_blocking=True)
        done = side.record_event()

    def result() -> int:
        done.synchronize()
        return int(copy)

    return result
