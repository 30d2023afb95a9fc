"""No step that is not logged waits for the device: what would is DeepSpeed's own, listed here with its reason.

worker_host_sync.py says what is seen, and how.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).absolute().parents[2]
WORKER = ROOT / "tests" / "distributed" / "worker_host_sync.py"

ALLOWED = {
    ("deepspeed/runtime/utils.py", "is_invalid_grad_norm"): "one read a step: is the gradient finite?",
    ("deepspeed/runtime/utils.py", "mask_nan_or_inf_with_val_inplace"): "a constant on its way to the device",
    ("deepspeed/runtime/zero/stage_1_and_2.py", "has_overflow"): "bf16: the same question, of the overflow flag",
}
"""(file, function) -> why it may wait: one point a step, behind the backward pass, that we cannot leave out."""


def found_in_steps(options: dict, cache_dir: Path, folder: Path) -> dict[str, dict[tuple[str, str], set[str]]]:
    """Kind of step -> (file, function) -> what it did that would wait."""
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(WORKER), json.dumps(options), str(cache_dir), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    found: dict = {}
    for kind, sites in json.loads(line.removeprefix("FOUND ")).items():
        found[kind] = {}
        for what, file, function, _count in sites:
            found[kind].setdefault((file, function), set()).add(what)
    return found


@pytest.mark.parametrize(("positions", "bf16"), [("masked", True), ("all", False)])
def test_nothing_but_deepspeeds_check_of_the_gradient_waits(positions, bf16, cache_dir, tmp_path):
    found = found_in_steps({"kl_positions": positions, "bf16": bf16}, cache_dir, tmp_path)
    assert ("deepspeed/runtime/utils.py", "is_invalid_grad_norm") in found["steps"], "the watch sees nothing"
    assert not {where: what for where, what in found["steps"].items() if where not in ALLOWED}
    # A loss that looks at its own value is seen, forward and backward.
    worker = str(WORKER.relative_to(ROOT))
    assert found["peeking"][worker, "forward"] == {"_local_scalar_dense"}
    assert found["peeking"][worker, "backward"] == {"index with a mask", "tolist"}
