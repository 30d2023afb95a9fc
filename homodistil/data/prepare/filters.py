"""Filters for documents from maintained libraries: Gopher's rules (datatrove), MinHash signatures (datasketch).

Both libraries are optional, and imported only if the config uses them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module, metadata

import numpy as np

from homodistil.config.schema import DataConfig
from homodistil.errors import UserError

HEAD_CHARS = 1 << 18
"""A document is judged by this many characters at its start, so that a long one need not be in memory."""
NUM_HASHES = 128
SIMILARITY = 0.8
"""Documents with at least this Jaccard similarity of their word 5-grams count as near-duplicates."""
_SHINGLE_WORDS = 5

KEPT, QUALITY, REPETITION, NEAR_DUPLICATE = range(4)
REASONS = {QUALITY: "gopher_quality", REPETITION: "gopher_repetition", NEAR_DUPLICATE: "near_duplicate"}
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]+")


class Filters:
    """The filters of a config. Raises `UserError` if a library is not installed."""

    def __init__(self, config: DataConfig) -> None:
        self.near_duplicates = config.near_duplicates == "minhash"
        self._rules = _gopher_rules() if config.boilerplate_filter == "gopher" else None
        self._signature = _minhash() if self.near_duplicates else None
        self.are_any = self.near_duplicates or self._rules is not None

    def judge(self, text: str) -> int:
        """KEPT, or the reason to drop the document: QUALITY or REPETITION."""
        return self._rules(text) if self._rules else KEPT

    def signature(self, text: str) -> np.ndarray:
        """MinHash signature, (NUM_HASHES,) uint32. The share of equal entries estimates the similarity of documents."""
        words = text.lower().split()
        shingles = {" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(max(1, len(words) - _SHINGLE_WORDS + 1))}
        return self._signature(shingles)


def versions(config: DataConfig) -> dict[str, str]:
    """Versions of the libraries of the filters in use, which are part of the fingerprint of the corpus."""
    wanted = {"datatrove": config.boilerplate_filter != "none", "datasketch": config.near_duplicates != "none"}
    by_library = {}
    for name in (name for name, is_wanted in wanted.items() if is_wanted):
        _need(name)
        by_library[name] = metadata.version(name)
    return by_library


# The package of datatrove does not require two packages that its filters import. The advice does not name the extra
# `homodistil[data]`, because the package homodistil on the public index is not this project.
_INSTALLED_AS = {"datatrove": "datatrove humanize loguru", "datasketch": "datasketch"}


def _need(package: str, module: str | None = None):
    try:
        return import_module(module or package)
    except ImportError as error:
        field = "data.boilerplate_filter" if package == "datatrove" else "data.near_duplicates"
        reason = " ".join(str(error).split())
        raise UserError(
            f"{field}: needs {package} ({reason}); pip install {_INSTALLED_AS[package]}, or set it to none"
        ) from None


def _gopher_rules() -> Callable[[str], int]:
    filters = _need("datatrove", "datatrove.pipeline.filters")
    Document = _need("datatrove", "datatrove.data").Document
    Whitespace = _need("datatrove", "datatrove.utils.word_tokenizers").WhitespaceTokenizer

    class Words(Whitespace):
        """Splits text into words and punctuation, which suffices for the rules; datatrove itself uses spaCy."""

        def word_tokenize(self, text: str) -> list[str]:
            return _WORD.findall(text)

    words = Words()
    # Books are longer than the rule for web pages allows, and only their start is judged anyway.
    quality = filters.GopherQualityFilter(language=words, max_doc_words=None)
    repetition = filters.GopherRepetitionFilter(language=words)

    def judge(text: str) -> int:
        document = Document(text=text, id="")
        if quality.filter(document) is not True:
            return QUALITY
        return KEPT if repetition.filter(document) is True else REPETITION

    return judge


def _minhash() -> Callable[[set[str]], np.ndarray]:
    datasketch = _need("datasketch")
    import xxhash

    def signature(shingles: set[str]) -> np.ndarray:
        minhash = datasketch.MinHash(NUM_HASHES, hashfunc=xxhash.xxh32_intdigest, permutations=shared, scheme=scheme)
        minhash.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in shingles])
        return minhash.hashvalues.astype(np.uint32)

    first = datasketch.MinHash(NUM_HASHES, hashfunc=xxhash.xxh32_intdigest)
    shared, scheme = first.permutations, first.scheme  # making them again takes longer than hashing a document
    return signature


def bands() -> tuple[int, int]:
    """(number of bands, rows per band) that datasketch chooses for the threshold SIMILARITY."""
    lsh = _need("datasketch").MinHashLSH(threshold=SIMILARITY, num_perm=NUM_HASHES)
    return lsh.b, lsh.r
