"""The loss from hidden states in pieces is the loss of all logits at once."""

import pytest
import torch
from torch.nn import functional as F

from pipeline import cross_entropy
from pipeline.batches import IGNORE


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(37, 8, dtype=dtype, requires_grad=True)
    head = torch.randn(50, 8, dtype=dtype, requires_grad=True)
    targets = torch.randint(50, (37,))
    targets[::5] = IGNORE
    return hidden, head, targets


def plain(hidden, head, targets):
    return F.cross_entropy((hidden @ head.T).float(), targets, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize(("num_logits", "num_rows"), [(10**6, 1000), (500, 3), (1, 1)])
def test_it_is_the_loss_of_all_logits_at_once(num_logits, num_rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "NUM_LOGITS", num_logits)
    monkeypatch.setattr(cross_entropy, "NUM_ROWS", num_rows)
    hidden, head, targets = inputs(torch.float32)
    found, expected = cross_entropy.nats(hidden, head, targets), plain(hidden, head, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    ours = torch.autograd.grad(found / 7, (hidden, head))
    for one, other in zip(ours, torch.autograd.grad(expected / 7, (hidden, head)), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_targets_that_do_not_count_give_nothing():
    hidden, head, targets = inputs(torch.float32)
    found = cross_entropy.nats(hidden, head, torch.full_like(targets, IGNORE))
    assert found.item() == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(found, (hidden, head)))


def test_in_16_bits_the_loss_is_summed_in_32():
    hidden, head, targets = (t.bfloat16() if t.is_floating_point() else t for t in inputs(torch.float32))
    found = cross_entropy.nats(hidden, head, targets)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(plain(hidden, head, targets).item(), rel=1e-4)
    assert found.bfloat16().item() != found.item()
