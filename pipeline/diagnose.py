"""From the numbers of a run to a verdict: is this curve normal, and what to do now?

A pure function of the rows of train.jsonl, of the content of evaluation.json and of the thresholds in params.yaml.
Losses are in nats per predicted token. Each verdict is one rule of RULES, and each rule is one sentence; several may
hold, the first of the table is the primary one. docs/guide.md has a section for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from pipeline import stage

Row = Mapping[str, Any]


class Thresholds(stage.Params):
    """Section `evaluate.thresholds` of params.yaml; nats where its comment says so."""

    recent_share: float = Field(gt=0, lt=1)
    plateau_share: float = Field(gt=0, lt=1)
    flat_change: float = Field(ge=0)
    rise: float = Field(ge=0)
    overfitting_gap: float = Field(ge=0)
    underfitting_margin: float = Field(ge=0)
    leakage_margin: float = Field(ge=0)
    widest_interval: float = Field(gt=0)

    @model_validator(mode="after")
    def _plateau_is_longer(self) -> Thresholds:
        if self.plateau_share < self.recent_share:
            raise ValueError(
                f"plateau_share {self.plateau_share} is below recent_share {self.recent_share}: one loss could then be "
                "still improving and on a plateau"
            )
        return self


@dataclass(frozen=True)
class Facts:
    """All that a rule may look at; NaN where a run does not have it.

    "Training loss" is measured as validation loss is: in evaluation mode, on a fixed sample of training documents.
    """

    num_evaluations: int
    num_non_finite: int  # losses that are no finite number
    last_step: int
    best_step: int  # of the lowest validation loss
    best_validation_loss: float
    last_validation_loss: float
    validation_rise: float  # last - best
    best_train_loss: float  # the lowest training loss
    last_train_loss: float
    train_rise: float  # last - lowest
    gap_at_best: float  # validation - training loss at best_step
    gap: float  # the same at the end
    recent_gain: float  # what the last `recent_share` of the steps took off the best validation loss
    plateau_gain: float  # the same for `plateau_share`
    validation_interval: float  # width of the 95 % interval of models/best
    gap_low: float  # 95 % interval of validation - training loss of models/best
    gap_high: float
    margin_below_unigram: float  # unigram model's loss - that of models/best
    margin_below_initial: float  # the same for the weights that training started from
    median_grad_norm: float
    max_grad_norm: float
    last_learning_rate_share: float  # of the highest rate of the run


@dataclass(frozen=True)
class Rule:
    """One verdict."""

    verdict: str
    sentence: str  # when it holds, in words; the guide has the same
    holds: Callable[[Facts, Thresholds], bool]
    because: str  # a sentence for Facts to fill
    advice: tuple[str, ...]


def judge(rows: Sequence[Row], evaluation: Mapping[str, Any], thresholds: Thresholds) -> dict[str, Any]:
    """The content of diagnostics.json.

    Returns:
        `verdict`: the primary one; `verdicts`: all that hold, it first; `because`: the primary one with its numbers;
        `evidence`: all Facts, None for what is not there; `advice`: sentences; `guide`: where to read on.
    """
    facts = facts_of(rows, evaluation, thresholds)
    held = [rule for rule in RULES if rule.holds(facts, thresholds)] or [HEALTHY]
    return {
        "verdict": held[0].verdict,
        "verdicts": [rule.verdict for rule in held],
        "because": held[0].because.format(**asdict(facts)),
        "evidence": {key: value if math.isfinite(value) else None for key, value in asdict(facts).items()},
        "advice": list(held[0].advice),
        "guide": f"docs/guide.md#{held[0].verdict}",
    }


def facts_of(rows: Sequence[Row], evaluation: Mapping[str, Any], thresholds: Thresholds) -> Facts:
    """Gather what the rules look at."""
    losses = [row[key] for row in rows for key in ("loss", "train_eval_loss", "validation_loss") if key in row]
    losses += [evaluation[side]["loss"] for side in ("train", "validation", "test")]
    evaluations = [row for row in rows if _finite(row.get("validation_loss")) and _finite(row.get("train_eval_loss"))]
    # A run without two finite evaluations has no curve; then every comparison below is with NaN, thus false.
    steps = np.array([row["step"] for row in evaluations] or [0], np.float64)
    validation = np.array([row["validation_loss"] for row in evaluations] or [math.nan])
    train = np.array([row["train_eval_loss"] for row in evaluations] or [math.nan])
    best = int(validation.argmin())
    grad_norms = [row["grad_norm"] for row in rows if _finite(row.get("grad_norm"))] or [math.nan]
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row] or [math.nan]
    low, high = (_number(end) for end in evaluation["validation"]["loss_ci95"])
    gap_low, gap_high = (_number(end) for end in evaluation["generalisation_gap"]["loss_ci95"])
    loss, baselines = _number(evaluation["validation"]["loss"]), evaluation["baselines"]["validation"]
    return Facts(
        num_evaluations=len(evaluations),
        num_non_finite=sum(not _finite(loss) for loss in losses),
        last_step=int(steps[-1]),
        best_step=int(steps[best]),
        best_validation_loss=float(validation[best]),
        last_validation_loss=float(validation[-1]),
        validation_rise=float(validation[-1] - validation[best]),
        best_train_loss=float(train.min()),
        last_train_loss=float(train[-1]),
        train_rise=float(train[-1] - train.min()),
        gap_at_best=float(validation[best] - train[best]),
        gap=float(validation[-1] - train[-1]),
        recent_gain=_gain(steps, validation, thresholds.recent_share),
        plateau_gain=_gain(steps, validation, thresholds.plateau_share),
        validation_interval=high - low,
        gap_low=gap_low,
        gap_high=gap_high,
        margin_below_unigram=_number(baselines["unigram"]) - loss,
        margin_below_initial=_number(baselines["initial"]) - loss,
        median_grad_norm=float(np.median(grad_norms)),
        max_grad_norm=float(max(grad_norms)),
        last_learning_rate_share=rates[-1] / max(rates),
    )


def _gain(steps: np.ndarray[Any, Any], losses: np.ndarray[Any, Any], share: float) -> float:
    """What the last `share` of the steps took off the lowest loss; not below 0.

    Between evaluations the loss counts as a straight line, so evaluating more often changes little.
    """
    boundary = steps[-1] - share * (steps[-1] - steps[0])
    before = min(losses[steps <= boundary].min(), np.interp(boundary, steps, losses))
    return float(before - losses.min())


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


RULES = (
    Rule(
        "non_finite",
        "A loss is not a finite number.",
        lambda facts, limits: facts.num_non_finite > 0,
        "{num_non_finite} losses of this run are not finite numbers.",
        (
            "Reduce train.learning_rate, or set train.mixed_precision to none.",
            "Keep train.max_grad_norm near 1, and look for broken text among the training documents.",
        ),
    ),
    Rule(
        "diverging",
        "Training loss ended more than `rise` above its lowest.",
        lambda facts, limits: facts.train_rise > limits.rise,
        "Training loss went up: it ended at {last_train_loss:.3f}, {train_rise:.3f} above its lowest.",
        (
            "Reduce train.learning_rate (try a third of it), or warm up for longer (train.warmup_ratio).",
            "If that does not help, look at the data: text that changes its kind half-way, or is damaged.",
        ),
    ),
    Rule(
        "validation_too_small",
        "The 95 % interval of the validation loss is wider than `widest_interval`.",
        lambda facts, limits: facts.validation_interval > limits.widest_interval,
        "The 95 % interval of the validation loss is {validation_interval:.3f} nats wide: too wide to judge by.",
        ("Add text, or raise split.validation_fraction. Until then, trust no small difference between runs.",),
    ),
    Rule(
        "leakage_suspected",
        "Validation loss is below training loss by more than `leakage_margin`, the whole 95 % interval of the gap.",
        lambda facts, limits: facts.gap_high < -limits.leakage_margin,
        "Validation loss is below training loss, which should not be: the gap is {gap_low:.3f} to {gap_high:.3f}.",
        (
            "Look for validation text among the training text; clean.near_duplicate_similarity, lowered, finds more.",
            "Or validation documents are of an easier kind: reports/documents.parquet has their losses and lengths.",
        ),
    ),
    Rule(
        "overfitting",
        "Validation loss ended more than `rise` above its lowest while the gap to training loss widened, "
        "or it no longer falls and the gap is above `overfitting_gap`.",
        lambda facts, limits: (
            (facts.validation_rise > limits.rise and facts.gap > facts.gap_at_best)
            or (facts.gap > limits.overfitting_gap and facts.recent_gain <= limits.flat_change)
        ),
        "The gap between validation and training loss was {gap_at_best:.3f} at step {best_step}, the best one, "
        "and is {gap:.3f} at the end, with validation loss {validation_rise:.3f} above its best.",
        (
            "Train for fewer epochs (train.num_epochs), or regularise: raise train.dropout or train.weight_decay.",
            "More text helps most. models/best holds the weights of the lowest validation loss; use those.",
        ),
    ),
    Rule(
        "underfitting",
        "The model is not `underfitting_margin` better than a unigram model of the training text.",
        lambda facts, limits: facts.margin_below_unigram < limits.underfitting_margin,
        "The model's loss is {margin_below_unigram:.3f} below that of mere word frequencies: it has hardly learned.",
        (
            "Train for longer (train.num_epochs), or raise train.learning_rate.",
            "If the loss is flat by then, use a larger model (train.scratch); check that the text is what you mean.",
        ),
    ),
    Rule(
        "plateau",
        "The last `plateau_share` of the steps took no more than `flat_change` off the lowest validation loss.",
        lambda facts, limits: facts.plateau_gain <= limits.flat_change,
        "Validation loss stands still: the later part of the run took {plateau_gain:.3f} off its lowest.",
        ("Stop earlier, or change train.learning_rate: lower if the loss jumps about, higher if it crawls.",),
    ),
    Rule(
        "still_improving",
        "The last `recent_share` of the steps took more than `flat_change` off the lowest validation loss.",
        lambda facts, limits: facts.recent_gain > limits.flat_change and facts.validation_rise <= limits.rise,
        "Validation loss is still going down: the last part of the run took {recent_gain:.3f} off it.",
        ("Continue: raise train.num_epochs.",),
    ),
)

HEALTHY = Rule(
    "healthy",
    "None of the others.",
    lambda facts, limits: True,
    "Validation loss went down and levelled off at {last_validation_loss:.3f}, {gap:.3f} above training loss.",
    ("Nothing needs mending: use models/best. More text or a larger model would bring the next gain.",),
)
