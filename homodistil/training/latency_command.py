"""Time checkpoints on this CPU in torch, ONNX and int8 ONNX, and print one table.

    homodistil latency embedded:minilm-l6 runs/quickstart/export
    homodistil latency models/minilm --tokens 128 --threads 1 --json
    homodistil latency runs/quickstart      # its teacher and its exports; the report of the run shows the table

Backbones are timed, without a language-modelling head. Each number is the median over rounds in which all models take
turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from homodistil.config.one_line_parser import OneLineParser
from homodistil.config.schema import DataConfig
from homodistil.distributed.graceful_stop import on_signals
from homodistil.evaluation import progress
from homodistil.evaluation.command_line import number
from homodistil.export.formats.layout import require_installed
from homodistil.files import to_json
from homodistil.training.latency_conditions import Conditions


def main(argv: list[str]) -> None:
    """The command `homodistil latency`. Raises `UserError`."""
    with progress.watching("loading libraries"):
        arguments = parser().parse_args(argv)
        require_installed(["onnx"])
        # Imported after parsing, so that --help and bad options are fast.
        from homodistil.training.latency import as_text, check_tokens, measure
        from homodistil.training.run_members import expand, keep
        from homodistil.training.stock_checkpoint import open_checkpoint

        cache_dir = arguments.cache_dir.expanduser()
        members = expand(arguments.checkpoint)
        checkpoints = [open_checkpoint(member.checkpoint, cache_dir) for member in members]
        check_tokens(checkpoints, arguments.tokens)
        conditions = Conditions(arguments.tokens, arguments.threads, arguments.rounds)
        with on_signals(), tempfile.TemporaryDirectory(prefix="homodistil-") as work:
            rows = measure(checkpoints, Path(work), conditions)
        keep(members, rows, conditions)
        if arguments.json:
            print(to_json(conditions._asdict() | {"rows": [row._asdict() for row in rows]}))
        else:
            print(f"\n{as_text(rows, conditions)}")


def parser() -> argparse.ArgumentParser:
    """The options of `homodistil latency`."""
    options = OneLineParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = options.add_argument
    text = (
        "folders or hub names of Hugging Face models, embedded:minilm-l6, folders that homodistil export wrote, or run"
    )
    text += " folders, of which teacher and exports are timed and the table is kept for the report"
    add("checkpoint", nargs="+", metavar="CHECKPOINT", help=text)
    add("--tokens", type=number(int, 1), default=Conditions().tokens, help="tokens of a sentence")
    add("--threads", type=number(int, 1, 1024), default=Conditions().threads, help="of torch and onnxruntime")
    add("--rounds", type=number(int, 1), default=Conditions().rounds, help="timed passes of every model")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--cache-dir", type=Path, default=Path(DataConfig().cache_dir), help="where packaged models are kept")
    return options
