"""The corpus of a run: `data.sources` tokenised, split by document, packed into blocks, cached by content.

    python launcher/prepare_data.py data.sources=[my_texts/]      # prepares it ahead of training

`prepare_corpus` may be called by several processes: the first one builds, all others wait, and all map the same files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from homodistil.config.schema import DataConfig
from homodistil.data.cache import build_once
from homodistil.data.prepare.build_shards import Preparation
from homodistil.data.prepare.filters import Filters, versions
from homodistil.data.prepare.integrity import CHECKED_AT_ONCE_BYTES, blocks_bytes, content_damage, structure_damage
from homodistil.data.prepare.label_rows import labels_file
from homodistil.data.prepare.merge import SUMMARY_FILE, merge
from homodistil.data.prepare.pairs import PairRule, pair_rule
from homodistil.data.prepare.shard_plan import Plan, make_plan
from homodistil.data.prepare.shards import CorpusShards, Recipe
from homodistil.data.prepare.texts import RULE_VERSION, TextRule, text_rule
from homodistil.data.prepare.token_labels import AnyLabelRule
from homodistil.data.rows import LabelRows, Rows, TextLabels
from homodistil.data.sources.documents import read
from homodistil.data.sources.sources import Source, check_sources, open_sources
from homodistil.data.task import task_of
from homodistil.data.tokenizer import check_text_is_known
from homodistil.errors import UserError

_FIRST_DOCUMENTS, _FIRST_TOKENS = 20, 200
_FORMAT_VERSION = 1  # of the cached blocks; increase it when reading, splitting or packing changes


@dataclass(frozen=True)
class Corpus:
    train: Rows
    heldout: Rows
    fingerprint: str
    """Hash of everything that the blocks depend on; equal fingerprints mean equal blocks."""
    description: str
    """One line: documents, tokens and blocks of each split."""
    labels: TextLabels | None = None
    """Of the text in each block (data.label_column); None: labels are not read."""

    def names(self) -> tuple[Path, Path, str, str, bool]:
        """Plain values from which another process can map the same files (`named`)."""
        return self.train.path, self.heldout.path, self.fingerprint, self.description, self.labels is not None

    @classmethod
    def named(cls, names: tuple[Path, Path, str, str, bool]) -> Corpus:
        """The corpus for the values of `names()`, mapped by this process."""
        train, heldout, fingerprint, description, has_labels = names
        labels = _labels_in(train.parent) if has_labels else None
        return cls(Rows(train), Rows(heldout), fingerprint, description, labels)


def _labels_in(folder: Path) -> TextLabels:
    return TextLabels(*(LabelRows(folder / labels_file(split)) for split in ("train", "heldout")))


def corpus_fingerprint(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """`Corpus.fingerprint` of a corpus that need not have been prepared. Raises `UserError` as `prepare_corpus`."""
    return _Order(config, tokenizer).fingerprint


def prepare_corpus(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    accept: Callable[[str], None] = lambda _: None,
    checked_bytes: float | None = None,
    labels: AnyLabelRule | None = None,
) -> Corpus:
    """The corpus, from the cache if it has been prepared before. Shards that a killed process has finished are reused.

    A cached corpus of up to `checked_bytes` (None: CHECKED_AT_ONCE_BYTES) is verified by its hashes; the caller must
    verify a larger one (`integrity.BackgroundCheck`).

    Args:
        tokenizer: of the teacher.
        accept: called with the fingerprint before anything is prepared; may raise.
        labels: how ground-truth labels are read; None: they are not, whatever columns there are.

    Raises:
        UserError: a source is missing, unreadable or without text, or has a label that is none; there are fewer than
            two documents; `seq_len` is too long for the model; a package or hub data set cannot be downloaded; the
            library of a filter is missing.
    """
    order = _Order(config, tokenizer, labels)
    accept(order.fingerprint)
    return order.whole(CHECKED_AT_ONCE_BYTES if checked_bytes is None else checked_bytes)


def prepare_share(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, task: int, tasks: int, labels: AnyLabelRule | None = None
) -> Corpus | str:
    """The work of one array task: make every `tasks`-th shard, beginning with number `task`.

    Returns:
        The corpus, in the task that finishes last and merges the shards; in all other tasks a line on what is left.

    Raises:
        UserError: as in `prepare_corpus`.
    """
    return _Order(config, tokenizer, labels).share(task, tasks)


def shards_of(config: DataConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Preparation:
    """The preparation of the shards of a corpus in `folder` instead of the cache, even if the corpus exists."""
    return _Order(config, tokenizer).preparation(folder, lambda: False)


class _Order:
    """A request for a corpus, with its sources opened."""

    def __init__(
        self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, labels: AnyLabelRule | None = None
    ) -> None:
        self._backend, task = check_tokenizer(config, tokenizer), task_of(config)
        self._frame = task.frame(tokenizer)
        self._unknown = tokenizer.unk_token_id
        self._config, self._sources, self._labels = config, open_sources(config), labels
        self._texts = self._text_rule(tokenizer) if task.has_single_texts else None
        special_ids = task.fingerprint(tokenizer)
        self.fingerprint = _fingerprint(config, self._sources, self._backend, special_ids, self._texts, labels)
        self._cache_dir = Path(config.cache_dir).expanduser()
        self._target = self._cache_dir / "corpora" / self.fingerprint

    def _text_rule(self, tokenizer: PreTrainedTokenizerBase) -> TextRule | PairRule:
        config = self._config
        if config.pair_columns:
            return pair_rule(config, tokenizer)
        return text_rule(config, self._backend, config.seq_len - self._frame.body(config.seq_len))

    def whole(self, checked_bytes: float = math.inf) -> Corpus:
        """The corpus, built if necessary. A cached corpus of at most `checked_bytes` is verified by its hashes."""

        def damage(folder: Path) -> str | None:
            if problem := structure_damage(folder):
                return problem
            return content_damage(folder) if blocks_bytes(folder) <= checked_bytes else None

        def build(folder: Path) -> None:
            nonlocal preparation
            preparation = self.preparation()
            self._build(folder, preparation)

        preparation = None
        folder = build_once(self._target, build, damage)
        if preparation is not None:
            preparation.give_up()
        train, heldout = Rows(folder / "train.npy"), Rows(folder / "heldout.npy")
        labels = None if self._labels is None else _labels_in(folder)
        return Corpus(train, heldout, self.fingerprint, _describe(folder, self._config.seq_len), labels)

    def share(self, task: int, tasks: int) -> Corpus | str:
        if self._is_there():
            return self.whole()
        preparation = self.preparation()
        numbers = range(len(preparation.maker.sizes))
        preparation.make(numbers[task::tasks], self._config.workers)
        left = [] if self._is_there() else preparation.unfinished()
        if not left:
            return self.whole()
        return (
            f"task {task} of {tasks} is done; {len(left)} of {len(numbers)} shards are left to other tasks; "
            f"the last one to finish merges them"
        )

    def _is_there(self) -> bool:
        return self._target.exists() and structure_damage(self._target) is None

    def preparation(self, folder: Path | None = None, is_over: Callable[[], bool] | None = None) -> Preparation:
        plan = make_plan(self._sources, self._config.shard_bytes, self.fingerprint)
        self._check_language(plan)
        recipe = Recipe(self._sources, self._backend, Filters(self._config), self._texts, self._labels)
        folder = folder or self._cache_dir / "parts" / plan.hash[:16]
        return Preparation(folder, CorpusShards(plan, recipe), is_over or self._is_there)

    def _check_language(self, plan: Plan) -> None:
        """Raise `UserError` for a source whose first tokens are unknown, before all of it is tokenised."""
        first = {shard.source: shard.spans[0] for shard in reversed(plan.shards)}
        for index, span in first.items():
            source, ids = self._sources[index], []
            for document in islice(read(source, span), _FIRST_DOCUMENTS):
                ids += self._backend.encode(next(iter(document), ""), add_special_tokens=False).ids
                if len(ids) >= _FIRST_TOKENS:
                    break
            check_text_is_known(ids, self._unknown, source.name)

    def _build(self, folder: Path, preparation: Preparation) -> None:
        shards = preparation.whole(self._config.workers)
        merge(folder, *preparation.maker, shards, self._frame, self._config)


def check_tokenizer(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the fast tokenizer without truncation and padding. Raises `UserError` where it does not do."""
    task = task_of(config)
    missing = [name for name in task.special_tokens if getattr(tokenizer, f"{name}_id", None) is None]
    if missing:
        raise UserError(f"teacher.name: its tokenizer has no {', '.join(missing)}; use the tokenizer of {task.model}")
    if config.seq_len > tokenizer.model_max_length:
        raise UserError(
            f"data.seq_len: found {config.seq_len}, the teacher takes at most {tokenizer.model_max_length} tokens; "
            f"lower data.seq_len"
        )
    # Earlier calls may have changed the truncation of the tokenizer, which must not affect the fingerprint.
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = content["padding"] = None
    return Tokenizer.from_str(json.dumps(content))


def _fingerprint(
    config: DataConfig,
    sources: list[Source],
    backend: Tokenizer,
    special_ids: list,
    texts: TextRule | PairRule | None,
    labels: AnyLabelRule | None,
) -> str:
    parts = {
        "version": _FORMAT_VERSION,
        "sources": [source.fingerprint for source in sources],
        "text_documents": config.text_documents,
        "text_column": config.text_column,
        "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "special_ids": special_ids,
        "seq_len": config.seq_len,
        "heldout_fraction": config.heldout_fraction,
    }
    # Added only if they are used, so that older corpora keep their fingerprints.
    if any(source.weight != 1 for source in sources):
        parts["weights"] = [source.weight for source in sources]
    if isinstance(texts, TextRule):
        parts["texts"] = [RULE_VERSION, *texts]
    if isinstance(texts, PairRule):
        parts["pairs"] = texts.identity
    if labels is not None:
        parts["labels"] = labels.identity
    if used := versions(config):
        parts["filters"] = [config.boilerplate_filter, config.near_duplicates, used]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _describe(folder: Path, seq_len: int) -> str:
    summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    parts = []
    for label, key in (("training", "train"), ("held out", "heldout")):
        documents, tokens, blocks = (f"{summary[key][unit]:,}" for unit in ("documents", "tokens", "blocks"))
        parts.append(f"{label}: {documents} documents, {tokens} tokens, {blocks} blocks of {seq_len}")
    return "; ".join(parts)


__all__ = ["Corpus", "Rows", "check_sources", "prepare_corpus", "prepare_share", "shards_of"]
