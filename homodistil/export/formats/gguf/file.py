"""Writes a GGUF file: metadata, then tensors in 32 bits, 16 bits or blocks of 32 numbers with 8 bits each."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType
from torch import nn

from homodistil.errors import UserError
from homodistil.export.formats.exportable import Exportable
from homodistil.export.formats.gguf.architectures import FIELD, architecture_of
from homodistil.export.formats.gguf.header import Header
from homodistil.export.formats.gguf.hyperparameters import Metadata, hyperparameters
from homodistil.export.formats.gguf.tensors import stored_tensors
from homodistil.models import family_of

_ALWAYS_F32 = ("position_embd.weight", "token_types.weight", "rope_freqs.weight")
"""Matrices that llama.cpp adds up, where it multiplies others, and reads in 32 bits alone."""
_BLOCK = 32
"""Numbers of Q8_0 that share a scale; a row is whole blocks."""
_QUANTISATION_VERSION = 2
_F16_LARGEST = 65504.0


class Types(NamedTuple):
    """How a format stores matrices."""

    file_type: LlamaFileType
    matrix: GGMLQuantizationType


TYPES = {
    "gguf": Types(LlamaFileType.MOSTLY_F16, GGMLQuantizationType.F16),
    "gguf-f32": Types(LlamaFileType.ALL_F32, GGMLQuantizationType.F32),
    "gguf-q8_0": Types(LlamaFileType.MOSTLY_Q8_0, GGMLQuantizationType.Q8_0),
}
"""Value of --format -> its types."""


def stored_part(model: Exportable) -> Exportable:
    """The model itself, or without its head where it predicts masked tokens: llama.cpp takes vectors from it."""
    stock = model.model
    return model if family_of(stock.config.model_type).is_causal else Exportable(stock.base_model, model.max_tokens)


def write_gguf(model: nn.Module, header: Header, path: Path, format_name: str) -> None:
    """Write a stock model, a backbone or one with its language-modelling head.

    Args:
        model: fp32 on the CPU.
        format_name: a key of `TYPES`.

    Raises:
        UserError: llama.cpp does not compute such a model, or a value is too large for 16 bits.
        OSError: the file cannot be written.
    """
    types = TYPES[format_name]
    architecture = architecture_of(model.config, has_head=model.base_model is not model)
    writer = gguf.GGUFWriter(path, architecture.name)
    metadata: Metadata = {
        "general.name": (GGUFValueType.STRING, header.name),
        "general.file_type": (GGUFValueType.UINT32, int(types.file_type)),
        "general.quantization_version": (GGUFValueType.UINT32, _QUANTISATION_VERSION),
    }
    metadata |= hyperparameters(model.config, architecture, header.pooling) | header.vocabulary
    for key, (kind, value) in metadata.items():
        writer.add_key_value(key, value, kind)
    for name, values in stored_tensors(model, architecture):
        kind = _type_of(name, values, types.matrix)
        writer.add_tensor(name, _packed(name, values, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _type_of(name: str, values: np.ndarray, matrix: GGMLQuantizationType) -> GGMLQuantizationType:
    """As llama.cpp's converter chooses them."""
    if values.ndim < 2 or name in _ALWAYS_F32:
        return GGMLQuantizationType.F32
    if matrix is GGMLQuantizationType.Q8_0 and values.shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    return matrix


def _packed(name: str, values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    if kind is not GGMLQuantizationType.F32 and (largest := np.abs(values).max()) > _F16_LARGEST:
        raise UserError(f"{FIELD}: {name} has values up to {largest:.3g}, 16 bits hold {_F16_LARGEST:g}; take gguf-f32")
    return gguf.quants.quantize(values, kind)
