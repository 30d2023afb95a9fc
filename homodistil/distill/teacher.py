"""The frozen teacher: loaded once, run without gradients in inference precision, its MLM head on wanted rows only."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from huggingface_hub import list_repo_files
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from homodistil.data.masking import Batch
from homodistil.errors import UserError
from homodistil.models import family_of
from homodistil.models.taps import ATTENTION, Tapped, Taps

_PICKLED_WEIGHTS = re.compile(r"pytorch_model.*\.bin")


class TeacherOutput(NamedTuple):
    tapped: Tapped
    logits: Tensor | None
    """(rows, V) on the rows of `wanted_rows`; None when no term needs them."""


class Teacher(nn.Module):
    """Frozen `model` (a Hugging Face masked LM with the tapped attention). `forward` never builds a graph."""

    def __init__(self, model: nn.Module, kl_positions: str = "masked", with_logits: bool = True) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.family = family_of(model.config.model_type)
        self.kl_positions = kl_positions
        self.with_logits = with_logits
        self._taps = Taps(model, self.family)

    def train(self, mode: bool = True) -> Teacher:
        """Never in training mode: its dropout would be noise in every target."""
        return super().train(False)

    def forward(self, batch: Batch) -> TeacherOutput:
        """What the training objective compares with."""
        return self.observe(batch, self.kl_positions, self.with_logits)

    @torch.no_grad()
    def observe(self, batch: Batch, positions: str, with_logits: bool = True) -> TeacherOutput:
        """Taps, and logits on the rows of `positions` ("masked" or "all")."""
        tapped = self._taps.run(batch.input_ids, batch.attention_mask)
        if not with_logits:
            return TeacherOutput(tapped, None)
        rows = wanted_rows(tapped.last, batch, positions)
        return TeacherOutput(tapped, self.family.mlm_head(self.model)(rows))

    def predict(self, batch: Batch) -> Tensor:
        """Logits (M, V) of the masked rows."""
        return self.observe(batch, "masked").logits


def wanted_rows(hidden: Tensor, batch: Batch, positions: str) -> Tensor:
    """Rows of `hidden` (B, T, D) that meet the vocabulary: (M, D) masked rows, or every valid token in order."""
    flat = hidden.flatten(0, 1)
    if positions == "masked":
        return flat.index_select(0, batch.masked_index)
    return flat.index_select(0, batch.attention_mask.flatten().nonzero().squeeze(1))


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
