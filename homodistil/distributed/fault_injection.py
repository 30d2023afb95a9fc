"""Fault injection, to test how a cluster and its launcher react to failures. Costs nothing if it is not used.

    HOMODISTIL_FAULT="train.step:rank=1:hit=20:action=kill" deepspeed launcher/train.py ...

The value is a list of faults, separated by commas: POINT[:rank=R][:hit=N][:action=A]. POINT is a place in the code
(`POINTS`), R the rank that fails (default: every rank), and N counts how often the process reaches the place until it
fails (default 1: the first time). The actions are:

    kill   SIGKILL (default)          stop   SIGSTOP, like a machine that hangs     term   SIGTERM, a request to stop
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
    "train.backward",  # on the loss before backward (nan: gradients that are not finite)
    "resize.before",  # all ranks have agreed on an event, and nothing has changed yet
    "resize.moved",  # weights and moments have been moved, modules and DeepSpeed's records not yet updated
    "checkpoint.shard_written",  # the files of this rank are in the hidden folder, its report is not
    "checkpoint.before_manifest",  # the files of all ranks are there; this and the following points: rank 0 only
    "checkpoint.before_rename",
    "checkpoint.before_latest",  # the new folder has its final name, `latest` names the previous checkpoint
    "checkpoint.before_prune",
    "family.exported",  # the stock checkpoint of a milestone is written, its record is not
    "vocabulary.written",  # one rank per cache: a teacher with fewer pieces is complete, but not in its place
    "outputs.shard_written",  # a shard of the teacher's outputs is complete, but not in its place
    "start.materials",  # teacher and corpus are ready, nothing has been trained yet
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
    """A place where a fault can be injected. Returns `value`, multiplied by NaN if the fault says so."""
    global _armed
    if _armed is None:  # not at import, because a forked rank has another environment than its parent
        _armed = parse(os.environ.get(VARIABLE, ""))
    for fault in _armed:
        if fault.is_due(name):
            value = _ACTIONS[fault.action](name, value)
    return value


def parse(text: str) -> list[_Fault]:
    """The faults that `text`, the value of HOMODISTIL_FAULT, describes. Raises `UserError` if it is malformed."""
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
