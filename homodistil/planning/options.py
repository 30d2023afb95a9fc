"""The options of launcher/plan.py that launcher/train.py does not have."""

from __future__ import annotations

import argparse
from pathlib import Path

from homodistil.errors import UserError
from homodistil.planning.cluster import CPU, DEVICES, INTERCONNECTS


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def split_options(argv: list[str], description: str) -> tuple[argparse.Namespace, list[str]]:
    """(own options, everything else). Raises `UserError`; exits by itself for --help."""
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
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
        if values is not None and min(values if isinstance(values, list) else [values]) < 0:
            raise UserError(f"--{name}: found {values}, allowed: 0 or more")
    return options, rest
