"""Loss spikes: the loss of training batches jumps far above what it was just before, and comes back.

Looked at are medians of a few steps in a row, so that one odd batch is no spike. Each is compared with those before it:
with their median, and with their usual scatter, because small batches scatter by themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pipeline.thresholds import Thresholds

Floats = npt.NDArray[np.float64]

MAD_TO_SIGMA = 1.4826  # the median absolute deviation of normal numbers, times this, is their standard deviation


@dataclass(frozen=True)
class Spike:
    """The highest spike of a run."""

    height: float  # nats above the median before it; 0: there is none
    step: int  # where it began; 0: there is none


def highest(steps: Floats, losses: Floats, limits: Thresholds) -> Spike:
    """The highest jump of the loss by more than `spike_scatter` times its scatter, of which at least half was undone.

    Args:
        steps: of each loss, ascending.
        losses: of training batches, all finite.
    """
    size, num_before = limits.spike_steps, limits.spike_blocks
    num_blocks = len(losses) // size
    if num_blocks <= num_before:
        return Spike(0.0, 0)
    blocks = np.median(losses[: num_blocks * size].reshape(num_blocks, size), axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(blocks, num_before)[:-1]
    before = np.median(windows, axis=1)
    scatter = MAD_TO_SIGMA * np.median(np.abs(windows - before[:, None]), axis=1)
    # So few numbers can lie close together by chance, hence no less than neighbours differ by in this run.
    scatter = np.maximum(scatter, MAD_TO_SIGMA * np.median(np.abs(np.diff(blocks))) / math.sqrt(2))
    heights = blocks[num_before:] - before
    lowest_from_here = np.minimum.accumulate(blocks[::-1])[::-1][num_before:]
    came_back = lowest_from_here <= before + heights / 2
    heights[(heights <= limits.spike_scatter * scatter) | ~came_back] = 0
    if not (heights > 0).any():
        return Spike(0.0, 0)
    highest = int(heights.argmax())
    return Spike(float(heights[highest]), int(steps[(num_before + highest) * size]))
