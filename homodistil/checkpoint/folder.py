"""The folder of checkpoints: names, manifest, publishing, candidates to resume from, and verification.

A checkpoint is published by one rename, after its manifest has been written and before `latest` is updated. A machine
that stops at any moment therefore leaves complete checkpoints; if `latest` names none of them, `candidates` does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from homodistil.checkpoint.files import FileRecord, WriteError, sync_folder, write_json
from homodistil.distributed.fault_injection import fault_point
from homodistil.errors import UserError
from homodistil.files import file_sha256, write_atomically

FORMAT = 2
MANIFEST_FILE, RUN_FILE, RUN_TENSORS_FILE = "manifest.json", "run.json", "run.safetensors"
LATEST_FILE = "latest"
_STEP = re.compile(r"step-(\d+)")


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def part_folder(folder: Path, step: int) -> Path:
    """The hidden folder in which the checkpoint of `step` is written before it is published."""
    return folder / f".{name_of(step)}.part"


def start_part(folder: Path, step: int) -> None:
    """Make an empty part folder, and remove those that killed jobs have left.

    Raises:
        UserError: the folder cannot be made.
    """
    part = part_folder(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (*folder.glob(".step-*.part"), *folder.glob(".step-*.old")):
            shutil.rmtree(stale, ignore_errors=True)
        part.mkdir()
    except OSError as error:
        raise UserError(
            f"checkpoint: rank 0 cannot make {part}: {error.strerror}; make run.dir a writable folder; "
            f"checkpoints before step {step} are intact"
        ) from None


def publish(folder: Path, step: int, files: dict[str, FileRecord], keep: int) -> None:
    """Write the manifest of the part folder, rename the folder, point `latest` at it, and remove old checkpoints.

    Args:
        folder: the folder of all checkpoints.
        files: records of the files of all ranks, by name.
        keep: number of checkpoints to keep, this one included.

    Raises:
        WriteError: the disk is full or read-only; `latest` still names the previous checkpoint.
    """
    part, final = part_folder(folder, step), folder / name_of(step)
    fault_point("checkpoint.before_manifest")
    table = {name: {"bytes": r.num_bytes, "sha256": r.sha256} for name, r in sorted(files.items())}
    write_json(part / MANIFEST_FILE, {"format": FORMAT, "step": step, "files": table})
    sync_folder(part)
    fault_point("checkpoint.before_rename")
    try:
        if final.exists():  # damaged, or from before this run resumed from an older checkpoint
            os.replace(final, folder / f".{final.name}.old")
        os.replace(part, final)
        sync_folder(folder)
        fault_point("checkpoint.before_latest")
        write_atomically(folder / LATEST_FILE, final.name + "\n")
        sync_folder(folder)
    except OSError as error:
        raise WriteError(f"{final}: {error.strerror}") from error
    fault_point("checkpoint.before_prune")
    _prune(folder, step, keep)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Keep the newest `keep` checkpoints up to `step`.

    Newer ones exist if the run was resumed from an older checkpoint; it will replace them when it reaches their steps.
    """
    reached = [name for name in _published(folder) if _number(name) <= step]
    for stale in (*(folder / name for name in reached[keep:]), *folder.glob(".step-*.old")):
        # Rename to a hidden name first: a partly removed checkpoint must not look like a published one.
        hidden = stale if stale.name.startswith(".") else stale.with_name(f".{stale.name}.old")
        if hidden != stale:
            os.replace(stale, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def candidates(folder: Path) -> list[str]:
    """Names of the checkpoints to try, in this order: `latest`, older ones, newer ones."""
    published, latest = _published(folder), _latest(folder)
    if latest is None:
        return published
    older = [name for name in published if _number(name) < _number(latest)]
    newer = [name for name in published if _number(name) > _number(latest)]
    return [latest, *older, *newer]


def _published(folder: Path) -> list[str]:
    """Names of the step folders, newest first."""
    names = [path.name for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(names, key=_number, reverse=True)


def _latest(folder: Path) -> str | None:
    """The name in the file `latest`; None if it is missing or does not contain the name of a step folder."""
    try:
        name = (folder / LATEST_FILE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return name if _STEP.fullmatch(name) else None


def _number(name: str) -> int:
    return int(_STEP.fullmatch(name).group(1))


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Read the manifest of the checkpoint `folder`: file name -> record.

    Raises:
        ValueError: there is no manifest, or it is damaged; the message says what is wrong.
        UserError: the checkpoint has the old, pickled format.
    """
    if (folder / "engine").is_dir() or (folder / "run.pt").is_file():
        raise UserError(
            f"{folder}: checkpoint format 1 (DeepSpeed's pickled files), which this version does not read; continue "
            f"with the version that wrote it, or choose another run.dir"
        )
    if not folder.is_dir():
        raise ValueError("no such folder")
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        records = {name: FileRecord(int(r["bytes"]), str(r["sha256"])) for name, r in content["files"].items()}
        version = content["format"]
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST_FILE} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{MANIFEST_FILE} is damaged ({type(error).__name__})") from None
    if version != FORMAT:
        raise ValueError(f"{MANIFEST_FILE} says format {version}, this version reads {FORMAT}")
    if not {RUN_FILE, RUN_TENSORS_FILE} <= records.keys() or any("/" in name for name in records):
        raise ValueError(f"{MANIFEST_FILE} is damaged (its list of files)")
    return records


def saved_fingerprints(folder: Path) -> dict[str, str] | None:
    """Fingerprints of corpus, tokenizer and teacher in the newest checkpoint whose RUN_FILE is intact.

    Returns:
        Name -> fingerprint (training/fingerprints.py); {} for a checkpoint of a version that did not save them; None if
        there is no such checkpoint.
    """
    for name in candidates(folder):
        try:
            record = read_manifest(folder / name)[RUN_FILE]
        except ValueError:  # `Checkpoints.load` will report what is wrong
            continue
        if not any(problems(folder / name, {RUN_FILE: record})):
            return json.loads((folder / name / RUN_FILE).read_text(encoding="utf-8")).get("fingerprints", {})
    return None


def problems(folder: Path, files: dict[str, FileRecord]) -> Iterator[str]:
    """Verify `files` of the checkpoint `folder` by size, sha256 and format: yields one text per damaged file."""
    for name, record in files.items():
        path = folder / name
        try:
            num_bytes = path.stat().st_size
            if num_bytes != record.num_bytes:
                yield f"{name} has {num_bytes} bytes, {record.num_bytes} were written"
            elif file_sha256(path) != record.sha256:
                yield f"{name} is not what was written (sha256 differs)"
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                with safe_open(path, "pt"):
                    pass
        except FileNotFoundError:
            yield f"{name} is missing"
        except (OSError, ValueError, SafetensorError) as error:
            yield f"{name} cannot be read ({str(error) or type(error).__name__})"
