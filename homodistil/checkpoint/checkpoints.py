"""Saving and resuming: what the trainer and the distillation see of checkpoints."""

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
    """A checkpoint that has been looked through."""

    folder: Path
    shards: list[str]
    run: dict
    """What `save` was given as `state`, under "state"; engine, config and layout beside it."""

    @property
    def state(self) -> dict:
        return self.run["state"]


class Checkpoints:
    """Saves and loads the checkpoints of one run. Every rank makes one.

    Args:
        folder: `checkpoints` of the run folder; all ranks see the same.
        run: how many are kept, whether training waits for the disk.
        seed: of the run (train.seed), for ranks that the checkpoint knows no random state of.
        notes: the config, and the layout it was trained in: written down for people, read by nobody.
        fingerprints: of what the run learns from (training/fingerprints.py).
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
        """Write the checkpoint of `step`. Every rank calls it; the one before is finished first.

        With `run.async_checkpoints` it returns once everything is copied; otherwise when it is published.

        Args:
            state: nested mappings of tensors and what JSON can hold, with "step"; rank 0's is written.

        Raises:
            UserError: on every rank, if any could not write this one (or, asynchronously, the one before).
        """
        self.wait()
        if step == self._last_step:  # stopped right after a checkpoint: it is there already
            return
        self._before_save()
        ranks.on_rank_zero(lambda: start_part(self.folder, step))
        self._writer = Writer(self.folder, self._snapshot(engine, step, state), self.run.keep_checkpoints)
        self._last_step = step
        if not self.run.async_checkpoints:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written any more. Every rank calls it. Raises `UserError` as `save` does."""
        if self._writer:
            writer, self._writer = self._writer, None
            writer.finish()

    def settle(self) -> None:
        """Before leaving because of an error elsewhere: let what is being written be published if it can."""
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
        """The newest checkpoint that is whole; None when there is none at all. Every rank calls it.

        Damaged ones are passed over with a warning; the ranks share the reading between them.

        Raises:
            UserError: there are checkpoints, but none of them is whole, or one is of the old, pickled format.
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
        """The checkpoint, or what is wrong with it; the same on all ranks."""
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
        """Weights, optimizer, LR schedule, loss scale and random state; the engine has the checkpoint's widths."""
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
