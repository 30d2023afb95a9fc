"""The frozen teacher: loaded once, run without gradients in inference precision, its MLM head on wanted rows only."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
import transformers
from huggingface_hub import list_repo_files
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from homodistil.data.batch import Batch
from homodistil.data.task import TASKS
from homodistil.data.tokenizer import check_ids, check_special_tokens, check_words, read_tokenizer
from homodistil.distill.losses.vocabulary import chunked_losses
from homodistil.distill.runtime import Runtime, SideStream
from homodistil.distill.teacher_outputs import Layerwise, TeacherOutputs, WholePass, own_lists, wanted_rows
from homodistil.errors import UserError
from homodistil.models import family_of
from homodistil.models.activations import ActivationHooks, Activations, attention_implementation
from homodistil.models.checkpoint_files import first_line, local_folder
from homodistil.models.classifier import label_class
from homodistil.models.config_file import read_config
from homodistil.models.family_heads import HeadKind
from homodistil.models.sentence_head import SentenceHead, pooled
from homodistil.models.weights import (
    Difference,
    check_finite,
    check_layers,
    check_whole,
    difference,
    stored_tensors,
    tell_unused,
)

FIELD = "teacher.name"
_PICKLED_WEIGHTS = re.compile(r"pytorch_model.*\.bin")


class Teacher(nn.Module):
    """Frozen `model` (a Hugging Face masked LM with the tapped attention). Nothing here ever builds a graph.

    Args:
        model: frozen and put into evaluation mode here.
        lock_step: run layer by layer beside the student (teacher_outputs.py) instead of as a whole.
        runtime: how a whole forward pass runs (distill/runtime), never in lock-step; None: as the module is.
        stream: runs whole passes beside whatever the current stream does.
        sentence_head: of a sentence embedder, whose vectors of texts are compared.
    """

    shows_layers: ClassVar[bool] = True
    """Whether there is more to compare with than vectors or scores of whole texts."""

    def __init__(
        self,
        model: nn.Module,
        lock_step: bool = True,
        runtime: Runtime | None = None,
        stream: SideStream | None = None,
        sentence_head: SentenceHead | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.family = family_of(model.config.model_type)
        self._taps = ActivationHooks(model, self.family) if runtime is None else None
        self._lock_step = lock_step and runtime is None
        self._runtime = runtime or self._taps.run
        self._stream = stream
        self.sentence_head = sentence_head
        self.scale = runtime.scale if runtime else self._taps.scale
        """What the softmax multiplies q.k with."""

    @property
    def device(self) -> torch.device:
        """Where batches have to be."""
        return next(self.parameters()).device

    def train(self, mode: bool = True) -> Teacher:
        """Never in training mode: its dropout would be noise in every target."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> TeacherOutputs:
        """What the objective compares with. In lock-step nothing is computed before the student runs."""
        if self._lock_step:
            outputs = Layerwise(self.model, self.family, batch, self._taps)
            outputs.sentence_head = self.sentence_head
            return outputs
        if self._stream is None:
            tapped = self.run(batch)
            return self._whole_pass(batch, lambda: tapped)
        pending = self._stream.start(batch.input_ids, batch.padding_mask, batch.token_types)
        return self._whole_pass(batch, pending.result)

    def _whole_pass(self, batch: Batch, finished: Callable[[], Activations]) -> WholePass:
        outputs = WholePass(self.model, self.family, batch, self.scale, finished)
        outputs.sentence_head = self.sentence_head
        return outputs

    @torch.no_grad()
    def for_several(self, batch: Batch, num_students: int) -> list[TeacherOutputs]:
        """What so many students are compared with, out of one whole pass, which is kept until the last has used it."""
        if self._stream is None:
            tapped = self.run(batch)
        else:
            tapped = self._stream.start(batch.input_ids, batch.padding_mask, batch.token_types).result()
        return [self._whole_pass(batch, functools.partial(own_lists, tapped)) for _ in range(num_students)]

    @torch.no_grad()
    def run(self, batch: Batch) -> Activations:
        """A whole forward pass of the backbone."""
        return self._runtime(batch.input_ids, batch.padding_mask, batch.token_types)

    @torch.no_grad()
    def pooled_states(self, batch: Batch) -> Tensor:
        """What the modules behind the backbone read of each text, (B, D): of a sentence embedder in fp32, of a
        classifier in the dtype of its hidden states; of a token classifier of every token, (rows, D)."""
        last, head = self.run(batch).last, self.sentence_head
        if head is None:
            return self.family.classifier(self.model).rows(last, batch)
        return pooled(last, batch.attention_mask, head.pooling)

    @torch.no_grad()
    def embed(self, batch: Batch) -> Tensor:
        """Vectors of the batch's texts, (B, E) fp32, not normalised. Of a sentence embedder alone."""
        return self.sentence_head.transform(self.pooled_states(batch))

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        """Logits of labels, fp32 (rows, labels), of the rows that the head reads. Of a classifier alone."""
        return self.family.classifier(self.model).logits_of(self.pooled_states(batch))

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Logits (M, V) of the masked rows."""
        return self.family.lm_head(self.model)(wanted_rows(self.run(batch).last, batch, "masked"))

    @torch.no_grad()
    def lm_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over the rows to predict of the cross-entropy, in chunks, and 0: its KL to itself."""
        rows = self.family.lm_transform(self.model)(wanted_rows(self.run(batch).last, batch, "masked"))
        one, zero = rows.new_ones((), dtype=torch.float32), rows.new_zeros((), dtype=torch.float32)
        decoder = self.family.decoder(self.model)
        loss, _, kl = chunked_losses(rows, decoder, None, batch.target_ids, one, zero)
        return loss, kl


def load_model(
    folder: str,
    dtype: torch.dtype = torch.float32,
    dropout: float | None = None,
    allow_pickle: bool = False,
    head: HeadKind = "lm",
) -> nn.Module:
    """A model with tapped attention from a folder or hub name.

    Args:
        folder: path or hub name.
        dtype: of the weights.
        dropout: replaces both dropout probabilities of the config (None keeps them).
        allow_pickle: take pickled weights (with weights_only) where there are no safetensors.
        head: which one; "none" leaves out the language-modelling head.

    Raises:
        UserError: nothing there, unreadable, pickled, or an architecture without a table of axes.
    """
    config = load_config(folder)
    family = family_of(config.model_type)
    if dropout is not None:
        family.set_dropout(config, dropout)
    options = {"config": config, "dtype": dtype, "attn_implementation": attention_implementation(family)}
    auto_class = label_class(config).auto_class if head == "classifier" else family.auto_class
    model = _from_pretrained(folder, allow_pickle, auto_class, **options)
    if head == "none":
        family.drop_head(model)
    return model


def has_lm_head(folder: str, allow_pickle: bool = False, say: Callable[[str], None] = lambda line: None) -> bool:
    """Whether the checkpoint brings its own MLM head (an encoder alone gets a freshly initialised one).

    Everything else has to be there: the weights are read once and looked at.

    Args:
        say: takes a line on tensors that the model does not use.

    Raises:
        UserError: as `load_model` and `check_stored`, or NaN or infinite values.
    """
    shape = load_config(folder)
    check_stored(folder, shape, allow_pickle)
    family, where = family_of(shape.model_type), f"{FIELD}: {folder!r}"
    model, compared = read_whole(folder, allow_pickle, family.auto_class)
    has_head = check_whole(compared, model, family, where)
    check_finite(model, where)
    tell_unused(folder, compared, say)
    return has_head


def read_whole(folder: str, allow_pickle: bool, auto_class: str) -> tuple[nn.Module, Difference]:
    """The model in fp32, and what is wrong with its files; unexpected are tensors that its family does not know of."""
    shape = load_config(folder)
    family = family_of(shape.model_type)
    # In fp32, whatever the config says of its type: nothing becomes infinite on the way.
    options = {"config": shape, "dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, report = _from_pretrained(folder, allow_pickle, auto_class, **options)
    unexpected = sorted(name for name in report["unexpected_keys"] if not family.is_unused(family.tensor_name(name)))
    mismatched = [(name, tuple(stored), tuple(ours)) for name, stored, ours in sorted(report["mismatched_keys"])]
    return model, Difference(sorted(report["missing_keys"]), unexpected, mismatched)


def check_stored(folder: str, shape, allow_pickle: bool = False) -> bool | None:
    """The files of a local teacher against its config `shape`, without reading the weights (milliseconds).

    Returns:
        Whether they have a language-modelling head; None where reading the weights alone can tell.

    Raises:
        UserError: files missing or damaged, whole numbers for weights, tensors missing or of another shape.
    """
    local, family, where = local_folder(folder, FIELD), family_of(shape.model_type), f"{FIELD}: {folder!r}"
    stored = stored_tensors(local, FIELD, allow_pickle) if local else {}
    if stored:
        check_layers(stored, shape.num_hidden_layers, family, where)
        with torch.device("meta"):
            model = family.empty_model(shape)
        return check_whole(difference(stored, model, family), model, family, where)
    return None


def _from_pretrained(folder: str, allow_pickle: bool, auto_class: str = "AutoModelForMaskedLM", **options):
    """Weights out of safetensors; a pickle could run anything while it is read. Code beside weights is never run."""
    options |= {"trust_remote_code": False, "weights_only": True, "use_safetensors": None if allow_pickle else True}
    # A bar and a report per rank and model would bury the training's own; `has_lm_head` reads what matters.
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        return getattr(transformers, auto_class).from_pretrained(folder, **options)
    except Exception as error:  # safetensors, torch, the hub client and its transport raise types of their own
        if not allow_pickle and _has_only_pickles(folder):
            raise UserError(
                f"teacher.name: {folder!r} has pickled weights only (.bin), which can run code when they are read; "
                f"give one with model.safetensors, or teacher.allow_pickle=true to read them with torch's weights_only"
            ) from None
        raise UserError(
            f"teacher.name: cannot load weights from {folder!r} ({first_line(error)}); give a folder with config.json "
            f"and model.safetensors of the same model, or a hub name"
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def _has_only_pickles(folder: str) -> bool:
    """Whether a folder (or, if it is reachable, a hub repository) has .bin weights but no safetensors."""
    if Path(folder).is_dir():
        names = [path.name for path in Path(folder).iterdir()]
    else:
        try:
            names = list_repo_files(folder)
        except Exception:  # the hub client and its transport raise types of their own; the first error is the better
            return False
    return not any(name.endswith(".safetensors") for name in names) and any(map(_PICKLED_WEIGHTS.fullmatch, names))


def load_config(folder: str):
    """Its configuration. Raises `UserError` when there is none, or one that no run could start from."""
    shape = read_config(folder, FIELD)
    family_of(shape.model_type)
    return shape


def load_tokenizer(folder: str, teacher_config, task: str | None = None) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer.

    Args:
        teacher_config: the teacher's Hugging Face configuration.
        task: name of the task; None: that of the teacher's family.

    Raises:
        UserError: it is missing, damaged or of another kind, does not fit the embeddings, lacks a special token that
            the task needs, or knows no words.
    """
    tokenizer, where = read_tokenizer(folder, FIELD), f"{FIELD}: the tokenizer at {folder!r}"
    check_ids(tokenizer, teacher_config.vocab_size, where)
    check_special_tokens(tokenizer, TASKS[task or family_of(teacher_config.model_type).task], where)
    check_words(tokenizer, where)
    return tokenizer
