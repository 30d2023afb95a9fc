"""Fields and config files."""

from __future__ import annotations

from case import Case

CASES = [
    Case("unknown_field", lambda w: w.train("train.stepz=3"), says=["train.stepz", "did you mean 'steps'"]),
    Case("teacher_is_nowhere", lambda w: w.train("teacher.name=/nowhere/bert"), says=["teacher.name", "/nowhere/bert"]),
    Case("run_dir_is_a_file", lambda w: (w.run_dir.write_text("mine"), w.train())[1], says=["run.dir", "is a file"]),
]
