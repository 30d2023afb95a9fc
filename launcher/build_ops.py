"""Build DeepSpeed's shared-memory op once (about a minute), so that no job has to.

python launcher/build_ops.py [--optimizers]     # also DeepSpeedCPUAdam and FusedAdam, all at the same time
"""

import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

OPTIMIZERS = ("CPUAdamBuilder", "FusedAdamBuilder")


def main() -> int:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print("error: no C++ compiler found (g++); install one, for example `apt-get install g++`", file=sys.stderr)
        return 2
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    builders = ("ShareMemCommBuilder", *(OPTIMIZERS if "--optimizers" in sys.argv[1:] else ()))
    if len(builders) == 1:
        build(*builders)
        return 0
    with ProcessPoolExecutor(len(builders), get_context("spawn")) as pool:
        list(pool.map(build, builders))
    return 0


def build(builder: str) -> None:
    """One op, in this process: an op that is built already is only loaded."""
    from homodistil.engine.native_ops import load_op

    load_op(builder)


if __name__ == "__main__":
    sys.exit(main())
