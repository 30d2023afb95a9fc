"""Command line -> RunConfig: recipe or YAML file first, then dotted overrides (`train.lr=1e-3` or `--train.lr 1e-3`).

Types and `--help` come from jsonargparse and the dataclasses of `schema.py`. This module adds strict names (errors
suggest the nearest known one) and one-line errors.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from homodistil.config import rules, students
from homodistil.config.one_line_parser import program
from homodistil.config.schema import SECTIONS, RunConfig
from homodistil.config.shipped import (
    DEFAULT_ENGINE,
    engine_names,
    engine_path,
    recipe_names,
    recipe_path,
    student_set_names,
)
from homodistil.config.values import (
    REMOVED_FIELDS,
    check_value,
    entries,
    is_text,
    parse_value,
    read_yaml,
    take_out_harmless,
    text_of,
)
from homodistil.errors import UserError, nearest


class Job(NamedTuple):
    """The arguments of `homodistil train`."""

    config: RunConfig
    engine_config: Path
    """Path of DeepSpeed's JSON."""
    students: Sequence[RunConfig] = ()
    """Configs of the students of `--teachers-once`; empty if `config` describes the only student."""
    is_check: bool = False
    """Whether to check the job without running it (preflight/)."""


def parse(argv: list[str], description: str = "", with_engine: bool = False) -> RunConfig:
    """The validated run config. Scripts that also take DeepSpeed's JSON use `parse_with_engine`. Raises `UserError`."""
    return _parse(argv, description, with_engine)[0]


def parse_with_engine(argv: list[str], description: str = "") -> Job:
    """The job of one student. Raises `UserError`; exits the process after --help or --print_config."""
    config, namespace = _parse(argv, description, with_engine=True)
    return Job(config, engine_path(namespace.deepspeed))


def _check_engine_file(arguments: list[str]) -> None:
    """Check the file of --deepspeed for --print_config, which exits before the file would be read."""
    names = [text.partition("=")[2] for text in arguments if text.startswith("--deepspeed=")]
    names += [after for flag, after in itertools.pairwise(arguments) if flag == "--deepspeed"]
    for name in names:
        try:
            json.loads(text_of(engine_path(name), "--deepspeed", "JSON"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"--deepspeed: {name!r} is not valid JSON ({str(error)[:200]}); correct it there") from None


def parse_job(argv: list[str], description: str = "Distil a student, or several, from a teacher.") -> Job:
    """Parse the arguments of `homodistil train`; see `parse_with_engine`."""
    config, namespace = _parse(argv, description, with_engine=True)
    engine_config = engine_path(namespace.deepspeed)
    if namespace.teachers_once is None:
        return Job(config, engine_config, is_check=namespace.check)
    if namespace.check:
        raise UserError(
            "--check: looks at one student, found --teachers-once; check each with its fields on the command line"
        )
    paths = students.file_names(namespace.teachers_once)
    configs = [_student(argv, description, path) for path in paths]
    job, configs = students.finalize_students(config, configs, [path.stem for path in paths])
    return Job(job, engine_config, configs)


def _student(argv: list[str], description: str, path: Path) -> RunConfig:
    """The config of the job, overridden by the fields in the YAML file of a student; these also override `argv`."""
    text = _check_file(path, "--teachers-once") or path.read_text(encoding="utf-8")
    content = yaml.safe_load(text) or {}
    return _parse([*argv, *students.as_overrides(content)], description, with_engine=True)[0]


def _parse(argv: list[str], description: str, with_engine: bool):
    parser = _build_parser(description, with_engine)
    parser.prog = program()
    normalised = _normalise(argv)
    arguments = _checked(normalised)
    if "--print_config" in arguments:
        _check_engine_file(arguments)
    try:
        namespace = parser.parse_args(arguments)
    except ArgumentError as error:
        raise UserError(_one_line(error)) from None
    config = RunConfig(**{name: _section(make, getattr(namespace, name)) for name, make in SECTIONS.items()})
    config.given = _given(normalised)
    rules.check(config)
    return config, namespace


def _given(arguments: list[str]) -> frozenset[str]:
    """Dotted names of the fields that valid arguments, or the files among them, set."""
    names: set[str] = set()
    tokens = iter(arguments)
    for token in tokens:
        key, _, text = token.removeprefix("--").partition("=")
        if token.startswith("--config="):
            names |= _names_in(entries(read_yaml(Path(text), "--config"), "--config"))
        elif token.startswith("--") and key in SECTIONS:  # train={steps: 3, lr: 1e-3}
            names |= _names_in({key: parse_value(text or next(tokens, ""), key)})
        elif token.startswith("--"):
            names.add(key)
    return frozenset(names)


def _names_in(sections: dict[str, yaml.Node | None]) -> set[str]:
    return {f"{section}.{name}" for section, fields in sections.items() for name in entries(fields, section)}


def _section(make, parsed):
    """The section as a dataclass; the parser returns a namespace instead if a YAML file has set some of its fields."""
    return parsed if isinstance(parsed, make) else make(**vars(parsed))


@functools.cache
def _build_parser(description: str, with_engine: bool) -> ArgumentParser:
    """Built once in a process: reading the docstrings of all fields takes half a second."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        exit_on_error=False,
        description=f"{description} Fields may be written as section.field=value. "
        f"recipe=NAME starts from a shipped recipe ({', '.join(recipe_names())}); without one, without --config and "
        f"without teacher.name it is recipe=quickstart. The defaults below apply to fields that none of these sets.",
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below.")
    if with_engine:
        parser.add_argument(
            "--deepspeed",
            type=str,
            help=f"DeepSpeed's JSON (engine settings only): a file, or one of {', '.join(engine_names())} (default: "
            f"{DEFAULT_ENGINE}).",
        )
        parser.add_argument(
            "--teachers-once",
            type=str,
            help="Several students in one job, which share each pass of the teacher: YAML files, separated by commas, "
            "with the fields in which each differs, or the name of a shipped set "
            f"({', '.join(student_set_names())}). Their folders are run.dir/students/FILE.",
        )
        parser.add_argument("--check", action="store_true", help="Only check whether the run can start; try one step.")
        parser.add_argument("--local_rank", type=int, default=-1, help="Set by the launcher.")
    parser.add_class_arguments(RunConfig, None)
    return parser


def _normalise(argv: list[str]) -> list[str]:
    """`a.b=c` -> `--a.b=c`; `recipe=NAME` -> `--config FILE`; config files first, so that overrides win."""
    configs: list[str] = []
    overrides: list[str] = []
    recipes = [token for token in argv if token.removeprefix("--").startswith("recipe=")]
    if len(recipes) > 1:
        raise UserError(f"recipe: found {' and '.join(recipes)}, allowed is one; set single fields behind it")
    tokens = iter(argv)
    for token in tokens:
        if token.removeprefix("--").startswith("recipe="):
            configs.append(f"--config={recipe_path(token.split('=', 1)[1])}")
        elif token == "--config":
            if not (path := next(tokens, "")):
                raise UserError("--config: names no file; give a YAML file, or recipe=NAME")
            configs.append(f"--config={path}")
        elif token.startswith("--config="):
            configs.append(token)
        elif not token.startswith("-") and "=" in token:
            overrides.append(f"--{token}")
        else:
            overrides.append(token)
    if not configs and not _is_about_another_job(overrides):
        configs.append(f"--config={recipe_path('quickstart')}")
    return configs + overrides


def _is_about_another_job(arguments: list[str]) -> bool:
    """Whether the quickstart recipe must not be the default: its sizes, correction and rates fit its teacher."""
    names = {argument.split("=", 1)[0] for argument in arguments}
    return bool(names & {"-h", "--help", "--teacher", "--teacher.name"})


def _known_keys() -> dict[str, set[str]]:
    return {name: {field.name for field in dataclasses.fields(section)} for name, section in SECTIONS.items()}


def _checked(arguments: list[str]) -> list[str]:
    """`arguments` for the parser; a config file with removed fields is replaced by its content without them.

    Refuses unknown names and values of the wrong type before parsing: the parser itself would accept `teacher.nam` as
    an abbreviation, and describe errors in terms of Python types.
    """
    checked: list[str] = []
    tokens = iter(arguments)
    for token in tokens:
        key, equals, text = token.removeprefix("--").partition("=")
        if token.startswith("--config="):
            checked.append(f"--config={_check_file(Path(text)) or text}")
            continue
        checked.append(token)
        if token.startswith("--") and (key.partition(".")[0] in _known_keys() or "." in key):
            values = [] if equals else [*itertools.islice(tokens, 1)]
            _check_argument(key, text if equals else "".join(values))
            checked += values
    return checked


def _check_argument(key: str, text: str) -> None:
    section, _, name = key.partition(".")
    _check_key(section, name or None, where="command line")
    if not name:  # train={steps: 3, lr: 1e-3}
        _check_section(section, parse_value(text, section), where="command line")
    elif is_text(section, name):
        check_value(section, name, yaml.ScalarNode("tag:yaml.org,2002:str", text))
    else:
        check_value(section, name, parse_value(text, key))


def _check_file(path: Path, flag: str = "--config") -> str | None:
    """Raise `UserError` for unknown names and wrong values in a YAML file.

    Returns:
        The YAML without removed fields, or None if the file has no removed fields.
    """
    node = read_yaml(path, flag)
    has_removed = take_out_harmless(node)
    for section, fields in entries(node, f"{flag}: {str(path)!r}").items():
        _check_key(section, None, where=str(path))
        _check_section(section, fields, where=str(path))
    return yaml.serialize(node) if has_removed else None


def _check_section(section: str, node: yaml.Node | None, where: str) -> None:
    for name, value in entries(node, f"{section}: the section in {where}").items():
        _check_key(section, name, where)
        check_value(section, name, value)


def _check_key(section: str, name: str | None, where: str) -> None:
    known = _known_keys()
    if section not in known:
        raise UserError(f"{section}: unknown section in {where}{nearest(section, known)}; allowed: {', '.join(known)}")
    if removed := REMOVED_FIELDS.get(f"{section}.{name}"):
        raise UserError(
            f"{section}.{name}: found in {where}, but the field was removed because {removed.why}; {removed.instead}"
        )
    if name is not None and name not in known[section]:
        raise UserError(
            f"{section}.{name}: unknown field in {where}{nearest(name, known[section])}; "
            f"allowed: {', '.join(sorted(known[section]))}"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).replace("Parser key ", "").split())
