"""What a run will take, before it is started: memory of a rank part by part, time, energy, money.

Takes launcher/train.py's arguments, and the machines:

    python launcher/plan.py --device H100 --devices-per-node 8 --nodes 4 --deepspeed ds_configs/zero2.json \
        recipe=homobert-base
    deepspeed --num_accelerators 2 launcher/plan.py --measure --deepspeed ds_configs/zero2.json recipe=quickstart
    python launcher/plan.py --device cpu --devices-per-node 2 --deepspeed ds_configs/zero2.json recipe=quickstart

The second line takes some real steps on this machine and keeps what they say about it, for plans such as the third.
"""

import sys

from homodistil.distributed.graceful_stop import handle_signals

handle_signals()  # first of all: what follows takes seconds

from homodistil.config.command_line import parse_with_engine  # noqa: E402
from homodistil.distributed.script_exit import exit_with_code  # noqa: E402
from homodistil.planning.options import split_options  # noqa: E402


def main() -> None:
    with exit_with_code():
        options, arguments = split_options(sys.argv[1:], __doc__)
        config, engine_config = parse_with_engine(arguments, "Plan a run.")
        from homodistil.planning.command import measure, show

        (measure if options.measure else show)(config, engine_config, options)


if __name__ == "__main__":
    main()
