"""No step that is not logged waits for the device: what would is DeepSpeed's own, listed here with its reason.

worker_host_sync.py says what is seen, and how.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fork_server import ForkServer

ROOT = Path(__file__).absolute().parents[2]
WORKER = ROOT / "tests" / "distributed" / "worker_host_sync.py"

ALLOWED = {
    ("deepspeed/runtime/utils.py", "is_invalid_grad_norm"): "one read a step: is the gradient finite?",
    ("deepspeed/runtime/utils.py", "mask_nan_or_inf_with_val_inplace"): "a constant on its way to the device",
    ("deepspeed/runtime/zero/stage_1_and_2.py", "has_overflow"): "bf16: the same question, of the overflow flag",
}
"""(file, function) -> why it may wait: one point a step, behind the backward pass, that we cannot leave out."""


def found_in_steps(
    server: ForkServer, options: dict, cache_dir: Path, folder: Path
) -> dict[str, dict[tuple[str, str], set[str]]]:
    """Kind of step -> (file, function) -> what it did that would wait."""
    output = server.run(WORKER, [json.dumps(options), str(cache_dir), str(folder)], num_ranks=1, timeout_s=180)
    (line,) = [line for line in output.splitlines() if line.startswith("FOUND ")]
    found: dict = {}
    for kind, sites in json.loads(line.removeprefix("FOUND ")).items():
        found[kind] = {}
        for what, file, function, _count in sites:
            found[kind].setdefault((file, function), set()).add(what)
    return found


@pytest.mark.parametrize(("positions", "bf16"), [("masked", True), ("all", False)])
def test_nothing_but_deepspeeds_check_of_the_gradient_waits(server, positions, bf16, cache_dir, tmp_path):
    found = found_in_steps(server, {"kl_positions": positions, "bf16": bf16}, cache_dir, tmp_path)
    assert ("deepspeed/runtime/utils.py", "is_invalid_grad_norm") in found["steps"], "the watch sees nothing"
    assert not {where: what for where, what in found["steps"].items() if where not in ALLOWED}
    # A loss that looks at its own value is seen, forward and backward.
    worker = str(WORKER.relative_to(ROOT))
    assert found["peeking"][worker, "forward"] == {"_local_scalar_dense"}
    assert found["peeking"][worker, "backward"] == {"index with a mask", "tolist"}
