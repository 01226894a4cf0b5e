"""Attention as plain matrix products over blocks of queries: exact, and on a CPU faster than the fused kernels.

A block of queries looks only at the keys up to its last one, so that of the square of scores hardly more than the
causal half is computed. Registered with transformers under a name, as its own implementations are, it serves any model
that asks for it. On other devices than the CPU torch's own fused attention is used.

Letters of tensor names: B windows, H heads, Q queries of a block, K keys that they see, T positions, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from pipeline.dropout import Noise

NAME = "blocks"
BLOCK = 256  # queries; measured on two cores at 4 x 12 x 512 x 64: 128 and 512 are slower


def register() -> None:
    """Make the name known to transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: torch.nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_options: Any,
) -> tuple[Tensor, None]:
    """Causal attention in the form in which transformers calls it.

    Args:
        module: the attention layer; `module.noise` makes the dropout masks.
        key_BHTD, value_BHTD: with fewer heads where several queries' heads share one.
        attention_mask: bool [B or 1, 1, T, T], True where a query sees a key; None: every key up to its own.
        dropout: probability of dropping a weight.
        scaling: of the scores, by default 1/sqrt(D).

    Returns:
        [B, T, H, D], and None in place of the weights.
    """
    num_shared = query_BHTD.shape[1] // key_BHTD.shape[1]
    key_BHTD, value_BHTD = repeat_kv(key_BHTD, num_shared), repeat_kv(value_BHTD, num_shared)
    scaling = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    noise = module.noise if dropout else None
    out_BHTD: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query_BHTD, key_BHTD, value_BHTD, attention_mask, scaling, dropout, noise
    )
    return out_BHTD.transpose(1, 2), None


class _Attention(torch.autograd.Function):
    """softmax(query key^T * scaling + mask), dropout, times value."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTD: Tensor,
        key_BHTD: Tensor,
        value_BHTD: Tensor,
        mask: Tensor | None,
        scaling: float,
        dropout: float,
        noise: Noise | None,
    ) -> Tensor:
        query_BHTD, key_BHTD, value_BHTD = query_BHTD.contiguous(), key_BHTD.contiguous(), value_BHTD.contiguous()
        T, device = query_BHTD.shape[2], query_BHTD.device
        hidden = ~mask if mask is not None else torch.ones(T, T, dtype=torch.bool, device=device).triu(1)
        saved, out_BHTD, ctx.scaling, ctx.scale = [], torch.empty_like(query_BHTD), scaling, 1.0
        for start, end in _blocks(T):
            scores_BHQK = query_BHTD[:, :, start:end] @ key_BHTD[:, :, :end].mT
            scores_BHQK.mul_(scaling).masked_fill_(hidden[..., start:end, :end], -torch.inf)
            weights_BHQK = scores_BHQK.softmax(-1)
            block = [weights_BHQK]
            if noise is not None:
                keep_BHQK, ctx.scale = noise.keep(weights_BHQK, dropout)
                block.append(keep_BHQK)
                weights_BHQK = weights_BHQK * keep_BHQK
            out_BHTD[:, :, start:end] = weights_BHQK @ value_BHTD[:, :, :end]
            saved += block
        ctx.save_for_backward(query_BHTD, key_BHTD, value_BHTD, *saved)
        return out_BHTD.mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad_BHTD: Tensor) -> tuple[Tensor | None, ...]:
        query_BHTD, key_BHTD, value_BHTD, *saved = ctx.saved_tensors
        blocks = _blocks(query_BHTD.shape[2])
        per_block = len(saved) // len(blocks)
        d_query, d_key, d_value = (torch.zeros_like(t) for t in (query_BHTD, key_BHTD, value_BHTD))
        grad_BHTD = (grad_BHTD * ctx.scale).contiguous()
        for number, (start, end) in enumerate(blocks):
            weights_BHQK, *keep = saved[number * per_block : (number + 1) * per_block]
            grad_BHQD = grad_BHTD[:, :, start:end]
            dropped_BHQK = weights_BHQK * keep[0] if keep else weights_BHQK
            d_value[:, :, :end] += dropped_BHQK.mT @ grad_BHQD
            d_weights_BHQK = grad_BHQD @ value_BHTD[:, :, :end].mT
            if keep:
                d_weights_BHQK.mul_(keep[0])
            d_scores_BHQK = torch._softmax_backward_data(d_weights_BHQK, weights_BHQK, -1, weights_BHQK.dtype)
            d_scores_BHQK.mul_(ctx.scaling)
            d_query[:, :, start:end] = d_scores_BHQK @ key_BHTD[:, :, :end]
            d_key[:, :, :end] += d_scores_BHQK.mT @ query_BHTD[:, :, start:end]
        return d_query, d_key, d_value, None, None, None, None


def _blocks(num_positions: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, num_positions)) for start in range(0, num_positions, BLOCK)]
