"""What torch.compile needs from the machine and from torch's settings: for teacher.runtime and student.compile alike.

The cache of compiled code (TORCHINDUCTOR_CACHE_DIR) stays the one of the user, shared by all ranks on purpose: its
files are written under locks that end with their holder, and what one rank has compiled the others load.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

import torch

from homodistil.errors import UserError
from homodistil.kernels.triton_support import triton_installed

MAX_COMPILE_THREADS = 4
"""Worker processes per rank at most, each with a torch of its own in memory: the graphs here hold few kernels."""


def require_compiler(field: str, device: torch.device) -> None:
    """Raises `UserError` naming `field` when torch.compile could not make code for `device` here."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"{field}: torch.compile needs a C++ compiler and {compiler!r} is not on the PATH; install g++, point the "
            f"environment variable CXX at a compiler, or leave {field} at its default"
        )
    if device.type == "cuda" and not triton_installed():
        raise UserError(
            f"{field}: torch.compile needs the package triton on a GPU and it is not installed; install triton, or "
            f"leave {field} at its default"
        )


def prepare(num_compilations: int) -> None:
    """Make room for that many more compilations of one function, and settle threads. Call before compiling."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    # torch gives up on a function after 8 compilations; widths are known to change more often, and how often.
    dynamo.recompile_limit += num_compilations
    dynamo.accumulated_recompile_limit += num_compilations
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        inductor.compile_threads = _compile_threads()
    # Generated loops hold their number of threads. Said here it is part of the cache's key in every version of torch:
    # what another job compiled for one thread is not taken for two.
    inductor.cpp.threads = torch.get_num_threads()


def _compile_threads() -> int:
    """This rank's share of the cores. 1 compiles in the rank itself, with no worker processes to outlive it."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1)))
    return min(MAX_COMPILE_THREADS, max(1, len(os.sched_getaffinity(0)) // local_ranks))


@contextlib.contextmanager
def failures_named(field: str) -> Iterator[None]:
    """Turn a failure of torch.compile itself inside into a `UserError` that names `field`."""
    from torch._dynamo.exc import TorchDynamoException  # not at import time: most runs compile nothing

    try:
        yield
    except TorchDynamoException as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{field}: torch.compile failed ({reason}); leave {field} at its default") from error
