"""Watchdog: if a rank dies or hangs, the job ends with a line that names this rank, instead of hanging silently.

    with watching(rank_timeout_s):                   # around the job; one thread per rank, connected to rank 0
        progress(step, "training")                   # only an assignment; every rank reports the same sequence
        for batch in each("evaluating", batches):    # one report per batch
        with long_phase("preparing data"):           # may take longer than rank_timeout_s

Every second each rank sends a heartbeat (heartbeat.py) with the number of reports that it has made (reports.py), the
last report and its age, and the current line of its main thread in this package. Rank 0 reads the heartbeats of all
ranks and detects failures (failure_detector.py); all other ranks only watch rank 0 (watchdog.py).
"""

from homodistil.distributed.watchdog.reports import TRAINING, each, long_phase, progress
from homodistil.distributed.watchdog.watchdog import watching

__all__ = ["TRAINING", "each", "long_phase", "progress", "watching"]
