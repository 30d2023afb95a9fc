"""What two ranks hand each other."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

from torch import distributed

from homodistil.distributed import groups, ranks
from homodistil.engine.build import init_ranks


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def exchange(num_bytes: list[int]) -> None:
    """Values of these sizes, shorter and longer than what one collective takes, from all and from rank 0."""
    init_ranks()
    for size in num_bytes:
        own = [ranks.rank(), "x" * (size if ranks.rank() else 3)]
        assert ranks.gather(own) == [[0, "xxx"], [1, "x" * size]], size
        assert ranks.on_rank_zero(lambda size=size: (Path("/a"), b"\x00" * size)) == (Path("/a"), b"\x00" * size)
        data = bytes(range(256)) * (size // 200)
        assert ranks.bytes_from_first(b"" if ranks.rank() else data) == data
    print("all arrived", flush=True)


def meet_a_stranger(caught: str) -> None:
    """Somebody has put a pickle where rank 0 will put what it has done for all."""
    init_ranks()
    store = distributed.distributed_c10d._get_default_store()
    if ranks.rank() == 0:
        store.wait(["rank 1 has looked"])
        return
    store.set("once/0/0", pickle.dumps((Trap(Path(caught)), None)))
    groups._calls = iter([0])
    with contextlib.suppress(ValueError):
        groups.once([0, 0], lambda: "made")
        print("taken for a value", flush=True)
    store.set("rank 1 has looked", "")
