"""Stored outputs of a teacher (teacher.outputs=stored) where there can be none, and files that cannot be written."""

from __future__ import annotations

from case import Case, Workspace

STORED = ("teacher.outputs=stored", "loss.kl=0", "data.task=embedding")
ALONE = ("loss.hidden=0", "loss.attention=0", "loss.embedding=0")


def _case(name: str, *overrides: str, says: list[str], script: str = "train") -> Case:
    return Case(
        f"stored_{name}",
        lambda w: w.train(*overrides, script=script),
        says=says,
        ranks=2 if script == "train" else 1,
    )


def _file_for_folder(w: Workspace) -> list[str]:
    w.cache.mkdir()
    (w.cache / "teacher_outputs").write_text("")
    return w.train(*STORED, *ALONE)


CASES = [
    _case("nowhere", "teacher.outputs=disk", says=["teacher.outputs", "'disk'", "live", "stored"]),
    _case(
        "of_masked_words",
        "teacher.outputs=stored",
        says=["teacher.outputs: found stored", "data.task=mlm", "teacher.outputs=live"],
    ),
    _case(
        "with_layers",
        *STORED,
        says=[
            "loss.embedding: found 1",
            "teacher.outputs=stored",
            "set loss.embedding=0 loss.hidden=0 loss.attention=0",
        ],
    ),
    _case(
        "in_parts", *STORED, *ALONE, "teacher.shard=true", says=["teacher.shard: found true", "teacher.outputs=live"]
    ),
    _case("of_any_precision", *STORED, script="prepare_data", says=["teacher.dtype: found auto", "float32"]),
    _case(
        "of_another_device",
        *STORED,
        "teacher.dtype=float16",
        script="prepare_data",
        says=["teacher.dtype: float16 needs a GPU"],
    ),
    _case(
        "of_fewer_pieces",
        *(*STORED, "teacher.dtype=float32", "student.vocab=20"),
        script="prepare_data",
        says=["student.vocab: found 20", "leave teacher.outputs out"],
    ),
    Case("stored_where_a_file_lies", _file_for_folder, says=["data.cache_dir: cannot", "teacher_outputs"]),
]
