"""Validates the values of fields in YAML files and on the command line before they are parsed.

    content = read_yaml(path, "--config")                        # limited size and depth, no aliases or duplicate keys
    check_value("train", "lr", parse_value("1e-3", "train.lr"))  # raises UserError for a value of the wrong type

Numbers must be written in decimal digits; YAML's numbers such as `0x10`, `6_0` and `1:30` are refused.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import types
import typing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from homodistil.config.rules import range_text
from homodistil.config.schema import SECTIONS
from homodistil.errors import UserError, nearest

MAX_FILE_BYTES = 1 << 20
MAX_VALUE_CHARS = 100_000
"""Longest value on the command line, which may be a list of many files."""
MAX_TEXT_CHARS = 4096
"""Longest text, which is also the longest path on Linux."""
MAX_NAME_BYTES = 255
"""Longest component of a path on common file systems."""
MAX_DEPTH = 8
_SHOWN_CHARS = 60
_WHOLE = re.compile(r"[-+]?[0-9]{1,30}")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,5})?")
_PATHS = {"teacher.name", "data.sources", "data.cache_dir", "run.dir", "run.name"}


class RemovedField(NamedTuple):
    """A field of earlier versions. It may still be in the config.yaml of old run folders, which has every field."""

    harmless: str
    """The value (in lower case) with the behaviour of this version; files may still have it."""
    why: str
    instead: str
    """Advice for users who set another value."""


REMOVED_FIELDS = {
    "teacher.kernel_inject": RemovedField(
        "false",
        why="no measurement showed a gain",
        instead="leave it out, and for a faster teacher set teacher.runtime=compile",
    ),
}
"""Dotted name -> removed field."""
_REMOVED_VALUES = {
    ("optimizer.implementation", "homodistil_fused"): "it showed no gain (79 ms against 80 ms on the CPU)"
}
"""(field, value) -> why it was removed."""


def read_yaml(path: Path, flag: str) -> yaml.Node | None:
    """The document of a YAML file as nodes, whose scalars are text; None if it is empty.

    Args:
        flag: the option that named the file, for messages.

    Raises:
        UserError: not a regular file of at most 1 MiB, not UTF-8, not YAML, or with aliases, duplicate keys or deep
            nesting.
    """
    return _compose(text_of(path, flag, "YAML"), f"{flag}: {_short(str(path), MAX_NAME_BYTES)!r}")


def parse_value(text: str, name: str) -> yaml.Node | None:
    """A value on the command line as nodes; None if it is empty. Raises `UserError` if it is not valid YAML."""
    if len(text) > MAX_VALUE_CHARS:
        raise UserError(f"{name}: found {len(text)} characters, allowed are {MAX_VALUE_CHARS}; set a shorter value")
    return _compose(text, name)


def entries(node: yaml.Node | None, where: str) -> dict[str, yaml.Node]:
    """Key -> node of a mapping; {} for nothing or null. Raises `UserError` if `node` is not a mapping."""
    if node is None or _is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{where} holds {_kind(node)}, expected sections such as `train:` with fields below")
    return {key.value: value for key, value in node.value}


def take_out_harmless(node: yaml.Node | None) -> bool:
    """Delete removed fields with their harmless value from a document (in place). Returns whether there were any."""
    sections = node.value if isinstance(node, yaml.MappingNode) else []
    return any([_take_out_of(key.value, section) for key, section in sections])


def _take_out_of(section: str, node: yaml.Node) -> bool:
    if not isinstance(node, yaml.MappingNode):
        return False
    kept = [(key, value) for key, value in node.value if not _is_harmless(f"{section}.{key.value}", value)]
    before, node.value = node.value, kept
    return len(kept) < len(before)


def _is_harmless(name: str, node: yaml.Node) -> bool:
    is_removed = name in REMOVED_FIELDS and isinstance(node, yaml.ScalarNode)
    return is_removed and node.value.lower() == REMOVED_FIELDS[name].harmless


def check_value(section: str, field: str, node: yaml.Node | None) -> None:
    """Raise `UserError` if the value does not have the type of the field; the message says what is allowed."""
    name = f"{section}.{field}"
    _check(name, _types(section)[field], node, _range_of(name))


def is_text(section: str, field: str) -> bool:
    """Whether the field is a text, whose value on the command line is not parsed as YAML."""
    return _types(section)[field] in (str, str | None)


def _range_of(name: str) -> str:
    limits = range_text(name)
    return f" {limits}" if limits else ""


@functools.cache
def _types(section: str) -> dict[str, Any]:
    return typing.get_type_hints(SECTIONS[section])


# -- reading


def text_of(path: Path, flag: str, kind: str) -> str:
    """Text of a regular UTF-8 file of at most 1 MiB. Raises `UserError` otherwise.

    Args:
        flag: the option that named the file, for messages.
        kind: "YAML" or "JSON", for messages.
    """
    shown, remedy = _short(str(path), MAX_NAME_BYTES), f"give an existing {kind} file"
    try:
        status = os.stat(path)  # before opening it: a pipe could wait for ever, a device may have no end
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
            raise UserError(f"{flag}: {shown!r} is {kind}, not a regular file; {remedy}")
        if status.st_size > MAX_FILE_BYTES:
            raise UserError(f"{flag}: {shown!r} has {status.st_size} bytes, allowed are {MAX_FILE_BYTES}; {remedy}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{flag}: cannot read {shown!r} ({error.strerror}); {remedy}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{flag}: {shown!r} is not valid {kind}: byte {error.start} is not UTF-8; save the file as UTF-8 text"
        ) from None
    except ValueError as error:  # a NUL byte in the path itself
        raise UserError(f"{flag}: {shown!r} is no path ({error}); {remedy}") from None


def _compose(text: str, where: str) -> yaml.Node | None:
    """Nodes of one document. Depth and aliases are checked on events first, before nodes are built recursively."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise UserError(f"{where}: is nested deeper than {MAX_DEPTH} levels; write section: {{field: value}}")
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{where}: found an alias (*{event.anchor[:20]}); write the value out")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: is not valid YAML ({_one_line(error)}); correct it there") from None
    _check_keys(node, where)
    return node


def _check_keys(node: yaml.Node | None, where: str) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                raise UserError(f"{where}: found the key {_shown(key)}, allowed are names of sections and fields")
            if key.value in seen:
                raise UserError(f"{where}: has {_short(key.value)!r} twice; keep one of them")
            seen.add(key.value)
            _check_keys(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, where)


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    place = f", line {mark.line + 1} column {mark.column + 1}" if mark else ""
    return f"{' '.join(str(problem).split())[:200]}{place}"


# -- types


def _check(name: str, kind: Any, node: yaml.Node | None, limits: str = "") -> None:
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if not (_is_null(node) and type(None) in options):
            _check(name, options[0], node, limits)
    elif origin is list:
        _check_list(name, options[0], node, limits)
    elif origin is dict:
        _check_mapping(name, options[1], node)
    elif not isinstance(node, yaml.ScalarNode):
        raise _refusal(name, node, _allowed(kind, limits))
    elif origin is Literal:
        if node.value not in options:
            reason = _REMOVED_VALUES.get((name, node.value))
            hint = nearest(node.value, options) if reason is None else ""
            raise _refusal(name, node, f"{', '.join(options)}{hint}", reason)
    elif kind is str:
        _check_text(name, node)
    elif not _fits(kind, node):
        raise _refusal(name, node, _allowed(kind, limits))


def _check_list(name: str, inner: Any, node: yaml.Node | None, limits: str) -> None:
    if name == "data.sources" and isinstance(node, yaml.ScalarNode) and not _is_null(node):
        _check_text(name, node)  # one path needs no brackets
    elif not isinstance(node, yaml.SequenceNode):
        raise _refusal(name, node, f"a list such as {_EXAMPLES[inner]}")
    else:
        for item in node.value:
            _check(name, inner, item, limits)


def _check_mapping(name: str, inner: Any, node: yaml.Node | None) -> None:
    """Check the values of a mapping; `_check_keys` has checked that its keys are unique texts."""
    if not isinstance(node, yaml.MappingNode):
        raise _refusal(name, node, "a mapping such as {my_term: 0.5}")
    for key, value in node.value:
        _check(f"{name}.{_short(key.value)}", inner, value)


_EXAMPLES = {str: "[/data/a,/data/b]", int: "[0,2,4]", float: "[0.75,0.5]"}


def _fits(kind: type, node: yaml.ScalarNode) -> bool:
    if kind is bool:
        return node.value.lower() in ("true", "false")
    text = node.value.strip()
    return node.style is None and bool((_WHOLE if kind is int else _NUMBER).fullmatch(text))


def _allowed(kind: Any, limits: str) -> str:
    if typing.get_origin(kind) is Literal:
        return ", ".join(typing.get_args(kind))
    words = {int: "a whole number in decimal digits", float: "a number in decimal digits", bool: "true or false"}
    return words.get(kind, "a text") + (limits if kind in (int, float) else "")


def _check_text(name: str, node: yaml.ScalarNode) -> None:
    text = node.value
    if _is_null(node) or not text.strip():
        raise UserError(f"{name}: found nothing, allowed is a text that is not empty; set {name} to one")
    if len(text) > MAX_TEXT_CHARS:
        raise UserError(f"{name}: found {len(text)} characters, allowed are {MAX_TEXT_CHARS}; set a shorter text")
    if bad := next((c for c in text if ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000), None):
        raise UserError(f"{name}: found the character U+{ord(bad):04X}, allowed is printable text; take it out")
    if name in _PATHS:
        _check_path(name, text)


def _check_path(name: str, text: str) -> None:
    longest = max(text.split("/"), key=lambda part: len(part.encode()))
    if len(longest.encode()) > MAX_NAME_BYTES:
        raise UserError(
            f"{name}: found a name of {len(longest.encode())} bytes ({_short(longest)!r}), allowed are "
            f"{MAX_NAME_BYTES} between two slashes; set a shorter one"
        )
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"{name}: found {text.split('/')[0]!r}, but there is no user of that name; write the path out"
        ) from None


def _refusal(name: str, node: yaml.Node | None, allowed: str, why_removed: str | None = None) -> UserError:
    removed = f", which was removed because {why_removed}" if why_removed else ""
    return UserError(f"{name}: found {_shown(node)}{removed}, allowed: {allowed}; set {name} to an allowed value")


def _shown(node: yaml.Node | None) -> str:
    if node is None or isinstance(node, yaml.ScalarNode) and not node.value:
        return "nothing"
    return repr(_short(node.value)) if isinstance(node, yaml.ScalarNode) else _kind(node)


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return f"the value {_short(node.value)!r}"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _is_null(node: yaml.Node | None) -> bool:
    return node is None or isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _short(text: str, num_chars: int = _SHOWN_CHARS) -> str:
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= num_chars else f"{text[:num_chars]}..."
