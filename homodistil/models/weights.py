"""The tensors in a checkpoint's files against those that its config asks for, from the files' headers alone.

    stored = stored_tensors(folder, "teacher.name")                   # name -> type and shape; milliseconds
    has_head = check_whole(difference(stored, model), model, ...)      # `model`: on the meta device
    check_finite(loaded, ...)                                          # the values, once they are in memory

Weights that are missing would be drawn at random by the library, silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from homodistil.errors import UserError
from homodistil.models.checkpoint_files import first_line, read_json
from homodistil.models.family import ModelFamily

SAFETENSORS, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
_FLOATS = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
_BUFFERS = ("_ids", "_tracked", ".attn.bias", ".attn.masked_bias")
"""Ends of names that older checkpoints kept: positions, token types and causal masks, which are not trained."""
_NAMED = 3


class Stored(NamedTuple):
    """A tensor in a file."""

    dtype: str
    shape: tuple[int, ...]


class Difference(NamedTuple):
    """What is wrong with a checkpoint, by the current names of the tensors."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    """(name, shape in the file, shape by the config)."""


def has_weights(folder: Path) -> bool:
    """Whether there is any file of weights, safe or not."""
    return any(folder.glob("*.safetensors")) or (folder / INDEX).exists() or any(folder.glob("*.bin"))


def stored_tensors(folder: Path, field: str, allow_pickle: bool = False) -> dict[str, Stored]:
    """Every tensor of the checkpoint in `folder`; empty where only reading the weights themselves can tell.

    Raises:
        UserError: a file is missing, cut short or damaged, or a tensor is no floating-point number.
    """
    if (folder / SAFETENSORS).exists():
        stored = _header(folder / SAFETENSORS, field)
    elif (folder / INDEX).exists():
        stored = _shards(folder / INDEX, field)
    elif allow_pickle and (folder / PICKLED).is_file():
        stored = _pickled(folder / PICKLED)
    else:
        return {}
    _check_types(stored, folder, field)
    return stored


def _header(path: Path, field: str) -> dict[str, Stored]:
    how = "copy or download the file again"
    if not path.is_file():
        actual = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "is not there"
        raise UserError(f"{field}: {path} {actual}; {how}")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            return {name: Stored(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except Exception as error:  # SafetensorError, OSError, and what its reader of headers raises
        raise UserError(
            f"{field}: {path} is no readable safetensors file ({path.stat().st_size} bytes: {first_line(error)}); {how}"
        ) from None


def _shards(index: Path, field: str) -> dict[str, Stored]:
    files = read_json(index, field).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{field}: {index} has no weight_map of tensor names to files; give the checkpoint's own file")
    stored: dict[str, Stored] = {}
    for file in sorted(set(files.values())):
        stored |= _header(index.with_name(file), field)
    if absent := sorted(files.keys() - stored.keys()):
        raise UserError(
            f"{field}: {index} names {some(absent)}, which are in none of its files; give index and files of the same "
            f"checkpoint"
        )
    return stored


def _pickled(path: Path) -> dict[str, Stored]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
        return {name: Stored(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
    except Exception:  # the library reads it next, and says what is wrong
        return {}


def _check_types(stored: Mapping[str, Stored], folder: Path, field: str) -> None:
    unusable = {n: t for n, t in stored.items() if t.dtype not in _FLOATS and not n.endswith(_BUFFERS)}
    if unusable:
        types = ", ".join(sorted({tensor.dtype for tensor in unusable.values()}))
        raise UserError(
            f"{field}: weights in {folder} are quantised or whole numbers ({types}: {some(unusable)}), allowed are "
            f"float32, float16, bfloat16 and float64; give the checkpoint before it was quantised"
        )


def difference(stored: Mapping[str, Stored], model: nn.Module, family: ModelFamily) -> Difference:
    """`stored` against the parameters of `model` (of any device; only names and shapes count)."""
    by_name = {family.tensor_name(name): tensor for name, tensor in stored.items()}
    names_of: dict[int, list[str]] = {}  # tied parameters have several
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        names_of.setdefault(id(parameter), []).append(name)
    missing = [names[0] for names in names_of.values() if not any(name in by_name for name in names)]
    mismatched = [
        (name, tensor.shape, tuple(parameters[name].shape))
        for name, tensor in by_name.items()
        if name in parameters and tensor.shape != tuple(parameters[name].shape)
    ]
    unexpected = [name for name in by_name if name not in parameters and not family.is_unused(name)]
    return Difference(missing, sorted(unexpected), mismatched)


def check_layers(stored: Mapping[str, Stored], num_layers: int, family: ModelFamily, where: str) -> None:
    """Refuse a config with more layers than the files have: to be called before a model of it is built."""
    there = family.num_stored_layers(stored)
    if stored and not there:
        raise UserError(
            f"{where}: the weights have no layer of a {family.name}, which config.json says they are (found "
            f"{some(stored)}); give config.json and weights of the same model"
        )
    if stored and num_layers > there:
        raise UserError(
            f"{where}: config.json says num_hidden_layers {num_layers}, the weights have {there} layers; give the "
            f"config.json of these weights, or the missing files"
        )


def check_whole(compared: Difference, model: nn.Module, family: ModelFamily, where: str) -> bool:
    """Whether the checkpoint brings an MLM head. Everything else has to be there.

    A head that is there in part is refused too: nobody can tell whether it is damaged or was never trained.

    Raises:
        UserError: tensors are missing, or of another shape.
    """
    head_missing = [name for name in compared.missing if family.is_head(name)]
    check_present(compared._replace(missing=[name for name in compared.missing if not family.is_head(name)]), where)
    # A tied decoder may go by its name in the head (XLM-R's class makes its head first).
    in_backbone = {id(parameter) for parameter in family.backbone(model).parameters()}
    num_in_head = sum(family.is_head(name) and id(p) not in in_backbone for name, p in model.named_parameters())
    if 0 < len(head_missing) < num_in_head:
        raise UserError(
            f"{where}: the weights have a part of the MLM head and lack {len(head_missing)} of its tensors "
            f"({some(head_missing)}); give the whole checkpoint, or one without any of the head"
        )
    return not head_missing


def check_present(compared: Difference, where: str) -> None:
    """Raise `UserError` where any tensor is missing or of another shape."""
    if compared.mismatched:
        name, in_file, by_config = compared.mismatched[0]
        more = f" (and {len(compared.mismatched) - 1} more)" if len(compared.mismatched) > 1 else ""
        raise UserError(
            f"{where}: {name} is {_sizes(in_file)} in the weights, {_sizes(by_config)} by config.json{more}; give the "
            f"config.json of these weights"
        )
    if compared.missing:
        count = f"{len(compared.missing)} tensor{'s' if len(compared.missing) > 1 else ''}"
        raise UserError(
            f"{where}: the weights lack {count} that config.json asks for ({some(compared.missing)}), which would stay "
            f"random; give the whole checkpoint, or the config.json of these weights"
        )


@torch.no_grad()
def check_finite(model: nn.Module, where: str) -> None:
    """Raise `UserError` that names the first parameter with NaN or infinite values."""
    for name, parameter in model.named_parameters():
        if parameter.numel() and not all(torch.isfinite(end) for end in torch.aminmax(parameter)):
            count = int((~torch.isfinite(parameter)).sum())
            raise UserError(
                f"{where}: {name} holds {count} NaN or infinite values of {parameter.numel()}; copy or download the "
                f"weights again, or give a checkpoint from before training diverged"
            )


def tell_unused(folder: str, compared: Difference, say: Callable[[str], None]) -> None:
    """Tell of tensors of a teacher that the model does not use."""
    names = compared.unexpected
    if names:
        say(f"teacher: tensors of {folder} that its config does not use ({len(names)}): {some(names)}")


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(name[:100] for name in names[:_NAMED]) + more


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a number"
