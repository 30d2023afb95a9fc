"""Reads DeepSpeed's JSON and validates it with DeepSpeed's own config classes, before the ranks join.

    content = read_engine_json(path)              # a JSON object of limited size, without duplicate keys
    check_engine_json(content, str(path))         # names and types as DeepSpeed expects them

There is no list of valid names here: DeepSpeed's config class is given a dict that records which names it looks up.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from homodistil.config.values import text_of
from homodistil.errors import UserError, nearest

FLAG = "--deepspeed"
_SHOWN_CHARS = 80
# Documented entries that are read by other parts of DeepSpeed than its config class.
_READ_ELSEWHERE = {"elasticity", "compression_training", "amp", "sparse_gradients", "sequence_parallel_size"}
# Section -> package that DeepSpeed imports for it while the engine is built.
_MONITORS = {"wandb": "wandb", "comet": "comet_ml", "tensorboard": "tensorboard"}
_READ_WHOLE = ("activation_checkpointing", "flops_profiler", "aio")
"""Sections without a pydantic model of which the config class reads every field, so that unknown fields show."""
_LARGEST_BUCKET = 10**11
"""Elements; no GPU has memory for more."""
_BATCH = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
_BATCH_NAMES = {*_BATCH, "train_batch_size"}
_WORDS = {bool: "true or false", int: "a number", float: "a number", str: "a text", dict: "a section with fields"}


def read_engine_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file. Raises `UserError` if there is none, or it has a key twice."""
    where = f"{FLAG}: {str(path)!r}"

    def one_of_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{where} has {_shown(twice)} twice; keep one of them")
        return dict(pairs)

    def no_number(text: str) -> NoReturn:
        raise UserError(f"{where} holds {text}, which is no JSON; write a number")

    def finite(text: str) -> float:
        return value if math.isfinite(value := float(text)) else no_number(text)

    text = text_of(path, FLAG, "JSON")
    try:
        content = json.loads(text, object_pairs_hook=one_of_each, parse_constant=no_number, parse_float=finite)
    except RecursionError:
        raise UserError(f"{where} is nested too deeply; write sections with fields (see ds_configs/)") from None
    except UserError:
        raise
    except ValueError as error:  # a JSONDecodeError, or an integer with more digits than Python converts
        raise UserError(f"{where} is not valid JSON ({str(error)[:200]}); correct it there") from None
    if not isinstance(content, dict):
        raise UserError(f"{where} holds {_kind(content)}, expected an object with sections (see ds_configs/)")
    return content


def check_engine_json(content: Mapping[str, Any], path: str) -> None:
    """Raise `UserError` for entries that DeepSpeed does not know or would fail on.

    The message names section and field, the value found, and what is allowed. The value "auto" is accepted everywhere:
    build.py checks which entries may have it.
    """
    known, where = _known(), f"{FLAG} {path}: "
    for name, value in content.items():
        if name not in known:
            close = nearest(name, known)
            raise UserError(f"{where}{_shown(name)} is no entry of DeepSpeed's config{close}; remove or rename it")
        if isinstance(value, list) or value == {}:
            raise UserError(
                f"{where}{name}: found {_kind(value)}, allowed is {_allowed(known[name])}; fix or remove it"
            )
        if not _is_like(known[name], value):
            raise UserError(f"{where}{name}: found {_shown(value)}, allowed is {_allowed(known[name])}; set one")
    _check_fields(content, where)
    _check_predivide(content, where)
    _check_monitors(content, where)
    for name in content:
        _check_entry(name, _without_auto(content[name]), where)


def _check_entry(name: str, value: Any, where: str) -> None:
    """Let DeepSpeed's config class read the entry `name` alone; raise `UserError` if it refuses it."""
    if value in ("auto", {}) or name in _BATCH_NAMES:
        return
    from pydantic import ValidationError

    asked: dict[str, Any] = {}
    try:
        _config_class()(_BATCH | {name: _Noting(value, asked) if name in _READ_WHOLE else value})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, (name, *first["loc"])))
        what = "no field of this section" if first["type"] == "extra_forbidden" else first["msg"].lower()
        raise UserError(f"{where}{field}: found {_shown(first.get('input'))}: {what}; fix or remove it") from None
    except Exception as error:  # DeepSpeed raises AssertionError, TypeError, ValueError and more
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{where}{name}: found {_shown(value)}: DeepSpeed refuses it ({reason}); fix or remove it"
        ) from None
    for field, item in value.items() if asked else ():
        if field not in asked or not _is_like(asked[field], item):
            kind = "no field of this section" if field not in asked else f"allowed is {_allowed(asked[field])}"
            raise UserError(f"{where}{name}.{field}: found {_shown(item)}: {kind}; fix or remove it")


def _check_fields(section: Mapping[str, Any], where: str, path: str = "") -> None:
    """Raise `UserError` for values that DeepSpeed accepts but misreads, or fails on only later."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            _check_fields(value, where, f"{path}{name}.")
        elif name == "enabled" and value != "auto" and not isinstance(value, bool):
            raise UserError(f"{where}{path}{name}: found {_shown(value)}, allowed are true and false; set one")
        elif name in ("stage", "steps_per_print") and value != "auto" and (type(value) is not int or value < 0):
            raise UserError(f"{where}{path}{name}: found {_shown(value)}, allowed is a whole number from 0 on; set one")
        elif name.endswith("bucket_size") and value != "auto":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= _LARGEST_BUCKET:
                raise UserError(
                    f"{where}{path}{name}: found {_shown(value)}, allowed are 1 .. {_LARGEST_BUCKET:.0e} (elements); "
                    f"set 5e8, say"
                )


def _check_predivide(content: Mapping[str, Any], where: str) -> None:
    section, factor = content.get("zero_optimization"), content.get("gradient_predivide_factor", 1)
    stage = section.get("stage", 0) if isinstance(section, Mapping) else 0
    if factor != "auto" and (factor != 1 and stage or factor <= 0):
        raise UserError(
            f"{where}gradient_predivide_factor: found {_shown(factor)}, allowed is 1 at ZeRO's stages 1 to 3, and a "
            f"number above 0 at stage 0; remove it"
        )


def _check_monitors(content: Mapping[str, Any], where: str) -> None:
    for name, package in _MONITORS.items():
        section = content.get(name)
        is_on = isinstance(section, Mapping) and section.get("enabled")
        if is_on and importlib.util.find_spec(package) is None:
            raise UserError(
                f"{where}{name}.enabled: needs {package}, which is not installed; pip install {package}, or false"
            )


# -- the entries that DeepSpeed knows


class _Noting(dict):
    """A dict that records in `asked` which names are looked up, each with the caller's default (None: without)."""

    def __init__(self, content: Mapping[str, Any], asked: dict[str, Any]) -> None:
        super().__init__(content)
        self._asked = asked

    def __copy__(self) -> _Noting:
        return _Noting(self, self._asked)

    def __contains__(self, name: object) -> bool:
        self._asked.setdefault(name, None)
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self._asked.setdefault(name, None)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        if self._asked.get(name) is None:
            self._asked[name] = default
        return super().get(name, default)

    def keys(self):
        return _Keys(self)


class _Keys:
    def __init__(self, content: _Noting) -> None:
        self._content = content

    def __contains__(self, name: object) -> bool:
        return name in self._content

    def __iter__(self) -> Iterator[str]:
        return iter(list(dict.keys(self._content)))


@functools.cache
def _known() -> dict[str, Any]:
    """Name of each entry that DeepSpeed reads -> its default; None if that is not known."""
    asked: dict[str, Any] = dict.fromkeys(_READ_ELSEWHERE)
    _config_class()(_Noting(_BATCH, asked))
    return {name: default for name, default in asked.items() if isinstance(name, str)}


@functools.cache
def _config_class():
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils import logger

    logger.setLevel(os.environ.get("HOMODISTIL_DEEPSPEED_LOG", "ERROR"))
    return DeepSpeedConfig


def _is_like(default: Any, value: Any) -> bool:
    """Whether `value` has the type of DeepSpeed's default (any number for a number), or is "auto"."""
    if value is None:
        return False
    if default is None or value == "auto":
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, (int, float)):
        return isinstance(value, (int, float))
    return isinstance(value, type(default))


def _allowed(default: Any) -> str:
    return next((words for kind, words in _WORDS.items() if isinstance(default, kind)), "what DeepSpeed documents")


def _without_auto(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {name: _without_auto(item) for name, item in value.items() if item != "auto"}


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return "an empty section" if value == {} else "a section" if isinstance(value, dict) else _shown(value)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, (dict, list)) else _kind(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
