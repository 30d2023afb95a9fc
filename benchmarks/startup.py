"""What starting costs, up to the first step: files opened, bytes read, seconds that one rank works for all others.

    python benchmarks/startup.py --out benchmarks/results/startup_cpu_202611

The real job's parts run on 1, 2 and 4 ranks of 1 and 2 simulated machines with caches of their own, where teacher and
text are unpacked already and the corpus is not yet prepared. Three of these runs give the parts of
    total(ranks, machines) = once + machines x per_machine + ranks x per_rank,
the last one is predicted by them.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

OPENED: collections.Counter = collections.Counter()
START_S = time.perf_counter()
if "LOCAL_RANK" in os.environ:  # before everything that is imported
    sys.addaudithook(lambda event, args: OPENED.update([str(args[0])]) if event == "open" else None)

from benchmarks import launch  # noqa: E402

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2)]
"""(ranks, machines); the first three are fitted."""
EXTRAPOLATED = (512, 64)
TOTALS = {"files_opened": "files opened", "bytes_read": "bytes read (MB)"}


def measure(cache: Path, num_machines: int) -> dict:
    """On every rank: start up to the end of the first step. Returns the sums over ranks, on rank 0."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    machine = rank * num_machines // num_ranks
    os.environ["HOMODISTIL_MACHINE"] = f"machine-{machine}"
    from homodistil.config.command_line import parse
    from homodistil.distributed import groups, ranks
    from homodistil.engine.build import init_ranks, load_engine_config, resolve_engine_config
    from homodistil.metrics.recorder import Recorder
    from homodistil.training.inputs import prepare_inputs
    from homodistil.training.run import DistillationRun
    from homodistil.training.trainer import TrainState

    first, once = _timed(ranks, "on_rank_zero", 0), _timed(groups, "once", 1)
    phases = {"imports": time.perf_counter() - START_S}
    device = init_ranks()
    phases["process group"] = time.perf_counter() - START_S
    fields = ["recipe=quickstart", f"data.cache_dir={cache / str(machine)}", "train.micro_batch_size=8"]
    config = parse([*fields, "pruning.compensation=none", "teacher.correction_steps=0"])
    engine = resolve_engine_config(
        load_engine_config(launch.ROOT / "ds_configs" / "zero2.json"), config.train, num_ranks
    )
    run_inputs = prepare_inputs(config, device)
    phases["data"] = time.perf_counter() - START_S
    run = DistillationRun(config, engine, run_inputs, cache / "run", "benchmark")
    phases["teacher and student"] = time.perf_counter() - START_S
    trainer = run.build_trainer(Recorder(run.folder, 1, 0, enabled=False), TrainState())
    phases["engine"] = time.perf_counter() - START_S
    trainer.train_step()
    phases["first step"] = time.perf_counter() - START_S
    read = int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
    own = {"files_opened": sum(OPENED.values()), "bytes_read": read + _mapped_bytes(run_inputs)}
    of_ranks = ranks.gather(own | {"alone_s": sum(first) + sum(once), "phases": _differences(phases)})
    totals = {name: sum(found[name] for found in of_ranks) for name in TOTALS}
    return totals | {"alone_s": of_ranks[0]["alone_s"], "phases": of_ranks[0]["phases"]}


def _timed(module, name: str, position: int) -> list[float]:
    """Seconds of every action that `module.name` runs on this rank, as they come."""
    seconds, plain = [], getattr(module, name)

    def timed(*args):
        args = list(args)
        action = args[position]

        def run():
            start = time.perf_counter()
            try:
                return action()
            finally:
                seconds.append(time.perf_counter() - start)

        args[position] = run
        return plain(*args)

    setattr(module, name, timed)
    return seconds


def _mapped_bytes(run_inputs) -> int:
    """What is read through memory maps, which the kernel's counter does not see: weights, twice (teacher, student)."""
    return 2 * sum(path.stat().st_size for path in Path(run_inputs.teacher).glob("*.safetensors"))


def _differences(ends: dict[str, float]) -> dict[str, float]:
    starts = [0.0, *ends.values()]
    return {name: end - start for (name, end), start in zip(ends.items(), starts, strict=False)}


def fit(found: dict[tuple[int, int], dict], name: str) -> dict[str, float]:
    """The three parts of a total, from (1, 1), (2, 1) and (2, 2)."""
    alone, two, apart = (found[layout][name] for layout in LAYOUTS[:3])
    per_rank, per_machine = two - alone, apart - two
    return {"once": alone - per_rank - per_machine, "per_machine": per_machine, "per_rank": per_rank}


def predict(parts: dict[str, float], layout: tuple[int, int]) -> float:
    return parts["once"] + layout[1] * parts["per_machine"] + layout[0] * parts["per_rank"]


def table(found: dict[tuple[int, int], dict]) -> str:
    lines = [
        "| ranks | machines | files opened | MB read | s of work of one rank for others |",
        "|--:|--:|--:|--:|--:|",
    ]
    for (ranks, machines), row in found.items():
        cells = f"{row['files_opened']:,} | {row['bytes_read'] / 1e6:,.0f} | {row['alone_s']:.1f}"
        lines.append(f"| {ranks} | {machines} | {cells} |")
    lines += ["", "| total | once | per machine | per rank | predicted for 4 ranks on 2 | measured | 512 ranks on 64 |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|"]
    for name, label in TOTALS.items():
        parts, unit = fit(found, name), 1e6 if "bytes" in name else 1
        check = predict(parts, LAYOUTS[3]), found[LAYOUTS[3]][name]
        values = [*parts.values(), *check, predict(parts, EXTRAPOLATED)]
        lines.append(f"| {label} | " + " | ".join(f"{value / unit:,.0f}" for value in values) + " |")
    phases = found[LAYOUTS[1]]["phases"]
    lines += ["", "Seconds of rank 0, two ranks: " + ", ".join(f"{name} {s:.1f}" for name, s in phases.items()) + "."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("startup"))
    parser.add_argument("--assets", type=Path, default=Path("~/.cache/homodistil/assets"), help="unpacked ones")
    arguments = parser.parse_args()
    found = {}
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            for machine in range(layout[1]):
                shutil.copytree(arguments.assets.expanduser(), Path(folder) / str(machine) / "assets")
            found[layout] = launch.run_ranks(__file__, [folder, str(layout[1])], layout[0], {})
            print(layout, found[layout], flush=True)
    text = table(found)
    head = f"# Start-up, CPU (November 2026)\n\n```{__doc__}```\n\nQuickstart without its correction, ZeRO-2.\n"
    arguments.out.with_suffix(".md").write_text(f"{head}\n{text}\n")
    rows = [{"ranks": ranks, "machines": machines} | row for (ranks, machines), row in found.items()]
    arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    if launch.is_rank():
        result = measure(Path(sys.argv[1]), int(sys.argv[2]))
        launch.hand_back(result)
    else:
        main()
