"""Build DeepSpeed's shared-memory op once (about a minute), so that no job has to.

python launcher/build_ops.py [--optimizers]     # also DeepSpeedCPUAdam and FusedAdam: one more minute each
"""

import os
import shutil
import sys

OPTIMIZERS = ("CPUAdamBuilder", "FusedAdamBuilder")


def main() -> int:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print("error: no C++ compiler found (g++); install one, for example `apt-get install g++`", file=sys.stderr)
        return 2
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from homodistil.engine.native_ops import load_op

    for builder in ("ShareMemCommBuilder", *(OPTIMIZERS if "--optimizers" in sys.argv[1:] else ())):
        load_op(builder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
