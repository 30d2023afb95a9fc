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
    max_difference: float | None = 1e-4
    """Largest difference of an output from torch's, relative to the largest output; fp32 rounds by about 1e-6. None:
    weights of 8 bits, which are held to `Limits`."""


FORMATS = {
    "onnx": Format("onnx/model.onnx", "onnx"),
    "onnx-int8": Format("onnx/model_qint8_avx512_vnni.onnx", "onnx", max_difference=None),
    "openvino": Format("openvino/openvino_model.xml", "openvino"),
    # 16 bits round a weight by up to 5e-4 of itself, once per layer, and outputs of rare tokens by more: MiniLM-L6 is
    # off by 2.3e-4, SmolLM2-135M by 1.3e-2 at its worst token and 1.1e-5 nats. A small Llama with rows in a wrong
    # order is off by 0.4.
    "gguf": Format("gguf/model-F16.gguf", "gguf", max_difference=0.05),
    "gguf-f32": Format("gguf/model-F32.gguf", "gguf"),
    "gguf-q8_0": Format("gguf/model-Q8_0.gguf", "gguf", max_difference=None),
}
"""Value of --format -> the format. What is before the "-" names the same one without quantisation."""

_ONNX = ("onnx", "onnxruntime", "onnxscript")
EXTRAS = {"onnx": _ONNX, "openvino": (*_ONNX, "openvino"), "gguf": ("gguf",)}
"""Extra of pyproject.toml -> the packages that it installs."""


class Limits(NamedTuple):
    """How far a format with weights of 8 bits may be from torch."""

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
