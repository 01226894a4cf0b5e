"""How every picture of an evaluation looks, and what makes it the same bytes from the same input.

No display, no user's matplotlib settings, no version or time in the file.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Colours that colour-blind readers tell apart (Okabe and Ito, 2008); markers and labels tell the same again.
BATCH, TRAIN, VALIDATION, TEST, BEST = "#bbbbbb", "#0072b2", "#d55e00", "#cc79a7", "#009e73"
BASELINE = "#555555"
DPI = 120


@contextmanager
def picture(path: Path, headline: str, sentence: str, size: tuple[float, float] = (9, 5.5)) -> Iterator[Any]:
    """A figure to draw into; when the block ends, it is a PNG with the headline and the sentence above its axes.

    Args:
        path: of the PNG.
        headline: a few words, large.
        sentence: what they mean in numbers, small.
        size: inches.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        lines = "\n".join(textwrap.wrap(sentence, 115))
        figure.axes[0].set_title(lines, loc="left", fontsize=9, color="#333333")
        figure.suptitle(headline, x=0.06, ha="left", fontsize=14, fontweight="bold")
        figure.savefig(path, format="png", metadata={"Software": None})


def plain(axes: Any) -> None:
    """A faint grid behind the data, and no frame around it."""
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label(axes: Any, text: str, place: tuple[float, float], *, offset: tuple[int, int], **looks: Any) -> None:
    """Text near a place, legible on top of lines."""
    background = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
    axes.annotate(text, place, xytext=offset, textcoords="offset points", bbox=background, zorder=6, **looks)
