import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import curves


def rows_of(losses: list[float], tokens: list[int]) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = [{"step": 0, "num_tokens": 0, "train_eval_loss": 4.0, "validation_loss": 4.5}]
    for step, (loss, num) in enumerate(zip(losses, tokens, strict=True), start=1):
        done = rows[-1]["num_tokens"] + num
        rows.append({"step": step, "loss": loss, "learning_rate": 1 / step, "grad_norm": loss / 2, "num_tokens": done})
    rows[-1] |= {"train_eval_loss": 2.0, "validation_loss": 2.25}
    return rows


def test_a_short_run_is_drawn_step_by_step():
    points = curves.training(rows_of([3.0, 2.0], [10, 90]))
    assert points == [
        {"step": 1, "loss": 3.0, "learning_rate": 1.0, "grad_norm": 1.5},
        {"step": 2, "loss": 2.0, "learning_rate": 0.5, "grad_norm": 1.0},
    ]


@given(num_steps=st.integers(1, 5000), cheap=st.integers(1, 50))
def test_a_long_run_is_thinned_without_moving_its_token_weighted_mean(num_steps: int, cheap: int):
    losses = [float(step % 7) for step in range(num_steps)]
    tokens = [cheap if step % 3 else 100 for step in range(num_steps)]
    points = curves.training(rows_of(losses, tokens))
    assert 1 <= len(points) <= curves.MAX_POINTS
    assert points[-1]["step"] == num_steps
    assert max(point["grad_norm"] for point in points) == max(losses) / 2
    size = -(-num_steps // curves.MAX_POINTS)
    weights = [sum(tokens[first : first + size]) for first in range(0, num_steps, size)]
    drawn = sum(point["loss"] * weight for point, weight in zip(points, weights, strict=True)) / sum(weights)
    assert drawn == pytest.approx(sum(x * w for x, w in zip(losses, tokens, strict=True)) / sum(tokens))


def test_every_evaluation_is_drawn_with_its_gap_and_csv_keeps_every_digit():
    points = curves.evaluations(rows_of([3.0, 0.1 + 0.2], [10, 90]))
    assert [point["step"] for point in points] == [0, 2]
    assert points[1]["generalisation_gap"] == 0.25
    text = curves.to_csv(curves.training(rows_of([0.1 + 0.2], [1])))
    assert text.splitlines()[0] == "step,loss,learning_rate,grad_norm"
    assert float(next(csv.DictReader(io.StringIO(text)))["loss"]) == 0.1 + 0.2
