"""The verdicts: when each holds, why, and what to do then. The first of the table that holds is the primary one.

docs/guide.md has a section for each, with the same sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.facts import Facts
from pipeline.thresholds import Thresholds


@dataclass(frozen=True)
class Rule:
    """One verdict."""

    verdict: str
    sentence: str  # when it holds, in words; the guide has the same
    holds: Callable[[Facts, Thresholds], bool]
    because: str  # a sentence for Facts to fill
    advice: tuple[str, ...]


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
        "Validation loss is below training loss by more than `leakage_margin`, the whole 95 % interval of the gap, "
        "or more than `leaked_share` of the held-out documents nearly equal a training document.",
        lambda facts, limits: facts.gap_high < -limits.leakage_margin or facts.leaked_documents > limits.leaked_share,
        "Validation loss lies {gap_low:.3f} to {gap_high:.3f} above training loss, and {leaked_documents:.1%} of the "
        "held-out documents nearly equal a training document.",
        (
            "Look for validation text among the training text; clean.near_duplicate_similarity, lowered, finds more.",
            "Or validation documents are of an easier kind: reports/documents.parquet has their losses and lengths.",
        ),
    ),
    Rule(
        "overfitting",
        "Validation loss ended more than `rise` above its lowest while training loss did not, "
        "or it no longer falls and the gap between them is above `overfitting_gap`.",
        lambda facts, limits: (
            (facts.validation_rise > limits.rise and facts.train_rise <= limits.rise)
            or (facts.gap > limits.overfitting_gap and facts.recent_gain <= limits.flat_change)
        ),
        "Since step {flat_since_step} the model learns training text by heart: validation loss was lowest at step "
        "{best_step}, with a gap of {gap_at_best:.3f} to training loss, and ended {validation_rise:.3f} higher with a "
        "gap of {gap:.3f}. models/best saves {saved_by_best:.3f} against the last weights.",
        (
            "Train for fewer epochs (train.num_epochs), or regularise: raise train.dropout or train.weight_decay.",
            "More text helps most. models/best holds the weights of the lowest validation loss; use those.",
        ),
    ),
    Rule(
        "memorising",
        "More than `memorised_share` of the samples repeat a long run of a training document word by word.",
        lambda facts, limits: facts.memorised_samples > limits.memorised_share,
        "{memorised_samples:.0%} of the samples repeat training text: up to {longest_overlap:.0f} tokens in a row.",
        (
            "Do not publish what the training text does not allow: reports/samples.md shows the passages.",
            "Train for fewer epochs (train.num_epochs), on more text, and remove what is in it again and again "
            "(clean.near_duplicate_similarity).",
        ),
    ),
    Rule(
        "loss_spike",
        "The loss of training batches jumped by more than `spike` within a few steps, and came back.",
        lambda facts, limits: facts.spike_height > limits.spike,
        "The loss of training batches jumped by {spike_height:.3f} at step {spike_step}, and came back.",
        (
            "Look at the training text for long documents that are damaged or of another kind; clean can drop them.",
            "If the text is sound, reduce train.learning_rate, warm up for longer, or lower train.max_grad_norm.",
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
        "Validation loss stands still since step {flat_since_step}: the later part of the run took {plateau_gain:.3f} "
        "off its lowest.",
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


def held(facts: Facts, thresholds: Thresholds) -> list[Rule]:
    """The rules that hold, the primary one first; HEALTHY alone where none does."""
    return [rule for rule in RULES if rule.holds(facts, thresholds)] or [HEALTHY]
