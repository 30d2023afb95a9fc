"""Injected faults, to try out what a cluster and its launcher do when something breaks. Costs nothing when unset.

    HOMODISTIL_FAULT="train.step:rank=1:hit=20:action=kill" deepspeed launcher/train.py ...

Several, separated by commas: POINT[:rank=R][:hit=N][:action=A]. POINT is a place in the code (`POINTS`), `rank` whose
process (default: every rank), `hit` at which visit of the place (default 1: the first), `action` what happens:

    kill   SIGKILL (default)          stop   SIGSTOP, as a machine that hangs       term   SIGTERM, a request to stop
    raise  an exception               hang   sleep for ever, still alive            nan    the value there becomes NaN
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from homodistil.errors import UserError

T = TypeVar("T")

VARIABLE = "HOMODISTIL_FAULT"
POINTS = (
    "train.step",  # before the first micro-batch of a step
    "train.backward",  # the loss, on its way into backward (nan: gradients that are not finite)
    "resize.before",  # an event is due and agreed on, nothing has changed
    "resize.moved",  # weights and moments are moved, their modules and records are not refreshed
    "checkpoint.shard_written",  # this rank's files are in the hidden folder, its report is not
    "checkpoint.before_manifest",  # all ranks' files are; from here on on rank 0 alone
    "checkpoint.before_rename",
    "checkpoint.before_latest",  # the new folder has its name, `latest` names the one before
    "checkpoint.before_prune",
    "family.exported",  # a milestone's stock checkpoint is written, its record is not
    "start.materials",  # teacher and corpus are there, nothing is trained yet
)


@dataclass
class _Fault:
    point: str
    rank: int | None = None
    hit: int = 1
    action: str = "kill"
    reached: int = 0

    def is_due(self, point: str) -> bool:
        if point != self.point or self.rank not in (None, int(os.environ.get("RANK", "0"))):
            return False
        self.reached += 1
        return self.reached == self.hit


_armed: list[_Fault] | None = None


def fault_point(name: str, value: T = None) -> T:
    """A place where a fault can be injected. Hands `value` through (multiplied by NaN where the fault says so)."""
    global _armed
    if _armed is None:  # at the first point, not at import: a forked rank has another environment than its parent
        _armed = parse(os.environ.get(VARIABLE, ""))
    for fault in _armed:
        if fault.is_due(name):
            value = _ACTIONS[fault.action](name, value)
    return value


def parse(text: str) -> list[_Fault]:
    """Faults of HOMODISTIL_FAULT. Raises `UserError` for what it does not understand."""
    return [_parse_one(part.strip()) for part in text.split(",") if part.strip()]


def _parse_one(text: str) -> _Fault:
    point, *options = text.split(":")
    fault = _Fault(point)
    for option in options:
        name, _, value = option.partition("=")
        if name in ("rank", "hit") and value.isdigit():
            setattr(fault, name, int(value))
        elif name == "action" and value in _ACTIONS:
            fault.action = value
        else:
            raise UserError(f"{VARIABLE}: found {option!r}; allowed: rank=R, hit=N, action={'|'.join(_ACTIONS)}")
    if point not in POINTS:
        raise UserError(f"{VARIABLE}: unknown point {point!r}; allowed: {', '.join(POINTS)}")
    return fault


def _signal(number: int) -> Callable[[str, T], T]:
    def send(_name: str, value: T) -> T:
        os.kill(os.getpid(), number)
        return value

    return send


def _raise(name: str, _value: T) -> T:
    raise RuntimeError(f"injected at {name}")


def _hang(_name: str, _value: T) -> T:
    while True:
        time.sleep(60)


def _nan(_name: str, value: T) -> T:
    return value * float("nan")


_ACTIONS = {
    "kill": _signal(signal.SIGKILL),
    "stop": _signal(signal.SIGSTOP),
    "term": _signal(signal.SIGTERM),
    "raise": _raise,
    "hang": _hang,
    "nan": _nan,
}
