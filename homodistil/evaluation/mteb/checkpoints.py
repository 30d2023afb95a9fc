"""Checkpoints that MTEB scores: embedders and rerankers in the classes of sentence-transformers."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import AutoConfig

from homodistil.errors import UserError
from homodistil.evaluation import progress
from homodistil.evaluation.glue.checkpoint import FIELD, checkpoint_identity, readable
from homodistil.models.classifier import OF_TEXTS
from homodistil.models.sentence_modules import sentence_root


class Checkpoint(NamedTuple):
    model: Any
    """A `sentence_transformers.SentenceTransformer`, or `CrossEncoder` of a reranker."""
    identity: str
    """Hash of its files."""
    is_reranker: bool = False

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def load(folder: str, device: str) -> Checkpoint:
    """A sequence classifier is a reranker, unless it lies in the folder of an embedder; anything else is an embedder.

    Raises:
        UserError: the checkpoint cannot be loaded, or is a classifier of several labels.
    """
    if sentence_root(folder) is None:
        with readable(folder):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if OF_TEXTS.named_by(config):
            return _reranker(folder, config.num_labels, device)
    return _embedder(folder, device)


def _embedder(folder: str, device: str) -> Checkpoint:
    """An embedder of sentence-transformers. An encoder without modules.json gets mean pooling, as in a run with
    data.pooling=auto, and a line says so.

    Raises:
        UserError: the checkpoint cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer

    root = sentence_root(folder)
    if root is None:
        progress.say(f"{folder} has no modules.json: its vectors are the means of its last hidden states")
    with readable(folder):
        model = SentenceTransformer(root or folder, device=device, trust_remote_code=False)
    return Checkpoint(model, checkpoint_identity(root or folder, with_modules=True))


def _reranker(folder: str, num_labels: int, device: str) -> Checkpoint:
    from sentence_transformers import CrossEncoder

    if num_labels != 1:
        raise UserError(
            f"{FIELD}: {folder!r} is a classifier of {num_labels} labels; a reranker has one, the score of a "
            f"query and a text"
        )
    with readable(folder):
        model = CrossEncoder(folder, device=device, trust_remote_code=False)
    return Checkpoint(model, checkpoint_identity(folder), is_reranker=True)
