"""The form of a run with overrides on Prefect's pages: a field a parameter, with the help that params.yaml has."""

import pytest

from flows import overrides
from tests.closure import ROOT


@pytest.fixture
def definitions(monkeypatch):
    monkeypatch.chdir(ROOT)
    schema = overrides.form().model_json_schema()
    return {"": schema} | schema["$defs"]


def test_a_parameter_is_one_field_named_by_its_key_with_the_comment_and_the_present_value(definitions):
    assert definitions["train"]["properties"]["learning_rate"] == {
        "title": "train.learning_rate",
        "description": "peak; 5e-5 suits fine-tuning, 5e-4 to 3e-3 a small model from scratch. Now 0.002.",
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": 1,
    }
    assert definitions["scratch"]["properties"]["embedding_size"]["title"] == "train.scratch.embedding_size"


def test_comments_above_a_key_are_its_own_and_not_those_of_the_key_before(definitions):
    of = {name: field["description"] for name, field in definitions["publish"]["properties"].items()}
    assert of["registered_model"] == "Name of the MLflow registered model. Now gpt2-pipeline."
    assert of["auto_promote"].startswith("At the end of the pipeline, its model becomes the champion")
    assert of["gate"].startswith("Besides a better test loss: what a champion must be. refused_verdicts, ")


def test_a_section_opens_with_a_button_and_names_its_parameters(definitions):
    train = definitions[""]["properties"]["train"]
    assert train["anyOf"] == [{"$ref": "#/$defs/train"}, {"type": "null"}]
    assert "learning_rate" in train["description"]
    assert definitions["train"]["title"] == definitions[""]["title"] == "change"


def test_what_the_form_sends_is_what_was_filled_in(monkeypatch):
    monkeypatch.chdir(ROOT)
    sent = {"ingest": None, "train": {"scratch": None, "micro_batch_size": None, "learning_rate": 0.003}}
    assert overrides.flat(overrides.form().model_validate(sent)) == {"train.learning_rate": 0.003}
