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

    def keep(self, shape: Sequence[int], probability: float, device: torch.device) -> tuple[Tensor, float]:
        """The mask of the next site, True where an element stays, and the factor that keeps the expectation.

        Args:
            shape: the first dimension is that of the windows.
            probability: of dropping an element.

        Returns:
            A bool tensor of `shape`, and 1 / the share that stays.
        """
        assert len(self._windows) == shape[0]
        threshold = round(probability * RANGE)
        site, self._site = self._site, self._site + 1
        keep = torch.empty(tuple(shape), dtype=torch.bool, device=device)
        for row, window in zip(keep, self._windows, strict=True):
            seed = np.random.SeedSequence([*self._key, window, site])
            if device.type == "cpu":
                drawn = np.frombuffer(np.random.Generator(np.random.SFC64(seed)).bytes(2 * row.numel()), "<u2")
                np.greater_equal(drawn, threshold, out=row.view(-1).numpy())
            elif device.type != "meta":
                generator = torch.Generator(device).manual_seed(int(seed.generate_state(1, np.uint64)[0] >> 1))
                drawn_there = torch.randint(RANGE, row.shape, generator=generator, device=device, dtype=torch.int32)
                torch.ge(drawn_there, threshold, out=row)
        return keep, RANGE / (RANGE - threshold)


class Dropout(torch.nn.Module):
    """In place of torch.nn.Dropout, with masks from `noise`."""

    def __init__(self, p: float, noise: Noise) -> None:
        super().__init__()
        self.p, self.noise = p, noise

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of `x`, of any shape, and scale up the others; while evaluating, `x` itself."""
        if not self.training or self.p == 0:
            return x
        return _Drop.apply(x, *self.noise.keep(x.shape, self.p, x.device))  # type: ignore[no-any-return, no-untyped-call]


class _Drop(torch.autograd.Function):
    """x * mask * scale, with the mask kept in one byte an element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return x.mul(keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return grad.mul(keep).mul_(ctx.scale), None, None
