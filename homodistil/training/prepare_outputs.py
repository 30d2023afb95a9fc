"""The part of `homodistil prepare-data` that computes a teacher's outputs (teacher.outputs=stored), without ranks."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from homodistil.config.schema import RunConfig
from homodistil.data.prepare.corpus import Corpus
from homodistil.data.task import task_of
from homodistil.data.vocabulary.choice import ALL
from homodistil.distill.classifier_files import check_classifier
from homodistil.distill.teacher import has_lm_head, load_config
from homodistil.engine.ds_config import teacher_dtype
from homodistil.errors import UserError
from homodistil.training.embedder import sentence_modules_of
from homodistil.training.inputs import RunInputs, window_of
from homodistil.training.stored_outputs import prepare_outputs
from homodistil.training.stored_terms import check_single_texts


def check_preparable(config: RunConfig) -> None:
    """Raise `UserError` where outputs are wanted that cannot be computed ahead of a run. The task is settled."""
    if not config.teacher.is_stored:
        return
    check_single_texts(config)
    if config.teacher.dtype == "auto":
        raise UserError(
            "teacher.dtype: found auto, which depends on the ranks of a run, allowed for teacher.outputs=stored ahead "
            "of a run are float32, bfloat16 and float16; set the one that the run will have, there as well"
        )
    teacher_dtype(config.teacher.dtype, {}, _device())
    if config.student.vocab != ALL:
        raise UserError(
            f"student.vocab: found {config.student.vocab}, allowed for teacher.outputs=stored ahead of a run is all, "
            f"as the run makes the smaller teacher; leave teacher.outputs out here: the run's ranks compute them"
        )


def outputs_of_worker(
    config: RunConfig, folder: str, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, task: int, tasks: int
) -> str:
    """One worker's share of the outputs of the teacher in `folder`. Returns a line on what there is now.

    Raises:
        UserError: the teacher cannot be used, or a file not be read or written.
    """
    device, head = _device(), task_of(config.data).head
    pickle = config.teacher.allow_pickle
    check_classifier(folder, pickle) if head == "classifier" else has_lm_head(folder, pickle)
    window, modules = window_of(load_config(folder)), sentence_modules_of(config.data, folder)
    run_inputs = RunInputs(
        folder, tokenizer, corpus, device, pickle, window=window, head=head, sentence_modules=modules
    )
    dtype = teacher_dtype(config.teacher.dtype, {}, device)
    return prepare_outputs(config, dtype, run_inputs, task, tasks)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
