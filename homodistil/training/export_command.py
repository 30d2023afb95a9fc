"""Export a checkpoint to ONNX, int8 ONNX, OpenVINO or GGUF, and keep nothing that differs from torch.

    homodistil export runs/quickstart/export
    homodistil export embedded:minilm-l6 --format onnx onnx-int8 --out models/minilm
    homodistil export embedded:smollm2-135m --format gguf gguf-q8_0

The files lie where sentence-transformers and optimum look for them: FOLDER/onnx/model.onnx,
FOLDER/onnx/model_qint8_avx512_vnni.onnx, FOLDER/openvino/openvino_model.xml; those of llama.cpp in FOLDER/gguf.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from homodistil.config.one_line_parser import OneLineParser
from homodistil.config.schema import DataConfig
from homodistil.distributed.graceful_stop import on_signals
from homodistil.evaluation import progress
from homodistil.evaluation.command_line import number
from homodistil.export.formats.layout import FORMATS, Limits, require_installed
from homodistil.training.gguf_header import gguf_header, plain_name

if TYPE_CHECKING:
    from homodistil.export.formats.agreement import Agreement
    from homodistil.training.stock_checkpoint import StockCheckpoint

HEADINGS = ("format", "file", "MB", "largest difference", "mean cosine", "KL, nats")


def main(argv: list[str]) -> None:
    """The command `homodistil export`. Raises `UserError`."""
    with progress.watching("loading libraries"):
        arguments = parser().parse_args(argv)
        require_installed(arguments.format)
        # Imported after parsing, so that --help and bad options are fast.
        from homodistil.export.formats.push import check_push, push
        from homodistil.training.stock_checkpoint import open_checkpoint

        if arguments.push is not None:
            check_push(arguments.push)
        checkpoint = open_checkpoint(arguments.checkpoint, arguments.cache_dir.expanduser())
        out = (arguments.out or _default_out(checkpoint)).expanduser().resolve()
        with on_signals("run it again: nothing was kept"):
            table, files = _export(checkpoint, out, arguments)
        print(f"\n{table}\n\n{out}")
        if arguments.push is not None:
            with progress.doing("uploading"):
                print(push(out, files, arguments.push))


def _export(checkpoint: StockCheckpoint, out: Path, arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """The table to print, and the files relative to `out`."""
    from homodistil.export.formats.folder import check_new, publish, staging
    from homodistil.export.formats.write import write_formats

    names = list(dict.fromkeys(arguments.format))
    check_new(out / checkpoint.inside, names, arguments.force)
    limits = Limits(arguments.min_cosine, arguments.max_kl)
    has_head = not arguments.no_head
    header = gguf_header(checkpoint, names, has_head)
    with staging(out) as staged:
        with progress.doing(f"loading {checkpoint.name}"):
            _write_companions(checkpoint, out, staged)
            model = checkpoint.load(with_head=has_head)
        with progress.doing(f"exporting {checkpoint.name} to {', '.join(names)}"):
            results = write_formats(model, names, staged / checkpoint.inside, limits, header)
        table = _table(results, checkpoint.inside, staged)
        return table, publish(staged, out, arguments.force)


def _write_companions(checkpoint: StockCheckpoint, out: Path, staged: Path) -> None:
    """Configuration, tokenizer, card and modules, where `out` is another folder than the checkpoint's."""
    from homodistil.data.tokenizer import read_tokenizer
    from homodistil.evaluation.glue.checkpoint import FIELD
    from homodistil.export.formats.folder import copy_modules

    folder = checkpoint.folder
    if folder is not None and out == folder.resolve():
        return
    if checkpoint.has_modules:
        copy_modules(folder, folder / checkpoint.inside, staged)
        return
    read_tokenizer(checkpoint.place, FIELD).save_pretrained(staged)
    checkpoint.config.save_pretrained(staged)
    if folder is not None and (folder / "README.md").is_file():
        shutil.copyfile(folder / "README.md", staged / "README.md")


def _default_out(checkpoint: StockCheckpoint) -> Path:
    """The checkpoint's own folder; for what lies in a cache, a folder of its name in the working directory."""
    if checkpoint.folder is not None and not checkpoint.is_packaged:
        return checkpoint.folder
    return Path(plain_name(checkpoint))


def _table(results: dict[str, Agreement], inside: str, staged: Path) -> str:
    from homodistil.export.formats.write import files_of
    from homodistil.metrics.result_table import aligned, cell

    lines = [list(HEADINGS)]
    for name, result in results.items():
        megabytes = sum(path.stat().st_size for path in files_of(name, staged / inside)) / 1e6
        file = (Path(inside) / FORMATS[name].file).as_posix()
        numbers = [
            (megabytes, "{:.1f}"),
            (result.difference, "{:.1e}"),
            (result.cosine, "{:.4f}"),
            (result.kl, "{:.1e}"),
        ]
        lines.append([name, file, *(cell(value, form) for value, form in numbers)])
    return aligned(lines)


def parser() -> argparse.ArgumentParser:
    """The options of `homodistil export`."""
    options = OneLineParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = options.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="folder or hub name of a Hugging Face model, or embedded:minilm-l6")
    add("--format", nargs="+", choices=tuple(FORMATS), default=["onnx"], help="one or several")
    add("--out", type=Path, help="folder to write to; None: the checkpoint's, or ./NAME for a hub name or package")
    add("--force", action="store_true", help="overwrite files that are there")
    add("--no-head", action="store_true", help="export the backbone alone: its output is last_hidden_state")
    text = "smallest mean cosine of 8-bit outputs with torch's"
    add("--min-cosine", type=number(float, -1, 1), default=Limits().min_cosine, help=text)
    text = "largest mean KL of a head's 8-bit probabilities to torch's, nats"
    add("--max-kl", type=number(float, 0), default=Limits().max_kl, help=text)
    add("--push", metavar="OWNER/NAME", help="upload what was exported to this repository of the hub")
    add("--cache-dir", type=Path, default=Path(DataConfig().cache_dir), help="where packaged models are kept")
    return options
