"""What ranks tell each other: the same values on the other side, no code in them, no pickle in the package."""

from __future__ import annotations

import ast
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from homodistil import data
from homodistil.checkpoint.files import FileRecord
from homodistil.data.corpus import Corpus, Rows
from homodistil.preflight.findings import Finding
from homodistil.wire import decode, encode

PACKAGE = Path(data.__file__).parents[1]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        10**40,
        -0.1,
        math.inf,
        "ä\ud800\n",
        b"\x00\xff" * 5,
        (),
        [(1, "a"), [2.5, None]],
        {"a": {1: (2, b"c")}, "path": Path("/tmp/x")},
        {"class": "not an instance", "tuple": 3},
        FileRecord(3, "abc"),
        [Finding("step", "seen", None)],
        {"state.safetensors": FileRecord(1, "x")},
    ],
)
def test_values_arrive_as_they_were_sent(value):
    received = decode(encode(value))
    assert received == value and type(received) is type(value)


def test_nan_and_numbers_of_numpy():
    assert math.isnan(decode(encode(math.nan)))
    assert decode(encode(np.int64(3))) == 3
    sent = np.arange(6, dtype=np.int64).reshape(2, 3)
    received = decode(encode(sent))
    assert received.dtype == sent.dtype and np.array_equal(received, sent) and received.flags.writeable


def test_a_corpus_travels_by_its_files(tmp_path):
    for name in ("train", "heldout"):
        np.save(tmp_path / f"{name}.npy", np.arange(8, dtype=np.uint16).reshape(2, 4))
    corpus = Corpus(Rows(tmp_path / "train.npy"), Rows(tmp_path / "heldout.npy"), "abc", "8 tokens")
    received = decode(encode(corpus))
    assert np.array_equal(received.train[[1, 0]], corpus.train[[1, 0]]) and received.fingerprint == "abc"


class _Command:
    """What a stranger would put into the job's store."""

    def __reduce__(self):
        return Path.touch, (Path("/nowhere/owned"),)


@pytest.mark.parametrize(
    "text",
    [
        pickle.dumps(_Command()),
        b"[",
        b'{"class": ["Path", ["/tmp"]]}',
        b'{"class": ["FileRecord", [1, 2, 3, 4, 5]]}',
        b'{"eval": "1"}',
        b'{"a": 1, "b": 2}',
        json.dumps({"array": ["|O", [1], ""]}).encode(),
        b"[" * 100_000,
    ],
)
def test_what_a_stranger_writes_is_refused(text):
    with pytest.raises(ValueError):
        decode(text)


@pytest.mark.parametrize("value", [object(), {1, 2}, print, pytest])
def test_what_does_not_travel_is_refused_at_the_sender(value):
    with pytest.raises(TypeError, match="does not travel between ranks"):
        encode(value)


UNPICKLING = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "recv_object_list"}


def test_nothing_of_ours_unpickles():
    """Neither pickle nor torch's object collectives, which are made of it. (Its error type may be caught by name.)"""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            assert name not in UNPICKLING, f"{path}:{node.lineno}"
            is_pickles = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "pickle"
            assert not is_pickles or name == "UnpicklingError", f"{path}:{node.lineno}"
