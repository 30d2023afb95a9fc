"""Layout of TensorBoard: the name of a run, and the values that are shown with their groups.

`tensorboard --logdir runs/quickstart/tensorboard` lists `quickstart` and its controls `compare/one_shot`, ...
TensorBoard sorts groups by name and opens the first ones, which are held-out results, losses and widths of the model.
Values per layer have a separate group, and of a resize only gap and cost are shown; metrics.jsonl and events.jsonl have
everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

TENSORBOARD_FOLDER = "tensorboard"
_COMPARE_FOLDER = "compare"
_PER_LAYER = "per_layer"

# Prefix of a value's name -> prefix of its tag in TensorBoard; None: not shown.
_GROUPS = {
    "heldout/masked_rows": None,  # never changes
    "heldout/gap/": "probe/",
    "widths/": "model/width_",
    "memory/": "speed/memory_",
    "events/gap_before/": "resize/before_",
    "events/gap_after/": "resize/after_",
    "events/widths_before/": None,
    "events/widths_after/": None,
    "events/": "resize/",
}


def board_folder(run_dir: Path) -> Path:
    """Folder for the event files of a run, with the name of the run folder.

    The event files of a control are in the TensorBoard folder of its run, so that both are listed together.
    """
    run_dir = Path(run_dir).resolve()
    if compared := compared_run(run_dir):
        return compared / TENSORBOARD_FOLDER / _COMPARE_FOLDER / run_dir.name
    folder = run_dir / TENSORBOARD_FOLDER
    # A run that was started by an earlier version continues in the old folder.
    is_older = folder.is_dir() and any(folder.glob("events.out.tfevents.*"))
    return folder if is_older else folder / (run_dir.name or "run")


def compared_run(run_dir: Path) -> Path | None:
    """The run folder of the run that `run_dir` is a control of; None: it is not the folder of a control."""
    return run_dir.parent.parent if run_dir.parent.name == _COMPARE_FOLDER else None


def board_values(values: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Logged values -> (tag, value) for TensorBoard, with the mean width over layers for each kind of axis."""
    kinds: dict[str, list[float]] = {}
    for name, value in values.items():
        tag = _tag(name)
        if tag is None:
            continue
        yield tag, float(value)
        if name.startswith("widths/layer."):
            kinds.setdefault(name.rpartition(".")[2], []).append(float(value))
    for kind, widths in kinds.items():
        yield f"model/width_{kind}", sum(widths) / len(widths)


def _tag(name: str) -> str | None:
    """The tag of a value in TensorBoard; None if it is not shown."""
    if "layer." in name:
        return None if name.startswith("events/") else f"{_PER_LAYER}/{name}"
    for beginning, group in _GROUPS.items():
        if name.startswith(beginning):
            return None if group is None else group + name.removeprefix(beginning)
    return name
