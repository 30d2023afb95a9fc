"""Detects ranks that are lost or stuck from heartbeats and the times at which they changed.

Clocks of different machines are never compared: the receiving rank measures for how long a heartbeat has not changed.

* Gone: the process does not exist any more (if that can be looked up), or sent no heartbeat for SILENT_S.
* Stuck: no report for `rank_timeout_s`, and no rank is in a long phase. Of the ranks with the fewest reports, those
  that are not in a collective are stuck; all others wait for them.
"""

from __future__ import annotations

import time

import psutil

from homodistil.distributed.watchdog.heartbeat import Heartbeat

SILENT_S = 15.0


class FailureDetector:
    """Decides from the heartbeats of the other ranks which of them is lost or stuck.

    Args:
        own_rank: the rank of this process, which is never reported as lost.
        rank_timeout_s: seconds without a report after which a rank counts as stuck.
    """

    def __init__(self, own_rank: int, rank_timeout_s: float) -> None:
        self._own, self._timeout_s = own_rank, rank_timeout_s
        self._signs: dict[int, Heartbeat] = {}
        self._seen_s: dict[int, float] = {}
        self._closed: set[int] = set()

    def see(self, rank: int, sign: Heartbeat) -> None:
        """Take in the newest heartbeat of `rank`."""
        if rank not in self._signs or self._signs[rank].beat != sign.beat:
            self._seen_s[rank] = time.monotonic()
        self._signs[rank] = sign

    def lose(self, rank: int) -> None:
        """Note that the connection to `rank` has ended."""
        self._closed.add(rank)

    def reset(self) -> None:
        """Restart all clocks after this process was suspended: it cannot know how long other ranks were silent."""
        self._seen_s = dict.fromkeys(self._seen_s, time.monotonic())

    def end_of(self, rank: int) -> tuple[int, str] | None:
        """(exit code, reason) that `rank` has reported; None if it has not ended by itself."""
        return self._signs[rank].end if rank in self._signs else None

    def num_ended(self) -> int:
        """Number of ranks that have reported their end or closed their connection."""
        return sum(1 for rank, sign in self._signs.items() if sign.end or rank in self._closed)

    def num_present(self) -> int:
        """Number of ranks whose connection is open, this one included."""
        return len(self._signs.keys() - self._closed)

    def first_failure(self) -> tuple[int, int, str] | None:
        """(rank, exit code, reason) of a rank that has reported a failure; None if there is none."""
        for rank, sign in self._signs.items():
            if rank != self._own and sign.end and sign.end[0]:
                return rank, *sign.end
        return None

    def gone(self) -> str | None:
        """A sentence that names the ranks that are gone; None if there are none."""
        reasons = {rank: self._reason(rank, sign) for rank, sign in self._signs.items() if rank != self._own}
        silent = [
            f"{self._signs[rank].name(rank)} is gone: {reason}; last seen in {self._signs[rank].doing()}, "
            f"{self._age_s(rank):.0f} s ago"
            for rank, reason in reasons.items()
            if reason
        ]
        return "; ".join(silent) or None

    def stuck(self) -> str | None:
        """A sentence that names the ranks that are stuck, for which all others wait; None if there are none."""
        running = {rank: sign for rank, sign in self._signs.items() if not sign.end}
        if not running or any(sign.is_long for sign in running.values()):
            return None
        least = min(sign.count for sign in running.values())
        behind = {rank: sign for rank, sign in running.items() if sign.count == least}
        idle_s = min(sign.idle_s + self._age_s(rank) for rank, sign in behind.items())
        if idle_s < self._timeout_s:
            return None
        culprits = {rank: sign for rank, sign in behind.items() if not sign.waits} or behind
        named = "; ".join(f"{sign.name(rank)} is stuck in {sign.doing()}" for rank, sign in culprits.items())
        blameless = ", ".join(str(rank) for rank in running if rank not in culprits)
        waiting = f"; waiting for it: rank {blameless}" if blameless else ""
        return f"{named}, no progress for {idle_s:.0f} s (run.rank_timeout_s is {self._timeout_s:g}){waiting}"

    def _age_s(self, rank: int) -> float:
        return time.monotonic() - self._seen_s[rank]

    def _reason(self, rank: int, sign: Heartbeat) -> str | None:
        if sign.end:
            return None
        state = _state_of(sign) if self._is_here(sign) else None
        if state in (_NO_PROCESS, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return "its process has ended (killed, or out of memory?)"
        if rank in self._closed:
            return "its connection has closed (process or machine lost)"
        if self._age_s(rank) < SILENT_S:
            return None
        if state is None:
            return f"no heartbeat for {SILENT_S:.0f} s (machine or network lost, or stopped by a signal)"
        # A process that is busy in one long call is not stopped; rank_timeout_s applies to it.
        return f"stopped by a signal for {SILENT_S:.0f} s" if state == psutil.STATUS_STOPPED else None

    def _is_here(self, sign: Heartbeat) -> bool:
        local = self._signs.get(self._own)
        return local is not None and (local.host, local.namespace) == (sign.host, sign.namespace)


_NO_PROCESS = "no process"


def _state_of(sign: Heartbeat) -> str:
    try:
        return psutil.Process(sign.pid).status()
    except psutil.NoSuchProcess:
        return _NO_PROCESS
