"""All SQuAD runs of a command, with one JSON file per finished run, and their table. Continues after interruptions."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from homodistil.errors import UserError
from homodistil.evaluation import progress
from homodistil.evaluation.glue.checkpoint import checkpoint_folder, checkpoint_identity
from homodistil.evaluation.glue.grid import Grid, check_out, read_record, run_label, write_output
from homodistil.evaluation.squad.examples import SquadData
from homodistil.evaluation.squad.fine_tuning import Settings, encode, load_reader, train
from homodistil.evaluation.trainer_arguments import on_cpu
from homodistil.files import to_json

MARKDOWN_FILE, JSON_FILE = "squad.md", "squad.json"
METRICS = {
    "exact": "EM",
    "f1": "F1",
    "has_answer_exact": "EM, answerable",
    "has_answer_f1": "F1, answerable",
    "no_answer_accuracy": "accuracy, unanswerable",
}
Record = dict[str, Any]
"""One finished run: version, checkpoint (as given), identity, setting (lr, batch_size, epochs, seed), result."""

_SETTING = ("lr", "batch_size", "epochs")
_VARIED = (*_SETTING, "seed")


def run_grid(
    checkpoint: str, data: SquadData, grid: Grid, out: Path, cache_dir: Path, say: Callable[[str], None]
) -> list[Record]:
    """Do all runs that are not finished yet, and return all records of this version in `out`.

    Args:
        checkpoint: folder, hub name or embedded:NAME.
        grid: its shared settings are a `squad.fine_tuning.Settings`.
        out: folder for the records.
        cache_dir: folder for packaged models.
        say: called with two lines per run, when it begins and when it has finished.

    Raises:
        UserError: the checkpoint cannot be used, or `out` holds results of another checkpoint, data or settings.
    """
    on_cpu(grid.shared.device)  # raises if there is no such device
    folder = checkpoint_folder(checkpoint, cache_dir)
    load_reader(folder)
    identity = _identity(checkpoint_identity(folder), data, grid.shared)
    place = out / data.version
    finished = {file: _read(file, identity) for file in sorted(place.glob("lr*.json"))}
    check_out(place)
    todo = {file: s for s in grid.settings() if (file := place / _name(s)) not in finished}
    with progress.doing(f"SQuAD {data.version}: tokenising {len(data.train) + len(data.dev):,} questions"):
        encoded = encode(folder, data, grid.shared) if todo else None
    for number, (file, settings) in enumerate(todo.items(), start=1):
        label = run_label(f"SQuAD {data.version}", number, len(todo), settings)
        say(label)
        with progress.doing(label):
            result, predictions = train(folder, encoded, settings)
        record = {"version": data.version, "checkpoint": checkpoint, "identity": identity}
        record |= {"setting": {name: getattr(settings, name) for name in _VARIED}, "result": result}
        # The record is written last, because it marks the run as finished.
        write_output(place / f"predictions-{file.name}", json.dumps(predictions) + "\n")
        write_output(file, to_json(record) + "\n")
        finished[file] = record
        say(f"SQuAD {data.version}: {file.stem}: EM {result['exact']:.4f}, F1 {result['f1']:.4f}")
    return [finished[file] for file in sorted(finished)]


def _identity(checkpoint: str, data: SquadData, shared: Settings) -> dict[str, Any]:
    """Everything that affects a result and is not in the file name, except the device."""
    fixed = {name: value for name, value in dataclasses.asdict(shared).items() if name not in (*_VARIED, "device")}
    return {"checkpoint": checkpoint, "data": data.fingerprint, **fixed}


def _name(settings: Settings) -> str:
    return f"lr{settings.lr:g}-batch{settings.batch_size}-epochs{settings.epochs}-seed{settings.seed}.json"


def _read(file: Path, identity: dict[str, Any]) -> Record:
    record = read_record(file, lambda record: ("exact", "f1"))
    stored = record["identity"]
    if differing := [name for name, value in identity.items() if stored.get(name) != value]:
        raise UserError(
            f"{file}: result of another run (differs in {', '.join(differing)}); give another --out, or delete the "
            f"old results"
        )
    return record


def summarise(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One dict per setting, ordered by median F1, the best first.

    Each has lr, batch_size, epochs, seeds, and "metrics" with median, standard_deviation (of the sample; None for one
    seed), min and max of each metric over the seeds.
    """
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record["setting"][name] for name in _SETTING), []).append(record)
    summaries = []
    for key, group in sorted(groups.items()):
        scores = {m: [r["result"][m] for r in group] for m in METRICS if m in group[0]["result"]}
        seeds = sorted(record["setting"]["seed"] for record in group)
        summary = dict(zip(_SETTING, key, strict=True)) | {"seeds": seeds}
        summaries.append(summary | {"metrics": {name: _spread(values) for name, values in scores.items()}})
    return sorted(summaries, key=lambda summary: -summary["metrics"]["f1"]["median"])


def _spread(values: list[float]) -> dict[str, float | None]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    spread = {"median": statistics.median(values), "standard_deviation": deviation}
    return spread | {"min": min(values), "max": max(values)}


def write_table(records: list[Record], out: Path) -> str:
    """Write squad.json and squad.md (of one version) into `out`/VERSION, atomically. Returns the Markdown."""
    summaries = summarise(records)
    about = {name: records[-1][name] for name in ("version", "checkpoint")}
    about["parameters"] = records[-1]["result"]["parameters"]
    names = [name for name in METRICS if name in summaries[0]["metrics"]]
    lines = [["model", "parameters, M", "lr", "batch", "epochs", "seeds", *(METRICS[name] for name in names)]]
    for summary in summaries:
        setting = [f"{summary['lr']:g}", str(summary["batch_size"]), str(summary["epochs"]), str(len(summary["seeds"]))]
        cells = [_cell(summary["metrics"][name]) for name in names]
        model = str(about["checkpoint"]).replace("|", "\\|")
        lines.append([model, f"{about['parameters'] / 1e6:.1f}", *setting, *cells])
    lines.insert(1, ["---"] * len(lines[0]))
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text = (
        f"# SQuAD {about['version']}, dev (percent)\n\n{table}\n\n"
        "Medians over the seeds +- standard deviation, the setting with the best F1 first (chosen on dev itself).\n"
    )
    write_output(out / about["version"] / JSON_FILE, to_json({**about, "settings": summaries}) + "\n")
    write_output(out / about["version"] / MARKDOWN_FILE, text)
    return text


def _cell(spread: dict[str, float | None]) -> str:
    deviation = spread["standard_deviation"]
    median = f"{100 * spread['median']:.1f}"
    return median if deviation is None else f"{median} +- {100 * deviation:.1f}"
