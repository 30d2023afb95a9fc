"""Build DeepSpeed's optimizers for the CPU once (about a minute), so that no job has to.

python launcher/build_ops.py     # DeepSpeedCPUAdam and FusedAdam, at the same time
"""

import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

BUILDERS = ("CPUAdamBuilder", "FusedAdamBuilder")


def main() -> int:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print("error: no C++ compiler found (g++); install one, for example `apt-get install g++`", file=sys.stderr)
        return 2
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with ProcessPoolExecutor(len(BUILDERS), get_context("spawn")) as pool:
        list(pool.map(build, BUILDERS))
    return 0


def build(builder: str) -> None:
    """One op, in this process: an op that is built already is only loaded."""
    from homodistil.engine.native_ops import load_op

    load_op(builder)


if __name__ == "__main__":
    sys.exit(main())
