"""Fields of the run config as Python keywords: without the section if the name is unique, or with it."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping

from homodistil.config.schema import RunConfig
from homodistil.errors import UserError, nearest


def full_names() -> list[str]:
    """Every field as section.name, in the order of the schema."""
    return [f"{section}.{name}" for section, fields in RunConfig().to_dict().items() for name in fields]


def full_name(keyword: str) -> str:
    """The full name (section.name) of a field: "train.steps" for "steps" or "train.steps".

    Raises:
        UserError: there is no such field, or several sections have a field of this name.
    """
    known = full_names()
    if keyword in known:
        return keyword
    candidates = [name for name in known if name.partition(".")[2] == keyword]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        example = f'**{{"{candidates[0]}": ...}}'
        raise UserError(f"{keyword}: could be {' or '.join(candidates)}; give the full name, as in {example}")
    raise UserError(f"{keyword}: no field is called so{_close(keyword, known)}; docs/config.md lists all of them")


def as_arguments(fields: Mapping[str, object]) -> list[str]:
    """Keywords and values as command-line arguments, so that the same parser validates them.

    Raises:
        UserError: as in `full_name`; or a field is given by its short and its full name; or a value has no text form.
    """
    values: dict[str, object] = {}
    for keyword, value in fields.items():
        name = full_name(keyword)
        if name in values:
            raise UserError(f"{name}: given twice, also as {name.partition('.')[2]}; give it once")
        values[name] = value
    return [f"--{name}={_text(name, value)}" for name, value in values.items()]


def _close(keyword: str, known: list[str]) -> str:
    if keyword in {name.partition(".")[0] for name in known}:
        inside = [name for name in known if name.startswith(f"{keyword}.")]
        return f' (a section: its fields are written as **{{"{inside[0]}": ...}})'
    if "." in keyword:
        return nearest(keyword, known)
    short = difflib.get_close_matches(keyword, {name.partition(".")[2] for name in known}, n=3, cutoff=0.6)
    full = [name for word in short for name in known if name.partition(".")[2] == word]
    return f" (did you mean {' or '.join(full)}?)" if full else ""


def _text(name: str, value: object) -> str:
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    try:
        return json.dumps(_plain(value))
    except (TypeError, ValueError):
        raise UserError(
            f"{name}: found {type(value).__name__}, allowed are texts, numbers, True, False, None and lists of them"
        ) from None


def _plain(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):  # a scalar of NumPy or torch
        return value.item()
    return value
