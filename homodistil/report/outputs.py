"""Output paths of a page and its figures: checked before anything is read, so that no other file is overwritten."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from homodistil.errors import UserError
from homodistil.files import write_atomically

_BEGINNING = b"<!doctype html"


def check_outputs(path: Path | None, figures: Path | None) -> None:
    """Raise `UserError` unless a page can be written to `path` and `figures` can be a folder (None: not checked)."""
    if path is not None:
        _check("--out", path, "a name for the page, such as report.html")
    if figures is not None:
        _check("--figures", figures / "name", "a folder")


def write_page(path: Path, page: str) -> None:
    """Write the HTML text `page` to `path` atomically, making its folder if necessary. Raises `OSError`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode("utf-8", "replace").decode())


@contextlib.contextmanager
def writing_report(path: Path) -> Iterator[None]:
    """Turn an `OSError` while the page or its figures are written into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be written ({error.strerror or error}); free disk space, or give "
            f"another --out or --figures"
        ) from None


def _check(option: str, path: Path, wanted: str) -> None:
    """Raise `UserError` unless the file `path` can be written; its folders need not exist yet."""
    try:
        if path.is_dir():
            raise UserError(f"{option}: {path} is a folder; give {wanted}")
        if path.exists() and not _is_page(path):
            raise UserError(
                f"{option}: {path} exists and is no HTML page, so it is not overwritten; give another name, or move "
                f"that file away"
            )
        blocking = next((parent for parent in path.parents if parent.exists() or parent.is_symlink()), None)
        if blocking is not None and not blocking.is_dir():
            raise UserError(f"{option}: {blocking} is no folder; give {wanted}, in a folder")
    except OSError as error:  # a name too long, a loop of links
        raise UserError(f"{option}: {str(path)[:200]!r} cannot be used ({error.strerror}); give {wanted}") from None


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False  # a pipe or a device: reading it might never end
    with open(path, "rb") as file:
        return file.read(len(_BEGINNING)).lower() == _BEGINNING
