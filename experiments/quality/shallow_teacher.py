"""A teacher of the first layers of a larger one, as a folder of its own: real weights at a depth that two cores bear.

It predicts badly until a run corrects it on its text (teacher.correction_steps).
"""

from __future__ import annotations

from pathlib import Path

import transformers

from homodistil.data.cache import build_once
from homodistil.data.sources.teachers import cached_teacher
from homodistil.data.tokenizer import read_tokenizer
from homodistil.models import family_of


def first_layers(teacher: str, num_layers: int, work: Path, cache_dir: Path) -> str:
    """`teacher.name` of the model of the first `num_layers` layers; `teacher` itself where it has no more.

    Args:
        teacher: packaged teacher, GGUF file, folder or hub name.
        work: where the folder is made, once.
        cache_dir: of the run config, for packaged teachers.

    Raises:
        UserError: no such teacher.
    """
    source = str(cached_teacher(teacher, cache_dir) or teacher)
    if num_layers >= transformers.AutoConfig.from_pretrained(source).num_hidden_layers:
        return teacher
    name = teacher.strip("/").replace(":", "-").replace("/", "-")
    return str(build_once(work / "shallow" / f"{name}-first{num_layers}", lambda f: _write(source, num_layers, f)))


def _write(source: str, num_layers: int, folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="float32")
    family_of(model.config.model_type).keep_layers(model, range(num_layers))
    model.save_pretrained(folder)
    read_tokenizer(source, "--teacher").save_pretrained(folder)
