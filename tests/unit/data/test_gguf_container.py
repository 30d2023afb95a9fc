"""GGUF files: every type of metadata and tensor, against loops and the reference library; every kind of damage."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from support.gguf_file import BF16, F16, F32, Q4_1, Q8_0, floats, gguf_bytes

from homodistil.data.sources.gguf.container import read_gguf
from homodistil.errors import UserError

METADATA = {
    "u8": (0, 200),
    "i8": (1, -100),
    "u16": (2, 60_000),
    "i16": (3, -30_000),
    "u32": (4, 4_000_000_000),
    "i32": (5, -2_000_000_000),
    "f32": (6, 0.5),
    "yes": (7, True),
    "no": (7, False),
    "text": (8, "naïve 東京"),
    "empty": (8, ""),
    "u64": (10, 2**63 + 1),
    "i64": (11, -(2**62)),
    "f64": (12, 1e-300),
    "numbers": (9, (5, [1, -2, 3])),
    "words": (9, (8, ["a", "", "Ġthe"])),
    "nothing": (9, (8, [])),
    "nested": (9, (9, [(4, [1, 2]), (8, ["x"])])),
}
VALUES = {name: value[1] if kind == 9 else value for name, (kind, value) in METADATA.items()}
VALUES["nested"] = [[1, 2], ["x"]]


def read(tmp_path, content: bytes):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    return read_gguf(file, "teacher.name")


def refused(tmp_path, content: bytes) -> str:
    """The one line, without the file's name."""
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    message = str(caught.value)
    assert message.startswith(f"teacher.name: {tmp_path / 'model.gguf'}") and "\n" not in message and ";" in message
    return message.removeprefix(f"teacher.name: {tmp_path / 'model.gguf'}").removeprefix(":").strip()


@pytest.mark.parametrize("version", [2, 3])
def test_every_type_of_metadata(tmp_path, version):
    file = read(tmp_path, gguf_bytes(METADATA, {}, version))
    assert file.metadata == VALUES and file.tensors == {}
    assert file.metadata["yes"] is True


@pytest.mark.parametrize("alignment", [1, 8, 32, 64])
def test_tensors_lie_at_aligned_offsets(tmp_path, alignment):
    tensors = {"a": floats([1, 2, 3]), "b": floats(list(range(6)), (3, 2)), "c": floats([7], (1, 1, 1, 1))}
    metadata = {"odd": (8, "x" * 5), "general.alignment": (4, alignment)}
    file = read(tmp_path, gguf_bytes(metadata, tensors, alignment=alignment))
    assert file.tensor("a").tolist() == [1, 2, 3]
    assert file.tensor("b").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert file.tensor("c").shape == (1, 1, 1, 1)


def _half(packed: bytes) -> np.float32:
    return np.float32(struct.unpack("<e", packed)[0])


def _loop_q8_0(packed: bytes) -> list[np.float32]:
    values = []
    for block in range(0, len(packed), 34):
        scale = _half(packed[block : block + 2])
        values += [scale * np.float32(q) for q in struct.unpack("<32b", packed[block + 2 : block + 34])]
    return values


def _loop_q4_1(packed: bytes) -> list[np.float32]:
    values = []
    for block in range(0, len(packed), 20):
        scale, offset = _half(packed[block : block + 2]), _half(packed[block + 2 : block + 4])
        quants = [byte % 16 for byte in packed[block + 4 : block + 20]]
        quants += [byte // 16 for byte in packed[block + 4 : block + 20]]
        values += [scale * np.float32(q) + offset for q in quants]
    return values


def _loop_bf16(packed: bytes) -> list[float]:
    return [struct.unpack("<f", b"\0\0" + packed[i : i + 2])[0] for i in range(0, len(packed), 2)]


# Type -> (bytes of 64 values, a loop over them).
LOOPS = {
    F32: (256, lambda packed: list(struct.unpack("<64f", packed))),
    F16: (128, lambda packed: list(struct.unpack("<64e", packed))),
    BF16: (128, _loop_bf16),
    Q8_0: (68, _loop_q8_0),
    Q4_1: (40, _loop_q4_1),
}


def _packed(kind: int, rows: int = 6) -> bytes:
    """Random finite values of a type, 64 a row."""
    generator = np.random.default_rng(kind)
    if kind == F32:
        return generator.normal(size=rows * 64).astype("<f4").tobytes()
    if kind == F16:
        return generator.normal(size=rows * 64).astype("<f2").tobytes()
    if kind == BF16:
        return (generator.normal(size=rows * 64).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    num_halves, num_bytes = (1, 32) if kind == Q8_0 else (2, 16)
    return b"".join(
        generator.normal(size=num_halves).astype("<f2").tobytes() + generator.bytes(num_bytes) for _ in range(rows * 2)
    )


@pytest.mark.parametrize("kind", LOOPS)
def test_dequantisation_equals_a_loop(tmp_path, kind):
    packed, (row_bytes, loop) = _packed(kind), LOOPS[kind]
    file = read(tmp_path, gguf_bytes({}, {"first": floats([1]), "x": (kind, (2, 3, 64), packed)}))
    values = file.tensor("x")
    assert values.dtype == np.float32 and values.shape == (2, 3, 64)
    rows = [loop(packed[i : i + row_bytes]) for i in range(0, len(packed), row_bytes)]
    np.testing.assert_array_equal(values.reshape(6, 64), np.array(rows, np.float32))


def test_equals_the_reference_library(tmp_path):
    gguf = pytest.importorskip("gguf")
    tensors = {f"t{kind}": (kind, (2, 3, 64), _packed(kind)) for kind in LOOPS}
    metadata = {name: value for name, value in METADATA.items() if name not in ("nested", "nothing")}
    file = read(tmp_path, gguf_bytes(metadata, tensors))
    reference = gguf.GGUFReader(tmp_path / "model.gguf")
    assert {name: reference.fields[name].contents() for name in metadata} == file.metadata
    for tensor in reference.tensors:
        theirs = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.tensor(tensor.name), theirs.reshape(2, 3, 64))


def test_damage_is_one_line(tmp_path):
    good = gguf_bytes({"key": (8, "value")}, {"x": (Q8_0, (2, 32), _packed(Q8_0)[:68])})
    read(tmp_path, good)
    counts = struct.pack("<QQ", 1, 1)
    assert good[8:24] == counts
    for content, says in {
        b"": "is no GGUF file (0 bytes, expected b'GGUF' and a header)",
        b"GGUF": "is no GGUF file (4 bytes",
        b"PK\3\4" + good[4:]: "is no GGUF file (it begins with b'PK\\x03\\x04'",
        good[:4] + struct.pack("<I", 1) + good[8:]: "found GGUF version 1, allowed are 2 and 3",
        good[:4] + struct.pack(">I", 3) + good[8:]: "found GGUF version 50331648, allowed are 2 and 3 (little-endian)",
        good[:8] + struct.pack("<QQ", 1, 2**60) + good[24:]: "is damaged (1152921504606846976 metadata entries in ",
        good[:8] + struct.pack("<QQ", 2**60, 1) + good[24:]: "is damaged (1152921504606846976 tensors in ",
        good[:8] + struct.pack("<QQ", 1, 2) + good[24:]: "is cut short or damaged (at byte ",
        good[:24] + struct.pack("<Q", 2**63) + good[32:]: f"(at byte 32 {2**63} more are announced, ",
        good.replace(b"key", b"k\xff\xff"): "is damaged (the text at byte 24 is not UTF-8)",
        good.replace(b"key" + struct.pack("<I", 8), b"key" + struct.pack("<I", 13)): "is damaged (metadata of type 13",
        good[:-1]: "is cut short or damaged (tensor 'x': 68 bytes of Q8_0 in shape [2, 32] from byte",
    }.items():
        assert says in refused(tmp_path, content)


@pytest.mark.parametrize(
    ("metadata", "tensors", "says"),
    [
        ({}, {"x": (12, (256,), b"\0" * 144)}, "'x' has quantisation type 12, read are F32, F16, Q4_1, Q8_0, BF16; co"),
        ({}, {"x": (Q8_0, (33,), b"\0" * 68)}, "is cut short or damaged (tensor 'x': 34 bytes of Q8_0 in shape [33]"),
        ({}, {"x": (F32, (2**40, 2**40), b"\0" * 64)}, "is cut short or damaged (tensor 'x'"),
        ({}, {"x": (F32, (0, 4), b"")}, "is cut short or damaged (tensor 'x': 0 bytes"),
        ({}, {"x": (F32, (), b"")}, "is damaged (a tensor with 0 dimensions"),
        ({}, {"x": (F32, (1, 1, 1, 1, 1), b"\0" * 4)}, "is damaged (a tensor with 5 dimensions"),
        ({"general.alignment": (4, 0)}, {}, "found general.alignment 0, allowed are powers of 2"),
        ({"general.alignment": (4, 24)}, {}, "found general.alignment 24"),
        ({"general.alignment": (8, "x")}, {}, "found general.alignment 'x'"),
        ({"deep": (9, (9, [(9, [(9, [(9, [(9, [])])])])]))}, {}, "is damaged (metadata of type 9"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, metadata, tensors, says):
    assert says in refused(tmp_path, gguf_bytes(metadata, tensors))


def test_names_are_distinct(tmp_path):
    content = gguf_bytes({"aa": (4, 1), "bb": (4, 2)}, {"cc": floats([1]), "dd": floats([2])})
    assert "is damaged ('aa' twice among the metadata entries)" in refused(tmp_path, content.replace(b"bb", b"aa"))
    assert "is damaged ('cc' twice among the tensors)" in refused(tmp_path, content.replace(b"dd", b"cc"))


def test_values_are_finite(tmp_path):
    file = read(tmp_path, gguf_bytes({}, {"x": floats([1, float("inf")])}))
    with pytest.raises(UserError, match=r"model.gguf: is damaged \(tensor 'x' has values that are not finite\)"):
        file.tensor("x")


def test_cut_anywhere_is_refused(tmp_path):
    content = gguf_bytes(METADATA, {"x": (Q4_1, (64,), _packed(Q4_1, 1)), "y": floats([1, 2])})
    for size in range(len(content)):
        refused(tmp_path, content[:size])


def test_no_flipped_byte_is_more_than_one_line(tmp_path):
    content = gguf_bytes(METADATA, {"x": (Q4_1, (64,), _packed(Q4_1, 1)), "y": floats([1, 2])})
    draw = random.Random(0)
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(4, len(content))] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        try:
            file = read(tmp_path, bytes(damaged))
            for name in file.tensors:
                file.tensor(name)
        except UserError as error:
            assert "\n" not in str(error)


def test_what_is_no_file(tmp_path):
    with pytest.raises(UserError, match=r"teacher.name: .*none.gguf is not there; give a GGUF file"):
        read_gguf(tmp_path / "none.gguf", "teacher.name")
    with pytest.raises(UserError, match=r"is not a regular file; give a GGUF file"):
        read_gguf(tmp_path, "teacher.name")
