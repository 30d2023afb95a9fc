"""Verifies a prepared corpus: its structure quickly, its content by sha256.

A small corpus is verified before training. A large one is hashed in a thread while training starts; nothing that was
trained on it is saved before the result is known.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np

from homodistil.data.cache import workspace
from homodistil.data.prepare.label_rows import labels_file
from homodistil.data.prepare.merge import MANIFEST_FILE, SUMMARY_FILE
from homodistil.files import file_sha256

CHECKED_AT_ONCE_BYTES = 1 << 30
"""Largest corpus that is hashed before training, which takes a second or two."""
_SPLITS = ("train", "heldout")
_COUNTS = ("documents", "tokens", "blocks")


def structure_damage(folder: Path) -> str | None:
    """What is missing, truncated or malformed in a prepared corpus; None if nothing is. Reads no blocks.

    Raises:
        OSError: the folder exists but cannot be read.
    """
    try:
        summary, manifest = json_object(folder / SUMMARY_FILE), json_object(folder / MANIFEST_FILE)
        if manifest.get("splits") != summary:
            return f"{SUMMARY_FILE} and {MANIFEST_FILE} do not agree"
        for split in _SPLITS:
            counts, digest = summary[split], manifest["sha256"][f"{split}.npy"]
            if not all(type(counts[name]) is int for name in _COUNTS) or not isinstance(digest, str):
                return f"{SUMMARY_FILE} or {MANIFEST_FILE} lacks a count or a checksum"
            shape = counts["blocks"], manifest["settings"]["seq_len"]
            if problem := _array_damage(folder / f"{split}.npy", shape, "iu", "token ids"):
                return problem
            if "label_column" in manifest["settings"]:
                shape = counts["blocks"], manifest["label_width"]
                if problem := _array_damage(folder / labels_file(split), shape, "f", "numbers"):
                    return problem
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        return f"{Path(error.filename).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def content_damage(folder: Path) -> str | None:
    """Which file does not have the sha256 in the manifest; None if all have. Reads all blocks."""
    if problem := structure_damage(folder):
        return problem
    checksums = json_object(folder / MANIFEST_FILE)["sha256"]
    for name in (*map("{}.npy".format, _SPLITS), *map(labels_file, _SPLITS)):
        if name in checksums and file_sha256(folder / name) != checksums[name]:
            return f"{name} has another sha256 than {MANIFEST_FILE} says"
    return None


def blocks_bytes(folder: Path) -> int:
    """Bytes of the files of both splits."""
    return sum((folder / f"{split}.npy").stat().st_size for split in _SPLITS)


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError that names the file if it is not an object; OSError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds {type(content).__name__}, expected an object")
    return content


def _array_damage(path: Path, shape: tuple[int, int], kinds: str, what: str) -> str | None:
    """`kinds`: of dtypes."""
    try:
        # Also compares the size of the file with the shape in its header.
        blocks = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # numpy evaluates the header, so damaged bytes can raise any exception
        return f"{path.name}: {type(error).__name__} in its header"
    if blocks.shape != shape or blocks.dtype.kind not in kinds:
        return f"{path.name} holds {blocks.shape} of {blocks.dtype}, expected {shape} {what}"
    return None


class BackgroundCheck:
    """Verifies a large corpus in a thread; does nothing for one that `prepare_corpus` has verified.

    Args:
        folder: of the corpus; None: another process verifies it.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._problem = folder, None
        self.is_settled = False
        """Whether all ranks know the result; set by the caller."""
        self._thread = threading.Thread(target=self._run, name="corpus check", daemon=True)
        if folder is not None and blocks_bytes(folder) > CHECKED_AT_ONCE_BYTES:
            self._thread.start()

    def _run(self) -> None:
        try:
            reason = content_damage(self._folder)
        except OSError as error:
            reason = error.strerror or str(error)
        if reason is None:
            return
        self._problem = (
            f"{self._folder}: is damaged ({reason}); nothing that was trained on it has been saved; run again with "
            f"run.resume=auto, which prepares it again"
        )

    def problem(self) -> str | None:
        """Wait for the thread. Returns a line on the damage, None if there is none; a damaged corpus is deleted."""
        if self._thread.ident is None:
            return None
        self._thread.join()
        if self._problem:
            with workspace(self._folder):
                shutil.rmtree(self._folder, ignore_errors=True)
        return self._problem
