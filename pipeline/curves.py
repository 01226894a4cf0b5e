"""The rows of train.jsonl as tables that are small enough to draw, however long the run was."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

MAX_POINTS = 1000  # more than a picture has pixels for; `dvc plots show` puts every point into its page


def training(rows: Sequence[Row]) -> list[dict[str, float]]:
    """`step`, `loss`, `learning_rate` and `grad_norm`, thinned to at most MAX_POINTS.

    Several steps in one point: the mean loss over their tokens, the last learning rate, the largest gradient norm.
    """
    steps = [row for row in rows if "loss" in row]
    tokens_before = [row["num_tokens"] for row in rows if "loss" not in row][:1] + [row["num_tokens"] for row in steps]
    num_tokens = [after - before for before, after in itertools.pairwise(tokens_before)]
    size = -(-len(steps) // MAX_POINTS) or 1
    points = []
    for first in range(0, len(steps), size):
        some, weights = steps[first : first + size], num_tokens[first : first + size]
        total = sum(row["loss"] * weight for row, weight in zip(some, weights, strict=True))
        points.append(
            {
                "step": some[-1]["step"],
                "loss": total / sum(weights),
                "learning_rate": some[-1]["learning_rate"],
                "grad_norm": max(row["grad_norm"] for row in some),
            }
        )
    return points


def evaluations(rows: Sequence[Row]) -> list[dict[str, float]]:
    """`step`, `train_eval_loss`, `validation_loss` and `generalisation_gap` (the second minus the first) of each."""
    return [
        {
            "step": row["step"],
            "train_eval_loss": row["train_eval_loss"],
            "validation_loss": row["validation_loss"],
            "generalisation_gap": row["validation_loss"] - row["train_eval_loss"],
        }
        for row in rows
        if "validation_loss" in row
    ]


def to_csv(points: Sequence[Mapping[str, float]]) -> str:
    """The points as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(points[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    return text.getvalue()
