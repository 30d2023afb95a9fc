"""TensorBoard: event files in the run folder. A failed write ends the run, as one of any other file of it does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path

from homodistil.files import writing
from homodistil.metrics.tensorboard_layout import TENSORBOARD_FOLDER, board_folder


class TensorBoardTracker:
    """Writes event files.

    Args:
        run_dir: run folder.
        start_step: optimizer steps already done; TensorBoard hides what was written of later steps.

    Raises:
        UserError: (`log`) a file cannot be written.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self._folder = run_dir / TENSORBOARD_FOLDER
        self._writer = _summary_writer(board_folder(run_dir), start_step)
        self._excepthook_before, threading.excepthook = threading.excepthook, _without_tensorboards_thread

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write all values as one event; one `add_scalar` per value would take ten times as long."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        with writing(self._folder):
            self._writer.file_writer.add_summary(Summary(value=scalars), step)
            self._writer.flush()

    def finish(self, result: Mapping[str, float] | None) -> None:
        """Close the file; TensorBoard has no place for a result."""
        threading.excepthook = self._excepthook_before
        # Every event was flushed when it was written, so an error here has been reported before.
        with contextlib.suppress(OSError):
            self._writer.close()


def _summary_writer(folder: Path, start_step: int):
    # Imported here because it is slow, and needed on rank 0 only.
    from torch.utils.tensorboard import SummaryWriter

    had_events = folder.is_dir() and any(folder.iterdir())
    first_new_step = start_step + 1 if start_step else 0
    return SummaryWriter(str(folder), purge_step=first_new_step if had_events else None)


def _without_tensorboards_thread(failure: threading.ExceptHookArgs) -> None:
    """An excepthook without the traceback of TensorBoard's thread on a full disk; the next call raises the error."""
    if not (issubclass(failure.exc_type, OSError) and type(failure.thread).__module__.startswith("tensorboard")):
        threading.__excepthook__(failure)
