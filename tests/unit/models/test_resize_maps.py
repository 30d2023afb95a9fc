"""Plans with linear maps against sums written out in float64; a selection is the map of zeros and ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.small import random_keep, small_batch, small_model

from homodistil.config.schema import LossConfig
from homodistil.distill.student import Student
from homodistil.models.axes import AxisTable, AxisUse
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.resize_plan import make_plan, slice_module, transform

TABLE = AxisTable(
    {"hidden": 7, "layer.0.ffn": 5, "layer.0.heads": 3, "layer.0.qk_dim": 2},
    (
        AxisUse("inner.weight", 0, ("layer.0.ffn",)),
        AxisUse("inner.weight", 1, ("hidden",)),
        AxisUse("norm.weight", 0, ("hidden",)),
        AxisUse("query.weight", 0, ("layer.0.heads", "layer.0.qk_dim")),
    ),
)
ROTATION = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q


def hidden_maps(matrix: torch.Tensor) -> dict[str, dict[int, torch.Tensor]]:
    return {"inner.weight": {1: matrix}, "norm.weight": {0: matrix.square()}}


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("shape", [(7,), (1, 7), (4, 7), (7, 3, 7)])
def test_transform_is_the_sum_over_old_entries(shape, squared):
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(shape, generator=generator)
    matrix, last = torch.randn(7, 5, generator=generator), len(shape) - 1
    maps = {last: matrix, 0: matrix[: shape[0]]} if shape[0] == 7 and last else {last: matrix}
    expected = tensor.double().numpy()
    for dim, m in maps.items():
        m = m.double().numpy() ** (2 if squared else 1)
        rows = np.moveaxis(expected, dim, -1)
        total = sum(rows[..., i, None] * m[i] for i in range(7))
        expected = np.moveaxis(total, -1, dim)
    found = transform(tensor, {}, maps, squared)
    assert found.dtype == torch.float32 and found.is_contiguous()
    # fp32 roundings of up to 49 products of standard normals
    np.testing.assert_allclose(found.numpy(), expected, atol=3e-5)


def test_index_and_map_of_one_tensor_and_its_precision():
    tensor = torch.arange(35.0, dtype=torch.float64).view(5, 7)
    kept = torch.tensor([0, 3])
    found = transform(tensor, {0: kept}, {1: ROTATION[:, :4].float()})
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, tensor.numpy()[[0, 3]] @ ROTATION[:, :4].float().double().numpy(), rtol=1e-12)
    rounded = transform(tensor.bfloat16(), {0: kept}, {1: ROTATION[:, :4]})  # integers up to 35: exact in bf16
    assert rounded.dtype == torch.bfloat16
    np.testing.assert_allclose(rounded.float(), found, rtol=2**-8)  # contracted in fp32, so rounded once


def test_a_selection_is_a_map_of_zeros_and_ones():
    kept = torch.tensor([1, 2, 6])
    tensor = torch.randn(4, 7, generator=torch.Generator().manual_seed(2))
    assert torch.equal(transform(tensor, {1: kept}, {}), transform(tensor, {}, {1: torch.eye(7)[:, kept]}))
    assert transform(tensor, {}, {}) is tensor


def test_plan_with_maps():
    keep = {"hidden": torch.arange(4), "layer.0.ffn": torch.tensor([0, 2, 4])}
    plan = make_plan(TABLE, keep, hidden_maps(ROTATION[:, :4]))
    assert plan.widths_after == {"hidden": 4, "layer.0.ffn": 3, "layer.0.heads": 3, "layer.0.qk_dim": 2}
    assert plan.index["inner.weight"].keys() == {0} and "norm.weight" not in plan.index
    assert plan.sizes == {"inner.weight": {0: 5, 1: 7}, "norm.weight": {0: 7}}
    leading = plan.as_selection()
    assert leading.maps == {} and leading.sizes == plan.sizes and leading.widths_after == plan.widths_after
    assert leading.index["inner.weight"][1].tolist() == leading.index["norm.weight"][0].tolist() == [0, 1, 2, 3]
    rotated = make_plan(TABLE, {}, hidden_maps(ROTATION)).as_selection()
    assert rotated.index == {} and rotated.widths_after == TABLE.widths


def test_the_hash_covers_the_maps():
    keep = {"hidden": torch.arange(4)}
    other = ROTATION[:, :4].clone()
    other[3, 2] = torch.nextafter(other[3, 2], torch.tensor(9.0, dtype=torch.float64))
    plans = [make_plan(TABLE, keep), *(make_plan(TABLE, keep, hidden_maps(m)) for m in (ROTATION[:, :4], other))]
    assert len({plan.hash for plan in plans}) == 3
    assert make_plan(TABLE, keep, hidden_maps(ROTATION[:, :4].clone())).hash == plans[1].hash


@pytest.mark.parametrize(
    ("maps", "text"),
    [
        (hidden_maps(ROTATION[:, :5]), r"shape \(7, 5\), expected \(7, 4\)"),
        ({"inner.weight": {1: ROTATION[:, :4]}}, "norm.weight dim 0: .* in some of its uses only"),
        (hidden_maps(ROTATION[:, :4]) | {"other.weight": {0: ROTATION}}, "other.weight dim 0, which .* lacks"),
    ],
)
def test_wrong_maps_are_refused(maps, text):
    with pytest.raises(ValueError, match=text):
        make_plan(TABLE, {"hidden": torch.arange(4)}, maps)


def test_slice_module_with_maps_computes_in_the_rotated_basis():
    """Rotating Q and K of every head by any M and its inverse transposed leaves the scores, and so the model, alone."""
    student = Student(small_model(), LossConfig(kl=1.0), distil=False).double().eval()
    batch = small_batch()
    before = student.predict(batch)
    table, maps = student.axis_table(), {}
    for layer in range(3):
        generator = torch.Generator().manual_seed(layer)
        blocks = [torch.eye(6) + 0.3 * torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(4)]
        for part, each in (("query", blocks), ("key", [torch.linalg.inv(block).T for block in blocks])):
            for kind in ("weight", "bias"):
                name = f"model.bert.encoder.layer.{layer}.attention.self.{part}.{kind}"
                maps[name] = {0: torch.block_diag(*each)}
    slice_module(student, make_plan(table, {}, maps))
    torch.testing.assert_close(student.predict(batch), before, rtol=0, atol=1e-10)  # float64


def test_slice_module_refuses_a_plan_for_other_widths():
    model = small_model()
    plan = make_plan(bert.axis_table(model), random_keep(bert.axis_table(model), {"hidden": 9}))
    slice_module(model, plan)
    with pytest.raises(ValueError, match="should be 24"):
        slice_module(model, plan)
