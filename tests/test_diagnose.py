import json
import math
import string
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pydantic
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline import diagnose
from pipeline.diagnose import Thresholds

THRESHOLDS = Thresholds(
    recent_share=0.25,
    plateau_share=0.5,
    flat_change=0.02,
    rise=0.03,
    overfitting_gap=0.5,
    underfitting_margin=0.1,
    leakage_margin=0.05,
    widest_interval=0.3,
)
VERDICTS = {
    "healthy", "still_improving", "plateau", "underfitting", "overfitting", "diverging", "non_finite",
    "leakage_suspected", "validation_too_small",
}  # fmt: skip


def run_of(validation: list[float], train: list[float], num_steps: int = 120) -> list[dict[str, Any]]:
    """Rows of a run with evaluations at equal distances."""
    steps = np.linspace(0, num_steps, len(validation)).round().astype(int).tolist()
    evaluations = dict(zip(steps, zip(train, validation, strict=True), strict=True))
    rows: list[dict[str, Any]] = []
    for step in range(num_steps + 1):
        row: dict[str, Any] = {"step": step, "epoch": step / 20, "num_tokens": 100 * step}
        if step:
            row |= {"loss": train[0], "learning_rate": 1e-3 * (1.01 - step / num_steps), "grad_norm": 1.0}
        if step in evaluations:
            row |= {"train_eval_loss": evaluations[step][0], "validation_loss": evaluations[step][1]}
        rows.append(row)
    return rows


def evaluation_of(rows: list[dict[str, Any]], half_width: float = 0.05, **changes: Any) -> dict[str, Any]:
    """What `evaluate` would have measured of the best weights of these rows."""
    best = min((row for row in rows if "validation_loss" in row), key=lambda row: row["validation_loss"])
    loss, gap = best["validation_loss"], best["validation_loss"] - best["train_eval_loss"]
    side = {"loss": loss, "loss_ci95": [loss - half_width, loss + half_width]}
    return {
        "train": {"loss": loss - gap},
        "validation": side,
        "test": side,
        "generalisation_gap": {"loss": gap, "loss_ci95": [gap - half_width, gap + half_width]},
        "baselines": {"validation": {"unigram": 6.0, "initial": 8.3, "last": loss}},
    } | changes


def falling(speed: float, floor: float = 2.0, start: float = 8.3) -> Callable[[float], float]:
    return lambda t: floor + (start - floor) * math.exp(-speed * t)


# What a person would call each of these curves; t goes from 0 to 1 over the run.
CURVES: dict[str, tuple[str, Callable[[float], float], Callable[[float], float]]] = {
    # name: verdict, validation loss, training loss
    "falls to the very end": ("still_improving", falling(3), falling(3, floor=1.9)),
    "a straight line down": ("still_improving", lambda t: 8.3 - 5 * t, lambda t: 8.3 - 5.1 * t),
    "fine-tuning that helps a little more each time": (
        "still_improving",
        lambda t: 3 - 0.2 * t,
        lambda t: 3 - 0.25 * t,
    ),
    "falls, then levels off": ("healthy", falling(8), falling(8, floor=1.8)),
    "falls, then levels off with a harmless wobble": (
        "healthy",
        lambda t: falling(8)(t) + (0.01 if t > 0.9 else 0),
        falling(8, floor=1.8),
    ),
    "falls at once, then nothing": ("plateau", falling(40), falling(40, floor=1.9)),
    "fine-tuning that changes nothing": ("plateau", lambda t: 3.0, lambda t: 2.9 - 0.01 * t),
    "never falls below word frequencies": ("underfitting", falling(40, floor=5.98), falling(40, floor=5.9)),
    "crawls": ("underfitting", lambda t: 8.3 - 0.4 * t, lambda t: 8.3 - 0.4 * t),
    "validation turns while training goes on": (
        "overfitting",
        lambda t: falling(12)(t) + max(0.0, t - 0.4),
        lambda t: falling(12)(t) - 0.8 * t,
    ),
    "validation turns slightly": (
        "overfitting",
        lambda t: falling(12)(t) + 0.2 * max(0.0, t - 0.6),
        lambda t: falling(12)(t) - 0.8 * t,
    ),
    "validation stands still far above training": ("overfitting", falling(12, floor=3), falling(6, floor=1.2)),
    "fine-tuning that is worse from its first step": ("overfitting", lambda t: 3 + t, lambda t: 3 - t),
    "both rise": ("diverging", lambda t: falling(12)(t) + 4 * max(0.0, t - 0.5), falling(12)),
    "rises from the first step": ("diverging", lambda t: 8.3 + 2 * t, lambda t: 8.3 + 2 * t),
    "both turn upwards a little": ("diverging", lambda t: falling(12)(t) + 0.2 * max(0.0, t - 0.5), falling(12)),
    "explodes at the end and stays": ("diverging", lambda t: falling(12)(t) + (3 if t > 0.8 else 0), falling(12)),
}
for name, (verdict, validation, _) in CURVES.items():
    if verdict == "diverging":  # training rises with validation
        CURVES[name] = (verdict, validation, validation)


@pytest.mark.parametrize("num_evaluations", [7, 13, 61])
@pytest.mark.parametrize("name", CURVES)
def test_a_curve_gets_the_verdict_that_a_person_would_give(name: str, num_evaluations: int):
    verdict, validation, train = CURVES[name]
    times, noise = np.linspace(0, 1, num_evaluations), np.random.default_rng(0).normal(0, 0.002, (2, num_evaluations))
    rows = run_of(
        [validation(t) + n for t, n in zip(times, noise[0], strict=True)],
        [train(t) + n for t, n in zip(times, noise[1], strict=True)],
    )
    assert diagnose.judge(rows, evaluation_of(rows), THRESHOLDS)["verdict"] == verdict


GOOD = run_of([falling(8)(t) for t in np.linspace(0, 1, 7)], [falling(8, floor=1.9)(t) for t in np.linspace(0, 1, 7)])


def verdicts(rows: list[dict[str, Any]], **changes: Any) -> list[str]:
    found: list[str] = diagnose.judge(rows, evaluation_of(GOOD, **changes), THRESHOLDS)["verdicts"]
    return found


def test_what_the_final_measurement_shows_is_judged_too():
    assert verdicts(GOOD) == ["healthy"]
    assert verdicts(GOOD, half_width=0.2) == ["validation_too_small"]
    assert verdicts(GOOD, generalisation_gap={"loss": -0.3, "loss_ci95": [-0.4, -0.2]}) == ["leakage_suspected"]
    # Below, but not beyond chance; and beyond chance, but not beyond the margin.
    assert verdicts(GOOD, generalisation_gap={"loss": -0.3, "loss_ci95": [-0.61, 0.01]}) == ["healthy"]
    assert verdicts(GOOD, generalisation_gap={"loss": -0.03, "loss_ci95": [-0.04, -0.02]}) == ["healthy"]


@pytest.mark.parametrize("broken", [math.nan, math.inf, None])
@pytest.mark.parametrize("key", ["loss", "train_eval_loss", "validation_loss"])
def test_one_loss_that_is_not_finite_is_the_first_thing_to_say(key: str, broken: float | None):
    rows = [*GOOD[:-1], GOOD[-1] | {key: broken}]
    found = diagnose.judge(rows, evaluation_of(GOOD), THRESHOLDS)
    assert found["verdict"] == "non_finite"
    assert found["evidence"]["num_non_finite"] == 1
    json.dumps(found, allow_nan=False)


def test_a_run_with_nothing_finite_is_still_judged():
    nothing = {"loss": None, "loss_ci95": [None, None]}
    evaluation = {side: nothing for side in ("train", "validation", "test", "generalisation_gap")}
    evaluation |= {"baselines": {"validation": {"unigram": 6.0, "initial": None, "last": None}}}
    rows = [{"step": 0, "train_eval_loss": math.nan, "validation_loss": math.nan, "num_tokens": 0, "epoch": 0.0}]
    assert diagnose.judge(rows, evaluation, THRESHOLDS)["verdicts"] == ["non_finite"]


losses = st.floats(0.5, 10, allow_nan=False)
curves = st.lists(st.tuples(losses, losses), min_size=2, max_size=10)


@given(curves)
def test_every_curve_gets_known_verdicts_sentences_and_valid_json(points: list[tuple[float, float]]):
    rows = run_of([v for v, _ in points], [t for _, t in points])
    found = diagnose.judge(rows, evaluation_of(rows), THRESHOLDS)
    assert set(found) == {"verdict", "verdicts", "because", "evidence", "advice", "guide"}
    assert found["verdict"] == found["verdicts"][0]
    assert set(found["verdicts"]) <= VERDICTS
    assert found["guide"] == f"docs/guide.md#{found['verdict']}"
    assert found["advice"] and "nan" not in found["because"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@given(curves)
def test_a_validation_loss_that_rose_is_overfitting_or_diverging(points: list[tuple[float, float]]):
    validation = [v for v, _ in points]
    assume(validation[-1] - min(validation) > THRESHOLDS.rise + 1e-6)
    rows = run_of(validation, [t for _, t in points])
    found = diagnose.judge(rows, evaluation_of(rows), THRESHOLDS)["verdicts"]
    assert {"overfitting", "diverging"} & set(found)
    assert not {"healthy", "still_improving"} & set(found)


@given(curves)
def test_still_improving_and_plateau_exclude_each_other(points: list[tuple[float, float]]):
    rows = run_of([v for v, _ in points], [t for _, t in points])
    found = diagnose.judge(rows, evaluation_of(rows), THRESHOLDS)["verdicts"]
    assert not {"plateau", "still_improving"} <= set(found)


# In 64ths, so that differences are exact and none lies on a threshold.
exact = st.integers(64, 640).map(lambda n: n / 64)


@given(st.lists(st.tuples(exact, exact), min_size=2, max_size=10), st.integers(-32, 320).map(lambda n: n / 64))
def test_only_differences_of_losses_count(points: list[tuple[float, float]], shift: float):
    rows = run_of([v for v, _ in points], [t for _, t in points])
    moved = run_of([v + shift for v, _ in points], [t + shift for _, t in points])
    evaluation = evaluation_of(moved)
    evaluation["baselines"]["validation"]["unigram"] += shift
    before = diagnose.judge(rows, evaluation_of(rows), THRESHOLDS)
    assert diagnose.judge(moved, evaluation, THRESHOLDS)["verdicts"] == before["verdicts"]


@given(curves, st.integers(2, 5))
def test_evaluating_more_often_along_the_same_lines_changes_nothing(points: list[tuple[float, float]], times: int):
    coarse = np.linspace(0, 1, len(points))
    fine = np.linspace(0, 1, (len(points) - 1) * times + 1)
    num_steps = 60 * (len(fine) - 1)  # every evaluation falls on a step
    rows = run_of([v for v, _ in points], [t for _, t in points], num_steps)
    often = run_of(*(np.interp(fine, coarse, [p[i] for p in points]).tolist() for i in (0, 1)), num_steps)
    before, after = (diagnose.judge(r, evaluation_of(r), THRESHOLDS)["evidence"] for r in (rows, often))
    for key in ("recent_gain", "plateau_gain", "validation_rise", "train_rise", "gap"):
        assert after[key] == pytest.approx(before[key], abs=1e-9)


def test_every_rule_fills_its_sentence_from_facts_and_names_a_knob_that_exists():
    names = {field.name for field in fields(diagnose.Facts)}
    for rule in (*diagnose.RULES, diagnose.HEALTHY):
        used = {name for _, name, _, _ in string.Formatter().parse(rule.because) if name}
        assert used and used <= names, rule.verdict
        assert rule.sentence.endswith(".") and all(sentence.endswith(".") for sentence in rule.advice)
    assert {rule.verdict for rule in (*diagnose.RULES, diagnose.HEALTHY)} == VERDICTS
    facts = diagnose.facts_of(GOOD, evaluation_of(GOOD), THRESHOLDS)
    assert all(math.isfinite(value) for value in asdict(facts).values())


def test_thresholds_that_contradict_each_other_are_refused():
    with pytest.raises(pydantic.ValidationError, match=r"plateau_share 0\.1 is below recent_share 0\.25"):
        Thresholds.model_validate(THRESHOLDS.model_dump() | {"plateau_share": 0.1})
