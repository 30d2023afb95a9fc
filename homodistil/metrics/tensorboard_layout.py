"""What TensorBoard shows: under which name a run stands in it, and which values it gets in which groups.

`tensorboard --logdir runs/quickstart/tensorboard` lists `quickstart` and its controls `compare/one_shot`, ... Groups
are sorted by name, and the first ones are open: held-out results, losses, and the model's widths come first. What there
is for every layer is in a group of its own, and of a resize the gap and the cost alone; metrics.jsonl and events.jsonl
have everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

TENSORBOARD_FOLDER = "tensorboard"
_COMPARE_FOLDER = "compare"
_PER_LAYER = "per_layer"

# Beginning of a value's name -> the same on the board; None: not shown.
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
    """Where a run's event files go: named as its folder is; a control's lie beside those of the run it belongs to."""
    run_dir = Path(run_dir).resolve()
    if run_dir.parent.name == _COMPARE_FOLDER:
        return run_dir.parent.parent / TENSORBOARD_FOLDER / _COMPARE_FOLDER / run_dir.name
    folder = run_dir / TENSORBOARD_FOLDER
    # A run that was begun by an earlier version continues in its own file.
    is_older = folder.is_dir() and any(folder.glob("events.out.tfevents.*"))
    return folder if is_older else folder / (run_dir.name or "run")


def board_values(values: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Values as they are logged -> (tag, value). Widths of all layers also as their mean, one for each kind of axis."""
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
    """None: not shown."""
    if "layer." in name:
        return None if name.startswith("events/") else f"{_PER_LAYER}/{name}"
    for beginning, group in _GROUPS.items():
        if name.startswith(beginning):
            return None if group is None else group + name.removeprefix(beginning)
    return name
