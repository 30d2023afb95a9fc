"""The main job: distil a student from a teacher under DeepSpeed.

    deepspeed --num_accelerators 2 launcher/train.py --deepspeed ds_configs/zero2.json
    deepspeed launcher/train.py --deepspeed ds_configs/zero2.json recipe=homobert-small \
        teacher.name=/models/bert-base-uncased data.sources=[/data/wiki,/data/books] run.dir=/runs/small

With --check nothing is trained: a table says what would go wrong (homodistil/preflight).
"""

import sys

from homodistil.cli import exit_with_code, parse_with_engine, wants_check


def main() -> None:
    with exit_with_code():
        config, engine_config = parse_with_engine(sys.argv[1:], description="Distil a student from a teacher.")
        if wants_check(sys.argv[1:]):
            from homodistil.preflight import check

            sys.exit(check(config, engine_config))
        from homodistil.job import run  # heavy imports, not needed for --help and config errors

        run(config, engine_config)


if __name__ == "__main__":
    main()
