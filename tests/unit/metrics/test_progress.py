"""Progress on a terminal: the bar moves every step, what is printed stands above it, long phases are named."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest

from homodistil.metrics import progress
from homodistil.metrics.progress import doing, step_progress


class Terminal(io.StringIO):
    """Keeps what was written; `lines` is what one would see."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        rows, row, column = [""], 0, 0
        for part in re.findall(r"\x1b\[A|[\r\n]|[^\x1b\r\n]+", self.getvalue()):
            if part == "\x1b[A":
                row -= 1
            elif part == "\r":
                column = 0
            elif part == "\n":
                row, column = row + 1, 0
                rows += [""] * (row == len(rows))
            else:
                rows[row] = rows[row][:column].ljust(column) + part + rows[row][column + len(part) :]
                column += len(part)
        return [line.rstrip() for line in rows]


@pytest.fixture
def terminal():
    return Terminal()


@contextmanager
def on(terminal: Terminal) -> Iterator[None]:
    """Both streams. In the test itself: pytest sets its own between a fixture and its test."""
    with redirect_stdout(terminal), redirect_stderr(terminal):
        yield


def test_the_bar_moves_every_step_and_shows_what_was_logged_last(terminal):
    with on(terminal):
        bar = step_progress(100, start_step=20)
        bar.show(30, {"loss/total": 3.14159, "widths/hidden": 96})
        for step in range(31, 35):
            time.sleep(0.15)  # beyond the bar's shortest interval
            bar.advance(step)
            assert f" {step}/100 " in terminal.lines()[-1] and "loss 3.142, hidden 96" in terminal.lines()[-1]
        bar.close()


def test_what_is_printed_meanwhile_stands_on_lines_of_its_own(terminal):
    with on(terminal):
        bar = step_progress(100, start_step=0)
        bar.advance(7)
        print("MFU refers to", "85 GFLOP/s")
        print("warning: something is odd", file=sys.stderr)
        sys.stdout.write("in two ")
        sys.stdout.write("parts\n")
        other = step_progress(100, start_step=0)  # of a second student
        print("below two bars")
        for one in (other, bar):
            one.close()
        assert sys.stdout is terminal and sys.stderr is terminal
        print("behind it")
        lines = terminal.lines()
        wanted = [
            "MFU refers to 85 GFLOP/s",
            "warning: something is odd",
            "in two parts",
            "below two bars",
            "behind it",
        ]
        assert [line for line in lines if line in wanted] == wanted


def test_what_takes_long_is_named_and_what_is_quick_is_not(terminal, monkeypatch):
    with on(terminal):
        monkeypatch.setattr(progress, "SAY_AFTER_S", 0.3)
        monkeypatch.delenv("RANK", raising=False)
        bar = step_progress(10, start_step=0)
        with doing("being quick"):
            pass
        with doing("evaluating the teacher on held-out text"):
            time.sleep(1)
        monkeypatch.setenv("RANK", "1")
        with doing("what rank 0 says already"):
            time.sleep(0.6)
        bar.close()
        assert "evaluating the teacher on held-out text ..." in terminal.lines()
        assert "quick" not in terminal.getvalue() and "already" not in terminal.getvalue()
