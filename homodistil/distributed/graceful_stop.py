"""Stopping on request: SIGINT (Ctrl-C), SIGTERM or SIGUSR1 to any rank ends all of them at the same step, behind a
checkpoint.

    handle_signals()                              # scripts, first of all: a signal ends the process, with one line
    with on_signals():                            # job.run: from here on it is raised as StopRequested
        ...
        with at_step_boundaries(device) as stop_agreed:       # Trainer.train: it waits for the next boundary
            train_step()
            if stop_agreed(): save and raise StopRequested    # the same step on every rank

A second request ends the process at once, wherever it is: Python runs its own handlers only between two of its
instructions, which a rank that hangs in a collective never reaches. A thread that reads the wake-up file descriptor
does not depend on that. What comes within SAME_REQUEST_S is the same request; so is a SIGTERM behind a SIGINT, whenever
it comes: launchers answer Ctrl-C, which the ranks have received already, by ending them one after the other.

This module imports nothing that takes time. Without `handle_signals` (a notebook, a program that calls job.run) the
handlers of before are back after `on_signals`, and a SIGINT is raised as `Interrupted`, which is a KeyboardInterrupt.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from homodistil.distributed import invocation
from homodistil.distributed.exit_codes import STOPPED, of_signal
from homodistil.distributed.launcher_env import rank_before_joining
from homodistil.errors import Interrupted, StopRequested, UserError

if TYPE_CHECKING:
    import torch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A launcher hands on what its whole process group has received already: copies that arrive together are one request.
SAME_REQUEST_S = 2.0


class _Mode(enum.Enum):
    """What the first signal does."""

    AT_ONCE = enum.auto()
    """Ends the process: there is nothing to save, and it may be inside an import or a library's call."""
    RAISED = enum.auto()
    DEFERRED = enum.auto()
    """To the next step boundary."""
    LEAVING = enum.auto()
    """It came before, and what it asked for is being done."""
    MET = enum.auto()
    """All is saved and the process ends by itself: what launchers still send on the way is nothing new."""


class _Requests:
    """What this process has been asked."""

    def __init__(self, mode: _Mode, how_to_go_on: str) -> None:
        self.pid = os.getpid()
        self.number = 0
        """Number of the first signal; 0: none yet."""
        self.mode, self.how_to_go_on = mode, how_to_go_on
        self._ours, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        # A shell starts jobs in the background with SIGINT ignored: Ctrl-C is not meant for them.
        self._numbers = [n for n in SIGNALS if n != signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
        threading.Thread(target=_listen, args=(self, self._ours), name="signals", daemon=True).start()
        self._before = {number: signal.signal(number, _on_signal) for number in self._numbers}
        self._woken_before = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)

    def restore(self) -> None:
        """Handlers of before; the thread ends."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._woken_before)
        self._wakes.close()


_requests: _Requests | None = None


def handle_signals() -> None:
    """Until this process ends: a signal ends it at once, with a line on rank 0. For scripts, before anything else."""
    global _requests
    invocation.remember()
    if threading.current_thread() is threading.main_thread():
        _requests = _Requests(_Mode.AT_ONCE, "the same command starts it again")


@contextlib.contextmanager
def on_signals(how_to_go_on: str = "run it again to go on") -> Iterator[None]:
    """Inside, a signal is raised as `StopRequested`. Outside the main thread there is nothing to handle.

    Args:
        how_to_go_on: what a line says behind its semicolon.
    """
    global _requests
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_script = _requests is not None
    requests = _requests = _requests or _Requests(_Mode.RAISED, how_to_go_on)
    before = requests.how_to_go_on
    requests.mode, requests.how_to_go_on = _Mode.RAISED, how_to_go_on
    try:
        yield
    finally:
        if not is_script:
            requests.restore()
            _requests = None
        elif requests.mode is _Mode.RAISED:
            requests.mode, requests.how_to_go_on = _Mode.AT_ONCE, before


def _on_signal(number: int, _frame: object) -> None:
    if os.getpid() != _requests.pid:  # a child that was forked a moment ago, see _forget_in_child
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _requests.number = _requests.number or number
    if _requests.mode is _Mode.RAISED:
        _requests.mode = _Mode.LEAVING
        raise _outside_training(number)


def _listen(requests: _Requests, wakes: socket.socket) -> None:
    """In a thread: what must not wait for the main thread."""
    first, first_s = 0, 0.0
    with wakes:
        while received := wakes.recv(64):  # nothing: the other end was closed
            for number in filter(SIGNALS.__contains__, received):
                if requests.mode is _Mode.AT_ONCE:
                    _end(number, requests.how_to_go_on)
                elif not first:
                    first, first_s = number, time.monotonic()
                elif time.monotonic() - first_s > SAME_REQUEST_S and not _is_echo(number, first, requests.mode):
                    os._exit(of_signal(number))


def _is_echo(number: int, first: int, mode: _Mode) -> bool:
    if mode is _Mode.MET:
        return number != signal.SIGINT
    return first == signal.SIGINT and number == signal.SIGTERM


def _end(number: int, how_to_go_on: str) -> None:
    with contextlib.suppress(OSError, UserError):
        if rank_before_joining() == 0:  # past Python's buffers, whose locks the main thread may hold
            start = "\n" if os.isatty(2) else ""
            os.write(2, f"{start}stopped by {signal.Signals(number).name}; {how_to_go_on}\n".encode())
    os._exit(STOPPED)


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
    the same on every rank, without waiting for anything that was not long done. A `StopRequested` that is raised inside
    says that everything is saved.
    """
    from homodistil.distributed.stop_agreement import Agreement

    agreement = Agreement(device, _own)
    _set_mode(_Mode.DEFERRED)
    try:
        yield agreement.exchange
    except StopRequested:
        _set_mode(_Mode.MET)
        raise
    except BaseException:
        _set_mode(_Mode.RAISED)
        raise
    _set_mode(_Mode.RAISED)
    if number := agreement.last():  # it came in the last step, and what follows has nothing to save
        _set_mode(_Mode.LEAVING)
        raise _outside_training(number)


def _set_mode(mode: _Mode) -> None:
    if _requests is not None:
        _requests.mode = mode


def _own() -> int:
    return _requests.number if _requests is not None else 0


def _outside_training(number: int) -> StopRequested:
    how_to_go_on = _requests.how_to_go_on if _requests is not None else "run it again to go on"
    return stopped(number, f"stopped by {signal.Signals(number).name} outside training; {how_to_go_on}")


def go_on_with() -> str:
    """ ": COMMAND" for the end of a line: what to type to continue. Nothing where no script was started."""
    command = invocation.resuming()
    return f": {command}" if command else ""


def stopped(number: int, text: str) -> StopRequested:
    """What a stop on signal `number` is raised as."""
    return (Interrupted if number == signal.SIGINT else StopRequested)(text)
