"""Output of ranks: each line of a rank other than 0 begins with its rank and machine; optionally a log file per rank.

    tag_lines()                 # launcher/train.py, before any library keeps a reference to sys.stdout
    keep_in(folder / "logs")    # with run.rank_logs: earlier output of this rank is included

Output that does not go through Python's streams (a crash inside CUDA, NCCL_DEBUG) is not tagged and not in the file.
"""

from __future__ import annotations

import io
import socket
import sys
from pathlib import Path
from typing import TextIO

from homodistil.distributed.launcher_env import rank_before_joining
from homodistil.files import writing

HELD_CHARS = 1 << 20
"""Maximum characters kept in memory until the log file is opened."""


class Tagged(io.TextIOBase):
    """A text stream that writes `tag` at the start of every line, also after a carriage return."""

    def __init__(self, stream: TextIO, tag: str, log: RankLog) -> None:
        self._stream, self._tag, self._log = stream, tag, log
        self._is_at_start = True

    def write(self, text: str) -> int:
        for part in _parts(text):
            self._stream.write(self._tag + part if self._is_at_start and part.strip("\r\n") else part)
            self._is_at_start = part[-1] in "\r\n"
        self._log.add(text)
        return len(text)

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return self._stream.encoding

    @property
    def buffer(self):
        return self._stream.buffer


class RankLog:
    """The output of this rank: kept in memory until `open` is called, then written to a file."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._held: list[str] = []
        self._held_chars = 0
        self._line = ""

    def add(self, text: str) -> None:
        """Add output. Of a progress bar that is redrawn many times, only the last state is kept."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._add_line(line.rpartition("\r")[2] + "\n")
        self._line = self._line[self._line.rfind("\r") + 1 :]

    def _add_line(self, line: str) -> None:
        if self._file is not None:
            self._write(line)
        elif self._held_chars < HELD_CHARS:
            self._held.append(line)
            self._held_chars += len(line)

    def _write(self, line: str) -> None:
        """Write a line; if that fails, stop writing with a warning, because the run itself can continue."""
        try:
            self._file.write(line)
        except OSError as error:
            self._file, self._held_chars = None, HELD_CHARS
            print(f"warning: run.rank_logs: no longer written ({error.strerror})", file=sys.stderr)

    def open(self, path: Path) -> None:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8", buffering=1)
            self._file.writelines(self._held)
        self._held.clear()


_log: RankLog | None = None


def tag_lines() -> None:
    """Tag the lines of this process from now on. The output of child processes is not tagged."""
    global _log
    if _log is None:
        rank, _log = rank_before_joining(), RankLog()
        tag = f"[rank {rank} {socket.gethostname()}] " if rank else ""
        sys.stdout, sys.stderr = Tagged(sys.stdout, tag, _log), Tagged(sys.stderr, tag, _log)


def keep_in(folder: Path) -> None:
    """Append the output of this rank since `tag_lines`, and all later output, to rank-NNNNN.txt in `folder`.

    Raises:
        UserError: the file cannot be written.
    """
    if _log is not None:
        _log.open(folder / f"rank-{rank_before_joining():05d}.txt")


def _parts(text: str) -> list[str]:
    """The lines of `text` with their line ends; a carriage return ends a line, too."""
    return io.StringIO(text, newline="").readlines()
