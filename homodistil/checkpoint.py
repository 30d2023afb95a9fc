"""Checkpoints: the whole state of a run in one folder that appears at once or not at all.

    checkpoints/step-000200/
        engine/           DeepSpeed's own files: low-precision weights, master weights, moments, LR schedule
        run.pt            step, consumed samples, kept indices, importance, layout (tensors and plain values only)
        rank-0.pt ...     random state of each rank
    checkpoints/latest    name of the newest whole checkpoint

Everything is written into a hidden folder and renamed when every rank is done; `latest` follows last. A run that dies
in between leaves the checkpoint before.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from homodistil import ranks
from homodistil.errors import UserError
from homodistil.metrics import write_atomically

ENGINE_TAG = "engine"
FORMAT = 1


class Checkpoints:
    """Args:
    folder: `checkpoints` of the run folder.
    keep: newest checkpoints kept.
    layout: what must agree on resume (number of ranks, ZeRO stage, precision): name -> value.
    """

    def __init__(self, folder: Path, keep: int, layout: dict[str, object]) -> None:
        self.folder, self.keep, self.layout = folder, keep, layout

    def save(self, engine, step: int, state: dict) -> None:
        """Write the checkpoint of `step`. Every rank calls it; `state` is rank 0's."""
        name = f"step-{step:06d}"
        temporary = self.folder / f".{name}.part"
        ranks.on_first_rank(lambda: _fresh_folder(temporary))
        engine.save_checkpoint(str(temporary), tag=ENGINE_TAG)
        torch.save(_random_state(), temporary / f"rank-{ranks.rank()}.pt")
        ranks.barrier()
        ranks.on_first_rank(lambda: self._publish(temporary, name, state))

    def _publish(self, temporary: Path, name: str, state: dict) -> None:
        torch.save({"format": FORMAT, "layout": self.layout, **state}, temporary / "run.pt")
        final = self.folder / name
        if final.exists():  # left by a run that went on from an older checkpoint
            shutil.rmtree(final)
        os.replace(temporary, final)
        write_atomically(self.folder / "latest", name + "\n")
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            if old != final:
                shutil.rmtree(old)

    def exists(self) -> bool:
        return (self.folder / "latest").is_file()

    def load(self) -> tuple[Path, dict] | None:
        """(folder, state) of the newest checkpoint, None when there is none.

        Raises:
            UserError: damaged, or written by a job of another layout.
        """
        if not self.exists():
            return None
        folder = self.folder / (self.folder / "latest").read_text(encoding="utf-8").strip()
        try:
            state = torch.load(folder / "run.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can fail in any way
            raise UserError(
                f"{folder}: not a whole checkpoint ({type(error).__name__}); remove it and write the name of an older "
                f"one into {self.folder / 'latest'}"
            ) from None
        self._check_layout(folder, state)
        return folder, state

    def _check_layout(self, folder: Path, state: dict) -> None:
        if state["format"] != FORMAT:
            raise UserError(f"{folder}: checkpoint format {state['format']}, this version reads {FORMAT}")
        for name, value in self.layout.items():
            if state["layout"][name] != value:
                raise UserError(
                    f"{folder}: written with {name} = {state['layout'][name]}, this job has {value}; "
                    f"resume with the same {name}"
                )

    def restore(self, engine, folder: Path) -> None:
        """Engine, optimizer, LR schedule and random state from `folder`; the engine has the checkpoint's widths."""
        loaded, _ = engine.load_checkpoint(str(folder), tag=ENGINE_TAG)
        if loaded is None:
            raise UserError(f"{folder}: DeepSpeed found no engine state in it")
        _set_random_state(torch.load(folder / f"rank-{ranks.rank()}.pt", weights_only=True))


def _fresh_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _random_state() -> dict:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
