"""What attention puts out on a CPU in bf16 (plain products) against SDPA in float64: values, gradients, padding."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from homodistil.models.attention import attend, keeps_probabilities


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("padded", [False, True])
def test_output_and_gradients(dtype, padded):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 13, 2, 5)  # (B, T, N, H): the library hands over transposed views
    mask = (torch.arange(13) < torch.tensor([13, 7, 1])[:, None])[:, None, None, :].expand(-1, 1, 13, -1)
    mask = mask if padded else None
    inputs = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]
    upstream = torch.randn(shape, generator=generator).to(dtype)
    ours = [tensor.clone().requires_grad_() for tensor in inputs]
    theirs = [tensor.double().requires_grad_() for tensor in inputs]
    found, _ = attend(nn.Module(), *ours, mask, scaling=0.7, dropout=0.0, is_causal=False)
    expected = scaled_dot_product_attention(*theirs, attn_mask=mask, scale=0.7).transpose(1, 2)
    (found * upstream).sum().backward()
    (expected * upstream.double()).sum().backward()
    # bf16: scores, probabilities and sums are each rounded to 8 bits.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, **tolerance)


def test_dropout_is_applied_where_products_are_plain():
    assert keeps_probabilities("cpu", torch.bfloat16) and not keeps_probabilities("cuda", torch.bfloat16)
    q, k = torch.zeros(1, 1, 4, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 64, 2, dtype=torch.bfloat16)
    torch.manual_seed(0)
    found, _ = attend(nn.Module(), q, k, torch.ones_like(k), None, scaling=1.0, dropout=0.5)
    assert found.unique().numel() > 1  # uniform probabilities over ones would give 1 everywhere
