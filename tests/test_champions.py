"""The alias champion and its history, in a real MLflow database."""

import shutil

import pytest

from pipeline import tracking
from pipeline.champions import Champions
from pipeline.stage import Refusal

NAME = "a model"


@pytest.fixture
def known(database, tmp_path, monkeypatch):
    """A registered model with four versions, none of them champion."""
    shutil.copy(database, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with tracking.problems():
        store = tracking.Store("an experiment")
        store.client.create_registered_model(NAME)
        for number in range(1, 5):
            store.client.create_model_version(NAME, f"{tmp_path}/{number}", description=f"Model {number}.")
        yield Champions(store, NAME)


def by_hand(known, number):
    """What a person does in MLflow's pages; None takes the alias away."""
    if number is None:
        known.client.delete_registered_model_alias(NAME, "champion")
    else:
        known.client.set_registered_model_alias(NAME, "champion", number)


def promote(known, number):
    known.settle()
    known.crown(number, known.PROMOTED, ["It is better."])


def roll_back(known):
    known.settle()
    return known.roll_back()


def everything(known):
    versions = known.client.search_model_versions(f"name = '{NAME}'")
    return (
        known.holder("champion"),
        known.history,
        {version.version: (version.tags, version.description, version.last_updated_timestamp) for version in versions},
    )


def states(known):
    return [known.state(str(number)) for number in range(1, 5)]


def test_a_champion_is_known_by_its_alias_its_tags_and_its_description(known):
    known.crown("1", known.PROMOTED, ["It is better.", "It is sound."])
    assert (known.holder("champion"), known.history) == ("1", ["1"])
    version = known.version("1")
    assert version.tags == {
        "pipeline.promotion": "promoted",
        "pipeline.promotion_reasons": "It is better.\nIt is sound.",
    }
    assert version.description == "Model 1.\n\n### Promotion\n\nPromoted.\n\n- It is better.\n- It is sound."


def test_the_next_champion_replaces_it(known):
    promote(known, "1")
    promote(known, "3")
    assert (known.holder("champion"), known.history) == ("3", ["1", "3"])
    assert states(known) == ["replaced", None, "promoted", None]
    assert known.version("1").tags[known.REASONS] == "Version 3 replaced it."
    assert "It is better" not in known.version("1").description


def test_what_a_person_wrote_into_a_description_stays(known):
    known.note("1", known.REFUSED, ["It is worse."])
    text = known.version("1").description
    known.client.update_model_version(NAME, "1", f"For the shop.\n{text}")
    known.note("1", known.REFUSED, ["It is damaged."])
    assert known.version("1").description.startswith("For the shop.\nModel 1.\n\n### Promotion")
    assert known.version("1").description.count("###") == 1


def test_a_person_who_moves_the_alias_is_respected_and_recorded(known):
    promote(known, "1")
    promote(known, "2")
    by_hand(known, "1")
    known.settle()
    assert (known.holder("champion"), known.history) == ("1", ["1", "2", "1"])
    assert states(known) == ["chosen by hand", "withdrawn", None, None]
    assert "person made version 1" in known.version("2").tags[known.REASONS]
    assert "Chosen by hand." in known.version("1").description


def test_a_person_who_makes_the_first_champion_is_recorded(known):
    by_hand(known, "4")
    known.settle()
    assert (known.holder("champion"), known.history, known.state("4")) == ("4", ["4"], "chosen by hand")


def test_a_person_who_takes_the_alias_away_is_recorded_and_may_give_it_back(known):
    promote(known, "2")
    by_hand(known, None)
    known.settle()
    assert (known.holder("champion"), known.history, known.state("2")) == (None, ["2"], "withdrawn")
    by_hand(known, "2")
    known.settle()
    assert (known.holder("champion"), known.history, known.state("2")) == ("2", ["2"], "chosen by hand")


@pytest.mark.parametrize("moves", [[], ["1", "2"], [None]])
def test_settling_again_changes_nothing(known, moves):
    promote(known, "3")
    for number in moves:
        by_hand(known, number)
        known.settle()
    before = everything(known)
    known.settle()
    assert everything(known) == before


def test_rolling_back_goes_one_champion_back_each_time(known):
    for number in ("1", "2", "4"):
        promote(known, number)
    assert roll_back(known) == ("4", "2")
    assert (known.holder("champion"), known.history) == ("2", ["1", "2"])
    assert states(known) == ["replaced", "returned by rollback", None, "withdrawn"]
    assert roll_back(known) == ("2", "1")
    assert (known.holder("champion"), known.history) == ("1", ["1"])
    with pytest.raises(Refusal, match="no champion to go back to: version 1 is the only one"):
        roll_back(known)


def test_rolling_back_undoes_what_a_person_did_too(known):
    promote(known, "1")
    promote(known, "3")
    by_hand(known, "2")
    assert roll_back(known) == ("2", "3")
    by_hand(known, None)
    assert roll_back(known) == (None, "3")


def test_rolling_back_leaves_out_what_was_deleted(known):
    for number in ("1", "2", "3"):
        promote(known, number)
    known.client.delete_model_version(NAME, "2")
    assert roll_back(known) == ("3", "1")
    known.client.delete_model_version(NAME, "1")  # and the alias with it
    known.settle()
    assert known.holder("champion") is None
    with pytest.raises(Refusal, match="no champion to go back to"):
        roll_back(known)


def test_without_a_champion_there_is_nothing_to_go_back_to(known):
    with pytest.raises(Refusal, match="there never was one"):
        roll_back(known)


def test_a_version_or_a_model_that_is_not_there_is_refused(known):
    with pytest.raises(Refusal, match="has no version 9; there are: 1, 2, 3, 4"):
        known.version("9")
    with pytest.raises(Refusal, match=r"no registered model 'another' yet; run `dvc repro`"):
        Champions(known.store, "another")


class KilledError(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


WRITES = (
    "set_model_version_tag", "update_model_version", "set_registered_model_alias", "set_registered_model_tag"
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("action", [lambda known: promote(known, "3"), roll_back], ids=["promote", "roll_back"])
@pytest.mark.parametrize("number", range(1, 9))
def test_a_promotion_killed_at_any_write_is_completed_and_taken_for_nobodys_else(known, monkeypatch, action, number):
    promote(known, "1")
    promote(known, "2")
    left, originals = [number], {name: getattr(known.client, name) for name in WRITES}

    def counted(name):
        def call(*arguments):
            left[0] -= 1
            if left[0] == 0:
                raise KilledError
            return originals[name](*arguments)

        return call

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        for name in WRITES:
            patch.setattr(known.client, name, counted(name))
        action(known)
    known.settle()
    assert "chosen by hand" not in states(known)
    if known.holder("champion") == "2":
        action(known)
    if action is roll_back:
        assert (known.holder("champion"), known.history) == ("1", ["1"])
        assert states(known) == ["returned by rollback", "withdrawn", None, None]
    else:
        assert (known.holder("champion"), known.history) == ("3", ["1", "2", "3"])
        assert states(known) == ["replaced", "replaced", "promoted", None]
