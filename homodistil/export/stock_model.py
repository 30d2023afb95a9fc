"""Student -> stock Hugging Face checkpoint: config, fp32 safetensors, tokenizer, model card. No code of ours to load.

During training the softmax keeps the teacher's 1/sqrt(head_dim); a stock model uses its own. The ratio is folded into
W_Q and b_Q, or the gamma of the queries' norm. So is that of embeddings which a class multiplies with a number of its
width, into these and the final norm. Rotary pairs that are left become another rope_theta. Heads narrower
than hidden_size / heads (a milestone in the middle of pruning) are padded with zeros, which changes nothing but their
size.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from homodistil.distill.student import Student
from homodistil.files import writing
from homodistil.models.axes import AxisTable, AxisUse


def stock_model(weights: dict[str, Tensor], student: Student, teacher_config) -> nn.Module:
    """A stock model (fp32, CPU) that computes what the student computes: without a head, its backbone's class.

    Args:
        weights: full fp32 weights by the student's parameter names (`resize.master_weights`).
        teacher_config: the teacher's configuration; dropout and everything but the widths come from it.

    Raises:
        ValueError: no stock configuration has these widths (`ModelFamily.stock_head_dim`), or the rotary pairs that
            are left (`ModelFamily.set_positions`).
    """
    table, head = student.family.axis_table(student.model), student.family.head_kind(student.model)
    head_dim = student.family.stock_head_dim(table.widths)
    if head_dim is None:
        raise ValueError(f"no stock configuration has the widths {table.widths}")
    config = student.family.student_config(teacher_config, table.widths)
    student.family.set_layer_kinds(config, student.model.config)
    student.family.set_positions(config, student.model, student.origins)
    model = student.family.empty(config, head)
    of_model = {name.removeprefix("model."): w.cpu() for name, w in weights.items() if name.startswith("model.")}
    missing, unexpected = model.load_state_dict(_pad_heads(of_model, table, head_dim), strict=False)
    tied = set(missing) - set(dict(model.named_parameters()))
    if unexpected or set(missing) - tied:
        raise ValueError(f"export: weights do not fit: missing {set(missing) - tied}, unexpected {unexpected}")
    if head == "lm":
        model.tie_weights()
    student.family.fold_softmax_scale(model, student.softmax_scale / student.family.softmax_scale(model))
    student.family.fold_embedding_scale(model, student.model)
    return model.eval() if head != "none" else student.family.backbone(model).eval()


def _pad_heads(weights: dict[str, Tensor], table: AxisTable, head_dim: int) -> dict[str, Tensor]:
    padded = dict(weights)
    for (name, dim), blocks in table.blocks().items():
        if any(head_dim != table.widths[use.axes[1]] for use in blocks if len(use.axes) == 2):
            parts = padded[name].movedim(dim, -1).split([table.size_of(use) for use in blocks], -1)
            parts = [_padded(part, use, table, head_dim) for part, use in zip(parts, blocks, strict=True)]
            padded[name] = torch.cat(parts, -1).movedim(-1, dim).contiguous()
    return padded


def _padded(part: Tensor, use: AxisUse, table: AxisTable, head_dim: int) -> Tensor:
    """A block whose last dimension is heads, each padded to `head_dim`; any other block as it is."""
    if len(use.axes) != 2:
        return part
    heads, dims = (table.widths[axis] for axis in use.axes)
    return functional.pad(part.unflatten(-1, (heads, dims)), (0, head_dim - dims)).flatten(-2)


def save_checkpoint(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    card: str,
    folder: Path,
    add_files: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write a stock checkpoint into `folder`: each file whole, config.json last, other files there left alone.

    Args:
        add_files: writes further files into a folder, which may be in folders of their own.

    Raises:
        UserError: the disk is full, or the folder cannot be written; `folder` is as it was.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(folder):
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            add_files(temporary)
            written = sorted(temporary.rglob("*"), key=lambda path: (path.is_file(), path == temporary / "config.json"))
            folder.mkdir(parents=True, exist_ok=True)
            for path in written:
                place = folder / path.relative_to(temporary)
                if path.is_dir():
                    place.mkdir(exist_ok=True)
                else:
                    os.replace(path, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
