"""The loss curve of a run as a picture that needs no explanation beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import curves
from pipeline.drawing import BASELINE, BATCH, BEST, TRAIN, VALIDATION, label, picture, plain

Row = Mapping[str, Any]


def loss_curve(rows: Sequence[Row], evaluation: Mapping[str, Any], diagnosis: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: losses over steps, the best checkpoint, the baselines, and the verdict as its title.

    Where overfitting and a loss spike are among the verdicts, it shows when they began.
    """
    steps, measured = _finite(curves.training(rows)), _finite(curves.evaluations(rows))
    with picture(path, diagnosis["verdict"].replace("_", " "), diagnosis["because"]) as figure:
        axes = figure.add_subplot()
        axes.plot(*_columns(steps, "loss"), color=BATCH, linewidth=1, label="training batches")
        axes.plot(*_columns(measured, "train_eval_loss"), color=TRAIN, marker="s", markersize=4, label="training text")
        axes.plot(
            *_columns(measured, "validation_loss"), color=VALIDATION, marker="o", markersize=5, label="validation"
        )
        _mark_best(axes, measured)
        _draw_baselines(axes, evaluation["baselines"]["validation"])
        _show_when(axes, diagnosis["verdicts"], diagnosis["evidence"])
        axes.set(xlabel="optimizer step", ylabel="loss (nats per predicted token)")
        axes.set_xlim(left=0)
        plain(axes)
        axes.margins(y=0.08)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)


def _mark_best(axes: Any, measured: Sequence[Mapping[str, float]]) -> None:
    """A star on the lowest validation loss, with its numbers."""
    if not measured:
        return
    best = min(measured, key=lambda point: point["validation_loss"])
    axes.plot(best["step"], best["validation_loss"], "*", color=BEST, markersize=16, markeredgecolor="white", zorder=5)
    on_the_right = best["step"] > measured[-1]["step"] / 2
    label(
        axes,
        f"best: {best['validation_loss']:.3f} at step {best['step']:,}",
        (best["step"], best["validation_loss"]),
        offset=(0, 24),  # above: training loss is below
        ha="right" if on_the_right else "left",
        color=BEST,
        fontweight="bold",
    )


def _draw_baselines(axes: Any, baselines: Mapping[str, float | None]) -> None:
    """A dashed line for what any trained model should be below: no training at all, and mere word frequencies."""
    names = {"initial": "before training", "unigram": "word frequencies alone"}
    known = sorted((loss, name) for key, name in names.items() if (loss := baselines[key]) is not None)
    for order, (loss, name) in enumerate(known):
        axes.axhline(loss, color=BASELINE, linewidth=1, linestyle="--", zorder=1)
        # The lower label hangs below its line, so that two close lines keep theirs apart.
        below = order == 0 and len(known) > 1
        label(
            axes,
            f"{name}: {loss:.3f}",
            (0.98, loss),
            offset=(0, -3 if below else 3),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="top" if below else "bottom",
            color=BASELINE,
            fontsize=9,
        )


def _show_when(axes: Any, verdicts: Sequence[str], evidence: Mapping[str, Any]) -> None:
    """From where on the model only learned training text by heart, and where the loss of batches jumped."""
    last_step = evidence["last_step"]
    if "overfitting" in verdicts:
        since = evidence["flat_since_step"]
        axes.axvspan(since, last_step, color=VALIDATION, alpha=0.1, linewidth=0, zorder=0)
        _label_at(axes, f"overfitting since step {since:,}", since, last_step, height=0.795, color=VALIDATION)
    if "loss_spike" in verdicts:
        step, jump = evidence["spike_step"], evidence["spike_height"]
        axes.axvline(step, color=BASELINE, linewidth=1, linestyle=":", zorder=1)
        _label_at(axes, f"loss spike at step {step:,}: up by {jump:.3f}", step, last_step, height=0.865, color=BASELINE)


def _label_at(axes: Any, text: str, step: int, last_step: int, *, height: float, color: str) -> None:
    """Text beside a step, on the side that has room; `height` is a share of the picture's."""
    on_the_right = step > 0.6 * last_step
    label(
        axes,
        text,
        (step, height),
        offset=(-5 if on_the_right else 5, 0),
        xycoords=("data", "axes fraction"),
        ha="right" if on_the_right else "left",
        va="center",
        color=color,
        fontsize=9,
    )


def _columns(points: Sequence[Mapping[str, float]], column: str) -> tuple[list[float], list[float]]:
    return [point["step"] for point in points], [point[column] for point in points]


def _finite(points: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    return [point for point in points if all(math.isfinite(value) for value in point.values())]
