"""Build DeepSpeed's optimizers for the CPU once (half a minute each), so that no job has to.

python launcher/build_ops.py                  # DeepSpeedCPUAdam and FusedAdam
python launcher/build_ops.py CPUAdamBuilder   # one of them
"""

import os
import shutil
import sys

BUILDERS = ("CPUAdamBuilder", "FusedAdamBuilder")


def main() -> int:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print("error: no C++ compiler found (g++); install one, for example `apt-get install g++`", file=sys.stderr)
        return 2
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from homodistil.engine.native_ops import load_op

    for builder in sys.argv[1:] or BUILDERS:
        load_op(builder)  # one that is built already is only loaded; one at a time, as the lock has it
    return 0


if __name__ == "__main__":
    sys.exit(main())
