"""The run folder: made, claimed or gone on with, before anything is trained; never overwritten."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from homodistil.checkpoint import candidates, saved_fingerprints
from homodistil.config.schema import RunConfig
from homodistil.config.values import REMOVED_FIELDS
from homodistil.errors import UserError
from homodistil.files import write_atomically

CONFIG_FILE = "config.yaml"
ENGINE_FILE = "ds_config.json"
# What may change when a run is gone on with: it moves neither the data's order nor, beyond rounding, the student.
_FREE = {
    "teacher": {"dtype", "allow_pickle", "shard"},
    "data": {"cache_dir", "workers", "shard_bytes"},
    "train": {"micro_batch_size", "save_every_steps", "eval_every_steps", "eval_batch_size", "log_every_steps"},
    "optimizer": {"implementation"},
}
# Moved elsewhere they are the same, which the checkpoint's fingerprints tell (fingerprints.py).
_BY_CONTENT = {"teacher": {"name"}, "data": {"sources"}}
# Of `run`, which else may change: where the widths pass.
_FIXED_OF_RUN = ("export_milestones", "settle_steps", "settle_cooldown")


def check_run_folders(config: RunConfig, students: Sequence[RunConfig] = ()) -> list[Path]:
    """`check_run_folder` of a job and of its students (students.py), whose checkpoints are in their own folders."""
    if students and config.run.resume == "must":
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume="auto"))
    return [check_run_folder(one) for one in (config, *students)]


def check_run_folder(config: RunConfig) -> Path:
    """Absolute path of `run.dir`, once it is known to be ours to use (rank 0 only). Writes nothing.

    Raises:
        UserError: not empty without resume, not a run folder, nothing to resume, or another run's folder.
    """
    folder = Path(config.run_dir).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.dir: {str(folder)!r} is a file; name a folder")
    occupied = folder.is_dir() and any(folder.iterdir())
    resume = config.run.resume
    if occupied and resume == "never":
        raise UserError(
            f"run.dir: {str(folder)!r} is not empty; choose another run.dir, or run.resume=auto to go on with that run"
        )
    if resume == "must" and not candidates(folder / "checkpoints"):
        raise UserError(f"run.resume: must, but {str(folder)!r} has no checkpoint; use auto or another run.dir")
    if occupied:
        _check_same_run(folder, config)
    return folder


def claim_run_folder(folder: Path, config: RunConfig, engine_config: dict) -> None:
    """Make the folder and write the resolved configs into it (rank 0 only). Raises `UserError` if that fails.

    The engine's config of before, if that was another one, stays beside it: ds_config.1.json, ds_config.2.json, ...
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False))
        _keep_other(folder / ENGINE_FILE, text := json.dumps(engine_config, indent=2) + "\n")
        write_atomically(folder / ENGINE_FILE, text)
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {str(folder)!r} ({error.strerror})") from None


def _keep_other(path: Path, text: str) -> None:
    """A copy of `path`, under the first free number, unless it holds `text` or is not there."""
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
        shutil.copyfile(path, next(kept for kept in numbered if not kept.exists()))


def _check_same_run(folder: Path, config: RunConfig) -> None:
    before = _config_of_run(folder)
    if before is None:
        raise UserError(f"run.dir: {str(folder)!r} is not empty and not a run folder; choose another run.dir")
    _check_removed(folder, before)
    by_content = _BY_CONTENT if saved_fingerprints(folder / "checkpoints") else {}
    for section, fields in config.to_dict().items():
        for name, value in fields.items():
            if section == "run" and name not in _FIXED_OF_RUN:
                continue
            old = before.get(section, {}).get(name, _of_before(before, section, name, value))
            if old != value and name not in _FREE.get(section, set()) | by_content.get(section, set()):
                raise UserError(
                    f"{section}.{name}: the run in {str(folder)!r} has {old}, this config {value}; "
                    f"go on with the same value, or choose another run.dir"
                )


def _check_removed(folder: Path, before: dict) -> None:
    """Refuse to go on with a run that used a field which is gone, whatever this config says."""
    for name, removed in REMOVED_FIELDS.items():
        section, field = name.split(".")
        value = before[section].get(field, removed.harmless)
        if str(value).lower() != removed.harmless:
            raise UserError(
                f"{name}: the run in {str(folder)!r} has {value}, but the field was removed because {removed.why}; "
                f"choose another run.dir, or go on with the version that began it"
            )


def _of_before(before: dict, section: str, name: str, value: object) -> object:
    """What a run had whose config.yaml does not know the field yet: the default, as far as it was what happened."""
    if (section, name) == ("teacher", "correction_seed") and before["teacher"].get("correction_steps"):
        return before["train"].get("seed", value)  # it seeded the correction, too
    return value


def _config_of_run(folder: Path) -> dict | None:
    """The config that a run of ours left in `folder`, None when it is not ours: many things are called config.yaml."""
    try:
        found = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    sections = RunConfig().to_dict().keys()
    is_ours = isinstance(found, dict) and all(isinstance(found.get(section), dict) for section in sections)
    return found if is_ours and (folder / ENGINE_FILE).is_file() else None
