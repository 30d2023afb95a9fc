"""What a run adds to its exports at its end: other formats (run.formats), and how fast its models are (run.latency).

The run is complete without either: what goes wrong here is a line, not an error.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from homodistil.config.schema import DataConfig, RunFolderConfig
from homodistil.errors import UserError
from homodistil.export.formats.layout import FORMATS, Limits, require_installed
from homodistil.metrics.progress import doing
from homodistil.training.latency_conditions import Conditions


def check_formats(run: RunFolderConfig) -> None:
    """Raise `UserError` where a package is missing that the end of the run needs."""
    require_installed(run.formats, "run.formats")
    if run.latency:
        require_installed(["onnx"], "run.latency")


def add_formats(folder: Path, run: RunFolderConfig, data: DataConfig) -> str:
    """Write run.formats into every export of a run that has its result, and time its models (on one rank).

    Returns:
        What there is to say of it; empty where the run asks for neither.
    """
    said, cache_dir = [], Path(data.cache_dir).expanduser()
    if run.formats:
        with doing(f"exporting to {', '.join(run.formats)}"):
            said += _write_formats(folder, run.formats, cache_dir)
    if run.latency:
        with doing("timing teacher and exports"):
            said.append(_time(folder, cache_dir))
    return "\n\n".join(said)


def _write_formats(folder: Path, names: Sequence[str], cache_dir: Path) -> list[str]:
    """A line per export. A format that lies there already is not made again."""
    # Imported here: most runs want neither, and every rank's start would wait for these imports.
    from homodistil.training.run_members import members_of

    lines = []
    for member in members_of(folder)[1:]:
        export = Path(member.checkpoint)
        missing = [name for name in names if not (export / FORMATS[name].file).exists()]
        try:
            for name in missing:
                _write_format(export, name, cache_dir)
            lines.append(f"{', '.join(names)}: {export}")
        except UserError as error:
            lines.append(f"run.formats: {error}; the checkpoint {export} is complete without it")
    return lines


def _write_format(export: Path, name: str, cache_dir: Path) -> None:
    from homodistil.export.formats.folder import publish, staging
    from homodistil.export.formats.write import write_formats
    from homodistil.training.gguf_header import gguf_header
    from homodistil.training.stock_checkpoint import open_checkpoint

    checkpoint = open_checkpoint(str(export), cache_dir)
    header = gguf_header(checkpoint, [name], with_head=True)
    with staging(export) as staged:
        write_formats(checkpoint.load(with_head=True), [name], staged / checkpoint.inside, Limits(), header)
        publish(staged, export, force=False)


def _time(folder: Path, cache_dir: Path) -> str:
    """The table, which is also kept for the report."""
    from homodistil.training.latency import as_text, measure
    from homodistil.training.run_members import keep, members_of
    from homodistil.training.stock_checkpoint import open_checkpoint

    try:
        members = members_of(folder)
        checkpoints = [open_checkpoint(member.checkpoint, cache_dir) for member in members]
        longest = min(checkpoint.max_tokens for checkpoint in checkpoints)
        conditions = Conditions(tokens=min(Conditions().tokens, longest))
        with tempfile.TemporaryDirectory(prefix="homodistil-") as work:
            rows = measure(checkpoints, Path(work), conditions)
        keep(members, rows, conditions)
    except UserError as error:
        return f"run.latency: {error}"
    return as_text(rows, conditions)
