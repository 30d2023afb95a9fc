"""Worker processes of a loader end with it: when the collector frees it, when its process ends, when a step fails."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_data_loader import loader, make_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("rows"), 31)


def test_workers_of_what_the_collector_frees_end_when_asked(rows, tokenizer):
    """Not by a signal, nor after the 10 seconds for which torch waits for one that the request does not reach."""
    kept = loader(rows, tokenizer, workers=1)
    kept.micro_batches(0)
    (process,) = kept._processes
    kept.itself = kept  # as in a run: part of a cycle
    del kept
    gc.collect()
    assert process.exitcode == 0


PROCESSES = """
import os, sys, torch
from transformers import AutoTokenizer
from homodistil.data.prefetch import BatchPrefetcher
from test_data_loader import Rows, loader

def left_alone():
    kept.micro_batches(0)
    kept.set_micro_batch_size(4)
    kept.itself = kept  # as in a run: part of a cycle, which only interpreter exit would free
    print(len(kept.micro_batches(8)))

def failing_step():
    feed = BatchPrefetcher(kept, torch.device("cpu"))
    feed.itself = feed
    feed.micro_batches(0)
    raise SystemExit("the step failed")

kept = loader(Rows(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2]), workers=1)
for end in (left_alone, failing_step):
    pid = os.fork()  # imports take seconds
    if not pid:
        end()
        raise SystemExit
    print(end.__name__, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.process
def test_a_process_ends_with_its_workers(tmp_path, tokenizer):
    """Left alone, and when a step has failed."""
    make_rows(tmp_path, 31)
    command = [sys.executable, "-c", PROCESSES, str(tmp_path / "31.npy"), tokenizer.name_or_path]
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[3])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "2\nleft_alone 0\nfailing_step 1\n", done.stderr
    assert done.stderr.strip() == "the step failed"
