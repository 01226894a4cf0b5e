"""The loss curve of a run as a picture that needs no explanation beside it.

Same input, same bytes: no display, no user's matplotlib settings, no version or time in the file.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import curves

Row = Mapping[str, Any]

# Colours that colour-blind readers tell apart (Okabe and Ito, 2008); markers and labels tell the same again.
BATCH, TRAIN, VALIDATION, BEST, BASELINE = "#bbbbbb", "#0072b2", "#d55e00", "#009e73", "#555555"


def loss_curve(rows: Sequence[Row], evaluation: Mapping[str, Any], diagnosis: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: losses over steps, the best checkpoint, the baselines, and the verdict as its title."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, measured = _finite(curves.training(rows)), _finite(curves.evaluations(rows))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot(*_columns(steps, "loss"), color=BATCH, linewidth=1, label="training batches")
        axes.plot(*_columns(measured, "train_eval_loss"), color=TRAIN, marker="s", markersize=4, label="training text")
        axes.plot(
            *_columns(measured, "validation_loss"), color=VALIDATION, marker="o", markersize=5, label="validation"
        )
        _mark_best(axes, measured)
        _draw_baselines(axes, evaluation["baselines"]["validation"])
        axes.set(xlabel="optimizer step", ylabel="loss (nats per predicted token)")
        axes.set_xlim(left=0)
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.08)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        because = textwrap.wrap(diagnosis["because"], 115)
        axes.set_title("\n".join(because), loc="left", fontsize=9, color="#333333")
        figure.suptitle(diagnosis["verdict"].replace("_", " "), x=0.06, ha="left", fontsize=14, fontweight="bold")
        figure.savefig(path, format="png", metadata={"Software": None})


def _mark_best(axes: Any, measured: Sequence[Mapping[str, float]]) -> None:
    """A star on the lowest validation loss, with its numbers."""
    if not measured:
        return
    best = min(measured, key=lambda point: point["validation_loss"])
    axes.plot(best["step"], best["validation_loss"], "*", color=BEST, markersize=16, markeredgecolor="white", zorder=5)
    on_the_right = best["step"] > measured[-1]["step"] / 2
    _label(
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
        _label(
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


def _label(axes: Any, text: str, place: tuple[float, float], *, offset: tuple[int, int], **looks: Any) -> None:
    """Text near a place, legible on top of lines."""
    background = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
    axes.annotate(text, place, xytext=offset, textcoords="offset points", bbox=background, zorder=6, **looks)


def _columns(points: Sequence[Mapping[str, float]], column: str) -> tuple[list[float], list[float]]:
    return [point["step"] for point in points], [point[column] for point in points]


def _finite(points: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    return [point for point in points if all(math.isfinite(value) for value in point.values())]
