"""Vectors of texts out of hidden states: the pooling, Dense layers and normalisation of a `SentenceModules`, frozen.

B texts, T tokens, D hidden size of the model, E dims of its vectors.
"""

from __future__ import annotations

import os

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from homodistil.errors import UserError
from homodistil.models.checkpoint_files import first_line, short
from homodistil.models.sentence_modules import Dense, PoolingMode, SentenceModules, sentence_file

WEIGHTS_FILE, _PICKLED = "model.safetensors", "pytorch_model.bin"


class SentenceHead(nn.Module):
    """The modules behind a Transformer. They have no gradients of their own; those of what enters them pass through.

    Args:
        modules: what there is.
        weights: one for each of `modules.dense`: `linear.weight` (E, D), and `linear.bias` (E,) where it has one.
    """

    def __init__(self, modules: SentenceModules, weights: list[dict[str, Tensor]] | None = None) -> None:
        super().__init__()
        self.modules_read = modules
        self.dense = nn.ModuleList(_DenseLayer(dense) for dense in modules.dense)
        for layer, tensors in zip(self.dense, weights or [], strict=True):
            layer.load_state_dict(tensors)
        self.eval().requires_grad_(False)

    @property
    def pooling(self) -> PoolingMode:
        return self.modules_read.pooling

    @property
    def num_dims(self) -> int | None:
        """Dims of the vectors; None: as many as the hidden states have."""
        return self.modules_read.dense[-1].out_features if self.modules_read.dense else None

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states (B, T, D), mask (B, T) 1 = token, 0 = padding -> vectors (B, E) in fp32, normalised where
        the model's are."""
        return self.finish(self.transform(pooled(hidden, attention_mask, self.pooling)))

    def finish(self, vectors: Tensor) -> Tensor:
        """(B, E), normalised where the model's vectors are."""
        return functional.normalize(vectors, dim=-1) if self.modules_read.normalises else vectors

    def transform(self, vectors: Tensor) -> Tensor:
        """The Dense layers: pooled (B, D) -> (B, E), fp32."""
        for layer in self.dense:
            vectors = layer(vectors)
        return vectors


class _DenseLayer(nn.Module):
    """Parameters have sentence-transformers' names."""

    def __init__(self, dense: Dense) -> None:
        super().__init__()
        self.linear = nn.Linear(dense.in_features, dense.out_features, dense.has_bias)
        self._activation, self._adds = getattr(nn, dense.activation)(), dense.use_residual

    def forward(self, vectors: Tensor) -> Tensor:
        after = self._activation(self.linear(vectors))
        return vectors + after if self._adds else after


def pooled(hidden: Tensor, attention_mask: Tensor, mode: PoolingMode) -> Tensor:
    """One vector for each text, fp32 (float64 for float64 states).

    Args:
        hidden: (B, T, D), any float dtype.
        attention_mask: (B, T), 1 = token, 0 = padding, on either side. The mean of no token is 0.
        mode: mean of the tokens, or the first (cls) or last one.

    Returns:
        (B, D).
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if mode == "mean":
        weights = attention_mask.to(dtype)
        sums = torch.einsum("bt,btd->bd", weights, hidden.to(dtype))
        return sums / weights.sum(1, keepdim=True).clamp(min=1)
    order = attention_mask.cumsum(1) if mode == "last" else attention_mask
    place = order.argmax(1)  # the first of equals: the last token is where the count of tokens gets to its end
    return hidden[torch.arange(len(hidden), device=hidden.device), place].to(dtype)


def load_sentence_head(modules: SentenceModules, where: str) -> SentenceHead:
    """The modules with their weights, fp32, on the CPU.

    Args:
        where: the option that the model was given with, for messages.

    Raises:
        UserError: weights that are not there, pickled, damaged, or of another shape.
    """
    return SentenceHead(modules, [_dense_weights(modules.root, dense, where) for dense in modules.dense])


def _dense_weights(root: str, dense: Dense, where: str) -> dict[str, Tensor]:
    path, where = (
        sentence_file(root, os.path.join(dense.folder, WEIGHTS_FILE)),
        f"{where}: {dense.folder} of {short(root)!r}",
    )
    if path is None:
        kind = "pickled weights only" if sentence_file(root, os.path.join(dense.folder, _PICKLED)) else "no weights"
        raise UserError(
            f"{where} has {kind}; save the model again as safetensors (SentenceTransformer.save_pretrained)"
        )
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    except Exception as error:  # safetensors raises types of its own
        raise UserError(
            f"{where}: cannot read {WEIGHTS_FILE} ({first_line(error)}); give the model's own file"
        ) from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {"linear.weight": (dense.out_features, dense.in_features)}
    expected |= {"linear.bias": (dense.out_features,)} if dense.has_bias else {}
    if shapes != expected or not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{where}: found tensors {shapes}, expected finite {expected}; give the model's own file")
    return tensors
