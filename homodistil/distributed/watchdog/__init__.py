"""Ranks watch over each other: one that is dead or stuck ends the job with a line that names it, never a silent hang.

    with watching(rank_timeout_s):                   # job.run; a thread a rank, a store of its own on rank 0
        progress(step, "training")                   # an assignment; every rank reports the same sequence
        for batch in each("evaluating", batches):    # one report a batch
        with long_phase("preparing data"):           # however long it takes

Every second a rank publishes a heartbeat (heartbeat.py): how many reports it has made (reports.py), the last one,
how long ago that was, and the line of ours that its main thread is in. Rank 0 reads all signs and judges
(failure_detector.py); the others read rank 0's and judge rank 0 (watchdog.py).
"""

from homodistil.distributed.watchdog.reports import TRAINING, each, long_phase, progress
from homodistil.distributed.watchdog.watchdog import watching

__all__ = ["TRAINING", "each", "long_phase", "progress", "watching"]
