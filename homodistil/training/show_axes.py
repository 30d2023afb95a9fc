"""Print what each axis of a teacher couples: which parameters and dimensions shrink together.

    homodistil axes --teacher runs/quickstart/export
    homodistil axes --teacher bert-base-uncased
    homodistil axes --teacher models/mine --plugins my_family.py

Weights are not read: a folder with a config.json is enough.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from homodistil.config.one_line_parser import OneLineParser
from homodistil.config.plugins import load_plugins
from homodistil.config.schema import DataConfig, TeacherConfig


def main(argv: list[str]) -> None:
    """The command `homodistil axes`. Raises `UserError`."""
    arguments = _parser().parse_args(argv)
    load_plugins(arguments.plugins, "--plugins")
    print(axes_of(arguments.teacher, arguments.cache_dir.expanduser()))


def axes_of(name: str, cache_dir: Path) -> str:
    """The listing for a teacher (folder, hub name, GGUF file or packaged). Raises `UserError`."""
    import torch

    from homodistil.data.sources.teachers import cached_teacher
    from homodistil.distill.teacher import load_config
    from homodistil.models import family_of
    from homodistil.models.axis_listing import LEGEND, axis_listing

    config = load_config(str(cached_teacher(name, cache_dir) or name))
    family = family_of(config.model_type)
    with torch.device("meta"):
        model = family.empty_model(config)
    table, parameters = family.axis_table(model), dict(model.named_parameters())
    total = sum(parameter.numel() for parameter in parameters.values())
    head = f"{name}: {config.model_type}, {total:,} parameters, {len(table.widths)} axes"
    listing = axis_listing(table, {name: tuple(parameter.shape) for name, parameter in parameters.items()})
    return f"{head}\n\n{listing}\n\n{LEGEND}"


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    text = "folder, hub name, or packaged model (embedded:bert-tiny, the default)"
    parser.add_argument("--teacher", default=TeacherConfig().name, help=text)
    text = "modules or .py files that register further model families, as teacher.plugins"
    parser.add_argument("--plugins", nargs="*", default=[], metavar="PLUGIN", help=text)
    text = "where packaged models are kept"
    parser.add_argument("--cache-dir", type=Path, default=Path(DataConfig().cache_dir), help=text)
    return parser
