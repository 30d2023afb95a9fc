"""A row of the table of hostile inputs, and what it may use: a small teacher, text, an engine JSON, an empty folder.

    CASES = [
        Case("steps_huge", lambda w: w.train("train.steps=100000000000000000000"), says=["train.steps"]),
        Case("text_is_a_fifo", _fifo, says=["data.sources", "not a regular file"]),
        Case("report_of_a_broken_run", lambda w: ["report", str(w.broken_run())], says=["metrics.jsonl"], ranks=1),
    ]

Each module `cases_*.py` of this folder has a list `CASES`; `test_hostile.py` runs them all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from support.fork_server import ROOT
from support.small_job import arguments
from torch import Tensor

USER_ERROR = 2


@dataclass(frozen=True)
class Case:
    """One hostile input."""

    name: str
    build: Callable[[Workspace], list[str]]
    """Damages what it likes in its workspace; returns the command: script of launcher/ without `.py`, arguments."""
    says: Sequence[str] = field(default=())
    """Texts that the one line must have: the field or file, what was found, what is allowed."""
    ranks: int = 2
    """Ranks that a launcher would start. 1 for the scripts that have no ranks."""
    code: int = USER_ERROR
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that are wrong, of every rank."""


class Workspace:
    """A folder with everything that a run needs. It is the case's alone, so it may be damaged."""

    def __init__(self, folder: Path, run_inputs: Path) -> None:
        self.folder = folder
        shutil.copytree(run_inputs, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("cache"))
        self.teacher, self.text, self.cache = folder / "teacher", folder / "text", folder / "cache"
        self.run_dir, self.engine = folder / "run", folder / "ds.json"
        shutil.copyfile(ROOT / "ds_configs" / "zero2_fp32.json", self.engine)

    def train(self, *overrides: str, script: str = "train") -> list[str]:
        """The command of a run on this workspace (script: train, plan or prepare_data); `overrides` win."""
        command = arguments(self.folder, self.run_dir, engine=self.engine)
        if script == "prepare_data":
            command = command[:2] + command[4:]  # it takes no --deepspeed
        return [script, *command, *overrides]

    def set_engine(self, **changes: object) -> None:
        """Change top-level entries of DeepSpeed's JSON."""
        self.engine.write_text(json.dumps(json.loads(self.engine.read_text()) | changes))

    def set_teacher(self, **changes: object) -> None:
        """Change entries of the teacher's config.json; None removes one."""
        self._set(self.teacher / "config.json", changes)

    def set_tokenizer(self, file: str = "tokenizer_config.json", **changes: object) -> None:
        """Change top-level entries of one of the tokenizer's files; None removes one."""
        self._set(self.teacher / file, changes)

    def edit_weights(self, edit: Callable[[dict[str, Tensor]], object]) -> None:
        """Change the teacher's tensors: `edit` takes them by name and alters the dict, or returns another."""
        path = self.teacher / "model.safetensors"
        tensors = load_file(path)
        edited = edit(tensors)
        save_file(edited if isinstance(edited, dict) else tensors, path, metadata={"format": "pt"})

    def _set(self, path: Path, changes: dict[str, object]) -> None:
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
