"""Checkpoints: the whole state of a run in one folder that is published atomically. No pickle is written or read.

    checkpoints/step-000200/
        state-00000-of-00002.safetensors   state of one rank: "<kind>/<parameter>/<first element>" -> elements, flat
        rank-00000.safetensors             random state of one rank
        run.safetensors, run.json          importance, kept indices; step, consumed samples, engine, config
        manifest.json                      file -> bytes and sha256, written last
    checkpoints/latest                     name of the newest whole checkpoint
    checkpoints/.step-000200.part          being written

A checkpoint does not depend on how its elements were spread over ranks: a run can resume from it with another number of
ranks, ZeRO stage, wrapper or precision. `checkpoints.py` is the interface; `writer.py` writes, `folder.py` publishes
and verifies, `reader.py` reads elements from the shards.
"""

from homodistil.checkpoint.checkpoints import Checkpoints, Found
from homodistil.checkpoint.folder import candidates, saved_fingerprints

__all__ = ["Checkpoints", "Found", "candidates", "saved_fingerprints"]
