"""Attention in blocks is exact: what torch's own gives, forwards and backwards."""

import pytest
import torch
from torch.nn import functional as F

from pipeline import attention
from pipeline.dropout import Noise


def inputs(num_positions, num_shared=1, dtype=torch.float64):
    torch.manual_seed(0)
    query = torch.randn(2, 4, num_positions, 8, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(2, 4 // num_shared, num_positions, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    return query, key, value


def packed(num_positions):
    """Three documents in each window."""
    document = torch.arange(num_positions) * 3 // num_positions
    return ((document[:, None] == document) & torch.ones(num_positions, num_positions, dtype=torch.bool).tril())[
        None, None
    ].expand(2, 1, -1, -1)


def gradients(out, tensors):
    torch.manual_seed(1)
    return torch.autograd.grad(out, tensors, torch.randn_like(out))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 16)


@pytest.mark.parametrize("num_positions", [1, 15, 16, 40])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_shared", [1, 2])
def test_it_gives_what_torch_gives(num_positions, masked, num_shared):
    tensors = inputs(num_positions, num_shared)
    mask = packed(num_positions) if masked else None
    found, _ = attention.attend(torch.nn.Module(), *tensors, mask)
    query, key, value = tensors
    key, value = (t.repeat_interleave(num_shared, 1) for t in (key, value))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-12)
    for ours, theirs in zip(gradients(found, tensors), gradients(expected, tensors), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_dropped_weights_are_scaled_up_and_their_gradients_with_them():
    query, key, value = tensors = inputs(40)
    module = torch.nn.Module()
    module.noise = Noise()
    module.noise.begin([5, 6], 1)
    found, _ = attention.attend(module, *tensors, None, dropout=0.25, scaling=0.3)

    again = Noise()
    again.begin([5, 6], 1)
    factors = torch.zeros(2, 4, 40, 40, dtype=torch.float64)
    for start in range(0, 40, 16):
        end = min(start + 16, 40)
        keep, scale = again.keep(torch.empty(2, 4, end - start, end), 0.25)
        factors[:, :, start:end, :end] = keep * scale
    scores = (query @ key.mT * 0.3).masked_fill(torch.ones(40, 40, dtype=torch.bool).triu(1), -torch.inf)
    expected = (scores.softmax(-1) * factors @ value).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-12)
    for ours, theirs in zip(gradients(found, tensors), gradients(expected, tensors), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
