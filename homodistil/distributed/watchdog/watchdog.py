"""The watchdog thread of a rank: sends heartbeats, receives those of other ranks, ends the process if one is lost.

Rank 0 watches all ranks, and all other ranks watch only rank 0, so that the traffic is linear in the number of ranks.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator

from homodistil.distributed import ranks
from homodistil.distributed.exit_codes import FAILED, RANK_LOST, code_of
from homodistil.distributed.watchdog import reports
from homodistil.distributed.watchdog.failure_detector import SILENT_S, FailureDetector
from homodistil.distributed.watchdog.heartbeat import local_heartbeat
from homodistil.distributed.watchdog.transport import connect
from homodistil.errors import CheckFailed, RankLost, StopRequested, UserError

BEAT_S = 1.0
HURRIED_BEAT_S = 0.05
# If the sleep of the thread takes this much longer than it should, the whole process was suspended.
AWAY_S = 5.0
# A rank that fails prints its error after SPEAK_AFTER_S unless rank 0 has printed the same; then all others end, too.
SPEAK_AFTER_S = 2.0
FOLLOW_AFTER_S = 4.0
ADVICE = "the job ends; run.resume=auto resumes from the last checkpoint"
_ENDINGS = (UserError, CheckFailed, RankLost, StopRequested)
# Parts of error messages of gloo, NCCL and torch for lost connections; most of these are plain RuntimeErrors.
_LOST_CONNECTION = ("onnection closed", "onnection reset", "onnection was", "roken pipe", "gloo", "NCCL", "imed out")


@contextlib.contextmanager
def watching(rank_timeout_s: float) -> Iterator[None]:
    """Run the watchdog inside this context. Every rank enters and leaves it, after joining the process group.

    If a rank is lost, the thread ends this process with the exit code RANK_LOST, because the main thread may be in a
    collective that never returns. An exception on this rank is sent to all other ranks, so that they end, too. Its
    attribute `is_said` is set to whether another rank prints it.

    Args:
        rank_timeout_s: seconds without progress after which a rank counts as stuck.
    """
    reports.progress(0, "starting")
    watcher = _Watcher(rank_timeout_s)
    try:
        yield
    except BaseException as error:
        watcher.leave_because_of(error)
        raise
    watcher.leave()


class _Watcher:
    """Watches until it is left. The constructor connects to the other ranks and starts the thread; collective."""

    def __init__(self, rank_timeout_s: float) -> None:
        self._rank, self._num_ranks = ranks.rank(), ranks.world_size()
        self._judge = FailureDetector(self._rank, rank_timeout_s)
        self._channel = connect()
        self._beat = 0
        self._end: tuple[int, str] | None = None
        self._followed_s: float | None = None
        self._hurry, self._is_done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()

    # -- leaving, in the main thread

    def leave(self) -> None:
        """Stop watching after success on all ranks; a rank that has reported its end no longer counts as lost."""
        self._say_end(0, "")
        ranks.barrier()
        self._wait_until(lambda: self._judge.num_ended() >= min(self._num_ranks, 2 if self._rank else self._num_ranks))
        self._stop()

    def leave_because_of(self, error: BaseException) -> None:
        """Send the error to all other ranks, and decide which rank prints it.

        Does not return if the error is a broken connection to a lost rank: the thread then ends the process.
        """
        if _is_lost_connection(error):
            self._thread.join(timeout=SILENT_S + FOLLOW_AFTER_S + 5 * BEAT_S)
        self._say_end(code_of(error), _one_line(error))
        if self._rank == 0:  # stay until all ranks have received it
            self._wait_until(lambda: self._judge.num_ended() == self._num_ranks)
            is_said = False
        else:
            is_said = self._wait_until(lambda: self._judge.end_of(0) == self._end)
        error.is_said = is_said
        self._stop()

    def _say_end(self, code: int, reason: str) -> None:
        self._end = (code, reason)
        self._hurry.set()

    def _wait_until(self, is_true) -> bool:
        deadline = time.monotonic() + SPEAK_AFTER_S
        while not is_true() and time.monotonic() < deadline:
            time.sleep(HURRIED_BEAT_S)
        return is_true()

    def _stop(self) -> None:
        self._is_done.set()
        self._thread.join()
        self._channel.close()

    # -- watching, in the thread

    def _watch(self) -> None:
        while not self._is_done.is_set():
            self._exchange()
            if self._end is None:
                self._act()
            self._rest()

    def _exchange(self) -> None:
        self._beat += 1
        local = local_heartbeat(self._beat, self._end)
        self._channel.send(local)
        self._judge.see(self._rank, local)
        signs, closed = self._channel.receive()
        for rank, sign in signs.items():
            self._judge.see(rank, sign)
        for rank in closed:
            self._judge.lose(rank)

    def _rest(self) -> None:
        start = time.monotonic()
        if self._end is None:
            self._hurry.wait(BEAT_S)
        else:
            time.sleep(HURRIED_BEAT_S)
        if time.monotonic() - start > BEAT_S + AWAY_S:
            self._judge.reset()

    def _act(self) -> None:
        if ended := self._judge.first_failure():
            self._follow(*ended)
        elif lost := self._judge.gone():
            self._end_process(f"{lost}; {ADVICE}")
        elif self._rank == 0 and (stuck := self._judge.stuck()):
            self._end_process(f"{stuck}; {ADVICE}")

    def _follow(self, rank: int, code: int, reason: str) -> None:
        """React to the failure of another rank: end this process, unless its main thread fails itself before."""
        self._followed_s = self._followed_s or time.monotonic()
        if code == RANK_LOST:
            self._leave_process(code, reason)
        elif time.monotonic() - self._followed_s > FOLLOW_AFTER_S:
            # Before training there is nothing to resume from, so that all ranks end with the code of the failed rank.
            if code == FAILED and reports.has_trained():
                self._end_process(f"rank {rank} failed: {reason}; {ADVICE}")
            self._leave_process(code, reason)

    def _end_process(self, text: str) -> None:
        """Print the error once and end: rank 0 or, if it is lost, rank 1 prints; other ranks wait to be ended first."""
        if self._rank > 1:
            time.sleep(SPEAK_AFTER_S)
        print(f"error: {text}", file=sys.stderr, flush=True)
        self._leave_process(RANK_LOST, text)

    def _leave_process(self, code: int, text: str) -> None:
        self._end = (code, text)
        deadline = time.monotonic() + SPEAK_AFTER_S
        while self._rank == 0 and self._judge.num_present() > 1 and time.monotonic() < deadline:
            self._exchange()  # until all other ranks have received it and left
            time.sleep(HURRIED_BEAT_S)
        os._exit(code)


def _is_lost_connection(error: BaseException) -> bool:
    is_plain = isinstance(error, RuntimeError) and not isinstance(error, _ENDINGS)
    return is_plain and any(part in str(error) for part in _LOST_CONNECTION)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, _ENDINGS) else f"{type(error).__name__}: {text}"
