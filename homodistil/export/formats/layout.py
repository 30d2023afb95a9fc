"""Names of the formats: the file of each, the packages that make it, and how they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import NamedTuple

from homodistil.errors import UserError


class Format(NamedTuple):
    """A format that a checkpoint is exported to."""

    file: str
    """Where sentence-transformers and optimum look for it in a checkpoint's folder."""
    extra: str
    """The extra of pyproject.toml that installs what makes and runs it."""


FORMATS = {
    "onnx": Format("onnx/model.onnx", "onnx"),
    "onnx-int8": Format("onnx/model_qint8_avx512_vnni.onnx", "onnx"),
    "openvino": Format("openvino/openvino_model.xml", "openvino"),
}
"""Value of --format -> the format."""

_ONNX = ("onnx", "onnxruntime", "onnxscript")
EXTRAS = {"onnx": _ONNX, "openvino": (*_ONNX, "openvino")}
"""Extra of pyproject.toml -> the packages that it installs."""


class Limits(NamedTuple):
    """How far an int8 graph may be from torch."""

    min_cosine: float = 0.95
    """Smallest mean cosine of the outputs."""
    max_kl: float = 0.1
    """Largest mean KL of a head's probabilities, nats. Logits share a direction: their cosine alone sees too little."""


def require_installed(names: Iterable[str], field: str = "--format") -> None:
    """Raise `UserError` where a package that a format of `names` needs is not installed. Imports none of them.

    Args:
        field: who asked for the formats.
    """
    for extra in dict.fromkeys(FORMATS[name].extra for name in names):
        if missing := [package for package in EXTRAS[extra] if importlib.util.find_spec(package) is None]:
            raise UserError(
                f"{field}: {', '.join(missing)} not installed; install with pip install {' '.join(EXTRAS[extra])} "
                f"(in a checkout: pip install -e '.[{extra}]'){'' if field.startswith('--') else ', or leave it out'}"
            )
