"""Reads questions, contexts and answers from SQuAD's official JSON files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from homodistil.errors import UserError

VERSIONS = ("v1.1", "v2.0")
# In the official files the positions of a few answers are wrong; more than this means another file.
_MAX_MISPLACED, _MAX_MISPLACED_FRACTION = 10, 0.01
_OFFICIAL = "give the official file of https://rajpurkar.github.io/SQuAD-explorer"


class Answer(NamedTuple):
    text: str
    start: int
    """Position of its first character in the context; -1 if the text is not where the file says."""


class Example(NamedTuple):
    ident: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    """Empty if the context does not answer the question (v2.0)."""


class SquadData(NamedTuple):
    """Training and dev questions of one version."""

    version: str
    train: list[Example]
    dev: list[Example]

    @property
    def has_unanswerable(self) -> bool:
        return self.version == "v2.0"

    @property
    def fingerprint(self) -> str:
        """sha256 over every question, context and answer."""
        digest = hashlib.sha256()
        for example in self.train + self.dev:
            digest.update(json.dumps(example).encode())
        return digest.hexdigest()


def load_squad(folder: str | Path, version: str | None = None) -> SquadData:
    """Read train-VERSION.json and dev-VERSION.json in `folder`.

    Args:
        version: "v1.1" or "v2.0"; None: the version whose files are in the folder.

    Raises:
        UserError: the folder or a file is missing, the folder has both versions and none is chosen, or a file does not
            have the official layout.
    """
    folder = Path(folder).expanduser()
    version = version or _only_version(folder)
    if version not in VERSIONS:
        raise UserError(f"--version: found {version!r}, allowed: {', '.join(VERSIONS)}")
    return SquadData(version, *(read_examples(folder / f"{name}-{version}.json", version) for name in ("train", "dev")))


def _only_version(folder: Path) -> str:
    if not folder.is_dir():
        raise UserError(f"--data: found {str(folder)!r}, which is no folder; give the one with train-v*.json in it")
    there = [version for version in VERSIONS if (folder / f"train-{version}.json").is_file()]
    if len(there) == 1:
        return there[0]
    if there:
        raise UserError(f"--data: {folder} holds {' and '.join(there)}; choose one with --version")
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
    raise UserError(f"{folder / 'train-v1.1.json'}: not found, nor train-v2.0.json (found: {names}); {_OFFICIAL}")


def read_examples(file: Path, version: str) -> list[Example]:
    """Read all questions of a file.

    Raises:
        UserError: the file cannot be read, has another layout or version, no question, or too many answers that are
            not at their position.
    """
    content = _parsed(file)
    articles = _field(content, "data", list, f"{file}")
    if content.get("version", version).removeprefix("v") != version.removeprefix("v"):
        raise UserError(f"{file}: found version {content['version']!r}, expected {version}; {_OFFICIAL}")
    examples, misplaced = [], []
    for i, article in enumerate(articles):
        for j, paragraph in enumerate(_field(article, "paragraphs", list, f"{file}, data[{i}]")):
            where = f"{file}, data[{i}].paragraphs[{j}]"
            context = _field(paragraph, "context", str, where)
            for k, question in enumerate(_field(paragraph, "qas", list, where)):
                examples.append(_example(question, context, version, f"{where}.qas[{k}]", misplaced))
    if not examples:
        raise UserError(f"{file}: found no question, expected at least one; {_OFFICIAL}")
    allowed = min(len(examples) - 1, max(_MAX_MISPLACED, int(_MAX_MISPLACED_FRACTION * len(examples))))
    if len(misplaced) > allowed:
        raise UserError(
            f"{file}: found {len(misplaced)} answers that do not stand at answer_start (the first in {misplaced[0]}), "
            f"allowed are {allowed}; answer_start counts characters of the context; {_OFFICIAL}"
        )
    return examples


def _parsed(file: Path) -> dict[str, Any]:
    if file.exists() and not file.is_file():  # reading a pipe could wait for ever
        raise UserError(f"{file}: is not a regular file; {_OFFICIAL}")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {_OFFICIAL}") from None
    except (ValueError, RecursionError) as error:  # also raised for numbers of 5,000 digits
        raise UserError(f"{file}: is not valid JSON ({error}); {_OFFICIAL}") from None
    if not isinstance(content, dict) or not isinstance(content.get("version", ""), str):
        raise UserError(f"{file}: found no object with `version` and `data` at the top; {_OFFICIAL}")
    return content


def _field(item: Any, name: str, kind: type, where: str) -> Any:
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        actual = f"fields {', '.join(sorted(item)[:8]) or 'none'}" if isinstance(item, dict) else type(item).__name__
        actual = f"`{name}` {type(value).__name__}" if value is not None else actual
        raise UserError(f"{where}: found {actual}, needs `{name}` ({kind.__name__}); {_OFFICIAL}")
    if kind is str and any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{where}: found half a surrogate pair in `{name}`, which is no character; {_OFFICIAL}")
    return value


def _example(question: Any, context: str, version: str, where: str, misplaced: list[str]) -> Example:
    ident = _field(question, "id", str, where)
    text = _field(question, "question", str, where).strip()
    answers = []
    for answer in _field(question, "answers", list, where):
        said, start = _field(answer, "text", str, where), _field(answer, "answer_start", int, where)
        stands = start >= 0 and bool(said) and context.startswith(said, start)
        answers.append(Answer(said, start if stands else -1))
        misplaced += [] if stands else [where]
    impossible = version == "v2.0" and _field(question, "is_impossible", bool, where)
    if impossible == bool(answers):
        raise UserError(
            f"{where}: found {len(answers)} answers where is_impossible is {str(impossible).lower()}; "
            f"{version} allows an empty list only for impossible questions (v2.0), and for these nothing else; "
            f"{_OFFICIAL}"
        )
    return Example(ident, text, context, tuple(dict.fromkeys(answers)))
