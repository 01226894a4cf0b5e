"""The loss straight from hidden states, in pieces: never are all the logits there in float32.

The logits are by far the largest tensor of a small language model: GPT-2 has 50,257 for each token. Here they are made
for some tokens at a time, and turned into their own gradient at once (which is softmax minus one at the target), so the
backward pass has only to multiply. The idea of joining the two is that of Liger Kernel (Hsu et al., 2024,
arXiv:2410.10989).

Letters of tensor names: N tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.batches import IGNORE

NUM_LOGITS = 2**27  # made at a time: 256 MiB in 16 bits
NUM_ROWS = 32  # of logits that become float32 at a time: they fit into a core's cache


def nats(hidden_NC: Tensor, head_VC: Tensor, targets_N: Tensor, num_rows: int | None = None) -> Tensor:
    """Cross-entropy in nats, summed over the tokens whose target counts.

    Args:
        hidden_NC: what the output layer takes.
        head_VC: weights of the output layer, in the dtype of `hidden_NC`.
        targets_N: int64; IGNORE does not count.
        num_rows: rows of logits that become float32 at a time; by default as many as suit the device.

    Returns:
        A float32 scalar; its gradient flows to `hidden_NC` and `head_VC`.
    """
    if num_rows is None:
        num_rows = NUM_ROWS if hidden_NC.device.type == "cpu" else NUM_LOGITS
    return _CrossEntropy.apply(hidden_NC, head_VC, targets_N, num_rows)  # type: ignore[no-any-return, no-untyped-call]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, head_VC: Tensor, targets_N: Tensor, num_rows: int) -> Tensor:
        needed = any(ctx.needs_input_grad)
        total = torch.zeros((), device=hidden_NC.device)
        d_hidden_NC = torch.empty_like(hidden_NC)
        d_head_VC = None
        for start, end in _pieces(len(hidden_NC), max(1, NUM_LOGITS // len(head_VC))):
            logits_NV = hidden_NC[start:end] @ head_VC.T
            for first, last in _pieces(end - start, num_rows):
                rows_NV, of_N = logits_NV[first:last], targets_N[start + first : start + last]
                log_probabilities_NV = F.log_softmax(rows_NV, dim=-1, dtype=torch.float32)
                total += F.nll_loss(log_probabilities_NV, of_N, ignore_index=IGNORE, reduction="sum")
                if needed:
                    counted_N1 = (of_N != IGNORE).unsqueeze(1).float()
                    probabilities_NV = log_probabilities_NV.exp_().mul_(counted_N1)
                    probabilities_NV.scatter_add_(1, of_N.clamp(min=0).unsqueeze(1), -counted_N1)
                    rows_NV.copy_(probabilities_NV)
            if needed:
                torch.mm(logits_NV, head_VC, out=d_hidden_NC[start:end])
                piece_VC = logits_NV.T @ hidden_NC[start:end]
                d_head_VC = piece_VC if d_head_VC is None else d_head_VC.float() + piece_VC
            del logits_NV, rows_NV  # before the next piece is made
        if needed:
            assert d_head_VC is not None
            ctx.save_for_backward(d_hidden_NC, d_head_VC.to(head_VC.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden_NC, d_head_VC = ctx.saved_tensors
        return d_hidden_NC * grad, d_head_VC * grad, None, None


def _pieces(num_rows: int, most: int) -> list[tuple[int, int]]:
    """Cut rows into pieces of about equal size, none larger than `most`."""
    num_pieces = -(-num_rows // most)
    edges = [n * num_rows // num_pieces for n in range(num_pieces + 1)]
    return list(itertools.pairwise(edges))
