"""What travels between ranks: plain data arrives as it was, and nothing that comes over a wire is unpickled."""

import ast
import pickle
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homodistil.distributed.plain_data import decode, encode

PACKAGE = Path(__file__).parents[3] / "homodistil"
MAY_NAME_PICKLE = {"distill/teacher.py"}
"""For the error that torch's weights_only raises."""
MAY_LOAD = {"models/weights.py"}
"""A teacher that has pickled weights alone, with teacher.allow_pickle=true and torch's weights_only."""

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
paths = st.sampled_from([Path("/runs/a"), Path("b")])
values = st.recursive(
    plain | paths,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers() | st.none(), inner)
    ),
    max_leaves=12,
)


@given(values)
def test_plain_data_arrives_as_it_was(value):
    assert repr(decode(encode(value))) == repr(value)  # types, the sign of zero and NaN included


class Named(NamedTuple):
    number: int


@pytest.mark.parametrize("value", [Named(1), {"a": {1, 2}}, object()], ids=["named tuple", "set", "object"])
def test_what_would_arrive_as_something_else_is_refused(value):
    with pytest.raises(TypeError, match="cannot be sent between ranks"):
        encode(value)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("data", [b'{"call": ["touch"]}', b'{"a": 1, "dict": []}', b"[" * 10**5, b"\xff", b""])
def test_other_bytes_are_no_value(data, tmp_path):
    for hostile in (data, pickle.dumps(Trap(tmp_path / "caught"))):
        with pytest.raises(ValueError):
            decode(hostile)
    assert not (tmp_path / "caught").exists()


def test_the_package_neither_imports_pickle_nor_calls_what_pickles_over_the_wire():
    hits = [f"{path.relative_to(PACKAGE)}: {name}" for path in PACKAGE.rglob("*.py") for name in pickling_names(path)]
    assert hits == []


def pickling_names(path: Path) -> list[str]:
    """Modules and functions that pickle, as `path` uses them."""
    modules = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    if str(path.relative_to(PACKAGE)) in MAY_NAME_PICKLE:
        modules.discard("pickle")
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.split(".")[0] in modules]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in modules:
            names.append(node.module)
        elif isinstance(node, ast.Attribute) and node.attr.endswith(("_object", "_object_list")):
            names.append(node.attr)
        elif isinstance(node, ast.Attribute) and _reads(node) and str(path.relative_to(PACKAGE)) not in MAY_LOAD:
            names.append(node.attr)
    return names


def _reads(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and (node.value.id, node.attr) in {("torch", "load"), ("torch", "save")}
