"""Checkpoints: the whole state of a run in one folder that appears at once or not at all, without any pickle.

    checkpoints/step-000200/
        state-00000-of-00002.safetensors   what one rank held: "<kind>/<parameter>/<first element>" -> elements, flat
        rank-00000.safetensors             random state of one rank
        run.safetensors, run.json          importance, kept indices; step, consumed samples, engine, config
        manifest.json                      file -> bytes and sha256, written last
    checkpoints/latest                     name of the newest whole checkpoint
    checkpoints/.step-000200.part          being written

Which rank holds which elements is of no account when reading: any number of ranks, ZeRO stage, wrapper and precision
resumes from any checkpoint. `checkpoints.py` is the door; `writer.py` writes, `folder.py` publishes and verifies,
`reader.py` finds elements in the shards.
"""

from homodistil.checkpoint.checkpoints import Checkpoints, Found
from homodistil.checkpoint.folder import candidates, saved_fingerprints

__all__ = ["Checkpoints", "Found", "candidates", "saved_fingerprints"]
