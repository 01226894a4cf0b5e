"""Dropout: masks that depend on (seed, step, window, site) alone, and keep the expectation."""

import numpy as np
import pytest
import torch

from pipeline.dropout import RANGE, Dropout, Noise


def mask(windows, *key, sites=0, probability=0.5, length=64, dtype=torch.float32):
    noise = Noise()
    noise.begin(windows, *key)
    for _ in range(sites + 1):
        keep, _ = noise.keep(torch.empty(len(windows), length, dtype=dtype), probability)
    return keep


def test_a_mask_is_a_function_of_its_key():
    assert torch.equal(mask([3, 8], 1, 2), mask([3, 8], 1, 2))


@pytest.mark.parametrize("other", [([3], 1, 9), ([3], 9, 2), ([9], 1, 2)])
def test_another_seed_step_or_window_has_another_mask(other):
    assert not torch.equal(mask([3], 1, 2), mask(other[0], *other[1:]))


def test_another_site_has_another_mask():
    assert not torch.equal(mask([3], 1, 2), mask([3], 1, 2, sites=1))


def test_a_window_has_its_mask_in_any_company():
    together = mask([3, 8, 5], 1, 2)
    assert torch.equal(together[1:2], mask([8], 1, 2))


def test_the_masks_of_both_types_drop_the_same_and_are_the_generator_s_16_bit_numbers():
    keep, numbers = mask([3], 1, 2, length=63), mask([3], 1, 2, length=63, dtype=torch.bfloat16)
    assert keep.dtype == torch.bool and numbers.dtype == torch.bfloat16
    assert torch.equal(keep.float(), numbers.float())
    drawn = np.random.Generator(np.random.SFC64(np.random.SeedSequence([1, 2, 3, 0]))).bytes(2 * 63)
    assert keep[0].tolist() == (np.frombuffer(drawn, "<u2") >= RANGE // 2).tolist()


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
def test_the_share_that_stays_is_the_one_asked_for_and_the_scale_keeps_the_mean(probability):
    noise = Noise()
    noise.begin([0], 1)
    keep, scale = noise.keep(torch.empty(1, 400_000), probability)
    share = float(keep.float().mean())
    assert share == pytest.approx(1 - probability, abs=4 * np.sqrt(probability * (1 - probability) / 400_000))
    assert scale == pytest.approx(1 / (1 - probability), rel=2 / RANGE / (1 - probability))


def test_the_gradient_flows_where_the_value_stayed():
    noise = Noise()
    noise.begin([0, 1], 1)
    layer = Dropout(0.25, noise).train()
    x = torch.ones(2, 100, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert out.detach().unique().tolist() == [0.0, pytest.approx(4 / 3)]


def test_while_evaluating_nothing_is_dropped():
    x = torch.ones(2, 3)
    assert Dropout(0.5, Noise()).eval()(x) is x
