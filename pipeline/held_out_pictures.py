"""Pictures of what the best model does on held-out text: the losses of its documents, and whether it is as often right
as it is sure to be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.calibration import EDGES, NUM_BINS, Calibration
from pipeline.drawing import BASELINE, TEST, TRAIN, VALIDATION, picture, plain

if TYPE_CHECKING:
    from pipeline.losses import DocumentLosses

Floats = npt.NDArray[np.float64]

COLOURS = {"validation": VALIDATION, "test": TEST}
NUM_BARS = 60


def document_losses(measured: Mapping[str, DocumentLosses], path: Path) -> None:
    """Write a PNG: for validation and test, how many documents have which loss.

    Losses that are not finite are left out, and said to be.
    """
    sides = {side: measured[side].nats / measured[side].num_tokens for side in COLOURS}
    finite = {side: losses_D[np.isfinite(losses_D)] for side, losses_D in sides.items()}
    edges = _edges(np.concatenate([*finite.values()]))
    sentence = (
        "How many documents have which loss, every document weighing the same. "
        "What stands far to the right is hard, damaged or of another kind."
    )
    with picture(path, "losses of single documents", sentence) as figure:
        for axes, (side, losses_D) in zip(figure.subplots(len(sides), 1, sharex=True), finite.items(), strict=True):
            axes.hist(losses_D, edges, color=COLOURS[side], alpha=0.6)
            if len(losses_D):
                _mark(axes, losses_D)
            num_left_out = len(sides[side]) - len(losses_D)
            left_out = f"\n{num_left_out:,} not finite" if num_left_out else ""
            axes.plot([], label=f"{len(losses_D):,} documents{left_out}", color="none")
            axes.set_ylabel(f"{side}\ndocuments")
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
            plain(axes)
        axes.set_xlabel("loss of a document (nats per predicted token)")


def reliability(calibration: Calibration, path: Path) -> None:
    """Write a PNG: how often the likeliest token is right, by the confidence in it, and of how many tokens."""
    num_tokens = calibration.num_tokens.sum()
    right, sure = calibration.num_right.sum() / num_tokens, calibration.confidence.sum() / num_tokens
    if math.isfinite(calibration.error):
        headline = f"expected calibration error {calibration.error:.4f}"
        sentence = (
            f"The model gets {right:.1%} of {num_tokens:,} test tokens right, with a mean confidence of {sure:.1%}. "
            "Bars below the dashed line: surer than it is right; above it: less sure."
        )
    else:
        headline = "no calibration error"
        sentence = "Some of the model's probabilities are not numbers."
    with picture(path, headline, sentence, size=(9, 7)) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        used = calibration.num_tokens > 0
        shares = calibration.num_right[used] / calibration.num_tokens[used]
        bars = {"width": 1 / NUM_BINS, "align": "edge", "edgecolor": "white"}
        above.bar(EDGES[:-1][used], shares, color=TRAIN, label="share that is right", **bars)
        above.plot(
            calibration.confidence[used] / calibration.num_tokens[used], shares, "o", color=VALIDATION, markersize=5,
            markeredgecolor="white", label="the same at the bin's mean confidence",
        )  # fmt: skip
        above.plot([0, 1], [0, 1], color=BASELINE, linestyle="--", linewidth=1, label="as often right as sure")
        above.set(xlim=(0, 1), ylim=(0, 1), ylabel="share of tokens that is right")
        above.legend(loc="upper left", frameon=False)
        below.bar(EDGES[:-1], calibration.num_tokens, color=TRAIN, alpha=0.5, **bars)
        for left, count in zip(EDGES[:-1], calibration.num_tokens, strict=True):
            below.annotate(
                f"{count:,}", (left + 0.5 / NUM_BINS, count), xytext=(0, 2), textcoords="offset points", ha="center",
                fontsize=7,
            )  # fmt: skip
        below.set(xlabel="confidence: probability of the likeliest token", ylabel="tokens")
        below.margins(y=0.2)
        plain(above)
        plain(below)


def _edges(losses_D: Floats) -> Floats:
    """NUM_BARS bars of equal width over all losses, which may be all the same, or none."""
    low, high = (losses_D.min(), losses_D.max()) if len(losses_D) else (0.0, 0.0)
    return np.linspace(math.floor(10 * low) / 10, math.floor(10 * high) / 10 + 0.1, NUM_BARS + 1)


def _mark(axes: Any, losses_D: Floats) -> None:
    """A line each for what is usual and what is not."""
    for name, value, style in (
        ("median", np.median(losses_D), "-"),
        ("mean", losses_D.mean(), "--"),
        ("95th percentile", np.quantile(losses_D, 0.95), ":"),
    ):
        axes.axvline(value, color="black", linestyle=style, linewidth=1.5, label=f"{name} {value:.3f}")
