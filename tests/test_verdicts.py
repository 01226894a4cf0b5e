"""Verdicts are right: on curves that a seed draws, and on real runs of this pipeline that were made to get them."""

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from bench import curves, recipes, synthetic, verdicts
from pipeline.thresholds import Thresholds
from tests.closure import ROOT

LIMITS = Thresholds.model_validate(YAML(typ="safe", pure=True).load(ROOT / "params.yaml")["evaluate"]["thresholds"])


def scores(cases):
    return verdicts.scored(cases, {name: verdicts.findings(curve, LIMITS) for name, curve in cases.items()})


@pytest.fixture(scope="module")
def scored():
    return {"drawn": scores(dict(synthetic.curves(verdicts.NUM_SYNTHETIC))), "recorded": scores(verdicts.recorded())}


@pytest.mark.parametrize("verdict", verdicts.VERDICTS)
@pytest.mark.parametrize(("kind", "fewest"), [("drawn", 10), ("recorded", 6)])
def test_at_least_95_in_100_are_right(scored, kind, fewest, verdict):
    score = scored[kind][verdict]
    assert len(score.right) + len(score.missed) >= fewest
    assert score.precision >= 0.95, score.wrong
    assert score.recall >= 0.95, score.missed


def test_there_are_enough_real_runs_each_with_the_label_of_its_recipe():
    labels = {recipe.name: recipe for recipe in recipes.recipes()}
    real = verdicts.recorded()
    assert len(real) >= 80 and set(real) <= set(labels)
    for name, curve in real.items():
        assert (set(curve["verdicts"]), set(curve["may"])) == (labels[name].verdicts, labels[name].may), name
    assert 0.25 < sum(map(verdicts.held_back, real)) / len(real) < 0.42


def test_the_page_has_the_table_that_comes_out(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["bench.verdicts"])
    verdicts.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(verdicts.VERDICTS)
    assert "\n".join(table) in verdicts.PAGE.read_text(encoding="utf-8")


def test_a_score_counts_what_is_wrong_and_what_is_missed_and_not_what_a_label_leaves_open():
    labels = {
        "a": {"verdicts": ["plateau"], "may": ["overfitting"]},
        "b": {"verdicts": ["plateau"], "may": []},
        "c": {"verdicts": ["healthy"], "may": ["plateau"]},
        "d": {"verdicts": ["healthy"], "may": []},
    }
    found = {"a": ["plateau", "overfitting"], "b": ["healthy"], "c": ["plateau", "healthy"], "d": ["plateau"]}
    scored = verdicts.scored(labels, found)
    assert (scored["plateau"].right, scored["plateau"].wrong, scored["plateau"].missed) == (["a"], ["d"], ["b"])
    assert scored["overfitting"].cells == ["0", "", ""]
    assert (scored["healthy"].precision, scored["healthy"].recall) == (0.5, 0.5)


def test_rows_come_back_from_their_columns():
    rows = [
        {"step": 0, "train_eval_loss": 2.0, "validation_loss": 2.5, "validation_loss_ci95": [2.0, 3.0]},
        {"step": 1, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0},
        {"step": 2, "learning_rate": 0.0},
    ]
    evaluations = curves.columns(rows[:1], curves.OF_EVALUATIONS)
    assert curves.rows_of({"steps": curves.columns(rows[1:], curves.OF_STEPS), "evaluations": evaluations}) == rows


@pytest.mark.slow
def test_a_recipe_becomes_a_curve(tmp_path: Path):
    """The quickest of them, in this process: all stages but publish, for real."""
    one = next(recipe for recipe in recipes.recipes() if recipe.name == "non_finite-0")
    curves.record(one, tmp_path / "curve.json")
    again = json.loads((tmp_path / "curve.json").read_text())
    assert again["verdicts"] == ["non_finite"]
    assert verdicts.findings(again, LIMITS) == {"non_finite": 1.0}
