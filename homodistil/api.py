"""From Python: distil in this process, also in a notebook, with one rank and no launcher.

run = homodistil.distill("bert-base-uncased", text=["corpus.jsonl"], hidden_size=384, steps=2000, out="runs/half")
run.student, run.tokenizer, run.result, run.report
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from homodistil.config.command_line import Job, parse, parse_job
from homodistil.config.field_names import as_arguments, full_name
from homodistil.config.schema import RunConfig
from homodistil.errors import UserError
from homodistil.metrics.result_table import format_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Place = str | os.PathLike
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads")


class Distilled:
    """A finished run.

    Args:
        folder: its run folder.
        result: the rows of its result table, as in result.json: the teacher, the student, the controls.
    """

    def __init__(self, folder: Path, result: list[dict]) -> None:
        self.folder, self.result = folder, result

    @functools.cached_property
    def student(self) -> PreTrainedModel:
        """The exported student, a stock Hugging Face model in evaluation mode, on the CPU; loaded when first asked."""
        import transformers

        from homodistil.models import family_of
        from homodistil.models.family import BACKBONE_CLASS

        config = transformers.AutoConfig.from_pretrained(self.export)
        kind = family_of(config.model_type).auto_class
        backbone = transformers.MODEL_MAPPING.get(type(config), None)  # an outsider's may have none
        if backbone is not None and backbone.__name__ in config.architectures:  # without a head
            kind = BACKBONE_CLASS
        return getattr(transformers, kind).from_pretrained(self.export).eval()

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer, which is exported with the student."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.export)

    @property
    def export(self) -> Path:
        """Folder of the exported student, for `from_pretrained`."""
        return self.folder / "export"

    @property
    def report(self) -> Path:
        """The HTML page of the run, there unless `run.report` is false."""
        return self.folder / "report.html"

    def __repr__(self) -> str:
        return f"{format_table(self.result)}\n{self.folder}"


def distill(
    teacher: Place | None = None,
    text: Place | Sequence[Place] | None = None,
    *,
    out: Place | None = None,
    recipe: str | None = None,
    deepspeed: Place | None = None,
    **fields: object,
) -> Distilled:
    """Distil a student from `teacher` in this process and return what came of it.

    One rank, unless a launcher (torchrun, deepspeed, srun) has started this program on several. The student's size is
    a fraction of the teacher's parameters (`size=0.5`), millions of them (`parameters=70`), or widths; one that is left
    open is chosen: half of the teacher's width, or what goes in proportion with the widths that are given.

    Args:
        teacher: `teacher.name`: folder, hub name or packaged model. None: the recipe's.
        text: `data.sources`: one file, folder, hub data set or packaged text, or a list of them.
        out: `run.dir`, which must be new or empty (with resume="auto": or this run's). Default: runs/NAME.
        recipe: a shipped recipe to start from (`homodistil recipes`). None: the defaults of the fields, or the
            quickstart where there is no teacher either.
        deepspeed: DeepSpeed's JSON, or the name of a shipped one such as "zero2_fp32". Default: zero2 (bf16).
        fields: any other field of the config: `steps=2000` where one section alone has a field of that name,
            `**{"pruning.schedule": "gap"}` always.

    Raises:
        UserError: bad input, in one line.
        KeyboardInterrupt: Ctrl-C, or a notebook's interrupt; during training behind a checkpoint, so that the same call
            with resume="auto" resumes.
    """
    given = {"teacher.name": teacher, "data.sources": text, "run.dir": out}
    fields = {name: value for name, value in given.items() if value is not None} | _checked(given, fields)
    job = _with_size(_job(recipe, deepspeed, fields), recipe, deepspeed, fields)
    from homodistil.train import run

    rows = run(job)
    return Distilled(Path(job.config.run_dir).expanduser().absolute(), rows)


def load_recipe(name: str) -> RunConfig:
    """The config of a shipped recipe (`homodistil recipes`). Raises `UserError`."""
    return parse([f"recipe={name}"])


def _checked(given: dict[str, object], fields: dict[str, object]) -> dict[str, object]:
    """`fields` without what has an argument of its own. Raises `UserError` for one that is given both ways."""
    arguments = dict(zip(given, ("teacher", "text", "out"), strict=True))
    for keyword in fields:
        name = full_name(keyword)
        if given.get(name) is not None:
            raise UserError(f"{name}: given twice, as {arguments[name]} and as {keyword}; give it once")
    return fields


def _job(recipe: str | None, deepspeed: Place | None, fields: dict[str, object]) -> Job:
    arguments = [f"recipe={recipe}"] if recipe is not None else []
    arguments += ["--deepspeed", os.fspath(deepspeed)] if deepspeed is not None else []
    arguments += as_arguments(fields)
    names = [argument.partition("=")[0] for argument in arguments]
    if "--run.name" not in names and "--run.dir" in names:
        folder = next(argument.partition("=")[2] for argument in arguments if argument.startswith("--run.dir="))
        arguments.append(f"--run.name={Path(folder).name or 'run'}")
    return parse_job(arguments)


def _with_size(job: Job, recipe: str | None, deepspeed: Place | None, fields: dict[str, object]) -> Job:
    """The job with the student's size complete, which the command line would ask for."""
    student = job.config.student
    sizes = {name: getattr(student, name) for name in _SIZES}
    is_sized = student.size is not None or student.parameters is not None
    if is_sized or student.preset != "custom" or None not in sizes.values():
        return job
    import torch

    from homodistil.distill.teacher import load_config
    from homodistil.models import family_of
    from homodistil.models.proposed_shapes import in_proportion
    from homodistil.training.teacher_checks import found_teacher

    teacher = load_config(found_teacher(job.config))
    family = family_of(teacher.model_type)  # refuses an architecture that has no axis table
    with torch.device("meta"):
        widths = family.axis_table(family.empty_model(teacher)).widths
    chosen = in_proportion(sizes, widths, family.whole_heads)
    missing = {f"student.{name}": getattr(chosen, name) for name, size in sizes.items() if size is None}
    return _job(recipe, deepspeed, fields | missing)
