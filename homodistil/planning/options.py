"""The command `homodistil plan`, and its options that `homodistil train` does not have."""

from __future__ import annotations

import argparse
from pathlib import Path

from homodistil.config.command_line import parse_with_engine
from homodistil.config.one_line_parser import OneLineParser
from homodistil.distributed.start_ranks import start_ranks
from homodistil.errors import UserError
from homodistil.planning.cluster import CPU, DEVICES, INTERCONNECTS

_MOST = 1_000_000
"""Machines, watts, dollars an hour: more is a slip of the finger."""


USAGE = """What a run will take, before it is started: memory of a rank part by part, time, energy, money.

Takes the arguments of `homodistil train`, and the machines:

    homodistil plan --device H100 --devices-per-node 8 --nodes 4 recipe=homobert-base
    homodistil plan --measure --ranks 2 recipe=quickstart
    homodistil plan --device cpu --devices-per-node 2 recipe=quickstart

The second line takes some real steps on this machine and keeps what they say about it, for plans such as the third.
"""


def main(argv: list[str], num_ranks: int = 1) -> None:
    """The command `homodistil plan`; --measure runs on `num_ranks` ranks. Raises `UserError`."""
    options, arguments = split_options(argv, USAGE)
    config, engine_config = parse_with_engine(arguments, "Plan a run.")
    if num_ranks > 1:
        if not options.measure:
            raise UserError("--ranks: only with --measure; a plan's ranks are --devices-per-node times --nodes")
        start_ranks(num_ranks)
    from homodistil.planning.command import measure, show  # not needed for --help and mistakes

    (measure if options.measure else show)(config, engine_config, options)


def split_options(argv: list[str], description: str) -> tuple[argparse.Namespace, list[str]]:
    """(own options, everything else). Raises `UserError`; exits by itself for --help."""
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cpu", help=f"one rank's: {', '.join(DEVICES)} or {CPU} (default)")
    parser.add_argument("--devices-per-node", type=int, default=1, help="ranks of a machine")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--interconnect", help=f"between machines: {', '.join(INTERCONNECTS)}")
    parser.add_argument("--price", type=float, nargs=2, metavar=("LOW", "HIGH"), help="USD of a device and hour")
    parser.add_argument("--watts", type=float, help="of a device at full load")
    parser.add_argument("--measure", action="store_true", help="take some real steps on this machine, keep the result")
    parser.add_argument("--calibration", type=Path, help="what --measure made (default: in data.cache_dir, for cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write it there (not into a run folder to be)")
    options, rest = parser.parse_known_args(argv)
    for name in ("price", "watts"):
        values = getattr(options, name)
        if values is not None and not all(map(_is_amount, values if isinstance(values, list) else [values])):
            raise UserError(f"--{name}: found {values}, allowed are numbers from 0 to {_MOST:g}; set --{name} again")
    if options.price and options.price[0] > options.price[1]:
        raise UserError(f"--price: found {options.price[0]:g} above {options.price[1]:g}; give the lower price first")
    for name in ("devices_per_node", "nodes"):
        if not 1 <= getattr(options, name) <= _MOST:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: found {getattr(options, name)}, allowed are 1 to {_MOST:g}; set {flag} again")
    if options.json and options.json.is_dir():
        raise UserError(f"--json: {str(options.json)!r} is a folder; name a file in it")
    return options, rest


def _is_amount(value: float) -> bool:
    return 0 <= value <= _MOST  # false for NaN
