"""Finished shards -> `train.npy`, `heldout.npy` (n, seq_len), `corpus.json` and `manifest.json`.

With data.label_column there are `train_labels.npy` and `heldout_labels.npy` (n, W) fp32 beside them.

Duplicates and the split are determined over all documents; then every shard is read once, in order. The files do not
depend on how the text was divided into shards, nor on which processes made these.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np

import homodistil
from homodistil.config.schema import DataConfig
from homodistil.data.prepare import filters
from homodistil.data.prepare.document_table import DocumentTable, chosen, document_table, token_rows
from homodistil.data.prepare.label_rows import (
    block_labels,
    document_labels,
    labels_file,
    token_labels,
    write_labels,
)
from homodistil.data.prepare.packing import BlockFile, Packer, split
from homodistil.data.prepare.pairs import PairPacker, PairRule
from homodistil.data.prepare.shard_plan import Plan
from homodistil.data.prepare.shards import SUMMARY, Recipe
from homodistil.data.prepare.text_packing import TextPacker
from homodistil.data.prepare.token_labels import TokenLabelRule
from homodistil.data.task import Frame
from homodistil.errors import UserError

SUMMARY_FILE, MANIFEST_FILE = "corpus.json", "manifest.json"


def merge(folder: Path, plan: Plan, recipe: Recipe, shards: list[Path], frame: Frame, config: DataConfig) -> None:
    """Fill `folder`.

    Args:
        folder: an empty folder.
        plan: of the corpus.
        recipe: that made the shards.
        shards: folder of each shard, all finished.
        frame: ids around and between the documents of a block.
        config: seq_len, heldout_fraction, and what the manifest reports.

    Raises:
        UserError: a source has no text (or none that the filters keep), there are fewer than two documents, or no text
            is left for training.
    """
    table = document_table(plan, shards)
    _drop_duplicates(table, shards, recipe, config)
    _check_every_source_has_text(table, recipe)
    _check_training_text(table, config)
    is_heldout = split(table.hashes, np.where(table.is_kept, table.source_of, -1), config.heldout_fraction)
    sides = {"train": table.is_kept & (is_heldout == 0), "heldout": table.is_kept & (is_heldout == 1)}
    weights = [source.weight for source in recipe.sources]
    to_disk = {
        "train": _Side(folder / "train.npy", table, sides["train"], weights, recipe, frame, config.seq_len),
        "heldout": _Side(folder / "heldout.npy", table, sides["heldout"], [], recipe, frame, config.seq_len),
    }
    if not to_disk["train"].num_blocks:
        raise UserError(
            f"data.weights: {config.weights} leave no block of training text; give larger weights or more text"
        )
    for shard, path, first in zip(plan.shards, shards, table.first, strict=True):
        for rows in token_rows(path, first, recipe.token_dtype):
            for name, side in to_disk.items():
                side.add(shard.source, chosen(rows, sides[name]))
    summary = {name: side.close() for name, side in to_disk.items()}
    checksums = {f"{name}.npy": part.pop("sha256") for name, part in summary.items()}
    if recipe.labels is not None:
        of_documents = _labels(shards, table, recipe, frame, config.seq_len)
        for name, weights_of_side in (("train", weights), ("heldout", [])):
            rows = block_labels(of_documents, sides[name], table.source_of, weights_of_side)
            checksums[labels_file(name)] = write_labels(folder / labels_file(name), rows)
    manifest = _manifest(plan, shards, table, is_heldout, recipe, config)
    _write(folder / MANIFEST_FILE, {**manifest, "splits": summary, "sha256": checksums}, indent=1)
    _write(folder / SUMMARY_FILE, summary)


def _labels(shards: list[Path], table: DocumentTable, recipe: Recipe, frame: Frame, seq_len: int) -> np.ndarray:
    """Labels of all documents, or of the tokens of their blocks, fp32 (N, W)."""
    if not isinstance(recipe.labels, TokenLabelRule):
        return document_labels(shards, recipe.labels.width)
    num_before = (frame.first is not None) + len(recipe.texts.prompt)
    body = frame.body(seq_len) - len(recipe.texts.prompt)
    return token_labels(shards, table.num_tokens, num_before, body, seq_len)


def _packer(recipe: Recipe, frame: Frame, seq_len: int, weight: float = 1.0) -> Packer | TextPacker | PairPacker:
    if recipe.texts is None:
        return Packer(frame, seq_len, weight)
    if isinstance(recipe.texts, PairRule):
        return PairPacker(recipe.texts, weight)
    return TextPacker(frame, seq_len, recipe.texts, weight)


class _Side:
    """Writes one split.

    Args:
        is_on: (N,) bool, the documents of the split.
        weights: of the sources. Unless all are 1, every source is packed separately.
    """

    def __init__(
        self,
        path: Path,
        table: DocumentTable,
        is_on: np.ndarray,
        weights: list[float],
        recipe: Recipe,
        frame: Frame,
        seq_len: int,
    ) -> None:
        self._summary = {"documents": int(is_on.sum()), "tokens": int(table.num_tokens[is_on].sum())}
        if set(weights) <= {1.0}:
            self._packers = [_packer(recipe, frame, seq_len)] * len(recipe.sources)
            groups = [is_on]
        else:
            self._packers = [_packer(recipe, frame, seq_len, weight) for weight in weights]
            groups = [is_on & (table.source_of == index) for index in range(len(weights))]
        num_blocks = [
            packer.num_blocks(table.num_tokens[rows], table.num_texts[rows])
            for packer, rows in zip(self._packers, groups, strict=False)
        ]
        if len(groups) > 1:
            self._summary["blocks_by_source"] = num_blocks
        self.num_blocks = sum(num_blocks)
        self._out = BlockFile(path, sum(num_blocks), seq_len, recipe.token_dtype)
        self._packer: Packer | TextPacker | PairPacker | None = None

    def add(self, source: int, rows) -> None:
        packer = self._packers[source]
        if self._packer not in (None, packer):
            self._packer.close(self._out)
        self._packer = packer
        packer.add(rows, self._out)

    def close(self) -> dict:
        if self._packer is not None:
            self._packer.close(self._out)
        return {**self._summary, "blocks": self._out.num_blocks, "sha256": self._out.close()}


def _drop_duplicates(table: DocumentTable, shards: list[Path], recipe: Recipe, config: DataConfig) -> None:
    if config.near_duplicates == "none":
        return
    from homodistil.data.prepare.near_duplicates import later_copies

    is_wanted = table.is_kept
    table.dropped_by[later_copies(shards, table.first, is_wanted)] = filters.NEAR_DUPLICATE


def _check_every_source_has_text(table: DocumentTable, recipe: Recipe) -> None:
    for index, source in enumerate(recipe.sources):
        here = table.source_of == index
        if not here.any():
            raise UserError(f"data.sources: {source.name!r} holds no text; remove it or fill it")
        if (table.dropped_by[here] > 0).all():
            raise UserError(
                f"data.sources: the filters keep none of the {int(here.sum())} documents of {source.name!r}; remove "
                f"it, or set data.boilerplate_filter=none"
            )


def _check_training_text(table: DocumentTable, config: DataConfig) -> None:
    """Raise `UserError` if `data.heldout_fraction` would leave no document for training."""
    num_documents = int(table.is_kept.sum())
    if num_documents > 1 and round(config.heldout_fraction * num_documents) >= num_documents:
        raise UserError(
            f"data.heldout_fraction: {config.heldout_fraction:g} of {num_documents} documents leaves none for "
            f"training; choose a smaller one, such as 0.05"
        )


def _manifest(plan: Plan, shards: list[Path], table: DocumentTable, is_heldout, recipe: Recipe, config: DataConfig):
    fields = ("text_documents", "text_column", "seq_len", "heldout_fraction", "shard_bytes")
    fields += ("boilerplate_filter", "near_duplicates")
    fields += ("pair_columns", "truncation") if config.pair_columns else ()
    fields += ("label_column",) if recipe.labels is not None else ()
    packages = ("numpy", "tokenizers", "transformers")
    return {
        "plan": plan.hash,
        **({} if recipe.labels is None else {"label_width": recipe.labels.width}),
        "settings": {name: getattr(config, name) for name in fields},
        "versions": {
            "homodistil": homodistil.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
            **filters.versions(config),
        },
        "sources": list(_by_source(table, is_heldout, recipe)),
        "shards": [json.loads((path / SUMMARY).read_text(encoding="utf-8")) for path in shards],
    }


def _by_source(table: DocumentTable, is_heldout: np.ndarray, recipe: Recipe) -> Iterator[dict]:
    for index, source in enumerate(recipe.sources):
        here = table.source_of == index
        kept = here & table.is_kept
        dropped = {name: here & (table.dropped_by == code) for code, name in filters.REASONS.items()}
        dropped["no_tokens"] = here & (table.dropped_by == 0) & (table.num_tokens == 0)
        yield {
            "name": source.name,
            "weight": source.weight,
            "fingerprint": source.fingerprint,
            "train": _counts(table, kept & (is_heldout == 0)),
            "heldout": _counts(table, kept & (is_heldout == 1)),
            "dropped": {name: _counts(table, rows) for name, rows in dropped.items() if rows.any()},
        }


def _counts(table: DocumentTable, rows: np.ndarray) -> dict[str, int]:
    num_bytes, num_tokens = int(table.num_bytes[rows].sum()), int(table.num_tokens[rows].sum())
    return {"documents": int(rows.sum()), "bytes": num_bytes, "tokens": num_tokens}


def _write(path: Path, content: dict, indent: int | None = None) -> None:
    path.write_text(json.dumps(content, indent=indent), encoding="utf-8")
