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

from homodistil.data.cache import as_user_error, set_aside, workspace
from homodistil.data.prepare.integrity import json_object
from homodistil.training.heldout_scores import language_loss
from homodistil.training.teacher_checksums import (
    CHECKSUMS_FILE,
    check_checksums,
    check_weights,
    problem,
    write_checksums,
)

FACTS_FILE = "correction.json"


def write_corrected_checksums(folder: Path) -> None:
    """Write checksums of all files of `folder`; the logs of the correction, in a folder of their own, are left out."""
    write_checksums(folder, (path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS_FILE))


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
    return problem(lambda: _check(folder))


def _check(folder: Path) -> None:
    if not (folder / CHECKSUMS_FILE).is_file():
        _adopt(folder)
        return
    check_checksums(folder)
    _check_readable(folder)


def _adopt(folder: Path) -> None:
    _check_readable(folder)
    write_corrected_checksums(folder)
    print(f"note: {folder} was made before corrected teachers had checksums: it has them now", file=sys.stderr)


def _check_readable(folder: Path) -> None:
    """Raises ValueError, KeyError, TypeError, OSError or SafetensorError where it is no corrected teacher."""
    json_object(folder / "config.json")
    facts = json_object(folder / FACTS_FILE)
    for moment in ("before", "after"):
        float(language_loss(facts[moment]))
    check_weights(folder)
