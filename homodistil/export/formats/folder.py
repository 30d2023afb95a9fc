"""The folder that an export goes to: made beside it as a whole, compared with what is there, then moved into place."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from homodistil.errors import UserError
from homodistil.export.formats.layout import FORMATS
from homodistil.files import writing

_KEPT = (".json", ".txt", ".model", ".md")
_WEIGHTS_INDEX = ".index.json"


def check_new(out: Path, names: Iterable[str], force: bool) -> None:
    """Raise `UserError` where `out` already has one of these formats, or is no folder. Writes nothing."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; give a folder, new or with a checkpoint in it")
    present = [out / FORMATS[name].file for name in names if (out / FORMATS[name].file).exists()]
    if present and not force:
        raise UserError(f"--out: {present[0]} exists and would be overwritten; add --force, or give another --out")


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, for what `publish` moves there; removed afterwards, whatever happens."""
    folder = out.with_name(f".{out.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with writing(out, ""):
            folder.mkdir(parents=True)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(staged: Path, out: Path, force: bool) -> list[str]:
    """Move every file of `staged` to its place below `out`, config.json last.

    Returns:
        Their paths relative to `out`.

    Raises:
        UserError: a file there has another content, and `force` is false; `out` is as it was.
    """
    files = [path.relative_to(staged) for path in staged.rglob("*") if path.is_file()]
    for file in files:
        if (out / file).exists() and not force and not filecmp.cmp(staged / file, out / file, shallow=False):
            raise UserError(f"--out: {out / file} has another content; add --force, or give another --out")
    for file in sorted(files, key=lambda path: (path.name == "config.json", path)):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / file, out / file)
    return [file.as_posix() for file in sorted(files)]


def copy_modules(source: Path, transformer: Path, staged: Path) -> None:
    """Copy what sentence-transformers needs beside the graph: the list of modules, and modules behind the Transformer.

    Args:
        source: a folder with modules.json.
        transformer: folder of its Transformer, `source` or below; its weights stay behind.
    """
    for path in source.rglob("*"):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        of_graph = relative.parts[0] in {Path(form.file).parts[0] for form in FORMATS.values()}
        is_weights = path.parent == transformer and not _is_described(path)
        if path.is_file() and not (hidden or of_graph or is_weights):
            (staged / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staged / relative)


def _is_described(path: Path) -> bool:
    return path.suffix in _KEPT and not path.name.endswith(_WEIGHTS_INDEX)
