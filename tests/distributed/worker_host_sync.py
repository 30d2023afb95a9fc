"""One rank of test_no_host_sync.py: real training steps under a watch for everything that brings a value to the host.

    python worker_host_sync.py '{"kl_positions": "masked"}' cache_dir folder

Prints `FOUND {"steps": [...], "peeking": [...]}`: where steps would have waited for the device, as
[what, file, function, how often]; "peeking" with a loss that looks at its own value.

Here the device is the CPU, so nothing really waits: what counts is what would. Two watches see the calling thread
alone, backward passes included. (a) Every operator, those inside of C++ too: reads of a scalar (item, bool, float),
sizes that depend on values (nonzero, unique, selection by a mask), copies to another device. (b) Every torch function
called from Python: `tolist`, `numpy` and `cpu`, which on the CPU are no operators, and `tensor` and `as_tensor`, whose
copy to a GPU waits. What never was on the device is prepared in a thread of its own (feed.py), which is not watched;
the test lists by name what else may stay.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

from homodistil.config.schema import RunConfig
from homodistil.data.prepare.corpus import Corpus, Rows
from homodistil.data.sources.assets import teacher_folder
from homodistil.distill.student import Student
from homodistil.engine.build import init_ranks, resolve_engine_config
from homodistil.training.inputs import RunInputs
from homodistil.training.run import DistillationRun
from homodistil.training.step_logger import run_recorder
from homodistil.training.trainer import Trainer, TrainState

WARM_UP_STEPS, WATCHED_STEPS = 2, 2
SEQ_LEN = 16
OPERATORS = ("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave")
FUNCTIONS = {torch.Tensor: ("cpu", "numpy", "tolist"), torch: ("as_tensor", "tensor")}
ROOT = Path(__file__).absolute().parents[2]


class Watch(TorchDispatchMode):
    """Inside, `found` counts (what, file, function) of the innermost frame outside torch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()
        self._thread = threading.get_ident()

    def __enter__(self) -> Watch:
        self._replaced = [(owner, name, getattr(owner, name)) for owner, names in FUNCTIONS.items() for name in names]
        for owner, name, function in self._replaced:
            setattr(owner, name, self._noting(name, function))
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for owner, name, function in self._replaced:
            setattr(owner, name, function)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        if name in OPERATORS or name.startswith(("unique", "_unique")) or _leaves_device(name, args, kwargs or {}):
            self._note(name)
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(map(_is_mask, args[1])):
            self._note(f"{name} with a mask")
        return operator(*args, **(kwargs or {}))

    def _noting(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def noting(*args, **kwargs):
            is_there = name == "as_tensor" and isinstance(args[0], torch.Tensor)
            if threading.get_ident() == self._thread and not is_there:
                self._note(name)
            return function(*args, **kwargs)

        return noting

    def _note(self, what: str) -> None:
        frame = sys._getframe(2)
        while "/torch/" in frame.f_code.co_filename or frame.f_code.co_name == "__torch_dispatch__":
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        packages = [i for i, part in enumerate(path.parts) if part == "site-packages"]
        file = Path(*path.parts[packages[-1] + 1 :]) if packages else path.absolute().relative_to(ROOT)
        self.found[what, str(file), frame.f_code.co_name] += 1


def _leaves_device(name: str, args: tuple, kwargs: dict) -> bool:
    if name == "_to_copy":
        return torch.device(kwargs.get("device") or args[0].device) != args[0].device
    return name == "copy_" and args[0].device != args[1].device


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class _Peek(torch.autograd.Function):
    """What no loss may do: look at a value, forward and backward."""

    @staticmethod
    def forward(ctx, value: torch.Tensor) -> torch.Tensor:
        value.item()
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> torch.Tensor:
        upstream.view(1)[upstream.view(1) > 0].tolist()
        return upstream


def build_trainer(options: dict, cache_dir: Path, folder: Path) -> Trainer:
    """A distillation of BERT-tiny in the phase in which every step measures importance, and none is logged."""
    config = RunConfig()
    config.loss.kl_positions = options["kl_positions"]
    config.student.preset, config.data.seq_len = "quickstart", SEQ_LEN
    config.train.global_batch_size, config.train.micro_batch_size = 4, 2
    config.train.steps, config.train.log_every_steps = 100, 100
    config.pruning.schedule = "cubic"
    config.pruning.interval_steps, config.pruning.max_event_fraction = 25, 0.9
    config.pruning.compensation, config.pruning.end_fraction, config.loss.kl = "none", 0.3, 1.0
    device = init_ranks()
    engine_config = {"bf16": {"enabled": options["bf16"]}, "zero_optimization": {"stage": 2}}
    engine_config = resolve_engine_config(engine_config, config.train, num_ranks=1)
    teacher = teacher_folder("embedded:bert-tiny", cache_dir)
    run_inputs = RunInputs(str(teacher), AutoTokenizer.from_pretrained(teacher), _corpus(folder), device)
    job = DistillationRun(config, engine_config, run_inputs, folder / "run", "a test")
    return job.build_trainer(run_recorder(folder / "run", config, 0), TrainState())


def _corpus(folder: Path) -> Corpus:
    """Random words between [CLS] and [SEP], padded at the end."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(1000, 30000, (200, SEQ_LEN)).astype(np.uint16)
    blocks[:, 0], blocks[:, -3], blocks[::2, -2:] = 101, 102, 0
    np.save(folder / "blocks.npy", blocks)
    rows = Rows(folder / "blocks.npy")
    return Corpus(rows, rows, "fingerprint", "random words")


def watched_steps(trainer: Trainer) -> list[list]:
    with Watch() as watch:
        for _ in range(WATCHED_STEPS):
            trainer.train_step()
    return [[*where, count] for where, count in watch.found.items()]


def peek(student: Student) -> None:
    forward = student.forward

    def peeking(*args, **kwargs):
        terms = forward(*args, **kwargs)
        return terms._replace(total=_Peek.apply(terms.total))

    student.forward = peeking


def main() -> None:
    trainer = build_trainer(json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
    for _ in range(WARM_UP_STEPS):
        trainer.train_step()
    found = {"steps": watched_steps(trainer)}
    peek(trainer.student)
    found["peeking"] = watched_steps(trainer)
    assert trainer.shrinker.pruner.wants_gradients(trainer.state.step), "importance was measured in every step"
    print("FOUND", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
