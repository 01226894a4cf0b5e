"""What the gate refuses, each check by itself."""

import math

import pydantic
import pytest

from pipeline import gate, rules, stage
from pipeline.significance import Comparison
from tests.tiny import ROOT


@pytest.fixture
def limits(monkeypatch):
    monkeypatch.chdir(ROOT)
    return stage.load_params()["publish"].gate


def evaluation(loss=3.0, unigram=6.0, initial=5.0):
    return {"test": {"loss": loss}, "baselines": {"test": {"unigram": unigram, "initial": initial, "last": 2.9}}}


def leakage(**changes):
    counts = {"num_documents": 200, "num_tokens": 1000, "near_duplicate_documents": 0, "ngram_tokens": 0}
    sides = {side: dict(counts) for side in ("validation", "test")}
    for name, value in changes.items():
        side, _, key = name.partition("_")
        sides[side][key] = value
    return {"ngram_size": 13, **sides}


@pytest.mark.parametrize(
    ("agrees", "losses"),
    [
        (True, {}),
        (True, {"initial": None}),  # a baseline that is not finite is beaten
        (False, {"loss": 5.5}),
        (False, {"loss": 7.0}),
        (False, {"loss": 6.5, "initial": 9.0}),
        (False, {"loss": 5.0}),
        (False, {"loss": None}),
    ],
)
def test_the_first_champion_beats_what_was_not_trained(agrees, losses):
    assert gate.beats_baselines(evaluation(**losses)).agrees is agrees


def test_a_champion_of_pretrained_weights_is_better_than_they_were():
    finding = gate.beats_baselines(evaluation(loss=3.001, initial=3.0))
    assert not finding.agrees and "initial 3.0000" in finding.sentence


@pytest.mark.parametrize(
    ("low", "high", "agrees", "word"),
    [(-0.3, -0.1, True, "Better"), (-0.3, 0.1, False, "may be chance"), (0.1, 0.3, False, "Worse")],
)
def test_only_an_improvement_beyond_chance_agrees(low, high, agrees, word):
    finding = gate.improves(Comparison((low + high) / 2, low, high, "nats per token", 455), "7")
    assert finding.agrees is agrees
    assert word in finding.sentence and "version 7" in finding.sentence and "455" in finding.sentence


@pytest.mark.parametrize(
    ("changes", "agrees"),
    [
        ({}, True),
        ({"test_near_duplicate_documents": 2}, True),
        ({"test_near_duplicate_documents": 3}, False),
        ({"validation_near_duplicate_documents": 3}, False),
        ({"test_ngram_tokens": 250}, True),
        ({"test_ngram_tokens": 251}, False),
        ({"validation_ngram_tokens": 251}, False),
    ],
)
def test_leakage_of_any_kind_on_either_side_is_refused_from_its_limit_on(limits, changes, agrees):
    limits = limits.model_copy(update={"max_near_duplicates": 0.01, "max_ngram_tokens": 0.25})
    finding = gate.is_clean(leakage(**changes), limits)
    assert finding.agrees is agrees
    assert finding.sentence.startswith("No leakage" if agrees else "Leakage")


def test_a_refused_verdict_is_refused_also_when_it_is_not_the_primary_one(limits):
    assert gate.is_sound({"verdicts": ["plateau"]}, limits).agrees
    finding = gate.is_sound({"verdicts": ["plateau", "leakage_suspected"]}, limits)
    assert not finding.agrees and "leakage_suspected" in finding.sentence and "plateau" not in finding.sentence


def test_a_verdict_that_does_not_exist_is_refused_by_its_name(limits):
    with pytest.raises(pydantic.ValidationError, match="no verdict is called overfiting; there are non_finite, "):
        gate.Limits.model_validate(limits.model_dump() | {"refused_verdicts": ["overfiting"]})
    every = [rule.verdict for rule in rules.RULES]
    assert gate.Limits.model_validate(limits.model_dump() | {"refused_verdicts": every}).refused_verdicts == every


def test_damaged_files_are_refused_and_named():
    assert gate.is_whole([], 12).agrees
    finding = gate.is_whole([f"{letter} changed" for letter in "abcdef"], 12)
    assert not finding.agrees
    assert finding.sentence == "Verification failed: a changed, b changed, c changed, ...."


@pytest.mark.parametrize(
    ("recorded", "measured", "agrees"),
    [(3.0, 3.0, True), (3.0, 3.0005, True), (3.0, 3.002, False), (3.0, 2.9, False), (3.0, math.nan, False),
     (None, 3.0, False), (None, math.nan, False)],
)  # fmt: skip
def test_a_loss_that_comes_out_otherwise_is_refused(limits, recorded, measured, agrees):
    limits = limits.model_copy(update={"max_loss_difference": 1e-3})
    assert gate.is_reproduced(recorded, measured, limits).agrees is agrees
