"""The study `embedder`: sentence vectors of half of MiniLM-L6, ours against rivals, same sentences and steps.

With --layers 12 the teacher is one of twice its layers (deeper_teacher.py).

Rates are chosen by the mean cosine to the teacher's vectors on the VALIDATION half, on the first seed; reported are
cosine and recall@10 on the TEST half, and STS-B by the vectors of the export.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.quality.comparison import QUICK_EXAMPLES, Entry, exports, run_probes, run_seeds, spec, try_rates
from experiments.quality.deeper_teacher import deeper_embedder
from experiments.quality.embedder_arms import EMBEDDER_BASE, NUM_LAYERS, embedder_arms
from experiments.quality.jobs import EvaluateTeacher
from experiments.quality.options import Options
from experiments.quality.pool import Pool
from homodistil.config import command_line


@dataclass
class EmbedderStudy:
    """All that the tables are made of."""

    entries: list[Entry]
    teacher_probes: dict[str, list[float]] = field(default_factory=dict)
    teacher_parameters: int | None = None


def run(pool: Pool, options: Options) -> EmbedderStudy:
    known, start = embedder_arms(options.layers or NUM_LAYERS), _start(pool, options)
    study = EmbedderStudy([Entry(known[name], "half", start=start) for name in options.arms])
    try_rates(pool, options, study.entries)
    run_seeds(pool, options, study.entries)
    teacher = EvaluateTeacher(spec(options, study.entries[0], options.rates[0], options.seeds[0]), options.eval_blocks)
    study.teacher_parameters = (pool.run("teacher", [teacher])[0] or {}).get("parameters")
    sources = [(entry.probes, export) for entry in study.entries for export in exports(options, entry)]
    run_probes(pool, [(study.teacher_probes, teacher), *sources], QUICK_EXAMPLES if options.quick else None)
    return study


def _start(pool: Pool, options: Options) -> tuple[str, ...]:
    """What all runs begin with. Raises `UserError` for a number of layers that the teacher cannot get."""
    if not options.layers:
        return EMBEDDER_BASE
    config = command_line.parse([*EMBEDDER_BASE, *options.set])
    return (*EMBEDDER_BASE, f"teacher.name={deeper_embedder(config, options.layers, pool.work)}")
