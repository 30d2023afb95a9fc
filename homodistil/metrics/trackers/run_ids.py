"""trackers.json in the run folder: the id of the run at each tracker, so that a resumed run goes on with the same."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from homodistil.files import write_atomically

RUN_IDS_FILE = "trackers.json"
_LOCK = threading.Lock()  # every tracker has its thread (background.py)


def kept_run_id(folder: Path, tracker: str) -> str | None:
    """The id at `tracker` that was kept in the run folder `folder`; None, if there is none or it cannot be read."""
    return _read(folder).get(tracker)


def keep_run_id(folder: Path, tracker: str, run_id: str) -> None:
    """Keep the id beside those of other trackers; the folder is made if it is missing. Raises `OSError`."""
    with _LOCK:
        folder.mkdir(parents=True, exist_ok=True)
        ids = _read(folder) | {tracker: run_id}
        write_atomically(folder / RUN_IDS_FILE, json.dumps(ids, indent=2) + "\n")


def _read(folder: Path) -> dict[str, str]:
    try:
        content = json.loads((folder / RUN_IDS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    ids = content if isinstance(content, dict) else {}
    return {tracker: run_id for tracker, run_id in ids.items() if isinstance(run_id, str)}
