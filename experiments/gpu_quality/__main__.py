"""Is a compensated cut worth it at length? Five arms on one GPU in about 25 minutes; or a hundredth of it on a CPU.

    python -m experiments.gpu_quality --out results --teacher models/bge-small --text corpus embedded --minutes 25
    python -m experiments.gpu_quality --out tried --teacher embedded:bert-tiny --scale 0.01

The folder --out gets table.md and rows.json after every phase. What was measured is kept in it: the same command
continues after an interruption, and a longer --minutes makes what was left out. --list prints the phases alone.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from benchmarks.harness.environment import environment
from benchmarks.harness.rows import to_json
from benchmarks.harness.run import command
from experiments.gpu_quality import tables
from experiments.gpu_quality.arms import WIDTHS, arms
from experiments.gpu_quality.sizes import Sizes, add_arguments, options_of, scaled
from experiments.gpu_quality.study import Experiment, Findings, findings_of
from experiments.quality.options import Options
from experiments.quality.pool import Pool, spawner
from homodistil.config import command_line
from homodistil.distill.teacher import load_config
from homodistil.errors import UserError
from homodistil.files import write_atomically
from homodistil.training.teacher_checks import found_teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the workers too
    try:
        run(args)
    except UserError as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> None:
    """Carry out the experiment, or list its phases. Raises `UserError` for a teacher that cannot be had."""
    sizes = scaled(args.scale)
    options = options_of(args, sizes, tuple(WIDTHS), tuple(arms(sizes.steps)))
    source = (f"teacher.name={args.teacher}", f"data.sources=[{','.join(args.text)}]")
    teacher = load_config(found_teacher(command_line.parse([*source, *options.set])))
    findings = findings_of(options, sizes, source, teacher)
    if args.list:
        print(_listing(Experiment(None, options, sizes, findings, lambda _: None)))
        return
    start = time.monotonic()
    with Pool(options.work, spawner(options.work, options.deepspeed), options.workers, say=_say) as pool:

        def publish(findings: Findings) -> None:
            _write(args.out, findings, options, sizes, pool.errors)

        Experiment(pool, options, sizes, findings, publish).run()
    print((args.out / "table.md").read_text(encoding="utf-8"))
    print(f"{(time.monotonic() - start) / 60:.1f} minutes; {args.out / 'table.md'}, {args.out / 'rows.json'}")


def _listing(experiment: Experiment) -> str:
    """Phases with the runs that are known beforehand: rates are not, so every run is counted at the first of them."""
    for entry in experiment.findings.entries:
        entry.rate = experiment.options.rates[0]
    lines, total = [], 0
    for phase in experiment.phases():
        steps = [job.spec.config().train.steps for job in phase.jobs()]
        total += sum(steps)
        lines.append(f"* {phase.title}: {len(steps)} runs, {sum(steps):,} steps" if steps else f"* {phase.title}")
    sizes = experiment.sizes
    tokens = total * sizes.sequences * 128
    correction = f"correction of the teacher: {sizes.correction_steps:,} steps"
    return "\n".join([*lines, f"In all {total:,} steps of training, {tokens / 1e6:,.1f} M tokens; {correction}."])


def _say(line: str) -> None:
    print(line, flush=True)


def _write(out: Path, findings: Findings, options: Options, sizes: Sizes, errors: dict[str, str]) -> None:
    config = {"command": command(), "steps": sizes.steps, "is_whole": sizes.is_whole, **environment()}
    write_atomically(out / "table.md", tables.report(findings, options, sizes, errors) + "\n")
    write_atomically(out / "rows.json", to_json(tables.rows(findings, config)))


if __name__ == "__main__":
    main()
