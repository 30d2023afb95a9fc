"""How GGUF packs numbers: as they are, or in blocks of 32 that share a scale (and an offset).

    Q8_0: scale (fp16), 32 x int8                          value = scale * q
    Q4_1: scale, offset (fp16), 16 bytes of two q each     value = scale * q + offset, q in 0 .. 15; byte i holds
                                                           q[i] in its low half and q[16 + i] in its high half

All are unpacked to float32, which holds every value: scale (11 bits) times q (8 bits) has 19 significant bits, more
than the 8 of bfloat16 and the 11 of float16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BLOCK = 32
"""Values of a quantised block."""


class Format(NamedTuple):
    """A type of tensor."""

    name: str
    block: int
    """Values that are packed together; a row is whole blocks."""
    block_bytes: int
    unpack: Callable[[np.ndarray], np.ndarray]
    """Bytes of whole blocks (uint8, 1-dim) -> their values (float32, 1-dim)."""


def _float32(packed: np.ndarray) -> np.ndarray:
    return packed.view("<f4").astype(np.float32)  # a copy: nothing refers to the file


def _float16(packed: np.ndarray) -> np.ndarray:
    return packed.view("<f2").astype(np.float32)


def _bfloat16(packed: np.ndarray) -> np.ndarray:
    """The upper half of a float32."""
    return (packed.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(packed: np.ndarray) -> np.ndarray:
    blocks = packed.reshape(-1, 2 + BLOCK)
    return (_halves(blocks[:, :2]) * blocks[:, 2:].view(np.int8)).reshape(-1)


def _q4_1(packed: np.ndarray) -> np.ndarray:
    blocks = packed.reshape(-1, 4 + BLOCK // 2)
    quants = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (_halves(blocks[:, :2]) * quants + _halves(blocks[:, 2:4])).reshape(-1)


def _halves(column: np.ndarray) -> np.ndarray:
    """The fp16 numbers in two columns of bytes, one per row: (N, 2) uint8 -> (N, 1) float32."""
    return np.ascontiguousarray(column).view("<f2").astype(np.float32)


FORMATS = {
    0: Format("F32", 1, 4, _float32),
    1: Format("F16", 1, 2, _float16),
    3: Format("Q4_1", BLOCK, 4 + BLOCK // 2, _q4_1),
    8: Format("Q8_0", BLOCK, 2 + BLOCK, _q8_0),
    30: Format("BF16", 1, 2, _bfloat16),
}
"""By the number that a file has for them."""
