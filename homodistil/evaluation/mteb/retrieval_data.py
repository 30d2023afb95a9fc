"""Local retrieval data in the format of BEIR, as a task of MTEB.

FOLDER/corpus.jsonl     {"_id": "d1", "title": "Rome", "text": "..."}   (title may be left out)
FOLDER/queries.jsonl    {"_id": "q1", "text": "..."}
FOLDER/qrels/test.tsv   query-id<TAB>corpus-id<TAB>score   with these names in its first line
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from homodistil.errors import UserError
from homodistil.models.checkpoint_files import short

CORPUS, QUERIES, RELEVANT = "corpus.jsonl", "queries.jsonl", "qrels/test.tsv"


def retrieval_task(folder: Path) -> Any:
    """A `mteb.abstasks.AbsTaskRetrieval` of the folder's name. Raises `UserError` for a line that does not fit."""
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    corpus = list(_texts(folder / CORPUS, ("title", "text")))
    queries = list(_texts(folder / QUERIES, ("text",)))
    relevant = _relevant(folder / RELEVANT, {row["id"] for row in queries}, {row["id"] for row in corpus})

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=folder.resolve().name,
            description="Retrieval data of a local folder.",
            dataset={"path": str(folder.resolve()), "revision": "local"},
            type="Retrieval",
            category="t2t",
            eval_langs=["und-Zyyy"],  # undetermined
            main_score="ndcg_at_10",
        )

        def load_data(self, *args, **kwargs) -> None:
            parts = {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(queries)}
            self.dataset = {"default": {"test": parts | {"relevant_docs": relevant, "top_ranked": None}}}
            self.data_loaded = True

    return LocalRetrieval()


def _texts(file: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """id and text columns of each line; what a line leaves out is empty, but for its text."""
    for number, line in _lines(file):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not (isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("_id", "text"))):
            raise UserError(
                f"--tasks: {file}:{number}: found {short(line)}, expected a JSON object with the texts _id and text"
            )
        yield {"id": row["_id"]} | {name: row.get(name) or "" for name in columns}


def _relevant(file: Path, queries: set[str], corpus: set[str]) -> dict[str, dict[str, int]]:
    """Query -> document -> how relevant it is."""
    relevant: dict[str, dict[str, int]] = {}
    for number, line in _lines(file):
        if number == 1 and line.split("\t")[0] == "query-id":
            continue
        query, document, relevance = (*line.split("\t"), "", "")[:3]
        if query not in queries or document not in corpus or not relevance.strip().isdigit():
            raise UserError(
                f"--tasks: {file}:{number}: found {short(line)}, expected the _id of a query, that of a document and a "
                f"whole number, with tabs between"
            )
        relevant.setdefault(query, {})[document] = int(relevance)
    return relevant


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not empty."""
    try:
        with file.open(encoding="utf-8") as lines:
            yield from ((number, text) for number, line in enumerate(lines, 1) if (text := line.rstrip("\r\n")).strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--tasks: cannot read {file} ({reason}); a folder of retrieval data has {CORPUS}, {QUERIES} and {RELEVANT}"
        ) from None
