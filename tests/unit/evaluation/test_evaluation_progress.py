"""A fine-tuning command is never silent for long: what it says of its runs, and what a watching thread says between."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.glue_files import write_checkpoint, write_glue

from homodistil.evaluation import progress
from homodistil.evaluation.glue.fine_tuning import Settings
from homodistil.evaluation.glue.grid import Grid, run_grid
from homodistil.evaluation.glue.tasks import TASKS

ROOT = Path(__file__).parents[3]
SLOW = """
import time
from homodistil.evaluation import progress
progress.SILENCE_S, progress._LOOK_S = 0.3, 0.05
with progress.watching("loading"):
    time.sleep(0.5)
    progress.say("a line")
    with progress.doing("RTE: run 1 of 2"):
        time.sleep(0.5)
        progress.now("epoch 1 of 3, step 7 of 9")
        time.sleep(0.5)
    progress.say("another")
time.sleep(0.5)
"""


@pytest.mark.process
def test_a_silence_is_broken_with_what_is_being_done():
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SLOW], capture_output=True, text=True, check=True)
    assert done.stdout == "a line\nanother\n"
    told = [re.sub(r" \(\d+ s\)$", "", line) for line in done.stderr.splitlines()]
    expected = ["... loading", "... RTE: run 1 of 2", "... RTE: run 1 of 2: epoch 1 of 3, step 7 of 9"]
    assert list(dict.fromkeys(told)) == expected, f"{told} in {time.monotonic() - start:.1f} s"


@pytest.mark.parametrize("patience", [None, 2])
def test_every_run_says_where_it_is(tmp_path, tokenizer, monkeypatch, patience):
    checkpoint = str(write_checkpoint(tmp_path / "checkpoint", tokenizer))
    shared = Settings(max_length=32, device="cpu", patience=patience)
    grid = Grid(lrs=[1e-3], batch_sizes=[4], epochs=[2], seeds=[0, 1], shared=shared)
    said, steps, now = [], [], progress.now
    monkeypatch.setattr(progress, "now", lambda text: (now(text), steps.append(progress.line()))[0])
    data = str(write_glue(tmp_path / "glue", num_train=8))
    run_grid(checkpoint, [TASKS["rte"]], data, grid, tmp_path / "out", tmp_path, said.append)
    assert [line for line in said if "run " in line] == [
        f"RTE: run {i + 1} of 2, lr 0.001, batch size 4, 2 epochs, seed {i}" for i in range(2)
    ]
    steps = [re.sub(r" \(\d+ s\)$", "", line) for line in steps if line.startswith(said[1])]
    trained = [line.removeprefix(f"{said[1]}: ") for line in steps if "epoch" in line.removeprefix(said[1])]
    assert trained == [f"epoch {(i + 1) // 2} of 2, step {i} of 4" for i in (1, 2, 3, 4)]
    evaluated = [line.removeprefix(f"{said[1]}: ") for line in steps if "evaluating" in line]
    after = (2, 4) if patience else (4,)
    assert evaluated == [f"after step {i}: evaluating, batch 1 of 1" for i in after]


@pytest.mark.process
@pytest.mark.parametrize("name", ["glue", "squad"])
def test_the_commands_watch_the_silence_from_their_start(name):
    """Before anything heavy is imported."""
    source = (ROOT / "homodistil" / "evaluation" / name / "command.py").read_text()
    assert source.index("progress.watching(") < source.index("import Settings") < source.index("progress.say")
