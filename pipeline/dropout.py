"""Dropout whose masks are a function of (seed, step, site), never of what was drawn before.

Every place in the model that drops something is a site, numbered in the order of the forward pass. On the CPU the mask
of a window comes from a generator of numpy that starts at the hash of (key, window, site): several times faster than
torch's own, which draws one number after another. Other devices have a fast one, which is seeded in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

RANGE = 2**16  # an element is dropped by a random number of 16 bits: probabilities are exact to 1/65,536
ONE = 0x3F80  # the bits of 1.0 in bfloat16


class Noise:
    """The masks of one forward pass after another."""

    def __init__(self) -> None:
        self.begin([], 0)

    def begin(self, windows: Sequence[int], *key: int) -> None:
        """Start a forward pass.

        Args:
            windows: a number for each row of the batch. A row's masks depend on its own number alone, so that it does
                not matter which rows share a forward pass, or a process.
            key: whatever else decides the masks: seed and step.
        """
        self._windows, self._key, self._site = windows, key, 0

    def keep(self, x: Tensor, probability: float) -> tuple[Tensor, float]:
        """The mask of the next site, to multiply `x` with, and the factor that keeps the expectation.

        Args:
            x: its first dimension is that of the windows.
            probability: of dropping an element.

        Returns:
            A tensor as of `empty_mask`, 1 where an element stays and 0 elsewhere, and 1 / the share that stays.
        """
        assert len(self._windows) == x.shape[0]
        threshold = round(probability * RANGE)
        site, self._site = self._site, self._site + 1
        keep = empty_mask(x)
        for row, window in zip(keep, self._windows, strict=True):
            seed = np.random.SeedSequence([*self._key, window, site])
            if x.device.type == "cpu":
                drawn = np.random.SFC64(seed).random_raw(-(-row.numel() // 4)).astype("<u8", copy=False).view("<u2")
                stays = drawn[: row.numel()] >= threshold
                if keep.dtype == torch.bfloat16:
                    np.multiply(stays, np.uint16(ONE), out=row.view(-1).view(torch.uint16).numpy())
                else:
                    row.copy_(torch.from_numpy(stays).view_as(row))
            elif x.device.type != "meta":
                generator = torch.Generator(x.device).manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
                drawn_there = torch.randint(RANGE, row.shape, generator=generator, device=x.device, dtype=torch.int32)
                row.copy_(drawn_there >= threshold)
        return keep, RANGE / (RANGE - threshold)


def empty_mask(x: Tensor) -> Tensor:
    """Room for the mask of `x`: bool; or bfloat16 where `x` is, for torch is slow in multiplying it by another type."""
    return torch.empty(x.shape, dtype=torch.bfloat16 if x.dtype == torch.bfloat16 else torch.bool, device=x.device)


class Dropout(torch.nn.Module):
    """In place of torch.nn.Dropout, with masks from `noise`."""

    def __init__(self, p: float, noise: Noise) -> None:
        super().__init__()
        self.p, self.noise = p, noise

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of `x`, of any shape, and scale up the others; while evaluating, `x` itself."""
        if not self.training or self.p == 0:
            return x
        return _Drop.apply(x, *self.noise.keep(x, self.p))  # type: ignore[no-any-return, no-untyped-call]


class _Drop(torch.autograd.Function):
    """x * mask * scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return x.mul(keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return grad.mul(keep).mul_(ctx.scale), None, None
