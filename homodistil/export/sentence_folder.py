"""The files that make a stock checkpoint a folder of sentence-transformers: its modules behind the Transformer.

2_Dense      W, where the student has one: its vectors are then in the teacher's space
3_Dense ...  the teacher's own Dense layers, of vectors in its space
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from homodistil.models.sentence_head import WEIGHTS_FILE, SentenceHead
from homodistil.models.sentence_modules import LENGTH_FILE, MODULES_FILE, PROMPTS_FILE, Dense

# Names that every version of sentence-transformers knows.
_CLASSES = "sentence_transformers.models"
_ACTIVATIONS = {"Identity": "torch.nn.modules.linear.Identity"}
_POOLING = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}


def write_sentence_folder(
    folder: Path, head: SentenceHead, hidden_size: int, projection: Tensor | None, shares_space: bool
) -> None:
    """Write the files into `folder`, which has the Transformer's.

    Args:
        head: the teacher's, on any device.
        hidden_size: of the exported model.
        projection: the student's W, (teacher's hidden size, hidden_size); None: it has none.
        shares_space: whether its vectors, behind W, are in the teacher's space.
    """
    modules = head.modules_read
    layers = [] if projection is None else [(_of_projection(projection), {"linear.weight": projection})]
    if shares_space:
        layers += [(dense, layer.state_dict()) for dense, layer in zip(modules.dense, head.dense, strict=True)]
    entries = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _write(folder / "1_Pooling" / "config.json", _pooling_config(modules.pooling, hidden_size))
    for dense, weights in layers:
        name = f"{len(entries)}_Dense"
        _write(folder / name / "config.json", _dense_config(dense))
        tensors = {key: tensor.detach().float().cpu().contiguous() for key, tensor in weights.items()}
        save_file(tensors, folder / name / WEIGHTS_FILE, {"format": "pt"})
        entries.append((name, "Dense"))
    if modules.normalises:
        name = f"{len(entries)}_Normalize"
        (folder / name).mkdir()
        entries.append((name, "Normalize"))
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"{_CLASSES}.{kind}"} for i, (path, kind) in enumerate(entries)
    ]
    length = {} if modules.max_seq_length is None else {"max_seq_length": modules.max_seq_length}
    _write(folder / LENGTH_FILE, {**length, "do_lower_case": False})
    versions = {"transformers": transformers.__version__, "pytorch": torch.__version__}
    prompts = {"prompts": dict(modules.prompts), "default_prompt_name": modules.default_prompt_name}
    _write(folder / PROMPTS_FILE, {"__version__": versions, **prompts, "similarity_fn_name": "cosine"})
    _write(folder / MODULES_FILE, listed)


def _of_projection(projection: Tensor) -> Dense:
    out_features, in_features = projection.shape
    return Dense("", in_features, out_features, has_bias=False, activation="Identity")


def _pooling_config(pooling: str, hidden_size: int) -> dict[str, object]:
    return {"word_embedding_dimension": hidden_size} | {name: mode == pooling for mode, name in _POOLING.items()}


def _dense_config(dense: Dense) -> dict[str, object]:
    activation = _ACTIVATIONS.get(dense.activation, f"torch.nn.modules.activation.{dense.activation}")
    sizes = {"in_features": dense.in_features, "out_features": dense.out_features, "bias": dense.has_bias}
    residual = {"use_residual": True} if dense.use_residual else {}  # versions before 5.7 do not know the key
    return {**sizes, "activation_function": activation, **residual}


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
