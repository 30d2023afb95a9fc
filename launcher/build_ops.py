"""Build DeepSpeed's shared-memory op once (about a minute), so that no job has to.

    python launcher/build_ops.py [--optimizers]     # also DeepSpeedCPUAdam and FusedAdam: one more minute each

A job that was killed while building leaves a lock that every later job waits for, for ever: it is removed first.
"""

import os
import shutil
import sys
from pathlib import Path

OPTIMIZERS = ("CPUAdamBuilder", "FusedAdamBuilder")


def main() -> int:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print("error: no C++ compiler found (g++); install one, for example `apt-get install g++`", file=sys.stderr)
        return 2
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if folder:  # without it the folder is shared with other projects, whose build may be going on
        for lock in Path(folder).rglob("lock"):
            lock.unlink()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.accelerator import get_accelerator

    for builder in ("ShareMemCommBuilder", *(OPTIMIZERS if "--optimizers" in sys.argv[1:] else ())):
        get_accelerator().create_op_builder(builder).load()
    return 0


if __name__ == "__main__":
    sys.exit(main())
