"""Whether a model is right as often as it is sure to be: confidence against accuracy of its likeliest tokens.

Guo, Pleiss, Sun and Weinberger (2017), "On Calibration of Modern Neural Networks", arXiv:1706.04599: predictions are
sorted into bins of equal width by their confidence, the probability of the likeliest token. The expected calibration
error (ECE) is the distance of a bin's mean confidence from the share of its predictions that are right, averaged over
all predictions.

Letters of tensor names: T predicted tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

NUM_BINS = 15  # as in the paper; part of what the number means, so no parameter
EDGES = np.arange(NUM_BINS + 1) / NUM_BINS  # a bin holds its upper edge


class Calibration:
    """Counts of predictions by their confidence, each an array of NUM_BINS."""

    def __init__(self) -> None:
        self.num_tokens = np.zeros(NUM_BINS, np.int64)
        self.num_right = np.zeros(NUM_BINS, np.int64)  # of them, the target was the likeliest token
        self.confidence = np.zeros(NUM_BINS, np.float64)  # summed

    def add(self, logits_TV: Tensor, targets_T: Tensor, nats_T: Tensor) -> None:
        """Count the predictions of a piece.

        Args:
            logits_TV: of every position, float32.
            targets_T: int64; a negative one is padding and does not count.
            nats_T: the targets' cross-entropy. The likeliest token's follows from it by the difference of two logits,
                so the vocabulary is passed over once, for its maximum, and never copied.
        """
        highest_T, likeliest_T = logits_TV.max(dim=-1)
        of_targets_T = logits_TV.gather(-1, targets_T.clamp(min=0)[:, None])[:, 0]
        counted_T = (targets_T >= 0).cpu().numpy()
        confidence_T = (highest_T.double() - of_targets_T - nats_T).exp().cpu().numpy()[counted_T]
        right_T = (likeliest_T == targets_T).cpu().numpy()[counted_T]
        bins_T = np.searchsorted(EDGES[1:-1], confidence_T)  # what is not a number: the last
        self.num_tokens += np.bincount(bins_T, minlength=NUM_BINS)
        self.num_right += np.bincount(bins_T[right_T], minlength=NUM_BINS)
        self.confidence += np.bincount(bins_T, weights=confidence_T, minlength=NUM_BINS)

    @property
    def error(self) -> float:
        """The expected calibration error, from 0 to 1; NaN where a confidence is not a number."""
        return float(np.abs(self.num_right - self.confidence).sum() / self.num_tokens.sum())
