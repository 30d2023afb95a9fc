"""Text of data sets on the Hugging Face hub, through the `datasets` library and its cache."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from homodistil.errors import UserError, nearest

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

    def __init__(self, rows, fingerprint: str) -> None:
        self._rows = rows
        self.fingerprint = fingerprint

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Approximate bytes of all columns."""
        return self._rows.data.nbytes

    def texts(self, column: str, start: int = 0, end: int | None = None) -> Iterator[str]:
        """Non-empty texts of rows start .. end - 1, read batch by batch from the memory-mapped table."""
        rows = self._rows.select(range(start, self.num_rows if end is None else end))
        for batch in rows.select_columns([column]).with_format("arrow").iter(_BATCH_ROWS):
            yield from (text for text in batch.column(0).to_pylist() if text)


def is_hub_name(name: str) -> bool:
    """Whether an entry of `data.sources` is a hub name: a short name, or owner/name[:config] that is not a path."""
    if name in _SHORT_NAMES:
        return True
    pattern = r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*(:[\w.\-]+)?"
    return bool(re.fullmatch(pattern, name)) and not _FILE_LIKE.fullmatch(name) and not Path(name).exists()


def hub_repository(name: str) -> str:
    """owner/name of a hub data set."""
    return _SHORT_NAMES[name].repository if name in _SHORT_NAMES else name.partition(":")[0]


def open_hub(name: str, column: str) -> HubText:
    """Download the train split of a data set, or take it from the cache of `datasets`.

    Args:
        name: a short name, or owner/name[:config].
        column: column of the text.

    Raises:
        UserError: the data set is unknown or cannot be reached, or has no train split or no `column`.
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
    if column not in rows.column_names:
        columns = rows.column_names
        raise UserError(
            f"data.text_column: {name!r} has no column {column!r}{nearest(column, columns)}; "
            f"found: {', '.join(columns)}"
        )
    return HubText(rows, f"{wanted.repository}:{wanted.config}:{rows._fingerprint}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]
