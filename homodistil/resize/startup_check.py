"""A check at start: a resize of the live engine that keeps all elements must not change a single bit.

It uses the same compaction, exchange and rebuilding as a real event. A version of DeepSpeed with a layout that
`resize/` does not know is thus detected before the first step, not after the first event.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from homodistil.models.resize_plan import ResizePlan
from homodistil.resize.adapters.adapter import Adapter

NOTHING = ResizePlan(keep={}, index={}, sizes={}, widths_before={}, widths_after={}, hash="")
PROBE = "homodistil_probe"
CHUNK_NUMEL = 1 << 20

Digest = tuple[tuple[int, ...], str, int]
"""Shape, dtype, and a position-dependent checksum of the bits."""


def try_resize(adapter: Adapter) -> None:
    """Resize to the same widths, and compare. Collective. Raises ValueError that names what changed on this rank."""
    with _probed(adapter):
        before, objects = _digests(adapter), _objects(adapter)
        adapter.resize(NOTHING)
        after = _digests(adapter)
        changed = [what for what in before if after.get(what) != before[what]]
        if changed or after.keys() != before.keys():
            differing = ", ".join(changed) or ", ".join(sorted(before.keys() ^ after.keys()))
            raise ValueError(f"a resize that keeps everything changed {differing}")
        if _objects(adapter) != objects:
            raise ValueError("a resize that keeps everything replaced an object that the optimizer or engine refers to")
    adapter.check_layout()


@contextmanager
def _probed(adapter: Adapter) -> Iterator[None]:
    """Give every group an optimizer state with distinct values: before the first step there is none to move."""
    state = adapter.torch_optimizer().state
    lent = [group.master for group in adapter.groups()]
    was_empty = [not state.get(master) for master in lent]
    for master in lent:
        state[master][PROBE] = torch.arange(master.numel(), dtype=torch.float32, device=master.device).view_as(master)
    for stretch in adapter.padding():
        stretch.zero_()
    try:
        yield
    finally:
        for master, empty in zip(lent, was_empty, strict=True):
            del state[master][PROBE]
            if empty:
                del state[master]  # torch creates the moments only if there is no state
        adapter.rebuild_maps()  # DeepSpeed's own references to the states, without the probe


def _digests(adapter: Adapter) -> dict[str, Digest]:
    """Checksums of master weights and optimizer states; `check_layout` compares the model with the masters."""
    digests = {}
    for i, group in enumerate(adapter.groups()):
        digests[f"master of group {i}"] = digest(group.master.detach())
        digests |= {f"{key} of group {i}": digest(value) for key, value in group.per_element().items()}
    return digests


def digest(tensor: Tensor) -> Digest:
    """A checksum that depends on every bit and its position, computed on the device of `tensor`."""
    bits = tensor.contiguous().view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    # Odd factors are invertible modulo 2^32, so one changed bit always changes the product.
    odd = torch.arange(min(CHUNK_NUMEL, bits.numel()), dtype=torch.int32, device=bits.device).mul_(2).add_(1)
    total = 0
    for chunk in bits.split(CHUNK_NUMEL):
        products = chunk.to(torch.int32) * odd[: chunk.numel()]
        total = (total * 31 + int(products.sum(dtype=torch.int64))) % (1 << 62)
    return tuple(tensor.shape), str(tensor.dtype), total


def _objects(adapter: Adapter) -> list[int]:
    optimizer, engine = adapter.torch_optimizer(), adapter.engine
    kept = [engine.optimizer, optimizer, engine.lr_scheduler, engine.module, *adapter.parameters.values()]
    kept += [param for group in optimizer.param_groups for param in group["params"]]
    return [id(thing) for thing in [*kept, *optimizer.state.keys()]]
