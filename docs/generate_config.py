"""Writes docs/config.md, the reference of all fields, from the dataclasses of the run config.

    python docs/generate_config.py             # writes docs/config.md
    python docs/generate_config.py --check     # exit code 1 if docs/config.md is stale

Everything that is known of a field is read in `_field_row`, and nowhere else here.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from pathlib import Path
from typing import Any

from docstring_parser import parse_from_object

from homodistil.config.rules import range_text
from homodistil.config.schema import RunConfig

PAGE = Path(__file__).with_name("config.md")
_HEAD = """# Configuration

<!-- Written by docs/generate_config.py; do not edit. -->

All fields of a run, with their types and defaults. Three sources are read in this order, and the later one wins:

1. `recipe=NAME`, a recipe that is shipped with the package. Without `recipe=`, `--config` and `teacher.name` it is
   `recipe=quickstart`.
2. `--config FILE.yaml`, a YAML file with sections and fields. It is plain YAML: no aliases, each name once, numbers in
   decimal digits, at most 1 MiB.
3. `section.field=value` on the command line.

`--help` explains every field, and `--print_config` prints the resolved values. Engine matters (ZeRO stage, precision,
buckets) are in DeepSpeed's JSON, see [Engines](engines.md). The column "Values" has the type and, where one is
declared, the range: `[` and `]` include their end, `(` and `)` do not. Limits that depend on the teacher are in the
descriptions.
"""


def render() -> str:
    """The whole page as Markdown."""
    return "\n".join([_HEAD, *(_section(field) for field in dataclasses.fields(RunConfig))])


def _section(section: dataclasses.Field) -> str:
    cls = typing.get_type_hints(RunConfig)[section.name]
    name, _, about = (cls.__doc__ or "").partition(": ")
    title = f"## {section.name}\n\n{_sentence(about or name)}\n"
    head = "| Field | Values | Default | Description |\n|---|---|---|---|\n"
    return title + "\n" + head + "".join(_rows(section.name, cls))


def _rows(section: str, cls: type) -> list[str]:
    hints = typing.get_type_hints(cls)
    docs = {param.arg_name: param.description for param in parse_from_object(cls).params}
    return [_field_row(section, f, hints[f.name], docs.get(f.name) or "") for f in dataclasses.fields(cls)]


def _field_row(section: str, field: dataclasses.Field, hint: Any, attribute_docstring: str) -> str:
    """One line of a table: name, type with choices or range, default, description.

    Args:
        section: name of the section, as it stands before the dot.
        hint: the resolved type of the field.
        attribute_docstring: the docstring below the field; the field's metadata `help` wins over it.
    """
    name = f"{section}.{field.name}"
    text = field.metadata.get("help") or attribute_docstring
    values = f"{_type(hint)} {range_text(name)}".strip()
    cells = [f"`{name}`", values, f"`{_default(field)}`", " ".join(text.split())]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _type(hint: Any) -> str:
    """The type in a user's words; the values themselves where it is a choice."""
    words = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", type(None): "`null`"}
    if hint in words:
        return words[hint]
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        inner = _type(typing.get_args(hint)[0])
        return f"list of {inner}s" if inner in words.values() and inner != "text" else f"list of {inner}"
    return ", or ".join(_type(part) for part in typing.get_args(hint))


def _default(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:_}" if isinstance(value, int) and value >= 100_000 else str(value)


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text[:1].upper() + text[1:].rstrip(".") + "."


def main(arguments: list[str]) -> int:
    if arguments == ["--check"]:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != render())
    PAGE.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
