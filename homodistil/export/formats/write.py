"""Writes a model in several formats, each checked against torch before the next one is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from homodistil.export.formats.agreement import Agreement, agreement, require
from homodistil.export.formats.exportable import Exportable
from homodistil.export.formats.graphs import write_int8, write_onnx, write_openvino
from homodistil.export.formats.layout import FORMATS, Limits
from homodistil.export.formats.runners import RUNNERS

if TYPE_CHECKING:
    from homodistil.export.formats.gguf.header import Header

_FROM_ONNX: dict[str, Callable[[Path, Path], None]] = {"onnx-int8": write_int8, "openvino": write_openvino}
"""Format -> what makes it of an fp32 ONNX graph."""


def write_formats(
    model: Exportable, names: Sequence[str], root: Path, limits: Limits, header: Header | None = None
) -> dict[str, Agreement]:
    """Write each format of `names` to its place below `root`.

    Args:
        limits: of formats with weights of 8 bits.
        header: what GGUF holds beside the weights; the other formats do without.

    Returns:
        How well each of them agrees with torch.

    Raises:
        UserError: the model cannot be exported, or a format is too far from torch; `root` has parts then.
    """
    ggufs = [name for name in names if FORMATS[name].extra == "gguf"]
    graphs = [name for name in names if name not in ggufs]
    results = _write_graphs(model, graphs, root, limits) if graphs else {}
    for name in ggufs:
        # Imported here because its package may be missing where no GGUF is wanted.
        from homodistil.export.formats.gguf import file, reload

        path, stored = _place(name, root), file.stored_part(model)
        file.write_gguf(stored.model, header, path, name)
        reload.check_tokenizer(path, header.tokenizer)
        results[name] = agreement(stored, reload.gguf_runner(path, stored))
        require(results[name], name, limits)
    return {name: results[name] for name in names}


def _write_graphs(model: Exportable, names: Sequence[str], root: Path, limits: Limits) -> dict[str, Agreement]:
    fp32, results = root / FORMATS["onnx"].file, {}
    for name in ("onnx", *(name for name in names if name != "onnx")):
        path = _place(name, root)
        if name == "onnx":
            write_onnx(model, path)
        else:
            _FROM_ONNX[name](fp32, path)
        results[name] = agreement(model, RUNNERS[name](path, 1))
        require(results[name], name, limits)
    if "onnx" not in names:
        for path in files_of("onnx", root):
            path.unlink()
    return results


def _place(name: str, root: Path) -> Path:
    path = root / FORMATS[name].file
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def files_of(name: str, root: Path) -> list[Path]:
    """The graph of a format below `root` and the file with its weights, where that is another."""
    graph = root / FORMATS[name].file
    candidates = [graph, graph.with_name(f"{graph.name}.data"), graph.with_suffix(".bin")]
    return [path for path in candidates if path.is_file()]
