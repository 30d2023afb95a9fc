"""One rank of test_host_syncs.py: real training steps, and every point where the host waited for the device.

    torchrun --nproc_per_node 1 worker_host_syncs.py FOLDER

torch's synchronisation debug mode warns where a call waits for the device (`item`, `nonzero`, a copy from or to
pageable memory, ...); the Python stack of each warning says who called. Prints one line `SYNCS {json}` with two lists
of {"by": homodistil | deepspeed | other, "at": "file:line function"}: of all steps measured, and of a wait on purpose.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.harness.product import build_trainer, run_config  # noqa: E402
from benchmarks.harness.shapes import SHAPES, Plan  # noqa: E402
from homodistil.engine.build import init_ranks  # noqa: E402

WARM_UP_STEPS, MEASURED_STEPS = 4, 4
NEVER_LOGGED = "train.log_every_steps=1000"
PACKAGES = ("homodistil", "deepspeed")


def caller(stack: traceback.StackSummary) -> dict[str, str]:
    """The innermost frame of homodistil or DeepSpeed: who asked torch for something that waits."""
    for frame in reversed(stack):
        for package in PACKAGES:
            if package in Path(frame.filename).parts[:-1] and "tests" not in Path(frame.filename).parts:
                return {"by": package, "at": f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"}
    frame = stack[-1]
    return {"by": "other", "at": f"{frame.filename}:{frame.lineno} {frame.name}"}


@contextmanager
def host_syncs(device: torch.device):
    """The list that it gives fills while the body runs."""
    found: list[dict[str, str]] = []

    def note(message, *_: object, **__: object) -> None:
        if "synchronizing CUDA operation" in str(message):
            found.append(caller(traceback.extract_stack()[:-1]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")


def main() -> None:
    work = Path(sys.argv[1])
    device = init_ranks()
    shape = SHAPES["tiny"]
    config = run_config(shape, Plan(interval=40), work, True, 1, [NEVER_LOGGED])
    trainer = build_trainer(shape, config, ROOT / "ds_configs" / "zero2.json", work, device)
    for _ in range(WARM_UP_STEPS):
        trainer.train_step()
    with host_syncs(device) as found:
        for _ in range(MEASURED_STEPS):
            trainer.train_step()
        num_of_steps = len(found)
        torch.ones((), device=device).item()  # has to be seen, or the mode was not on
    print("SYNCS", json.dumps({"of_steps": found[:num_of_steps], "on_purpose": found[num_of_steps:]}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
