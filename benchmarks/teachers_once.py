"""What several students in one job save: a step of all of them with one pass of the teacher, beside a step of each with
a pass of its own.

    python benchmarks/teachers_once.py               # 6 layers, 384 wide; students of a half and a quarter; fp32
    python benchmarks/teachers_once.py --quick       # under 90 s on 2 cores

The product's own steps (Together.train_step, Trainer.train_step) with engines, losses and optimizers, random weights
and words, one process. The ways take turns (A B C A B C ...); ratios are medians over turns.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from product import write_inputs
from report import environment, environment_text, result_path, row, spread, write, write_json
from shapes import Shape

from homodistil.config import command_line
from homodistil.config.schema import RunConfig
from homodistil.engine.build import init_ranks, load_engine_config, resolve_engine_config
from homodistil.training.inputs import prepare_inputs
from homodistil.training.multi_student import MultiStudentTrainer, student_runs

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "homobert-small-paper"
FULL = Shape(layers=6, hidden=384, ffn=1536, heads=6, recipe=RECIPE, batch={"cpu": (8, 8)}, vocabulary=8192)
QUICK = Shape(layers=3, hidden=192, ffn=768, heads=6, recipe=RECIPE, batch={"cpu": (4, 4)}, vocabulary=2048)
PARTS = (2, 4)
"""Of the teacher's width."""
TOGETHER, APART, LOCK_STEP = "one pass for all", "a pass for each", "a pass for each, in lock-step"
TEACHER = "the teacher's pass alone"


def student_config(shape: Shape, part: int, work: Path) -> RunConfig:
    """Pruned before step 0: every step is one at the final width."""
    batch, micro_batch = shape.batch["cpu"]
    fields = {
        "teacher.name": work / "teacher",
        "teacher.correction_steps": 0,
        "teacher.lock_step": "false",
        "data.sources": f"[{work / 'text.txt'}]",
        "data.cache_dir": work / "cache",
        "data.text_documents": "paragraph",
        "data.heldout_fraction": 0.1,
        "data.workers": 0,
        "student.preset": "custom",
        "student.hidden_size": shape.hidden // part,
        "student.intermediate_size": shape.ffn // part,
        "student.num_attention_heads": shape.heads,
        "train.steps": 100_000,
        "train.global_batch_size": batch,
        "train.micro_batch_size": micro_batch,
        "train.log_every_steps": 100_000,
        "train.eval_every_steps": 0,
        "train.save_every_steps": 0,
        "pruning.schedule": "one_shot",
        "pruning.importance": "magnitude",
        "pruning.calibration_batches": 1,
        "run.name": f"part-{part}",
    }
    return command_line.parse([f"recipe={shape.recipe}", *(f"{name}={value}" for name, value in fields.items())])


def measure(shape: Shape, num_turns: int, work: Path) -> dict[str, list[float]]:
    """Seconds by way, a turn each: of a step of all students, and of the teacher's pass alone."""
    device = init_ranks()
    configs = [student_config(shape, part, work) for part in PARTS]
    write_inputs(shape, configs[0], work)
    engine_config = resolve_engine_config(
        load_engine_config(ROOT / "ds_configs" / "zero2_fp32.json"), configs[0].train, 1
    )
    folders = [work / "run" / config.run.name for config in configs]
    runs = student_runs(configs, folders, engine_config, prepare_inputs(configs[0], device), "benchmark")
    teacher = runs[0].teacher
    with contextlib.ExitStack() as stack:
        trainers = [stack.enter_context(run.training()) for run in runs]
        together = MultiStudentTrainer(trainers, teacher, trainers[0].prefetcher)
        batches = trainers[0].prefetcher.micro_batches(0)

        def each(lock_step: bool) -> None:
            teacher._lock_step = lock_step
            for trainer in trainers:
                trainer.train_step()

        ways = {TOGETHER: lambda: together.train_step(trainers), APART: lambda: each(False)}
        ways |= {LOCK_STEP: lambda: each(True), TEACHER: lambda: [teacher.run(batch) for batch in batches]}
        return take_turns(ways, num_turns)


def take_turns(ways: dict[str, Callable[[], object]], num_turns: int) -> dict[str, list[float]]:
    """Seconds of each way, a turn each: of this process on a CPU, which other work on the machine stretches less."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(num_turns + 1):
        for way, run in ways.items():
            start = _now()
            run()
            if turn:  # the first one warms up
                seconds[way].append(_now() - start)
    return seconds


def _now() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def table(seconds: dict[str, list[float]], shape: Shape) -> str:
    once, teacher = seconds[TOGETHER], seconds[TEACHER]
    lines = ["| a step of both students | CPU ms | times the first |", "|-|-|-|"]
    for way, found in seconds.items():
        ratio = statistics.median(s / first for s, first in zip(found, once, strict=True))
        lines.append(f"| {way} | {statistics.median(found) * 1e3:.0f} | {ratio:.2f} |")
    saved = [(apart - together) / one for apart, together, one in zip(seconds[APART], once, teacher, strict=True)]
    low, middle, high = spread(saved)
    batch, _ = shape.batch["cpu"]
    widths = " and ".join(str(shape.hidden // part) for part in PARTS)
    title = f"{shape.layers} layers, {shape.hidden} wide, students of {widths}, {batch} x 128 tokens, fp32"
    head = [f"# Several students, one pass of the teacher: {title}", "", environment_text()]
    head += [f"* threads: {torch.get_num_threads()}", f"* turns: {len(once)}", ""]
    tail = f"""
A step of two students with one pass saves {middle:.2f} passes of the teacher (20th to 80th percentile {low:.2f} to
{high:.2f}; all of one would be 1). Ratios are medians over turns."""
    return "\n".join([*head, *lines, tail])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where the rows go, instead of to results/")
    options = parser.parse_args()
    shape = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory() as work:
        seconds = measure(shape, 5 if options.quick else options.turns, Path(work))
    text = table(seconds, shape)
    print(text)
    facts = environment()
    rows = [row("teachers_once", way, "step", "s", shape.hidden, found, facts) for way, found in seconds.items()]
    if options.json or not options.quick:
        write_json(options.json or result_path("teachers_once", ".json"), rows)
    if not options.json and not options.quick:
        write(result_path("teachers_once", ".md"), text)


if __name__ == "__main__":
    main()
