"""What the fault tests run on forked ranks besides the whole job: one mechanism each, in a second."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from support.small_job import TRAIN
from torch import distributed

from homodistil.config.schema import DataConfig
from homodistil.data.prepare import corpus, integrity
from homodistil.data.prepare.corpus import prepare_corpus
from homodistil.distill.teacher import load_config, load_tokenizer
from homodistil.distributed import graceful_stop, ranks, watchdog
from homodistil.distributed.script_exit import exit_with_code
from homodistil.engine.build import init_ranks
from homodistil.engine.native_ops import _alone
from homodistil.errors import UserError


def train_with_file_limit(num_bytes: int, arguments: list[str]) -> None:
    """The job, in a process that may write no file beyond `num_bytes` (Python leaves SIGXFSZ ignored)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


def train_with_large_corpus(arguments: list[str]) -> None:
    """The job, with a corpus that is large enough to be hashed beside training."""
    corpus.CHECKED_AT_ONCE_BYTES = integrity.CHECKED_AT_ONCE_BYTES = 0
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


def train_with_jumping_clock(arguments: list[str]) -> None:
    """The job, on a machine whose clock jumps by up to a day, forwards and backwards, every time somebody looks."""
    real, jumps = time.time, random.Random(0)
    time.time = lambda: real() + jumps.uniform(-86400, 86400)
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


def join_where_others_are_missing(rank: int, rank_timeout_s: float) -> None:
    """One rank of a job whose other ranks never start."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3"}
    with exit_with_code():
        init_ranks(rank_timeout_s)


def hold_lock(path: str) -> None:
    """As torch does while it builds an op."""
    os.open(path, os.O_CREAT | os.O_EXCL)
    print("held", flush=True)
    time.sleep(120)


def be_alone(folder: str) -> None:
    with _alone(Path(folder)):
        print("alone", flush=True)
        time.sleep(120)


def sleep_outside_training() -> None:
    with exit_with_code(), graceful_stop.on_signals():
        print("ready", flush=True)
        time.sleep(60)


def pool_inside_handlers() -> None:
    """Forked children must die of the SIGTERM by which pools end them, and must not tell their parent of it."""
    with graceful_stop.on_signals():
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(abs, [-1, -2]) == [1, 2]
            pool.terminate()
            pool.join()
        time.sleep(0.2)
        assert graceful_stop._requests.number == 0
    print("done", flush=True)


def children_ended_at_once() -> None:
    """SIGTERM right behind the fork, before the child has run a line."""
    with graceful_stop.on_signals():
        for _ in range(20):
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            os.kill(child, signal.SIGTERM)
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
        assert graceful_stop._requests.number == 0
    print("done", flush=True)


def be_stopped_during_a_fork() -> None:
    """The hooks of a fork, and a signal between them: what they raise would be lost."""
    with exit_with_code(), graceful_stop.on_signals():
        graceful_stop._hold_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        graceful_stop._let_signals_go()
        print("let go", flush=True)
        time.sleep(60)


def sleep_while_another_thread_takes_the_signal() -> None:
    """As the kernel chooses where the main thread has blocked it: nothing wakes the main thread then."""
    with exit_with_code(), graceful_stop.on_signals():
        threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM)).start()
        time.sleep(60)


def agree(signal_step: int, num_steps: int) -> None:
    """Rank 1 signals itself in a step; every rank prints the step at which it would leave."""
    device = init_ranks()
    with exit_with_code(), graceful_stop.on_signals(), graceful_stop.at_step_boundaries(device) as stop_agreed:
        for step in range(1, num_steps + 1):
            if step == signal_step and ranks.rank() == 1:
                os.kill(os.getpid(), graceful_stop.SIGNALS[1])
            if number := stop_agreed():
                print(f"agreed on {number} at step {step}", flush=True)
                os._exit(0)


def wait_for_rank(kind: str, rank_timeout_s: float) -> None:
    """Rank 1 does something else while the others wait for it in a collective, as `kind` says."""
    device = init_ranks()
    with exit_with_code(), watchdog.watching(rank_timeout_s):
        for step in range(1, 4):
            watchdog.progress(step, "training")
            distributed.all_reduce(torch.ones(1, device=device))
        if ranks.rank() == 1:
            _ACTIONS[kind]()
        distributed.all_reduce(torch.ones(1, device=device))
    print("all is well", flush=True)


def prepare(run_inputs: str, cache: str) -> None:
    """The corpus of the small job, without a process group, as launcher/prepare_data.py has it."""
    config = DataConfig(sources=[f"{run_inputs}/text"], seq_len=16, heldout_fraction=0.2, cache_dir=cache)
    prepare_corpus(config, load_tokenizer(f"{run_inputs}/teacher", load_config(f"{run_inputs}/teacher")))


def _fail() -> None:
    raise UserError("run.dir: rank 1 alone cannot write it; mend it")


def _prepare() -> None:
    with watchdog.long_phase("preparing data"):
        time.sleep(9)


_ACTIONS = {"sleep": lambda: time.sleep(60), "fail": _fail, "long": _prepare, "exit": lambda: os._exit(0)}
