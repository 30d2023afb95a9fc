"""Takes whole parameters, those of layers that leave, out of a live DeepSpeed engine.

    cost = remove_parameters(engine, names, lambda: student.keep_layers(kept))     # right after engine.step()

Their weights, master weights, gradients and moments leave ZeRO's partitions, and all of DeepSpeed's lists, tables and
hooks forget them. Everything that stays keeps its value and its order, bit by bit; partitions are made equal again by
the same moves as in a resize (flat.py). Parameters that stay may get other names, because layers are renumbered:
DeepSpeed's own table of names follows.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Set

import torch

from homodistil.distributed.fault_injection import fault_point
from homodistil.errors import UserError
from homodistil.models.parameter_shape import full_shape
from homodistil.resize.boundary import ResizeCost, check_agreement, check_boundary, synchronize
from homodistil.resize.support import adapter_of
from homodistil.resize.verify import verify_resize


@torch.no_grad()
def remove_parameters(engine, names: Set[str], detach: Callable[[], None]) -> ResizeCost:
    """Remove the parameters `names` from the engine, its optimizer and their state, in place. Every rank calls it.

    Call it only when `resize` would be allowed.

    Args:
        engine: a DeepSpeed engine that has passed `check_supported` and `check_removable`.
        names: of parameters of the module, the same on every rank.
        detach: takes exactly these parameters out of the module, once they are empty.

    Raises:
        ValueError: a name is unknown; nothing has changed.
        RuntimeError: accumulated gradients have not been applied yet, ranks name other parameters (nothing has
            changed), or `detach` took other parameters out.
        CheckFailed: the state afterwards does not match the module (verify.py).
    """
    adapter = adapter_of(engine)
    check_boundary(adapter)
    if unknown := names - adapter.parameters.keys():
        raise ValueError(f"removal names {min(unknown)!r}, which the model lacks")
    device = next(engine.module.parameters()).device
    check_agreement(hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest(), device)
    staying = {p: full_shape(p) for name, p in adapter.parameters.items() if name not in names}
    fault_point("resize.before")
    synchronize(device)
    start = time.perf_counter()
    bytes_moved = adapter.remove({adapter.parameters[name] for name in names})
    detach()
    fault_point("resize.moved")
    _rename(engine, staying.keys())
    renamed = adapter_of(engine)
    verify_resize(renamed, {renamed.name_of[param]: shape for param, shape in staying.items()})
    synchronize(device)
    return ResizeCost((time.perf_counter() - start) * 1e3, bytes_moved)


def _rename(engine, staying: Set[torch.nn.Parameter]) -> None:
    """DeepSpeed's names of parameters, which its optimizer shares, as they are now."""
    now = {param: name for name, param in engine.module.named_parameters()}
    if now.keys() != staying:
        raise RuntimeError(
            f"removal: the module has {len(now)} parameters afterwards, {len(staying)} of them were to stay; they "
            f"must be the same"
        )
    engine.param_names.clear()
    engine.param_names.update(now)


def check_removable(engine, names: Iterable[str]) -> None:
    """Raise `UserError` where a group of the optimizer would be left without any parameter by removing `names`."""
    emptied = adapter_of(engine).emptied_groups(frozenset(names))
    if emptied:
        raise UserError(
            f"ds_config zero_optimization.sub_group_size: group {emptied[0]} holds parameters of layers alone, which "
            f"may all leave (pruning.depth_schedule=linear); raise it until embeddings or the first layer are in every "
            f"group, or set pruning.depth_schedule=one_shot"
        )
