"""What a model was made from, in words that mean something on another machine: teacher, text, and the command.

A model card travels: folders of the machine that trained it are replaced by names, and what is told of a teacher is
what its own card or its package says. Nothing is guessed.
"""

from __future__ import annotations

import filecmp
import re
import shlex
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import yaml
from huggingface_hub import hf_hub_download, metadata_load, try_to_load_from_cache

from homodistil.config.schema import DataConfig
from homodistil.config.shipped import ENGINES, engine_names
from homodistil.data.sources import assets
from homodistil.data.sources.hub import hub_repository, is_hub_name
from homodistil.data.sources.text_files import is_url, local_path

_SCRIPT, _COMMAND, _SHIPPED = "train.py", "homodistil", "ds_configs"
_HUB_TIMEOUT_S = 5.0
# Flags that take a file -> its placeholder, and what to put there.
_FILES = {
    "--config": ("CONFIG", "a YAML file with the run's fields, such as `config.yaml` of its folder"),
    "--deepspeed": ("DEEPSPEED_JSON", "the engine's JSON, such as `ds_config.json` of the run's folder"),
    "--teachers-once": ("STUDENTS", "the YAML files of the students, separated by commas"),
}
_LOCAL_PATH = re.compile(r"""(?<![\w.:/-])(?:~[\w.-]*|\.\.)?/[^\s,\]"']*""")


class Origin(NamedTuple):
    """Where a model comes from, as the run's config names it."""

    teacher: str
    """`teacher.name`."""
    data: DataConfig
    run_dir: str | None
    """`run.dir`."""


class Teacher(NamedTuple):
    """A teacher as its card or package describes it; None: not known."""

    name: str
    licence: str | None = None
    """Identifier, as on the hub."""
    base_model: str | None = None
    """Hub id of the teacher, or of what the teacher's own card says it was made from."""


def describe_teacher(name: str) -> Teacher:
    """What is known of `teacher.name`. Asks the hub for a hub model's card where it is not cached, and does without
    if it cannot."""
    if assets.is_embedded(name):
        packaged = assets.TEACHERS[name]
        return Teacher(name, packaged.licence, packaged.base_model)
    folder = Path(name).expanduser()
    if folder.exists():
        card = _metadata(folder / "README.md")
        return Teacher(folder.resolve().name, _text(card.get("license")), _first(card.get("base_model")))
    return Teacher(name, _text(_metadata(_hub_card(name)).get("license")), name)


def describe_sources(sources: list[str]) -> list[str]:
    """Each of `data.sources` by its name: packaged and hub names as they are, of paths and URLs the last part."""
    return [_source(source) for source in sources]


def hub_datasets(sources: list[str]) -> list[str]:
    """Hub ids among `data.sources`."""
    return [hub_repository(source) for source in sources if is_hub_name(source)]


def repeatable(command: str, origin: Origin, num_ranks: int) -> tuple[str, dict[str, str]]:
    """The command line of a run for another machine.

    Args:
        command: interpreter, script and arguments, quoted for a shell.

    Returns:
        The command, and what stands for what: placeholder -> what to put there.
    """
    script, arguments = _script(shlex.split(command))
    places, meant, tokens = _places(origin), {}, []
    for token in _split_flags(arguments):
        is_file = bool(tokens) and tokens[-1] in _FILES
        if is_file and token not in engine_names() and not (token := _shipped(token)).startswith(f"{_SHIPPED}/"):
            placeholder, meaning = _FILES[tokens[-1]]
            meant[placeholder] = meaning
            tokens.append(placeholder)
        else:
            tokens.append(_replaced(token, places, meant))
    if script != _SCRIPT:
        start = f"{_COMMAND} train --ranks {num_ranks}" if num_ranks > 1 else f"{_COMMAND} train"
    else:
        start = f"deepspeed --num_accelerators {num_ranks}" if num_ranks > 1 else "python"
        start += f" launcher/{_SCRIPT}"
    return f"{start} {shlex.join(tokens)}".rstrip(), meant


def _script(words: list[str]) -> tuple[str, list[str]]:
    """(train.py or homodistil, arguments) of a command line; one started from Python has the run's own files."""
    name = Path(words[1]).name if len(words) > 1 else ""
    if name in (_COMMAND, "cli.py") and words[2:3] == ["train"]:
        return _COMMAND, words[3:]
    is_ours = name == _SCRIPT
    return _SCRIPT, words[2:] if is_ours else ["--config", "config.yaml", "--deepspeed", "ds_config.json"]


def _split_flags(arguments: list[str]) -> list[str]:
    """Without what a launcher added; a flag's file behind it, not in the same word."""
    words = [word for word in arguments if not word.startswith(("--local_rank", "--local-rank"))]
    parts = [word.split("=", 1) if word.split("=", 1)[0] in _FILES else [word] for word in words]
    return [part for pair in parts for part in pair]


def _places(origin: Origin) -> list[tuple[str, str, str]]:
    """(what was typed, placeholder, what to put there), of the fields that name places of this machine."""
    local = [source for source in origin.data.sources if not assets.is_embedded(source) and not is_hub_name(source)]
    numbers = [f"_{i + 1}" for i in range(len(local))] if len(local) > 1 else [""]
    places = [(s, f"TEXT{n}", f"the text `{_source(s)}`") for s, n in zip(local, numbers, strict=False)]
    teacher = origin.teacher
    if not assets.is_embedded(teacher) and Path(teacher).expanduser().exists():
        places.append((teacher, "TEACHER", f"the folder of the teacher `{describe_name(teacher)}`"))
    places += [(origin.run_dir, "RUN_DIR", "a new folder for the run")] if _is_local(origin.run_dir) else []
    cache = origin.data.cache_dir
    return places + ([(cache, "CACHE_DIR", "a folder for prepared text and teachers")] if _is_local(cache) else [])


def describe_name(path: str) -> str:
    """The last part of a path."""
    return Path(path).expanduser().resolve().name


def _is_local(path: str | None) -> bool:
    return bool(path) and bool(_LOCAL_PATH.match(path))


def _replaced(token: str, places: list[tuple[str, str, str]], meant: dict[str, str]) -> str:
    for path, placeholder, meaning in sorted(places, key=lambda place: -len(place[0])):
        # Whole paths alone: `data` in `data.sources` is none.
        pattern = rf"(?<![^\s=,\[\"']){re.escape(path)}/?(?![^\s,\]\"'])"
        token, count = re.subn(pattern, placeholder, token)
        if count:
            meant[placeholder] = meaning

    def other(match: re.Match) -> str:
        number = sum(name.startswith("PATH") for name in meant) + 1
        meant[f"PATH_{number}"] = f"`{Path(match.group()).name}`"
        return f"PATH_{number}"

    return _LOCAL_PATH.sub(other, token)


def _shipped(path: str) -> str:
    """`ds_configs/zero2.json` for a file that is the same as one of this repository, else `path`."""
    ours = ENGINES / Path(path).name
    try:
        is_ours = filecmp.cmp(Path(path).expanduser(), ours, shallow=False)
    except OSError:
        is_ours = False
    return f"{_SHIPPED}/{ours.name}" if is_ours else path


def _source(name: str) -> str:
    if assets.is_embedded(name) or is_hub_name(name):
        return name
    if is_url(local_path(name)):
        return urlsplit(name).path.rstrip("/").rpartition("/")[2] or urlsplit(name).hostname or "a URL"
    return describe_name(local_path(name))


def _hub_card(name: str) -> Path | None:
    cached = try_to_load_from_cache(name, "README.md")
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(name, "README.md", etag_timeout=_HUB_TIMEOUT_S))
    except Exception:  # offline, or the hub's own types: the card is left without what it would have told
        return None


def _metadata(card: Path | None) -> dict:
    """The block at the head of a model card; {} where there is none that can be read."""
    try:
        metadata = metadata_load(card) if card is not None and card.is_file() else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _first(value: object) -> str | None:
    return _text(value[0] if isinstance(value, list) and value else value)
