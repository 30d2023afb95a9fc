"""What sentence-transformers does with the hidden states of a model, read from its folder: pooling, Dense, Normalize.

    modules = read_sentence_modules("sentence-transformers/all-MiniLM-L6-v2", "auto", "teacher.name")
    modules.pooling, modules.normalises                           # "mean", True

`modules.json` lists the modules in order, each with its class and its folder. Classes have moved between versions of
sentence-transformers, so the last part of their dotted names counts. A model without that file is read as
sentence-transformers itself reads it, mean pooling, and its vectors are normalised.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers.utils import cached_file

from homodistil.errors import UserError
from homodistil.models.checkpoint_files import local_folder, read_json, read_json_list, short

MODULES_FILE, PROMPTS_FILE, LENGTH_FILE = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)
CROSS_ENCODER = "CrossEncoder"
"""`model_type` of a cross-encoder in PROMPTS_FILE."""
PoolingMode = Literal["mean", "cls", "last"]
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
"""Classes of torch.nn that a Dense may end with."""

# As sentence-transformers 6 calls them in `pooling_mode`, and as the booleans of earlier versions do.
_POOLING = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_BEFORE, _BOOLEANS = "pooling_mode_", {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "lasttoken"}


class Dense(NamedTuple):
    """A linear map of a pooled vector, then an activation; with `use_residual`, the vector is added to that."""

    folder: str
    """With the weights, relative to the model's."""
    in_features: int
    out_features: int
    has_bias: bool
    activation: str
    """One of `ACTIVATIONS`."""
    use_residual: bool = False


@dataclass(frozen=True)
class SentenceModules:
    """The modules behind the Transformer, and what an input is given beside its text."""

    pooling: PoolingMode = "mean"
    normalises: bool = True
    dense: tuple[Dense, ...] = ()
    max_seq_length: int | None = None
    """Tokens after which sentence-transformers truncates a text; None: the tokenizer says so."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    """Name -> text that is put before an input."""
    default_prompt_name: str | None = None
    root: str = ""
    """Folder or hub name that all this was read from."""

    def prompt(self, wanted: str) -> str:
        """The text that `wanted` stands for: a name among the prompts, or itself; "auto": the default prompt's."""
        if wanted == "auto":
            return self.prompts.get(self.default_prompt_name, "")
        return self.prompts.get(wanted, wanted)


def sentence_root(name: str) -> str | None:
    """The folder or hub name with the `modules.json` of the embedder at `name`; None: it has none.

    That of a local Transformer in a subfolder is its parent's. A hub that cannot be asked has none, and neither has a
    cross-encoder, which newer versions save with a `modules.json` as well.
    """
    root = _modules_root(name)
    return None if root is None or _is_cross_encoder(root) else root


def _modules_root(name: str) -> str | None:
    path = Path(name).expanduser()
    if not path.is_dir():
        return name if sentence_file(name, MODULES_FILE) else None
    if (path / MODULES_FILE).is_file():
        return str(path)
    parent = path.absolute().parent
    if not (parent / MODULES_FILE).is_file():
        return None
    first = _entries(str(parent), MODULES_FILE)[0]
    return str(parent) if first.get("path") == path.name else None


def _is_cross_encoder(root: str) -> bool:
    settings = sentence_file(root, PROMPTS_FILE)
    with contextlib.suppress(UserError):  # who reads the whole of it says what is wrong
        return settings is not None and read_json(settings, PROMPTS_FILE).get("model_type") == CROSS_ENCODER
    return False


def transformer_folder(folder: Path, where: str) -> Path:
    """The folder of the Transformer of a local model: `folder` itself, unless its `modules.json` names a subfolder.

    Args:
        where: the option that named it, for messages.

    Raises:
        UserError: a damaged `modules.json`, or one that begins with another module.
    """
    if (folder / "config.json").is_file() or not (folder / MODULES_FILE).is_file():
        return folder
    return folder / transformer_path(folder, where)


def transformer_path(folder: Path, where: str) -> str:
    """Where the Transformer lies below a local folder, by its `modules.json`; "": in the folder itself.

    Raises:
        UserError: as `transformer_folder`, or the Transformer lies outside of the folder.
    """
    if not (folder / MODULES_FILE).is_file():
        return ""
    where = f"{where}: {folder / MODULES_FILE}"
    path = str(_transformer(_entries(str(folder), where), where).get("path", ""))
    if not (folder / path).resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{where} has the path {path[:100]!r}, which is not in its folder; correct it")
    return path


def read_sentence_modules(name: str, pooling: str, where: str) -> SentenceModules:
    """The modules of a model.

    Args:
        name: folder (of the model, or of its Transformer) or hub name.
        pooling: "auto": as the model's own; otherwise instead of it (`PoolingMode`).
        where: the option that `name` was given with, for messages.

    Raises:
        UserError: a module, pooling or setting that is not supported, or a damaged file.
    """
    root = sentence_root(name)
    modules = SentenceModules(root=name) if root is None else _read(root, where, pooling == "auto")
    return modules if pooling == "auto" else SentenceModules(**{**vars(modules), "pooling": pooling})


def _read(root: str, where: str, reads_pooling: bool) -> SentenceModules:
    entries, where = _entries(root, where), f"{where}: {MODULES_FILE} of {short(root)!r}"
    transformer = _transformer(entries, where)
    if transformer.get("path") and not os.path.isdir(root):
        raise UserError(f"{where} has its Transformer in a subfolder; download the model and give its folder")
    pooling, dense, normalises = None, [], False
    for entry in entries[1:]:
        kind, folder = _kind(entry), str(entry.get("path", ""))
        if kind == "Pooling" and pooling is None:
            pooling = _pooling(_object(root, folder, "config.json", where), where, reads_pooling)
        elif kind == "Dense" and pooling and not normalises:
            dense.append(_dense(_object(root, folder, "config.json", where), folder, where))
        elif kind == "Normalize" and pooling:
            normalises = True
        else:
            raise UserError(
                f"{where}: found module {short(kind)!r} as number {entries.index(entry)}, supported are Transformer, "
                f"Pooling, any number of Dense, and Normalize, in this order; give a model of these"
            )
    if pooling is None:
        raise UserError(f"{where} has no Pooling, so its vectors are not of texts; give a SentenceTransformer's folder")
    of_text = _object(root, "", PROMPTS_FILE, where) if sentence_file(root, PROMPTS_FILE) else {}
    return SentenceModules(
        pooling,
        normalises,
        tuple(dense),
        _max_length(root, str(transformer.get("path", "")), where),
        {name: text for name, text in (of_text.get("prompts") or {}).items() if isinstance(text, str)},
        of_text.get("default_prompt_name"),
        root,
    )


def _transformer(entries: list[dict[str, Any]], where: str) -> dict[str, Any]:
    if _kind(entries[0]) != "Transformer":
        raise UserError(
            f"{where}: found module {short(_kind(entries[0]))!r} first, supported is Transformer; give a model whose "
            f"vectors are pooled from a Transformer's hidden states"
        )
    return entries[0]


def _pooling(config: dict[str, Any], where: str, is_read: bool) -> str:
    if not config.get("include_prompt", True):
        raise UserError(
            f"{where}: found Pooling with include_prompt false, supported is true: prompts are part of what is pooled; "
            f"give a model that pools them"
        )
    true = [key.removeprefix(_BEFORE) for key, value in config.items() if key.startswith(_BEFORE) and value is True]
    modes = config.get("pooling_mode") or [_BOOLEANS.get(name, name) for name in true] or "mean"
    modes = [modes] if isinstance(modes, str) else list(modes)
    pooling = _POOLING.get(modes[0]) if len(modes) == 1 else None
    if pooling is None and is_read:
        raise UserError(
            f"{where}: found pooling {short(', '.join(map(str, modes)))}, supported are mean, cls and lasttoken, one "
            f"at a time; set data.pooling to mean, cls or last to train for that instead"
        )
    return pooling or "mean"


def _dense(config: dict[str, Any], folder: str, where: str) -> Dense:
    activation = str(config.get("activation_function", "torch.nn.Tanh")).rpartition(".")[2]
    sizes = [config.get(name) for name in ("in_features", "out_features")]
    names = [config.get(name) or "sentence_embedding" for name in ("module_input_name", "module_output_name")]
    residual = bool(config.get("use_residual", False))
    if activation not in ACTIVATIONS or set(names) != {"sentence_embedding"} or not all(map(_is_size, sizes)):
        raise UserError(
            f"{where}: found Dense from {names[0]} to {names[1]} of sizes {sizes} with {short(activation)!r}, "
            f"supported are whole sizes, activations {', '.join(ACTIVATIONS)}, and sentence_embedding in and "
            f"out; give such a model"
        )
    if residual and sizes[0] != sizes[1]:
        raise UserError(
            f"{where}: found Dense with use_residual between unequal sizes {sizes}, supported are equal ones"
        )
    return Dense(folder, *sizes, bool(config.get("bias", True)), activation, residual)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _max_length(root: str, folder: str, where: str) -> int | None:
    path = os.path.join(folder, LENGTH_FILE)
    config = _object(root, folder, LENGTH_FILE, where) if sentence_file(root, path) else {}
    if config.get("do_lower_case"):
        raise UserError(
            f"{where}: found do_lower_case true in {LENGTH_FILE}, supported is false: the tokenizer must do that; give "
            f"a model whose tokenizer does"
        )
    return config.get("max_seq_length")


def _kind(entry: dict[str, Any]) -> str:
    return str(entry.get("type", "")).rpartition(".")[2]


def _entries(root: str, where: str) -> list[dict[str, Any]]:
    entries = read_json_list(sentence_file(root, MODULES_FILE), where)
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{where}: {MODULES_FILE} of {short(root)!r} lists no modules; give the model's own file")
    return entries


def _object(root: str, folder: str, name: str, where: str) -> dict[str, Any]:
    path = sentence_file(root, os.path.join(folder, name))
    if path is None:
        raise UserError(f"{where}: {os.path.join(folder, name)} is not there; give the model's own folder, whole")
    return read_json(path, where)


def sentence_file(root: str, path: str) -> Path | None:
    """A file of a model, by its path in the folder or hub repository; None: it is not there, or the hub is not."""
    folder = local_folder(root, "teacher.name")
    if folder is not None:
        return folder / path if (folder / path).is_file() else None
    try:
        path_in_cache = cached_file(root, path, _raise_exceptions_for_missing_entries=False)
    except OSError:  # no such repository, or no connection and not cached
        return None
    return Path(path_in_cache) if path_in_cache else None
