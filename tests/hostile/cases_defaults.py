"""Targets that are missing, half there or impossible, recipes that are none, and seeds."""

from __future__ import annotations

from case import Case, Workspace

HALF = "student.hidden_size=12 student.intermediate_size=20 student.num_attention_heads=4 (or student.preset="
NO_TARGET = ("student.hidden_size=null", "student.intermediate_size=null", "student.num_attention_heads=null")


def _bare(w: Workspace, *fields: str) -> list[str]:
    """A user's own teacher and text, and nothing else."""
    given = [
        f"teacher.name={w.teacher}",
        f"data.sources=[{w.text}]",
        f"data.cache_dir={w.cache}",
        f"run.dir={w.run_dir}",
    ]
    return ["train", "--deepspeed", str(w.engine), *given, "data.seq_len=16", *fields]


def _once(w: Workspace) -> list[str]:
    (w.folder / "slow.yaml").write_text("train: {lr: 1.0e-4}\n")
    return w.train("--teachers-once", str(w.folder / "slow.yaml"), *NO_TARGET)


CASES = [
    Case("no_recipe_and_no_target", lambda w: _bare(w), says=["student: no target size", HALF]),
    Case(
        "plan_without_a_target",
        lambda w: w.train("--device", "H100", *NO_TARGET, script="plan"),
        says=["student: no target size", HALF],
        ranks=1,
    ),
    Case("students_of_one_teacher_without_a_target", _once, says=["student: no target size", HALF]),
    Case(
        "target_without_heads",
        lambda w: w.train("student.num_attention_heads=null"),
        says=["student.num_attention_heads: not set beside hidden_size=12", "student.num_attention_heads=4 (or"],
    ),
    Case(
        "target_of_heads_alone",
        lambda w: _bare(w, "student.num_attention_heads=3"),
        says=["student.hidden_size, student.intermediate_size: not set beside num_attention_heads=3"],
    ),
    Case("target_of_no_width", lambda w: w.train("student.hidden_size=0"), says=["student.hidden_size", "1 .. 24"]),
    Case("target_that_no_head_divides", lambda w: w.train("student.num_attention_heads=5"), says=["student.", "5"]),
    Case("preset_that_is_none", lambda w: w.train("student.preset=half"), says=["student.preset", "half"]),
    Case(
        "the_quickstarts_target_on_a_narrow_teacher",
        lambda w: _bare(w, "recipe=quickstart"),
        says=["student.hidden_size: found 64, the teacher has 24"],
    ),
    Case(
        "recipe_that_is_nearly_one",
        lambda w: _bare(w, "recipe=homobert-small-papers"),
        says=["recipe: found 'homobert-small-papers'", "did you mean 'homobert-small-paper'"],
    ),
    Case("recipe_without_a_name", lambda w: _bare(w, "recipe="), says=["recipe: found ''"]),
    Case(
        "correction_seed_negative",
        lambda w: w.train("teacher.correction_seed=-1"),
        says=["teacher.correction_seed: found -1, allowed [0"],
    ),
    Case(
        "correction_seed_huge",
        lambda w: w.train(f"teacher.correction_seed={2**63}"),
        says=["teacher.correction_seed", str(2**63)],
    ),
    Case(
        "shares_of_what_has_no_weights",
        lambda w: w.train("pruning.importance=activation", "pruning.score_normalisation=per_tensor"),
        says=["pruning.score_normalisation: found per_tensor", "pruning.importance=activation is none"],
    ),
    Case("train_seed_negative", lambda w: w.train("train.seed=-1"), says=["train.seed: found -1, allowed [0"]),
]
