"""How good the small models are: our method against its rivals, tuned alike, on two CPU cores.

    python -m experiments.quality main                # the comparison; `make quality` runs this
    python -m experiments.quality gap                 # teacher-student gap over training, for several ends of pruning
    python -m experiments.quality map                 # where gradual beats one-shot: sizes x steps
    python -m experiments.quality ablate --base homodistil
    python -m experiments.quality decoder --list      # the runs on SmolLM2 and their time; without --list: makes them
    python -m experiments.quality refit               # which form of the cut is best after training: forms x lengths
    python -m experiments.quality embedder            # half of a sentence embedder against its rivals
    python -m experiments.quality main --quick        # under 90 s, leaves results/ alone

Two processes of one rank and one thread each train run after run (worker.py) through
`homodistil.training.run.Distillation` under real DeepSpeed. Every single run is kept in --work under a hash of its
resolved config, so an interrupted command goes on, and studies share runs; a run that fails is reported and does not
end the study. All methods see the same batches, masks and steps; the held-out blocks are split in two halves, by
turns: learning rates are chosen on the one (seed 0), the other is reported. CPU seconds are the process's own
while it trains (calibration, cut, steps, resize events; not evaluations), because two share the machine.
"""

from __future__ import annotations

import signal
import sys

from benchmarks.harness.environment import environment
from benchmarks.harness.run import command, parser, publish
from experiments.quality import (
    ablation,
    ablation_tables,
    comparison,
    comparison_tables,
    compute_map,
    compute_map_tables,
    decoder_list,
    decoder_study,
    decoder_tables,
    embedder_study,
    embedder_tables,
    gap_study,
    gap_tables,
    refit_study,
    refit_tables,
)
from experiments.quality.options import add_arguments, options_of
from experiments.quality.pool import Pool, spawner
from homodistil.errors import UserError

STUDIES = {
    "main": (comparison.run, comparison_tables),
    "gap": (gap_study.run, gap_tables),
    "map": (compute_map.run, compute_map_tables),
    "ablate": (ablation.run, ablation_tables),
    "decoder": (decoder_study.run, decoder_tables),
    "refit": (refit_study.run, refit_tables),
    "embedder": (embedder_study.run, embedder_tables),
}
"""Study -> its runs, and the module with its `report` and `rows`."""


def main() -> None:
    made = parser(__doc__, quick="a few steps; ends within 90 s")
    add_arguments(made)
    args = made.parse_args()
    try:
        options = options_of(args)
    except UserError as error:
        made.error(str(error))
    if options.is_listed and options.study != "decoder":
        made.error("--list: only the study decoder has a list")
    if options.is_listed:
        print(decoder_list.listing(options))
        return
    run, tables = STUDIES[options.study]
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the workers too
    start = spawner(options.work, options.deepspeed)
    workers = 0 if args.table else options.workers
    try:
        with Pool(options.work, start, workers, say=lambda line: print(line, flush=True)) as pool:
            outcome = run(pool, options)
    except UserError as error:  # a teacher that cannot be had, or not of so many layers
        made.error(str(error))
    for label, error in pool.errors.items():
        print(f"failed: {label}: {error}", file=sys.stderr)
    config = {"command": command(), "steps": options.steps, "quick": options.quick, **environment()}
    text = tables.report(outcome, options, pool.errors)
    publish(f"quality_{options.study}", text, tables.rows(outcome, config), args)


if __name__ == "__main__":
    main()
