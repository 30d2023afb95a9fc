"""Saving and resuming: the interface of this package for the training code."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from homodistil.checkpoint.files import FileRecord, join_tensors, split_tensors
from homodistil.checkpoint.folder import (
    FORMAT,
    RUN_FILE,
    RUN_TENSORS_FILE,
    candidates,
    problems,
    read_manifest,
    start_part,
)
from homodistil.checkpoint.random_state import random_state, restore_random_state
from homodistil.checkpoint.reader import WEIGHT, StateReader, key_of
from homodistil.checkpoint.writer import Snapshot, Writer, random_file
from homodistil.config.schema import RunFolderConfig
from homodistil.distributed import ranks
from homodistil.errors import UserError
from homodistil.models.parameter_shape import full_numel
from homodistil.resize import engine_state, load_engine_state, load_state, owned_state, state_scalars

SETTLE_S = 60.0
_PACKAGES = ("torch", "deepspeed", "transformers", "safetensors")


class Found(NamedTuple):
    """A checkpoint whose files have been verified."""

    folder: Path
    shards: list[str]
    """Names of its state files, one per rank that saved it."""
    run: dict
    """Content of run.json: "state" (the argument of `save`, with its tensors), "engine", "fingerprints", notes."""

    @property
    def state(self) -> dict:
        """The argument `state` of `save`."""
        return self.run["state"]


class Checkpoints:
    """Saves and loads the checkpoints of one run. Every rank constructs one.

    Args:
        folder: the folder `checkpoints` of the run, on a file system that all ranks share.
        run: how many checkpoints are kept, and whether training waits for the disk.
        seed: `train.seed`, for ranks whose random state is not in the checkpoint.
        notes: config and engine layout. Written for human readers; never read back.
        fingerprints: of corpus, tokenizer and teacher (training/fingerprints.py).
        before_save: called on every rank before anything is written; may raise.
    """

    def __init__(
        self,
        folder: Path,
        run: RunFolderConfig,
        seed: int,
        notes: dict[str, object],
        fingerprints: Mapping[str, str] | None = None,
        before_save: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.run, self._seed, self._notes = folder, run, seed, dict(notes)
        self._fingerprints, self._before_save = dict(fingerprints or {}), before_save
        self._writer: Writer | None = None
        self._last_step: int | None = None

    # -- saving

    def save(self, engine, step: int, state: dict) -> None:
        """Write the checkpoint of `step`. Every rank calls it; it first waits for the previous checkpoint.

        With `run.async_checkpoints` it returns once everything has been copied, otherwise once it is published.

        Args:
            engine: the live DeepSpeed engine, right after an optimizer step.
            step: optimizer steps done.
            state: nested mappings of tensors and JSON values, with the entry "step"; only that of rank 0 is written.

        Raises:
            UserError: on every rank, if any rank could not write this checkpoint (or, when asynchronous, the previous).
        """
        self.wait()
        if step == self._last_step:  # the run was stopped right after a checkpoint, which exists already
            return
        self._before_save()
        ranks.on_rank_zero(lambda: start_part(self.folder, step))
        self._writer = Writer(self.folder, self._snapshot(engine, step, state), self.run.keep_checkpoints)
        self._last_step = step
        if not self.run.async_checkpoints:
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint being written is published. Every rank calls it. Raises `UserError` like `save`."""
        if self._writer:
            writer, self._writer = self._writer, None
            writer.finish()

    def settle(self) -> None:
        """Give the checkpoint being written some time to be published, before this rank exits with another error."""
        if self._writer:
            self._writer.settle(SETTLE_S)

    def _snapshot(self, engine, step: int, state: dict) -> Snapshot:
        plain, tensors = split_tensors(state)
        run = {"format": FORMAT, "state": plain, "engine": engine_state(engine), **self._notes}
        run |= {"versions": _versions(), "fingerprints": self._fingerprints}
        first = ranks.rank() == 0
        copies = {name: _copy(tensor) for name, tensor in tensors.items()} if first else None
        return Snapshot(step, _own_state(engine), random_state(), run if first else None, copies)

    # -- resuming

    def load(self) -> Found | None:
        """The newest complete checkpoint, verified; None if there is no checkpoint at all. Every rank calls it.

        Damaged checkpoints are skipped with a warning. Each rank verifies some of the files.

        Raises:
            UserError: there are checkpoints but none is complete, or one has the old, pickled format.
        """
        names = ranks.on_rank_zero(lambda: candidates(self.folder))
        reasons = []
        for name in names:
            checkpoint = self._look_through(self.folder / name)
            if isinstance(checkpoint, Found):
                return checkpoint
            reasons.append(f"{name}: {checkpoint}")
            if ranks.rank() == 0:
                print(f"warning: {self.folder / name} is passed over: {checkpoint}", file=sys.stderr, flush=True)
        if reasons:
            raise UserError(
                f"{self.folder}: no whole checkpoint ({'; '.join(reasons)}); restore one from a copy, or choose "
                f"another run.dir to start anew"
            )
        return None

    def _look_through(self, folder: Path) -> Found | str:
        """The verified checkpoint, or a text that says what is wrong with it; the same on all ranks."""
        files, problem = ranks.on_rank_zero(lambda: _manifest_or_problem(folder))
        if problem:
            return problem
        files = {name: FileRecord(*record) for name, record in files.items()}
        by_size = sorted(files, key=lambda name: (files[name].num_bytes, name))
        my_files = {name: files[name] for name in by_size[ranks.rank() :: ranks.world_size()]}
        problems_of_all = [problem for part in ranks.gather(list(problems(folder, my_files))) for problem in part]
        if problems_of_all:
            return "; ".join(problems_of_all)
        run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        join_tensors(run["state"], load_file(folder / RUN_TENSORS_FILE))
        return Found(folder, sorted(name for name in files if name.startswith("state-")), run)

    def restore(self, engine, checkpoint: Found) -> None:
        """Load weights, optimizer state, LR schedule, loss scale and random state into `engine`. Every rank calls it.

        Args:
            engine: a new engine whose student has the widths that the checkpoint was saved at.
            checkpoint: the result of `load`.

        Raises:
            UserError: the checkpoint is of another model, or elements are missing in it.
        """
        with StateReader(checkpoint.folder, checkpoint.shards) as reader:
            reader.check_model({name: full_numel(param) for name, param in engine.module.named_parameters()})
            saved = checkpoint.run["engine"]
            load_state(engine, reader.state_names, state_scalars(engine, saved), reader)
        load_engine_state(engine, saved)
        step, rank = checkpoint.state["step"], ranks.rank()
        restore_random_state(checkpoint.folder / random_file(rank), self._seed, rank, step)
        self._last_step = step


def _manifest_or_problem(folder: Path) -> tuple[dict[str, tuple[int, str]], str | None]:
    try:
        return {name: tuple(record) for name, record in read_manifest(folder).items()}, None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        return {}, str(error)


def _own_state(engine) -> dict[str, Tensor]:
    copies = {}
    for piece in owned_state(engine):
        for kind, tensor in {WEIGHT: piece.weight, **piece.states}.items():
            copies[key_of(kind, piece.name, piece.start)] = _copy(tensor)
    return copies


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _PACKAGES}
