"""What teacher.outputs=stored saves: a step with the teacher's states from files beside a step with the teacher in it,
of the same student; and what computing the files costs.

    python -m benchmarks.speed.stored_outputs               # MiniLM-L6 to half, recipe=quickstart-embedder, one rank
    python -m benchmarks.speed.stored_outputs --quick       # a few turns

The product's own steps (Trainer.train_step) with engine, losses, data and optimizer, in one process. Both ways take
turns (A B A B ...), are timed by this process's CPU time (on a GPU by wall time), and are compared turn by turn. The
student is cut before the first step, without compensation: what a step costs at its width, not how it got there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.harness import run
from benchmarks.harness.environment import ROOT, environment
from benchmarks.harness.rows import Rows, ratios, spread
from benchmarks.harness.table import table
from homodistil.config.command_line import parse
from homodistil.config.schema import RunConfig
from homodistil.engine.build import init_ranks, load_engine_config, resolve_engine_config
from homodistil.training.inputs import RunInputs, prepare_inputs
from homodistil.training.run import DistillationRun
from homodistil.training.stored_outputs import with_stored_outputs
from homodistil.training.trainer import Trainer

LIVE, STORED = "teacher in the step (live)", "states from files (stored)"
ENGINE = ROOT / "ds_configs" / "zero2_fp32.json"
FIELDS = {
    "recipe": "quickstart-embedder",
    "loss.hidden": 0,
    "data.sources": "[embedded:moby-dick]",
    "train.steps": 100_000,
    "train.log_every_steps": 100_000,
    "train.eval_every_steps": 0,
    "train.save_every_steps": 0,
    "pruning.compensation": "none",
    "pruning.importance": "magnitude",
    "run.report": "false",
}


def config_of(outputs: str, overrides: list[str]) -> RunConfig:
    return parse([*(f"{name}={value}" for name, value in FIELDS.items()), f"teacher.outputs={outputs}", *overrides])


def measure(num_turns: int, work: Path, overrides: list[str]) -> tuple[dict[str, list[float]], float, RunInputs]:
    """Seconds of each way, a turn each; seconds per text of computing the files; what both have read."""
    device, configs = init_ranks(), {LIVE: config_of("live", overrides), STORED: config_of("stored", overrides)}
    engine_config = resolve_engine_config(load_engine_config(ENGINE), configs[LIVE].train, 1)
    trainers: dict[str, Trainer] = {}
    with contextlib.ExitStack() as stack:
        for way, config in configs.items():
            config.data.cache_dir = str(work / "cache")
            run_inputs = prepare_inputs(config, device)
            start_s = _now()
            if config.teacher.is_stored:
                run_inputs = with_stored_outputs(config, torch.float32, run_inputs)
            computing_s = _now() - start_s
            made = DistillationRun(config, engine_config, run_inputs, work / config.teacher.outputs, "benchmark")
            trainers[way] = stack.enter_context(made.training())
        seconds = take_turns({way: trainer.train_step for way, trainer in trainers.items()}, num_turns)
    return seconds, computing_s / sum(map(len, run_inputs.outputs)), run_inputs


def take_turns(ways: dict[str, Callable[[], object]], num_turns: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(num_turns + 1):
        for way, act in ways.items():
            start_s = _now()
            act()
            if turn:  # the first one warms up
                seconds[way].append(_now() - start_s)
    return seconds


def _now() -> float:
    """CPU seconds of this process, which other work on the machine stretches less; on a GPU wall seconds."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def text_of(seconds: dict[str, list[float]], per_text_s: float, batch: int, inputs: RunInputs) -> str:
    live = seconds[LIVE]
    lines = [(way, [1e3 * s for s in taken], ratios(taken, live)) for way, taken in seconds.items()]
    columns = ("a step", "CPU ms {:.0f}" if not torch.cuda.is_available() else "ms {:.0f}", "times live {:.3f}")
    _, saved_s, _ = spread([a - b for a, b in zip(live, seconds[STORED], strict=True)])
    num_texts, states = len(inputs.corpus.train), inputs.outputs.train
    size = states[[0]].nbytes
    break_even = (
        f"Computing the files took {per_text_s * 1e3:.1f} ms per text ({num_texts:,} training texts, {size:,} bytes "
        f"each); a step of {batch} texts saves {saved_s * 1e3:.0f} ms, {saved_s / batch * 1e3:.1f} ms per text. So the "
        f"files are worth it from {per_text_s / (saved_s / batch):.1f} passes over the text on, by all students "
        f"together. Ratios are medians over turns, with 20th and 80th percentiles."
    )
    return "\n\n".join([table(columns, lines), break_even])


def main() -> None:
    parser = run.parser(__doc__, quick="5 turns")
    parser.add_argument("--turns", type=int, default=60)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="more of the run config")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        turns = 5 if args.quick else args.turns
        seconds, per_text_s, inputs = measure(turns, Path(work), args.set)
        config = config_of("stored", args.set)
        text = text_of(seconds, per_text_s, config.train.global_batch_size, inputs)
    facts = {"threads": torch.get_num_threads(), "turns": turns, "deepspeed config": ENGINE.name}
    page = run.page("A step with the teacher's states from files: MiniLM-L6 to half, fp32", text, facts=facts)
    rows = Rows("stored_outputs", environment() | {k: str(v) for k, v in facts.items()})
    for way, taken in seconds.items():
        rows.add(way, "step", "s", "192", taken)
    rows.add("computing", "text", "s", "384", per_text_s, **dataclasses.asdict(config.train))
    run.publish("stored_outputs", page, rows, args)


if __name__ == "__main__":
    main()
