"""What the rows of a training and the measurements after it say, as the numbers that a verdict is made of.

Losses are in nats per predicted token. "Training loss" is measured as validation loss is: in evaluation mode, on a
fixed sample of training documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import spikes
from pipeline.thresholds import Thresholds

Row = Mapping[str, Any]
Floats = npt.NDArray[np.float64]
Table = npt.NDArray[np.float64]  # a line a row, a column each of COLUMNS

COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "train_eval_loss", "validation_loss", "low", "high")


@dataclass(frozen=True)
class Facts:
    """All that a rule may look at; NaN where a run does not have it, or not yet."""

    # from the rows
    num_evaluations: int
    num_non_finite: int  # losses that are no finite number; a step that was skipped has one
    last_step: int
    best_step: int  # of the lowest validation loss
    best_validation_loss: float
    last_validation_loss: float
    validation_rise: float  # last - best
    validation_slope: float  # over the last `recent_share` of the steps, in nats per 1,000 steps
    best_train_loss: float  # the lowest training loss
    last_train_loss: float
    train_rise: float  # last - lowest
    gap_at_best: float  # validation - training loss at best_step
    gap: float  # the same at the end
    recent_gain: float  # what the last `recent_share` of the steps took off the best validation loss
    plateau_gain: float  # the same for `plateau_share`
    flat_since_step: int  # after the evaluation there, validation loss fell by `flat_change` at most
    spike_height: float  # nats by which the loss of batches jumped and came back, at most; 0: it did not
    spike_step: int  # where it began
    median_grad_norm: float
    recent_grad_norm: float  # its median over the last `recent_share` of the steps
    max_grad_norm: float
    max_grad_norm_step: int
    last_learning_rate_share: float  # of the highest rate of the run
    learning_rate_phase: str  # warmup: climbing; peak: from there to half of the highest rate; decay: below
    validation_interval: float  # width of the 95 % interval of the last evaluation; in the end, that of models/best
    # from the measurements after training
    saved_by_best: float = math.nan  # loss of the last weights - that of models/best
    gap_low: float = math.nan  # 95 % interval of validation - training loss, of models/best; during training, of the
    gap_high: float = math.nan  # last evaluation, whose training loss counts as exact
    margin_below_unigram: float = math.nan  # unigram model's loss - that of models/best
    margin_below_initial: float = math.nan  # the same for the weights that training started from
    leaked_documents: float = math.nan  # share of validation and test that nearly equals a training document
    leaked_tokens: float = math.nan  # share of their tokens in n-grams that a training document holds too
    memorised_samples: float = math.nan  # share that repeats `sample.memorised_tokens` of a training document
    longest_overlap: float = math.nan  # tokens of a sample that a training document holds in a row, at most


def table_of(rows: Iterable[Row]) -> Table:
    """Rows of train.jsonl as numbers: NaN where a row has none, infinity where it has one that is not finite.

    A step whose loss is missing was skipped, because it was not finite.
    """
    return np.fromiter(map(_line, rows), np.dtype((np.float64, len(COLUMNS))))


def of_rows(table: Table, limits: Thresholds) -> Facts:
    """The facts of a training, finished or not."""
    columns = dict(zip(COLUMNS, table.T, strict=True))
    losses = np.stack([columns[name] for name in ("loss", "train_eval_loss", "validation_loss")])
    evaluated = table[np.isfinite(columns["train_eval_loss"]) & np.isfinite(columns["validation_loss"])]
    # A run without a finite evaluation has no curve; then every comparison below is with NaN, thus false.
    if not len(evaluated):
        evaluated = np.full((1, len(COLUMNS)), math.nan)
        evaluated[0, 0] = 0
    steps, _, _, _, train, validation, lows, highs = evaluated.T
    trained = table[np.isfinite(columns["loss"])]
    last_step = float(max(steps[-1], columns["step"][-1:].max(initial=0)))
    recently = last_step - limits.recent_share * last_step
    best = int(validation.argmin())
    spike = spikes.highest(trained[:, 0], trained[:, 1], limits)
    return Facts(
        num_evaluations=int(np.isfinite(validation).sum()),
        num_non_finite=int(np.isinf(losses).sum()),
        last_step=int(last_step),
        best_step=int(steps[best]),
        best_validation_loss=float(validation[best]),
        last_validation_loss=float(validation[-1]),
        validation_rise=float(validation[-1] - validation[best]),
        validation_slope=1000 * _slope(steps, validation, recently),
        best_train_loss=float(train.min()),
        last_train_loss=float(train[-1]),
        train_rise=float(train[-1] - train.min()),
        gap_at_best=float(validation[best] - train[best]),
        gap=float(validation[-1] - train[-1]),
        recent_gain=_gain(steps, validation, limits.recent_share),
        plateau_gain=_gain(steps, validation, limits.plateau_share),
        flat_since_step=int(steps[_flat_since(validation, limits.flat_change)]),
        spike_height=spike.height,
        spike_step=spike.step,
        validation_interval=float(highs[-1] - lows[-1]),
        gap_low=float(lows[-1] - train[-1]),
        gap_high=float(highs[-1] - train[-1]),
        **_of_gradients(table[np.isfinite(columns["grad_norm"])], recently),
        **_of_rates(trained[:, COLUMNS.index("learning_rate")]),
    )


def with_measurements(
    facts: Facts, evaluation: Mapping[str, Any], leakage: Mapping[str, Any], samples: Sequence[Row]
) -> Facts:
    """The facts, with those of evaluation.json, leakage.json and samples.jsonl."""
    low, high = (_number(end) for end in evaluation["validation"]["loss_ci95"])
    gap_low, gap_high = (_number(end) for end in evaluation["generalisation_gap"]["loss_ci95"])
    loss, baselines = _number(evaluation["validation"]["loss"]), evaluation["baselines"]["validation"]
    measured = [_number(evaluation[side]["loss"]) for side in ("train", "validation", "test")]
    held_out = {key: sum(leakage[side][key] for side in ("validation", "test")) for key in leakage["test"]}
    return replace(
        facts,
        num_non_finite=facts.num_non_finite + sum(not math.isfinite(loss) for loss in measured),
        validation_interval=high - low,
        saved_by_best=_number(baselines["last"]) - loss,
        gap_low=gap_low,
        gap_high=gap_high,
        margin_below_unigram=_number(baselines["unigram"]) - loss,
        margin_below_initial=_number(baselines["initial"]) - loss,
        leaked_documents=held_out["near_duplicate_documents"] / max(1, held_out["num_documents"]),
        leaked_tokens=held_out["ngram_tokens"] / max(1, held_out["num_tokens"]),
        memorised_samples=sum(bool(sample["memorised"]) for sample in samples) / max(1, len(samples)),
        longest_overlap=float(max((sample["longest_overlap_num_tokens"] for sample in samples), default=0)),
    )


def _line(row: Row) -> tuple[float, ...]:
    held: dict[str, Any] = {"loss": None} if row["step"] > 0 else {}
    held |= row
    if "validation_loss_ci95" in row:
        held["low"], held["high"] = row["validation_loss_ci95"]
    return tuple(_cell(held[name]) if name in held else math.nan for name in COLUMNS)


def _cell(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.inf


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _gain(steps: Floats, losses: Floats, share: float) -> float:
    """What the last `share` of the steps took off the lowest loss; not below 0.

    Between evaluations the loss counts as a straight line, so evaluating more often changes little.
    """
    boundary = steps[-1] - share * (steps[-1] - steps[0])
    before = min(losses[steps <= boundary].min(), np.interp(boundary, steps, losses))
    return float(before - losses.min())


def _slope(steps: Floats, losses: Floats, first: float) -> float:
    """Of the line closest to the losses from step `first` on (least squares), or to the last two; nats a step."""
    if len(steps) < 2:
        return math.nan
    num_last = max(2, int((steps >= first).sum()))
    x, y = steps[-num_last:] - steps[-num_last:].mean(), losses[-num_last:]
    # `x @ y` would be BLAS, whose last digit depends on the model of the processor.
    return float((x * y).sum() / (x * x).sum())


def _flat_since(losses: Floats, flat_change: float) -> int:
    """The first index after which the loss falls by `flat_change` at most."""
    lowest_from_here = np.minimum.accumulate(losses[::-1])[::-1]
    return int((losses - lowest_from_here <= flat_change).argmax())


def _of_gradients(rows: Table, recently: float) -> dict[str, Any]:
    steps, norms = rows[:, 0], rows[:, COLUMNS.index("grad_norm")]
    if not len(norms):
        unknown = ("median_grad_norm", "recent_grad_norm", "max_grad_norm")
        return dict.fromkeys(unknown, math.nan) | {"max_grad_norm_step": 0}
    return {
        "median_grad_norm": float(np.median(norms)),
        "recent_grad_norm": float(np.median(norms[steps >= min(recently, steps[-1])])),
        "max_grad_norm": float(norms.max()),
        "max_grad_norm_step": int(steps[norms.argmax()]),
    }


def _of_rates(rates: Floats) -> dict[str, Any]:
    if not len(rates):
        return {"last_learning_rate_share": math.nan, "learning_rate_phase": "warmup"}
    share = float(rates[-1] / rates.max())
    climbing = len(rates) > 1 and share == 1 and rates[-1] > rates[-2]
    phase = "warmup" if climbing else "peak" if share >= 0.5 else "decay"
    return {"last_learning_rate_share": share, "learning_rate_phase": phase}
