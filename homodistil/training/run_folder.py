"""The run folder: made, claimed or resumed, before anything is trained; never overwritten."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import yaml

from homodistil.checkpoint import candidates, saved_fingerprints
from homodistil.config.derive import job_folder_config
from homodistil.config.schema import OPTIONS, SECTIONS, RunConfig, value_of
from homodistil.config.values import REMOVED_FIELDS
from homodistil.errors import UserError
from homodistil.files import write_atomically

CONFIG_FILE = "config.yaml"
EXPORT_FOLDER = "export"
"""The student as a stock checkpoint; members of a family in folders below it."""
_STATES_BEFORE = {"hidden_space": "raw", "skip_first_tokens": 0}
"""Fields of the loss -> how hidden states were compared before there were these fields."""
ENGINE_FILE = "ds_config.json"


def check_run_folders(config: RunConfig, students: Sequence[RunConfig] = ()) -> list[Path]:
    """`check_run_folder` of a job and of its students (students.py), whose checkpoints are in their own folders."""
    if students and config.run.resume == "must":
        config = job_folder_config(config)
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
    # Moved elsewhere it is the same, which the checkpoint's fingerprints tell (fingerprints.py).
    free = ("free", "content") if saved_fingerprints(folder / "checkpoints") else ("free",)
    for field, facts in OPTIONS.items():
        value = value_of(config, field)
        if facts.resume in free or config.leaves_open(field):  # of the latter it is looked at again, once settled
            continue
        section, _, name = field.partition(".")
        old = before[section].get(name, _of_before(before, section, name, value))
        if old != value:
            raise UserError(
                f"{field}: the run in {str(folder)!r} has {old}, this config {value}; "
                f"go on with the same value, or choose another run.dir"
            )


def _check_removed(folder: Path, before: dict) -> None:
    """Refuse to resume a run that used a field which has been removed."""
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
    compares_states = any(before["loss"].get(name) for name in ("hidden", "embedding"))
    if section == "loss" and name in _STATES_BEFORE and compares_states:
        return _STATES_BEFORE[name]
    return value


def _config_of_run(folder: Path) -> dict | None:
    """The config that a run of ours left in `folder`, None when it is not ours: many things are called config.yaml."""
    try:
        content = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    is_ours = isinstance(content, dict) and all(isinstance(content.get(section), dict) for section in SECTIONS)
    return content if is_ours and (folder / ENGINE_FILE).is_file() else None
