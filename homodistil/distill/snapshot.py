"""Plain copies of a student that an engine holds: for trying a cut, and for gradients that no engine is to see."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from homodistil.distill.student import Student


def duplicate(student: Student) -> Student:
    """A student of its own, hooks included. Not of one that an engine holds."""
    return copy.deepcopy(student, {id(student.family): student.family})  # a Python module cannot be copied


class StudentSnapshots:
    """Makes plain copies of a student that an engine holds.

    Args:
        student: before an engine takes it: hooks and partitioned parameters of an engine cannot be copied.
    """

    def __init__(self, student: Student) -> None:
        self._student = student
        self._mould = duplicate(student)
        for parameter in self._mould.parameters():
            parameter.data = torch.empty(0)  # the shapes will be others anyway

    def make(self, weights: dict[str, Tensor], dtype: torch.dtype) -> Student:
        """The current student with these values.

        Args:
            weights: by the student's parameter names, full, at the current widths (`resize.master_weights`).
            dtype: of the copy.
        """
        made = duplicate(self._mould)
        if len(self._student.layers) < len(made.layers):
            made.keep_layers([made.layers.index(layer) for layer in self._student.layers])
        for name, parameter in made.named_parameters():
            parameter.data = weights[name].to(dtype)
        made.origins = dict(self._student.origins)
        made.after_resize({})  # nothing goes: the modules learn the current sizes
        return made
