"""A corrected teacher in the cache: its checksums, what is wrong with it, and taking a damaged one out of the way.

<cache_dir>/teachers/<key>/
    model.safetensors, config.json, tokenizer...   a stock checkpoint
    correction.json                                facts of the correction
    checksums.json                                 file -> bytes and sha256, written last
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open

from homodistil.data.cache import as_user_error, set_aside, workspace
from homodistil.data.prepare.integrity import json_object
from homodistil.files import file_sha256, write_atomically
from homodistil.training.heldout_scores import language_loss

FACTS_FILE, CHECKSUMS_FILE = "correction.json", "checksums.json"


def write_checksums(folder: Path) -> None:
    """Write checksums of all files of `folder`; the logs of the correction, in a folder of their own, are left out."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS_FILE)
    sums = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
    write_atomically(folder / CHECKSUMS_FILE, json.dumps(sums, indent=1) + "\n")


def weights_digest(folder: Path) -> str:
    """Hash of the weights, as the checksums have them."""
    sums = json_object(folder / CHECKSUMS_FILE)
    weights = {name: record["sha256"] for name, record in sums.items() if name.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:32]


def remove_damaged(folder: Path) -> None:
    """Take a corrected teacher that is not what was written out of the way, with a warning; it is made again.

    One of before there were checksums gets them now, with a line, if it can be read at all.

    Raises:
        UserError: it cannot be read or removed.
    """
    _remove(folder, damage)


def remove_other(folder: Path, digest: str) -> None:
    """Take one out of the way that is whole, but does not have rank 0's weights. Raises `UserError` as above."""
    _remove(folder, lambda there: None if weights_digest(there) == digest else "other weights than rank 0 has")


def _remove(folder: Path, reason_of) -> None:
    with as_user_error(folder, "read"):
        if not folder.exists() or reason_of(folder) is None:
            return
    with workspace(folder):
        if folder.exists() and (reason := reason_of(folder)):
            set_aside(folder, reason)


def damage(folder: Path) -> str | None:
    """What is missing or altered in a corrected teacher; None: nothing."""
    try:
        if not (folder / CHECKSUMS_FILE).is_file():
            return _adopt(folder)
        for name, record in json_object(folder / CHECKSUMS_FILE).items():
            if (size := (folder / name).stat().st_size) != record["bytes"]:
                return f"{name} has {size} bytes instead of {record['bytes']}"
            if file_sha256(folder / name) != record["sha256"]:
                return f"{name} has another sha256 than {CHECKSUMS_FILE} says"
        _check_readable(folder)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def _adopt(folder: Path) -> None:
    _check_readable(folder)
    write_checksums(folder)
    print(f"note: {folder} was made before corrected teachers had checksums: it has them now", file=sys.stderr)


def _check_readable(folder: Path) -> None:
    """Raises ValueError, KeyError, TypeError, OSError or SafetensorError where it is no corrected teacher."""
    json_object(folder / "config.json")
    facts = json_object(folder / FACTS_FILE)
    for moment in ("before", "after"):
        float(language_loss(facts[moment]))
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError("no weights")
    for path in weights:
        with safe_open(path, "pt"):
            pass
