"""The frozen teacher: loaded once, run without gradients in inference precision, its MLM head on wanted rows only."""

from __future__ import annotations

import functools
import json
import pickle
import re
from pathlib import Path
from types import ModuleType

import torch
from huggingface_hub import list_repo_files
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from homodistil.config import TeacherConfig
from homodistil.data.masking import Batch
from homodistil.distill.runtime import OwnStream, Runtime, build_runtime
from homodistil.distill.sharded import shard_layers
from homodistil.distill.targets import Finished, LockStep, Targets, own_lists, wanted_rows
from homodistil.errors import UserError
from homodistil.models import family_of
from homodistil.models.taps import ATTENTION, Tapped, Taps

_PICKLED_WEIGHTS = re.compile(r"pytorch_model.*\.bin")


class Teacher(nn.Module):
    """Frozen `model` (a Hugging Face masked LM with the tapped attention). Nothing here ever builds a graph.

    Args:
        model: frozen and put into evaluation mode here.
        lock_step: run layer by layer beside the student (targets.py) instead of as a whole.
        runtime: how a whole forward pass runs (distill/runtime), never in lock-step; None: as the module is.
        stream: runs whole passes beside whatever the current stream does.
    """

    def __init__(
        self, model: nn.Module, lock_step: bool = True, runtime: Runtime | None = None, stream: OwnStream | None = None
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.family = family_of(model.config.model_type)
        self._taps = Taps(model, self.family) if runtime is None else None
        self._lock_step = lock_step and runtime is None
        self._runtime = runtime or self._taps.run
        self._stream = stream
        self.scale = runtime.scale if runtime else self._taps.scale
        """What the softmax multiplies q.k with."""
        self.shows_attention = runtime is None or runtime.shows_attention
        """Whether its targets have queries and keys."""

    def train(self, mode: bool = True) -> Teacher:
        """Never in training mode: its dropout would be noise in every target."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Targets:
        """What the objective compares with. In lock-step nothing is computed before the student runs."""
        if self._lock_step:
            return LockStep(self.model, self.family, batch, self._taps)
        if self._stream is None:
            tapped = self.run(batch)
            return Finished(self.model, self.family, batch, self.scale, lambda: tapped)
        pending = self._stream.start(batch.input_ids, batch.padding_mask)
        return Finished(self.model, self.family, batch, self.scale, pending.result)

    @torch.no_grad()
    def for_several(self, batch: Batch, num_students: int) -> list[Targets]:
        """What so many students are compared with, out of one whole pass, which is kept until the last has used it."""
        if self._stream is None:
            tapped = self.run(batch)
        else:
            tapped = self._stream.start(batch.input_ids, batch.padding_mask).result()
        return [
            Finished(self.model, self.family, batch, self.scale, functools.partial(own_lists, tapped))
            for _ in range(num_students)
        ]

    @torch.no_grad()
    def run(self, batch: Batch) -> Tapped:
        """A whole forward pass of the backbone."""
        return self._runtime(batch.input_ids, batch.padding_mask)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Logits (M, V) of the masked rows."""
        return self.family.mlm_head(self.model)(wanted_rows(self.run(batch).last, batch, "masked"))


def build_teacher(model: nn.Module, config: TeacherConfig, device: torch.device, dtype: torch.dtype) -> Teacher:
    """`model`, moved to `device` as a whole or (teacher.shard) in this rank's part, in the runtime of `config`.

    Raises:
        UserError: that runtime does not compute what the model does.
    """
    model, family = model.eval().requires_grad_(False), family_of(model.config.model_type)
    if config.shard:
        shard_layers(family.layers(model), dtype)
    model = model.to(device)
    plain = config.runtime == "torch" and not config.own_stream
    runtime = None if plain else build_runtime(model, family, config, device, dtype)
    stream = OwnStream(runtime, device) if config.own_stream else None
    return Teacher(model, config.in_lock_step, runtime, stream)


def load_model(
    folder: str, dtype: torch.dtype = torch.float32, dropout: float | None = None, allow_pickle: bool = False
) -> nn.Module:
    """A masked LM with tapped attention from a folder or hub name.

    Args:
        folder: path or hub name.
        dtype: of the weights.
        dropout: replaces both dropout probabilities of the config (None keeps them).
        allow_pickle: take pickled weights (with weights_only) where there are no safetensors.

    Raises:
        UserError: nothing there, unreadable, pickled, or an architecture without a table of axes.
    """
    config = load_config(folder)
    family_of(config.model_type)
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    return _from_pretrained(folder, allow_pickle, config=config, dtype=dtype, attn_implementation=ATTENTION)


def has_mlm_head(folder: str, allow_pickle: bool = False) -> bool:
    """Whether the checkpoint brings its own MLM head (an encoder alone gets a freshly initialised one)."""
    _, report = _from_pretrained(folder, allow_pickle, output_loading_info=True)
    return not any(name.startswith(("cls.", "lm_head.")) for name in report["missing_keys"])


def _from_pretrained(folder: str, allow_pickle: bool, **options):
    """Weights out of safetensors; a pickle could run anything while it is read. Code beside weights is never run."""
    options |= {"trust_remote_code": False, "weights_only": True, "use_safetensors": None if allow_pickle else True}
    # A bar and a report a rank and model would bury the training's own; `has_mlm_head` reads what matters.
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        return AutoModelForMaskedLM.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        if not allow_pickle and _has_only_pickles(folder):
            raise UserError(
                f"teacher.name: {folder!r} has pickled weights only (.bin), which can run code when they are read; "
                f"give one with model.safetensors, or teacher.allow_pickle=true to read them with torch's weights_only"
            ) from None
        raise UserError(f"teacher.name: cannot load weights from {folder!r} ({_first_line(error)})") from None
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
    """Its configuration. Raises `UserError` when there is none."""
    if folder.startswith((".", "/", "~")) and not Path(folder).expanduser().is_dir():
        raise UserError(f"teacher.name: no folder {folder!r}; give a folder with config.json, a hub name or embedded:…")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"teacher.name: no model at {folder!r} ({_first_line(error)}); "
            f"give a folder with config.json and weights, a reachable hub name, or embedded:bert-tiny"
        ) from None


def load_tokenizer(folder: str, vocab_size: int) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer. Raises `UserError` when it is missing or does not fit the `vocab_size` embeddings."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise UserError(f"teacher.name: no usable tokenizer at {folder!r} ({_first_line(error)})") from None
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"teacher.name: the tokenizer at {folder!r} has {len(tokenizer)} tokens, the model {vocab_size} "
            f"embeddings; use the tokenizer that the model was trained with"
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def head_only_parameters(model: nn.Module, family: ModuleType) -> list[nn.Parameter]:
    """Parameters of the MLM head that nothing else uses (the tied word embeddings are not among them)."""
    shared = {id(p) for p in family.backbone(model).parameters()}
    return [p for p in family.mlm_head(model).parameters() if id(p) not in shared]
