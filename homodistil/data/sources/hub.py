"""Text, and labels, of data sets on the Hugging Face hub, through the `datasets` library and its cache."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from homodistil.data.sources.columns import joined, no_column, no_label, no_text
from homodistil.errors import UserError

_BATCH_ROWS = 1024


class _Name(NamedTuple):
    repository: str
    config: str | None = None
    revision: str | None = None


_SHORT_NAMES = {
    "wikipedia": _Name("wikimedia/wikipedia", "20231101.en"),
    # The default branch has a loading script, which `datasets` no longer runs; this is the hub's conversion of it.
    "bookcorpus": _Name("bookcorpus/bookcorpus", None, "refs/convert/parquet"),
}
_FILE_LIKE = re.compile(r".*\.(txt|jsonl?|parquet|csv|tsv|gz|zip|arrow)")


class HubText:
    """The `train` split of a hub data set."""

    def __init__(self, rows, name: str, fingerprint: str) -> None:
        self._rows, self.name = rows, name
        self.fingerprint = fingerprint

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Approximate bytes of all columns."""
        return self._rows.data.nbytes

    def texts(self, column: str, start: int = 0, end: int | None = None) -> Iterator[str]:
        """Non-empty texts of rows start .. end - 1."""
        return (text for (value,) in self.rows([column], start, end) if (text := joined(value)))

    def rows(self, columns: Sequence[str], start: int = 0, end: int | None = None) -> Iterator[list[Any]]:
        """These columns of rows start .. end - 1, read batch by batch from the memory-mapped table."""
        rows = self._rows.select(range(start, self.num_rows if end is None else end))
        for batch in rows.select_columns(list(columns)).with_format("arrow").iter(_BATCH_ROWS):
            yield from map(list, zip(*(batch.column(column).to_pylist() for column in columns), strict=True))

    def label_names(self, column: str) -> tuple[str, ...] | None:
        """What the numbers in a column mean, where the data set says so (`datasets.ClassLabel`); -1 means no label."""
        kind = self._rows.features[column]
        names = getattr(getattr(kind, "feature", kind), "names", None)
        return tuple(names) if names else None


def is_hub_name(name: str) -> bool:
    """Whether an entry of `data.sources` is a hub name: a short name, or owner/name[:config] that is not a path."""
    if name in _SHORT_NAMES:
        return True
    pattern = r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*(:[\w.\-]+)?"
    return bool(re.fullmatch(pattern, name)) and not _FILE_LIKE.fullmatch(name) and not Path(name).exists()


def hub_repository(name: str) -> str:
    """owner/name of a hub data set."""
    return _SHORT_NAMES[name].repository if name in _SHORT_NAMES else name.partition(":")[0]


def _check_text(rows, name: str, column: str, is_of_pair: bool) -> None:
    """Refuse a column that does not hold text, or (of single texts) lists of words."""
    kind = rows.features[column]
    of_one = kind if is_of_pair else getattr(kind, "feature", kind)
    if getattr(of_one, "dtype", None) not in ("string", "large_string"):
        raise no_text(repr(name), column, kind, is_of_pair)


def open_hub(name: str, columns: Sequence[str], label_column: str | None = None) -> HubText:
    """Download the train split of a data set, or take it from the cache of `datasets`.

    Args:
        name: a short name, or owner/name[:config].
        columns: that of the text, or both of a pair.
        label_column: of labels, where these are read.

    Raises:
        UserError: the data set is unknown or cannot be reached, or has no train split or not these columns of text.
    """
    import datasets

    owner_name, _, config = name.partition(":")
    wanted = _SHORT_NAMES.get(name, _Name(owner_name, config or None))
    try:
        rows = datasets.load_dataset(wanted.repository, wanted.config, split="train", revision=wanted.revision)
    except Exception as error:  # datasets and the hub client raise exceptions of many types
        raise UserError(
            f"data.sources: cannot load hub data set {name!r} ({type(error).__name__}: {_first_line(error)}); "
            f"check the name and the connection to the hub, or use local files or embedded"
        ) from error
    for column in columns:
        if column not in rows.column_names:
            raise no_column(repr(name), column, rows.column_names, is_of_pair=len(columns) > 1)
        _check_text(rows, name, column, is_of_pair=len(columns) > 1)
    if label_column and label_column not in rows.column_names:
        raise no_label(repr(name), label_column, rows.column_names)
    return HubText(rows, name, f"{wanted.repository}:{wanted.config}:{rows._fingerprint}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]
