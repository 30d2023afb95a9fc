"""Each fused operation against eager torch and the best library: `python benchmarks/kernels.py --help`.

All of it is in kernel_comparison.py. This file says its name alone: Hugging Face has a package called `kernels`, which
transformers looks for, and whatever runs in this folder would find this file in its place.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def become_the_package() -> None:
    """Imported as `kernels`: hand over to the package of that name, if it is installed."""
    elsewhere = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    if spec := PathFinder.find_spec("kernels", elsewhere):
        sys.modules["kernels"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["kernels"])


if __name__ == "__main__":
    from kernel_comparison import main

    main()
else:
    become_the_package()
