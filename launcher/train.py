"""The main job: distil a student from a teacher under DeepSpeed.

    deepspeed --num_accelerators 2 launcher/train.py --deepspeed ds_configs/zero2.json
    deepspeed launcher/train.py --deepspeed ds_configs/zero2.json recipe=homobert-small \
        teacher.name=/models/bert-base-uncased data.sources=[/data/wiki,/data/books] run.dir=/runs/small
    deepspeed launcher/train.py --deepspeed ds_configs/zero2.json --teachers-once half.yaml,third.yaml run.dir=/runs/two

With --check nothing is trained: a table says what would go wrong (homodistil/preflight).
"""

import sys

from homodistil.distributed.graceful_stop import handle_signals

handle_signals()  # first of all: what follows takes seconds

from homodistil.config.command_line import parse_job  # noqa: E402
from homodistil.distributed.rank_log import tag_lines  # noqa: E402
from homodistil.distributed.script_exit import exit_with_code  # noqa: E402
from homodistil.metrics.progress import doing  # noqa: E402


def main() -> None:
    tag_lines()
    with exit_with_code():
        job = parse_job(sys.argv[1:], description="Distil a student, or several, from a teacher.")
        with doing("loading torch, DeepSpeed and Transformers"):  # not needed for --help and config errors
            if job.is_check:
                from homodistil.preflight import check
            else:
                from homodistil.train import run
        if job.is_check:
            sys.exit(check(job.config, job.engine_config))
        run(job.config, job.engine_config, job.students)


if __name__ == "__main__":
    main()
