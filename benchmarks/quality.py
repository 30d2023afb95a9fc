"""How good the small models are: our method against its rivals, tuned alike, on two CPU cores.

    python benchmarks/quality.py main                 # the comparison; `make quality` runs this
    python benchmarks/quality.py gap                  # teacher-student gap over training, for several ends of pruning
    python benchmarks/quality.py map                  # where gradual beats one-shot: sizes x steps
    python benchmarks/quality.py ablate --base homodistil
    python benchmarks/quality.py main --quick         # under 90 s, leaves results/ alone

Two processes of one rank and one thread each train run after run (study/worker.py) through
`homodistil.training.run.Distillation` under real DeepSpeed. Every single run is kept in --work under a hash of its
resolved config, so an interrupted command goes on, and studies share runs; a run that fails is reported and does not
end the study. All methods see the same batches, masks and steps; the held-out blocks are split in two halves, by
turns: learning rates are chosen on the one (seed 0), the other is reported. CPU seconds are the process's own
while it trains (calibration, cut, steps, resize events; not evaluations), because two share the machine.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from report import environment, result_path, write, write_json  # noqa: E402
from study.options import ROOT, Options, add_arguments, options_of  # noqa: E402
from study.pool import Pool, spawner  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    options = options_of(args)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the workers too
    command = shlex.join(["python", Path(__file__).resolve().relative_to(ROOT).as_posix(), *sys.argv[1:]])
    start = spawner(options.work, options.deepspeed)
    with Pool(options.work, start, options.workers, say=lambda line: print(line, flush=True)) as pool:
        text, rows = _study(options, command, pool)
    print(text)
    for label, error in pool.errors.items():
        print(f"failed: {label}: {error}", file=sys.stderr)
    if args.json or not options.quick:
        write_json(args.json or result_path(f"quality_{options.study}", ".json"), rows)
    if not args.json and not options.quick:
        write(result_path(f"quality_{options.study}", ".md"), text)


def _study(options: Options, command: str, pool: Pool) -> tuple[str, list[dict]]:
    """Markdown and rows of the study."""
    config = {"command": command, "steps": options.steps, "quick": options.quick, **environment()}
    if options.study == "main":
        from study import comparison, comparison_tables

        found = comparison.run(pool, options)
        return comparison_tables.report(found, options, command, pool.errors), comparison_tables.rows(found, config)
    if options.study == "gap":
        from study import gap_study, gap_tables

        found = gap_study.run(pool, options)
        return gap_tables.report(found, options, command, pool.errors), gap_tables.rows(found, config)
    if options.study == "map":
        from study import compute_map, compute_map_tables

        found = compute_map.run(pool, options)
        return compute_map_tables.report(found, options, command, pool.errors), compute_map_tables.rows(found, config)
    from study import ablation, ablation_tables

    found = ablation.run(pool, options)
    return ablation_tables.report(found, options, command, pool.errors), ablation_tables.rows(found, config)


if __name__ == "__main__":
    main()
