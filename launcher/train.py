"""The main job: distil a student from a teacher under DeepSpeed. The same as `homodistil train`.

    deepspeed --num_accelerators 2 launcher/train.py --deepspeed ds_configs/zero2.json
    deepspeed launcher/train.py --deepspeed ds_configs/zero2.json recipe=homobert-small \
        teacher.name=/models/bert-base-uncased data.sources=[/data/wiki,/data/books] run.dir=/runs/small
    deepspeed launcher/train.py --deepspeed ds_configs/zero2.json --teachers-once half.yaml,third.yaml run.dir=/runs/two

With --check nothing is trained: a table says what would go wrong (homodistil/preflight).
"""

import sys

from homodistil.distributed.graceful_stop import handle_signals

handle_signals()  # first of all: what follows takes seconds

from homodistil.cli import run  # noqa: E402

if __name__ == "__main__":
    run("train", sys.argv[1:])
