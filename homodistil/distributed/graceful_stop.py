"""Stopping on request: SIGINT (Ctrl-C), SIGTERM or SIGUSR1 to any rank stops all ranks at the same step.

    handle_signals()                              # first call of a script: a signal ends the process with one line
    with on_signals():                            # around a job: a signal is raised as StopRequested
        ...
        with at_step_boundaries(device) as stop_agreed:       # in training: a signal waits for the next boundary
            train_step()
            if stop_agreed(): save and raise StopRequested    # at the same step on every rank

A second request ends the process at once. Python runs signal handlers only between two bytecode instructions, which a
rank that hangs in a collective never reaches; a thread that reads the wake-up file descriptor does not depend on that.
Signals within SAME_REQUEST_S count as one request, and so does a SIGTERM at any time after a SIGINT: launchers react to
Ctrl-C, which the ranks have received as well, by ending the ranks one after the other.

This module imports nothing slow. Without `handle_signals` (in a notebook, or a program that uses the Python API), the
previous handlers are restored after `on_signals`, and SIGINT is raised as `Interrupted`, a KeyboardInterrupt.
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
    from types import FrameType

    import torch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A launcher forwards signals that its process group has received already; copies within this time are one request.
SAME_REQUEST_S = 2.0


class _Mode(enum.Enum):
    """Effect of the first signal."""

    AT_ONCE = enum.auto()
    """Ends the process: there is nothing to save, and it may be inside an import or a library call."""
    RAISED = enum.auto()
    """Raises `StopRequested`."""
    DEFERRED = enum.auto()
    """Waits for the next step boundary."""
    LEAVING = enum.auto()
    """The first signal has been received, and the process is stopping."""
    MET = enum.auto()
    """Everything is saved and the process ends by itself, so further signals of a launcher are ignored."""


class _Requests:
    """The stop requests that this process has received, and its signal handlers."""

    def __init__(self, mode: _Mode, how_to_go_on: str) -> None:
        self.pid = os.getpid()
        self.number = 0
        """Number of the first signal; 0 if there was none."""
        self.mode, self.how_to_go_on = mode, how_to_go_on
        self._ours, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        # Shells start background jobs with SIGINT ignored, because Ctrl-C is not meant for them.
        self._numbers = [n for n in SIGNALS if n != signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
        threading.Thread(target=_listen, args=(self, self._ours), name="signals", daemon=True).start()
        self._before = {number: signal.signal(number, _on_signal) for number in self._numbers}
        self._woken_before = signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)

    def restore(self) -> None:
        """Restore the previous handlers, and end the thread."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._woken_before)
        self._wakes.close()


_requests: _Requests | None = None


def handle_signals() -> None:
    """From now on a signal ends this process at once, with a line on rank 0. Scripts call it first of all."""
    global _requests
    invocation.remember()
    if threading.current_thread() is threading.main_thread():
        _requests = _Requests(_Mode.AT_ONCE, "the same command starts it again")


@contextlib.contextmanager
def on_signals(how_to_go_on: str = "run it again to go on") -> Iterator[None]:
    """Inside this context a signal is raised as `StopRequested`. Does nothing outside the main thread.

    Args:
        how_to_go_on: text after the semicolon of the message, which says how to continue.
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


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _requests.pid:  # a child that has just been forked, see _forget_in_child
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if _requests.mode is _Mode.RAISED and _is_in_hook_of_fork(frame):
        _send_again(number)
        return
    _requests.number = _requests.number or number
    if _requests.mode is _Mode.RAISED:
        _requests.mode = _Mode.LEAVING
        raise _outside_training(number)


def _listen(requests: _Requests, wakes: socket.socket) -> None:
    """Runs in a thread: handle the signals that must not wait for the main thread."""
    first, first_s = 0, 0.0
    with wakes:
        while received := wakes.recv(64):  # empty once `restore` has closed the other end
            for number in filter(SIGNALS.__contains__, received):
                if requests.mode is _Mode.AT_ONCE:
                    _end(number, requests.how_to_go_on)
                elif not first:
                    first, first_s = number, time.monotonic()
                    _send_again(number)  # another thread may have taken it, while the main one waits in C
                elif time.monotonic() - first_s > SAME_REQUEST_S and not _is_echo(number, first, requests.mode):
                    os._exit(of_signal(number))


def _is_echo(number: int, first: int, mode: _Mode) -> bool:
    if mode is _Mode.MET:
        return number != signal.SIGINT
    return first == signal.SIGINT and number == signal.SIGTERM


def _end(number: int, how_to_go_on: str) -> None:
    with contextlib.suppress(OSError, UserError):
        if rank_before_joining() == 0:  # os.write, because the main thread may hold the locks of Python's buffers
            start = "\n" if os.isatty(2) else ""
            os.write(2, f"{start}stopped by {signal.Signals(number).name}; {how_to_go_on}\n".encode())
    os._exit(STOPPED)


_forking = threading.local()
"""`mask`: the signals that the forking thread had blocked before the fork; None outside one."""
SEND_AGAIN_S = 0.02


def _is_in_hook_of_fork(frame: FrameType | None) -> bool:
    """Whether an exception raised at `frame` of the main thread would be lost: Python drops those of hooks of a fork.

    `mask` is set while hooks of other libraries run, for ours comes first before a fork. The first and last lines of
    our hooks lie outside of that time, so the frames are searched for them.
    """
    if getattr(_forking, "mask", None) is not None:
        return True
    hooks = {hook.__code__ for hook in (_hold_signals, _let_signals_go, _forget_in_child)}
    while frame is not None and frame.f_code not in hooks:
        frame = frame.f_back
    return frame is not None


def _send_again(number: int) -> None:
    """To the main thread, in a moment, if it has not handled it by then."""
    timer = threading.Timer(SEND_AGAIN_S, _interrupt_main_thread, (number,))
    timer.daemon = True
    timer.start()


def _interrupt_main_thread(number: int) -> None:
    if _requests is not None and not _requests.number:  # its handler has not run, or not where it could raise
        signal.pthread_kill(threading.main_thread().ident, number)


def _hold_signals() -> None:
    """Block signals during a fork, until parent and child are ready for them.

    A child that received SIGTERM while it still has our handlers would lose the signal (Python drops pending signals
    after a fork), and a pool that wants to end the child would wait for ever.
    """
    if _requests is not None:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _let_signals_go() -> None:
    mask = getattr(_forking, "mask", None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _forking.mask = None


def _forget_in_child() -> None:
    """Restore default handlers in a forked worker: pools end workers by SIGTERM, and it must not use our socket."""
    if _requests is not None:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    _let_signals_go()


os.register_at_fork(before=_hold_signals, after_in_parent=_let_signals_go, after_in_child=_forget_in_child)


def ignore_in_worker(_worker: int = 0) -> None:
    """Ignore signals in a data worker: launchers signal whole process trees, but a rank needs its workers to stop well.

    Usable as `worker_init_fn` of a DataLoader.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def at_step_boundaries(device: torch.device) -> Iterator[Callable[[], int]]:
    """Inside this context a signal waits for the next step boundary. Every rank enters it.

    Args:
        device: device of the collectives.

    Yields:
        A function that every rank must call at each step boundary. It returns the number of a signal that any rank had
        received at the *previous* boundary, or 0, the same on every rank. It does not have to wait, because this
        exchange was started one step earlier. If it is not 0, the caller saves and raises `StopRequested`.

    Raises:
        StopRequested: at the end of the context, if a signal was received during the last step.
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
    if number := agreement.last():  # received during the last step; there is nothing left to save
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
    """ ": COMMAND" for the end of a message, the command that continues the run; "" if no script was started."""
    command = invocation.resuming()
    return f": {command}" if command else ""


def stopped(number: int, text: str) -> StopRequested:
    """The exception to raise for a stop by signal `number`."""
    return (Interrupted if number == signal.SIGINT else StopRequested)(text)
