"""Labelled curves that a seed makes, as a person would draw them: what must hold of each is known because it was drawn.

Numbers are drawn from ranges in which people agree on what they see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

Random = np.random.Generator
Floats = np.ndarray[Any, np.dtype[np.float64]]

SEED = 1
SHAPES = ("healthy", "still_improving", "plateau")  # of a curve with which nothing else is the matter
KINDS = (*SHAPES, "underfitting", "overfitting", "diverging", "loss_spike", "non_finite", "leakage_suspected",
         "validation_too_small", "memorising")  # fmt: skip


@dataclass
class Run:
    """A run in the making; times go from 0 to 1."""

    random: Random
    verdicts: set[str]
    may: set[str]
    times: Floats  # of the evaluations
    validation: Floats
    train: Floats
    step_times: Floats
    batches: Floats  # losses of training batches; NaN: skipped
    half_width: float  # of the interval of the validation loss
    margin: float  # of mere word frequencies: their loss - that of the best weights
    twins: float = 0.0  # share of held-out documents that nearly equal a training document
    memorised: float = 0.0  # share of samples
    risen: float = 0.0  # loss of the last weights - that of the best


def curves(number: int, seed: int = SEED) -> Iterator[tuple[str, dict[str, Any]]]:
    """So many runs, all kinds in turns, each with a name, as bench/curves.py records them."""
    for index in range(number):
        kind = KINDS[index % len(KINDS)]
        random = np.random.default_rng((seed, index))
        run = drawn(kind if kind in SHAPES else str(random.choice(SHAPES)), random)
        if kind not in SHAPES:
            CHANGES[kind](run)
        yield f"{kind}-{index}", recorded(run)


def drawn(shape: str, random: Random) -> Run:
    """A curve that falls; how fast decides its shape."""
    num_steps, num_evaluations = int(random.integers(150, 2000)), int(random.integers(9, 40))
    start, floor = random.uniform(7, 10), random.uniform(1, 4)
    speed = {"healthy": random.uniform(8.5, 9.3), "still_improving": random.uniform(1, 4.5)}.get(shape, 0)
    speed = speed or random.uniform(25, 80)
    times, step_times = np.linspace(0, 1, num_evaluations), np.arange(1, num_steps + 1) / num_steps

    def falling(t: Floats, lowest: float) -> Floats:
        return lowest + (start - lowest) * np.exp(-speed * t)

    gap = random.uniform(0.02, 0.3)
    noise = random.normal(0, random.uniform(0.0005, 0.002), (2, num_evaluations))
    scatter = 10 ** random.uniform(-2, -0.5)
    return Run(
        random=random,
        verdicts={shape},
        may=set(),
        times=times,
        validation=falling(times, floor) + noise[0],
        train=falling(times, floor - gap) + noise[1],
        step_times=step_times,
        batches=falling(step_times, floor - gap) + random.normal(0, scatter, num_steps),
        half_width=random.uniform(0.01, 0.1),
        margin=random.uniform(0.4, 4),
    )


def underfitting(run: Run) -> None:
    """It ends about where word frequencies are."""
    run.margin = -run.random.uniform(0, 0.6)
    _with_shape(run, "underfitting")


def overfitting(run: Run) -> None:
    """Validation loss turns while training loss goes on falling."""
    turn, height = run.random.uniform(0.25, 0.7), 10 ** run.random.uniform(-1, 0.2)
    after = np.clip(run.times - turn, 0, None) / (1 - turn)
    run.validation = np.where(after > 0, run.validation[run.times <= turn].min(), run.validation) + height * after
    run.train -= run.random.uniform(0.2, 1) * after
    run.risen = height
    run.verdicts, run.may = {"overfitting"}, {"plateau"}


def diverging(run: Run) -> None:
    """Both losses turn upwards and stay there."""
    turn, height = run.random.uniform(0.2, 0.85), 10 ** run.random.uniform(-0.8, 0.6)
    rise = np.clip(run.times - turn, 0, None) / (1 - turn)
    for losses in (run.validation, run.train):
        losses[:] = np.where(rise > 0, losses[run.times <= turn].min(), losses) + height * rise
    run.batches += height * np.clip(run.step_times - turn, 0, None) / (1 - turn)
    run.verdicts, run.may = {"diverging"}, {"plateau"}


def loss_spike(run: Run) -> None:
    """The loss of batches jumps, and comes back within some steps."""
    length = int(run.random.integers(5, 25))
    first = int(run.random.integers(len(run.batches) // 3, len(run.batches) - 2 * length))
    scatter = float(np.abs(np.diff(run.batches[first - 30 : first])).mean())
    height = run.random.uniform(1, 4) + 8 * scatter
    run.batches[first : first + length] += height * np.linspace(1, 0.3, length)
    _with_shape(run, "loss_spike")


def non_finite(run: Run) -> None:
    """Some steps were skipped."""
    run.batches[run.random.integers(len(run.batches), size=3)] = np.nan
    _with_shape(run, "non_finite")


def leakage_suspected(run: Run) -> None:
    """Validation documents are in the training text, or easier than it."""
    if run.random.random() < 0.5:
        run.twins = run.random.uniform(0.05, 0.6)
    else:
        run.validation = run.train - run.random.uniform(3, 6) * run.half_width - 0.1
    _with_shape(run, "leakage_suspected")


def validation_too_small(run: Run) -> None:
    """The interval is as wide as what one trains for."""
    run.half_width = run.random.uniform(0.25, 1)
    _with_shape(run, "validation_too_small")


def memorising(run: Run) -> None:
    """Samples are training text."""
    run.memorised = run.random.uniform(0.2, 1)
    _with_shape(run, "memorising")


def _with_shape(run: Run, verdict: str) -> None:
    """Another verdict beside that of the shape; `healthy` is only what has no other."""
    run.verdicts = run.verdicts - {"healthy"} | {verdict}


CHANGES: dict[str, Callable[[Run], None]] = {
    change.__name__: change
    for change in (
        underfitting,
        overfitting,
        diverging,
        loss_spike,
        non_finite,
        leakage_suspected,
        validation_too_small,
        memorising,
    )
}


def recorded(run: Run) -> dict[str, Any]:
    """The run as bench/curves.py would have recorded it."""
    num_steps, best = len(run.batches), int(run.validation.argmin())
    steps = np.rint(run.times * num_steps).astype(int).tolist()
    warmup = np.minimum(1, run.step_times / 0.05)
    loss, gap, width = run.validation[best], run.validation[best] - run.train[best], run.half_width
    side = {"loss": loss, "loss_ci95": [loss - width, loss + width]}
    documents = {"num_documents": 1000, "num_tokens": 10**5, "exact_documents": 0, "ngram_documents": 100,
                 "near_duplicate_documents": round(1000 * run.twins), "ngram_tokens": 2000}  # fmt: skip
    return {
        "verdicts": sorted(run.verdicts),
        "may": sorted(run.may),
        "refused": "",
        "steps": {
            "step": list(range(1, num_steps + 1)),
            "loss": [None if np.isnan(value) else value for value in run.batches.tolist()],
            "learning_rate": (1e-3 * warmup * (1.001 - run.step_times)).tolist(),
            "grad_norm": (0.5 * np.exp(run.random.normal(0, 0.3, num_steps))).tolist(),
        },
        "evaluations": {
            "step": steps,
            "train_eval_loss": run.train.tolist(),
            "validation_loss": run.validation.tolist(),
            "validation_loss_ci95": [[value - width, value + width] for value in run.validation.tolist()],
        },
        "evaluation": {
            "train": {"loss": loss - gap},
            "validation": side,
            "test": side,
            "generalisation_gap": {"loss": gap, "loss_ci95": [gap - width, gap + width]},
            "baselines": {
                "validation": {
                    "unigram": loss + run.margin,
                    "initial": run.validation[0],
                    "last": loss + run.risen,
                }
            },
        },
        "leakage": {"validation": documents, "test": documents},
        "samples": [
            {"memorised": n < round(20 * run.memorised), "longest_overlap_num_tokens": 60 - n} for n in range(20)
        ],
    }
