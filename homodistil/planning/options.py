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
"""Maximum number of machines, watts, or dollars per hour; a larger number is a typing error."""


USAGE = """Predict memory per rank, time, energy and cost of a run before it is started.

Takes the arguments of `homodistil train`, and the machines:

    homodistil plan --device H100 --devices-per-node 8 --nodes 4 recipe=homobert-base
    homodistil plan --measure --ranks 2 recipe=quickstart
    homodistil plan --device cpu --devices-per-node 2 recipe=quickstart

The second command trains a few steps on this machine and stores its speed, which plans such as the third then use.
"""


def main(argv: list[str], num_ranks: int = 1) -> None:
    """The command `homodistil plan`; --measure runs on `num_ranks` ranks. Raises `UserError`."""
    options, arguments = split_options(argv, USAGE)
    job = parse_with_engine(arguments, "Plan a run.")
    if num_ranks > 1:
        if not options.measure:
            raise UserError("--ranks: only with --measure; a plan's ranks are --devices-per-node times --nodes")
        start_ranks(num_ranks)
    from homodistil.planning.command import measure, show  # slow, and not needed for --help and bad options

    (measure if options.measure else show)(job, options)


def split_options(argv: list[str], description: str) -> tuple[argparse.Namespace, list[str]]:
    """(options of `homodistil plan`, all other arguments). Raises `UserError`; exits the process after --help."""
    parser = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cpu", help=f"device of a rank: {', '.join(DEVICES)} or {CPU} (default)")
    parser.add_argument("--devices-per-node", type=int, default=1, help="ranks per machine")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--interconnect", help=f"between machines: {', '.join(INTERCONNECTS)}")
    parser.add_argument("--price", type=float, nargs=2, metavar=("LOW", "HIGH"), help="USD per device and hour")
    parser.add_argument("--watts", type=float, help="power of a device at full load")
    parser.add_argument("--measure", action="store_true", help="train a few steps on this machine, store its speed")
    parser.add_argument("--calibration", type=Path, help="file of --measure (default for cpu: in data.cache_dir)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the plan as JSON (not to a new run folder)"
    )
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
