import json
import math
import re
import string
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline import diagnose, facts, rules
from pipeline.thresholds import Thresholds
from tests.closure import ROOT

THRESHOLDS = Thresholds(
    recent_share=0.25,
    plateau_share=0.5,
    flat_change=0.02,
    rise=0.03,
    overfitting_gap=0.5,
    underfitting_margin=0.1,
    leakage_margin=0.05,
    leaked_share=0.02,
    memorised_share=0.1,
    widest_interval=0.3,
    spike=0.5,
    spike_scatter=7,
    spike_steps=3,
    spike_blocks=10,
)
PARAMS = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
VERDICTS = {
    "healthy", "still_improving", "plateau", "underfitting", "overfitting", "diverging", "non_finite",
    "leakage_suspected", "validation_too_small", "loss_spike", "memorising",
}  # fmt: skip
NO_LEAKS = {"num_documents": 100, "num_tokens": 9000, "exact_documents": 0, "near_duplicate_documents": 0,
            "ngram_documents": 4, "ngram_tokens": 90}  # fmt: skip
SAMPLES = [{"memorised": False, "longest_overlap_num_tokens": 9}] * 9


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
            row["validation_loss_ci95"] = [evaluations[step][1] - 0.05, evaluations[step][1] + 0.05]
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


def judge(rows: list[dict[str, Any]], evaluation: dict[str, Any], **changes: Any) -> dict[str, Any]:
    inputs = {"leakage": {"validation": NO_LEAKS, "test": NO_LEAKS}, "samples": SAMPLES} | changes
    return diagnose.judge(rows, evaluation, inputs["leakage"], inputs["samples"], THRESHOLDS)


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
    assert judge(rows, evaluation_of(rows))["verdict"] == verdict


GOOD = run_of([falling(8)(t) for t in np.linspace(0, 1, 7)], [falling(8, floor=1.9)(t) for t in np.linspace(0, 1, 7)])


def verdicts(rows: list[dict[str, Any]], **changes: Any) -> list[str]:
    found: list[str] = judge(rows, evaluation_of(GOOD, **changes))["verdicts"]
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
    found = judge(rows, evaluation_of(GOOD))
    assert found["verdict"] == "non_finite"
    assert found["evidence"]["num_non_finite"] == 1
    json.dumps(found, allow_nan=False)


def test_a_run_with_nothing_finite_is_still_judged():
    nothing = {"loss": None, "loss_ci95": [None, None]}
    evaluation = {side: nothing for side in ("train", "validation", "test", "generalisation_gap")}
    evaluation |= {"baselines": {"validation": {"unigram": 6.0, "initial": None, "last": None}}}
    rows = [{"step": 0, "train_eval_loss": math.nan, "validation_loss": math.nan, "num_tokens": 0, "epoch": 0.0}]
    assert judge(rows, evaluation)["verdicts"] == ["non_finite"]


losses = st.floats(0.5, 10, allow_nan=False)
curves = st.lists(st.tuples(losses, losses), min_size=2, max_size=10)


@given(curves)
def test_every_curve_gets_known_verdicts_sentences_and_valid_json(points: list[tuple[float, float]]):
    rows = run_of([v for v, _ in points], [t for _, t in points])
    found = judge(rows, evaluation_of(rows))
    assert set(found) == {
        "verdict", "verdicts", "because", "confidence", "evidence", "advice", "guide", "findings"
    }  # fmt: skip
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
    found = judge(rows, evaluation_of(rows))["verdicts"]
    assert {"overfitting", "diverging"} & set(found)
    assert not {"healthy", "still_improving"} & set(found)


@given(curves)
def test_still_improving_and_plateau_exclude_each_other(points: list[tuple[float, float]]):
    rows = run_of([v for v, _ in points], [t for _, t in points])
    found = judge(rows, evaluation_of(rows))["verdicts"]
    assert not {"plateau", "still_improving"} <= set(found)


# In 64ths, so that differences are exact and none lies on a threshold.
exact = st.integers(64, 640).map(lambda n: n / 64)


@given(st.lists(st.tuples(exact, exact), min_size=2, max_size=10), st.integers(-32, 320).map(lambda n: n / 64))
def test_only_differences_of_losses_count(points: list[tuple[float, float]], shift: float):
    rows = run_of([v for v, _ in points], [t for _, t in points])
    moved = run_of([v + shift for v, _ in points], [t + shift for _, t in points])
    evaluation = evaluation_of(moved)
    evaluation["baselines"]["validation"]["unigram"] += shift
    before = judge(rows, evaluation_of(rows))
    assert judge(moved, evaluation)["verdicts"] == before["verdicts"]


@given(curves, st.integers(2, 5))
def test_evaluating_more_often_along_the_same_lines_changes_nothing(points: list[tuple[float, float]], times: int):
    coarse = np.linspace(0, 1, len(points))
    fine = np.linspace(0, 1, (len(points) - 1) * times + 1)
    num_steps = 60 * (len(fine) - 1)  # every evaluation falls on a step
    rows = run_of([v for v, _ in points], [t for _, t in points], num_steps)
    often = run_of(*(np.interp(fine, coarse, [p[i] for p in points]).tolist() for i in (0, 1)), num_steps)
    before, after = (judge(r, evaluation_of(r))["evidence"] for r in (rows, often))
    for key in ("recent_gain", "plateau_gain", "validation_rise", "train_rise", "gap"):
        assert after[key] == pytest.approx(before[key], abs=1e-9)


def test_every_rule_fills_its_sentence_from_facts_and_names_a_knob_that_exists():
    names = {field.name for field in fields(facts.Facts)}
    for rule in (*rules.RULES, rules.HEALTHY):
        used = {name for _, name, _, _ in string.Formatter().parse(rule.because) if name}
        assert used and used <= names, rule.verdict
        assert rule.sentence.endswith(".") and all(sentence.endswith(".") for sentence in rule.advice)
        for section, key in re.findall(r"\b(\w+)\.(\w+)", " ".join(rule.advice)):
            if key not in ("parquet", "md"):  # of files in reports/
                assert key in PARAMS[section], (rule.verdict, f"{section}.{key}")
    assert {rule.verdict for rule in (*rules.RULES, rules.HEALTHY)} == VERDICTS
    evidence = judge(GOOD, evaluation_of(GOOD))["evidence"]
    assert set(evidence) == names and None not in evidence.values()


def test_thresholds_that_contradict_each_other_are_refused():
    with pytest.raises(pydantic.ValidationError, match=r"plateau_share 0\.1 is below recent_share 0\.25"):
        Thresholds.model_validate(THRESHOLDS.model_dump() | {"plateau_share": 0.1})


def test_gradients_have_a_median_a_recent_one_and_a_largest_with_its_step():
    norms = {40: 5.0} | dict.fromkeys(range(90, 121), 2.0)
    rows = [row | ({"grad_norm": norms.get(row["step"], 1.0)} if row["step"] else {}) for row in GOOD]
    found = facts.of_rows(facts.table_of(rows), THRESHOLDS)
    assert (found.median_grad_norm, found.recent_grad_norm) == (1.0, 2.0)
    assert (found.max_grad_norm, found.max_grad_norm_step) == (5.0, 40)


# --- more than the curve -------------------------------------------------------------------------------------------


def with_losses(losses: list[float]) -> list[dict[str, Any]]:
    """GOOD, with these losses of its batches."""
    return [GOOD[0], *(row | {"loss": loss} for row, loss in zip(GOOD[1:], losses, strict=True))]


def noisy(scatter: float, seed: int = 0) -> np.ndarray:
    steps = np.arange(1, len(GOOD))
    return 2 + 6 * np.exp(-steps / 20) + np.random.default_rng(seed).normal(0, scatter, len(steps))


@pytest.mark.parametrize("scatter", [0.01, 0.1])
def test_a_loss_that_jumps_for_some_steps_and_comes_back_is_a_spike_with_its_place(scatter: float):
    losses = noisy(scatter)
    losses[80:86] += 1.5
    found = judge(with_losses(losses.tolist()), evaluation_of(GOOD))
    assert found["verdict"] == "loss_spike"
    assert found["evidence"]["spike_step"] in range(79, 85)
    assert found["evidence"]["spike_height"] == pytest.approx(1.5, abs=0.3)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scatter", [0.01, 0.1, 0.5])
def test_batches_that_scatter_are_no_spike(scatter: float, seed: int):
    assert "loss_spike" not in judge(with_losses(noisy(scatter, seed).tolist()), evaluation_of(GOOD))["verdicts"]


def test_one_odd_batch_and_a_loss_that_never_comes_back_are_no_spikes():
    for changed in (slice(80, 81), slice(80, None)):
        losses = noisy(0.01)
        losses[changed] += 3
        assert judge(with_losses(losses.tolist()), evaluation_of(GOOD))["verdicts"] == ["healthy"]


def test_samples_that_repeat_training_text_are_memorised():
    repeated = {"memorised": True, "longest_overlap_num_tokens": 57}
    found = judge(GOOD, evaluation_of(GOOD), samples=[*SAMPLES, repeated, repeated])
    assert found["verdict"] == "memorising" and "57 tokens" in found["because"]
    assert judge(GOOD, evaluation_of(GOOD), samples=[*SAMPLES, repeated])["verdicts"] == ["healthy"]  # one in ten


def test_held_out_documents_that_nearly_equal_training_documents_are_leakage():
    leaked = NO_LEAKS | {"near_duplicate_documents": 6}
    found = judge(GOOD, evaluation_of(GOOD), leakage={"validation": NO_LEAKS, "test": leaked})
    assert found["verdict"] == "leakage_suspected" and "3.0% of the held-out documents" in found["because"]


def test_a_step_that_was_skipped_is_a_loss_that_is_not_finite():
    skipped = [{key: value for key, value in row.items() if key != "loss"} for row in GOOD]
    found = judge([*GOOD[:50], skipped[50], *GOOD[51:]], evaluation_of(GOOD))
    assert found["verdict"] == "non_finite" and found["evidence"]["num_non_finite"] == 1


def test_overfitting_says_where_it_began_and_what_the_best_checkpoint_saved():
    _, validation, train = CURVES["validation turns while training goes on"]
    times = np.linspace(0, 1, 13)
    rows = run_of([validation(t) for t in times], [train(t) for t in times])
    evaluation = evaluation_of(rows)
    evaluation["baselines"]["validation"]["last"] += 0.55
    found = judge(rows, evaluation)
    assert found["evidence"]["flat_since_step"] in (40, 50)
    assert found["evidence"]["saved_by_best"] == pytest.approx(0.55)
    assert "saves 0.550" in found["because"]


def test_the_learning_rate_has_a_phase():
    phases = {}
    for name, rates in {
        "warmup": [1e-4, 2e-4, 3e-4], "peak": [1e-3, 2e-3, 1.9e-3], "decay": [1e-3, 2e-3, 9e-4], "no warmup": [1e-3],
    }.items():  # fmt: skip
        rows = [{"step": step, "loss": 1.0, "learning_rate": rate} for step, rate in enumerate(rates, 1)]
        phases[name] = facts.of_rows(facts.table_of(rows), THRESHOLDS).learning_rate_phase
    assert phases == {"warmup": "warmup", "peak": "peak", "decay": "decay", "no warmup": "peak"}


def test_the_slope_is_that_of_the_last_evaluations_in_nats_per_thousand_steps():
    losses = [8.0, 5.0, 4.0, 3.6, 3.2]  # the last quarter of 120 steps: 0.4 in 30
    found = facts.of_rows(facts.table_of(run_of(losses, losses)), THRESHOLDS)
    assert found.validation_slope == pytest.approx(1000 * -0.4 / 30)


def test_confidence_is_high_far_from_the_threshold_and_about_a_half_on_it():
    def found(gap: float) -> float:
        high = -THRESHOLDS.leakage_margin * gap
        diagnosis = judge(GOOD, evaluation_of(GOOD, generalisation_gap={"loss": high, "loss_ci95": [high - 0.1, high]}))
        assert diagnosis["verdict"] == "leakage_suspected"
        return float(diagnosis["confidence"])

    assert found(3) == 1
    assert found(1.01) == pytest.approx(0.5, abs=0.05)
    assert 0.5 < found(1.5) < 1
    assert judge(run_of([3.0, math.nan], [3.0, 3.0]), evaluation_of(GOOD))["confidence"] == 1  # no threshold at all


def test_every_verdict_that_holds_has_its_own_finding():
    repeated = [{"memorised": True, "longest_overlap_num_tokens": 57}]
    found = judge(GOOD, evaluation_of(GOOD, half_width=0.2), samples=repeated)
    assert found["verdicts"] == [finding["verdict"] for finding in found["findings"]]
    assert found["verdicts"] == ["validation_too_small", "memorising"]
    for finding in found["findings"]:
        assert set(finding) == {"verdict", "because", "confidence", "advice", "guide"}
        assert finding["guide"] == f"docs/guide.md#{finding['verdict']}" and 0 < finding["confidence"] <= 1
    assert found | found["findings"][0] == found


# --- while training goes on ----------------------------------------------------------------------------------------


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    with file.open("a") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def test_the_verdicts_so_far_are_those_of_the_rows_so_far_however_often_one_looks(tmp_path: Path):
    file = tmp_path / "train.jsonl"
    often, seen = diagnose.Watch(file, THRESHOLDS), []
    for first in range(0, len(GOOD), 20):
        write(file, GOOD[first : first + 20])
        seen.append(often.look()[1])
        assert seen[-1] == diagnose.Watch(file, THRESHOLDS).look()[1]  # as after resuming
    assert seen[0] == []  # one evaluation is no curve
    assert seen[1] == ["still_improving"] and seen[-1] == ["healthy"]


def test_while_training_goes_on_the_interval_of_the_last_evaluation_counts(tmp_path: Path):
    wide = [row | ({"validation_loss_ci95": [1.0, 9.0]} if "validation_loss" in row else {}) for row in GOOD]
    write(tmp_path / "train.jsonl", wide)
    assert "validation_too_small" in diagnose.Watch(tmp_path / "train.jsonl", THRESHOLDS).look()[1]


def test_validation_far_below_training_is_suspect_while_training_goes_on(tmp_path: Path):
    rows = [dict(row) for row in GOOD]
    for row in rows:
        if "validation_loss" in row:
            row["train_eval_loss"] = row["validation_loss"] + 0.3
            row["validation_loss_ci95"] = [0.0, row["validation_loss"] + 0.2]
    write(tmp_path / "train.jsonl", rows)
    looked, verdicts = diagnose.Watch(tmp_path / "train.jsonl", THRESHOLDS).look()
    assert "leakage_suspected" in verdicts and looked.gap_high == pytest.approx(-0.1)


@pytest.mark.parametrize("damage", [b"zzz\n", b"[]\n", b"3\n", b'{"stop": 1}\n', b"\xff\n"])
def test_rows_that_somebody_changes_have_no_verdict_and_stop_nothing(tmp_path: Path, damage: bytes):
    write(tmp_path / "train.jsonl", GOOD)
    watch = diagnose.Watch(tmp_path / "train.jsonl", THRESHOLDS)
    assert watch.look()[1] == ["healthy"]
    with (tmp_path / "train.jsonl").open("ab") as file:
        file.write(damage)
    assert watch.look()[1] == []
    assert diagnose.Watch(tmp_path / "nowhere.jsonl", THRESHOLDS).look()[1] == []
