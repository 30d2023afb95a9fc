"""Progress of a run for its user: a bar or lines for the steps, and a line for each slow task between steps.

    with doing("evaluating the teacher on held-out text"):     # printed on rank 0 after SAY_AFTER_S
        ...
    progress = step_progress(total_steps, start_step)          # on rank 0
    progress.advance(step)                                     # after every step
    progress.show(step, values)                                # after every logged step
    progress.close()

While a bar is drawn, all output of Python is printed above it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Protocol

from homodistil.distributed.launcher_env import rank_before_joining

SAY_AFTER_S = 2.0


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Print the name of the task inside this context once it has taken `SAY_AFTER_S`; only rank 0 prints."""
    if rank_before_joining():
        yield
        return
    timer = threading.Timer(SAY_AFTER_S, _say, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # above a bar, if there is one
    sys.stderr.flush()


class StepProgress(Protocol):
    """Shows the progress of a run."""

    def advance(self, step: int) -> None:
        """`step` optimizer steps are done."""

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """`step` optimizer steps are done, and `values` have been logged."""

    def close(self) -> None: ...


def step_progress(total_steps: int, start_step: int) -> StepProgress:
    """A bar in a terminal or a notebook, otherwise lines."""
    if sys.stderr.isatty():
        return _Bar(total_steps, start_step)
    return _NotebookBar(total_steps, start_step) if _in_notebook() else _Lines(total_steps)


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook (Jupyter or a compatible program)."""
    interactive = sys.modules.get("IPython")
    shell = interactive.get_ipython() if interactive is not None else None
    return shell is not None and hasattr(shell, "kernel")


class _Bar:
    """Progress in a terminal: one line that is redrawn."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        from tqdm import tqdm
        from tqdm.contrib import DummyTqdmFile

        self._streams = sys.stdout, sys.stderr
        # miniters: otherwise tqdm adapts to fast steps, and hardly updates the bar during slow ones.
        options = {"unit": "step", "dynamic_ncols": True, "miniters": 1, "file": _beneath(sys.stderr)}
        self._bar = tqdm(total=total_steps, initial=start_step, **options)
        sys.stdout, sys.stderr = (DummyTqdmFile(_beneath(stream)) for stream in self._streams)

    def advance(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        self._bar.set_postfix_str(_summary(values), refresh=False)
        self.advance(step)

    def close(self) -> None:
        sys.stdout, sys.stderr = self._streams
        self._bar.close()


class _NotebookBar:
    """Progress below a notebook cell: a widget if ipywidgets is installed, else one line of text that is redrawn."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tqdm warns if ipywidgets is not installed
            from tqdm.auto import tqdm

        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", miniters=1)

    def advance(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        self._bar.set_postfix_str(_summary(values), refresh=False)
        self.advance(step)

    def close(self) -> None:
        self._bar.close()


def _beneath(stream):
    """The original stream, if another bar (several students in one job) has replaced it."""
    from tqdm.contrib import DummyTqdmFile

    return stream._wrapped if isinstance(stream, DummyTqdmFile) else stream


class _Lines:
    """Progress in a log file: a line at the first and the last step, and every `INTERVAL_S` in between."""

    INTERVAL_S = 30.0

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._first: tuple[int, float] | None = None
        """The first step that was done here, and when: what comes before it, a cut for example, is paid once."""
        self._next_line = time.monotonic()

    def advance(self, step: int) -> None:
        if self._first is None:
            self._first = step, time.monotonic()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now < self._next_line and step < self._total_steps:
            return
        self._next_line = now + self.INTERVAL_S
        line = f"step {step}/{self._total_steps}, {_summary(values)}"
        if self._first is not None and self._first[0] < step < self._total_steps:
            first_step, first_s = self._first
            left_s = (now - first_s) / (step - first_step) * (self._total_steps - step)
            line += f", {_interval(left_s)} left"
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def _interval(seconds: float) -> str:
    from tqdm import tqdm

    return tqdm.format_interval(seconds)


def _summary(values: Mapping[str, float]) -> str:
    parts = []
    if "loss/total" in values:
        parts.append(f"loss {float(values['loss/total']):.4g}")
    if "widths/hidden" in values:
        parts.append(f"hidden {int(values['widths/hidden'])}")
    if "speed/tokens_per_s" in values:
        parts.append(f"{float(values['speed/tokens_per_s']):,.0f} tokens/s")
    return ", ".join(parts)
