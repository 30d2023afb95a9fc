"""What single ranks of the start-up tests do."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

from torch import distributed

from homodistil.distributed import groups, ranks, watchdog
from homodistil.distributed.script_exit import exit_with_code
from homodistil.engine.build import init_ranks
from homodistil.errors import UserError

COLLECTIVE_TIMEOUT_S = 3


def prepare_slowly(how: str, seconds: float) -> None:
    """Rank 0 prepares for longer than a collective may take, alone."""
    init_ranks()
    distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S))
    with exit_with_code(), watchdog.watching(60), watchdog.long_phase("preparing"):
        slow = lambda: time.sleep(seconds) or "made"  # noqa: E731
        result = groups.once(groups.machine_groups(), slow) if how == "once" else ranks.on_rank_zero(slow)
    print(f"rank {ranks.rank()} has {result}", flush=True)


def fail_on_one_machine() -> None:
    """Only rank 1's machine has something wrong."""
    init_ranks()

    def look() -> str:
        if ranks.rank() == 1:
            raise UserError("data.cache_dir: full on rank 1's machine; free it")
        return "fine"

    with exit_with_code(), watchdog.watching(60):
        groups.once(groups.machine_groups(), look)


def group(cache: str) -> None:
    init_ranks()
    folder = Path(cache).expanduser()
    leaders = groups.cache_leaders(folder)
    print(f"machines {groups.machine_groups()} caches {leaders} left {list(folder.iterdir())}", flush=True)
