"""Promotion from end to end: models that are published, compared, loaded back and measured, in a real MLflow store."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline import champions, corpus, evaluate, evidence, files, promote, publish, stage, tracking
from pipeline.stage import Refusal
from tests import result
from tests.test_publish import View, state

pytestmark = pytest.mark.slow


@pytest.fixture
def here(texts, tmp_path, monkeypatch):
    """A copy of it, as the current folder."""
    monkeypatch.chdir(shutil.copytree(texts, tmp_path / "here"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "here"


@pytest.fixture(scope="module")
def with_champion(texts, tmp_path_factory):
    """A copy in which a mediocre model is champion; shared, for publishing takes a second."""
    folder = tmp_path_factory.mktemp("champion") / "here"
    shutil.copytree(texts, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        by_hand(publish_it(0.5))
    return folder


@pytest.fixture
def beside_a_champion(with_champion, tmp_path, monkeypatch):
    """That copy as the current folder; in the end all files, except MLflow's database, are what they were."""
    monkeypatch.chdir(with_champion)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(with_champion, tmp_path / "before", ignore=shutil.ignore_patterns("mlflow.db"))
    yield with_champion
    shutil.copytree(tmp_path / "before", with_champion, dirs_exist_ok=True)


def write(skill, seed=0, verdicts=("healthy",), loss_error=0.0):
    """A model that knows how frequent every token is, the better the nearer its skill is to 1; and what evaluate
    would write of it, worked out by hand."""
    tokens = corpus.load(Path("data/tokens"))
    counts = np.bincount(tokens.tokens, minlength=tokens.vocabulary_size) + 1.0
    counts[tokens.end_id] += tokens.num_documents
    logits = skill * np.log(counts)
    best = Path("models/best")
    shutil.rmtree(best)
    result.write_model(best, Path("data/tokens/tokenizer"), tokens.vocabulary_size, seed)
    weights = load_file(best / "model.safetensors")
    weights["transformer.ln_f.weight"][:] = 0
    weights["transformer.ln_f.bias"][:] = np.eye(1, len(weights["transformer.ln_f.bias"]))
    weights["transformer.wte.weight"][:, 0] = logits
    save_file(weights, best / "model.safetensors", metadata={"format": "pt"})

    nats_V = np.log(np.exp(logits).sum()) - logits
    measured = {}
    for side in evaluate.HELD_OUT:
        documents = np.load(f"data/split/{side}.npy")
        nats = np.array([nats_V[tokens.document(i)].sum() + nats_V[tokens.end_id] for i in documents])
        measured[side] = SimpleNamespace(documents=documents, nats=nats, num_tokens=tokens.lengths[documents] + 1)
    evaluate.write_documents(Path("reports/documents.parquet"), tokens, measured)
    evaluation = files.read_json(Path("reports/evaluation.json"))
    for side, losses in measured.items():
        evaluation[side]["loss"] = float(losses.nats.sum() / losses.num_tokens.sum()) + loss_error
        evaluation["baselines"][side] = {"unigram": 5.4, "initial": 5.5}
    files.write_json(Path("reports/evaluation.json"), evaluation)
    diagnosis = files.read_json(Path("reports/diagnostics.json"))
    files.write_json(Path("reports/diagnostics.json"), diagnosis | {"verdict": verdicts[0], "verdicts": list(verdicts)})


def publish_it(*arguments, auto_promote=False, **keywords):
    """Write a model and publish it; the number of its version."""
    write(*arguments, **keywords)
    with automatic() if auto_promote else contextlib.nullcontext():
        result.publish_here()
    return View().challenger


def automatic():
    return result.edited(Path("params.yaml"), "auto_promote: false", "auto_promote: true")


def known():
    view = View()
    return champions.Champions(view.store, view.model)


def champion():
    return known().holder("champion")


def by_hand(number):
    known().client.set_registered_model_alias(View().model, "champion", number)


def refusal(number=None):
    with pytest.raises(Refusal) as refused:
        promote.promote(number)
    return str(refused.value)


def test_the_first_model_becomes_champion_at_the_end_of_the_pipeline(here, capsys):
    assert publish_it(0.5, auto_promote=True) == champion() == "1"
    told = capsys.readouterr().out
    assert "publish: version 1 of 'gpt2-pipeline' is the champion now:" in told
    version = known().version("1")
    assert version.tags["pipeline.promotion"] == "promoted"
    reasons = version.tags["pipeline.promotion_reasons"]
    assert told.endswith("".join(f"\n  {line}" for line in reasons.splitlines()) + "\n")
    for word in ("The first champion", "No leakage", "No refused verdict", "Verified", "Loaded back"):
        assert f"\n{word}" in f"\n{reasons}" and f"\n- {word}" in version.description
    with automatic():
        before = state(here)
        result.publish_here()
        publish.ensure()
    assert state(here) == before


def test_a_better_model_replaces_the_champion_and_a_rollback_brings_it_back(here):
    publish_it(0.5, auto_promote=True)
    assert publish_it(1.0, auto_promote=True) == champion() == "2"
    assert "Better than champion version 1: -" in known().version("2").tags["pipeline.promotion_reasons"]
    assert known().state("1") == "replaced"
    environment = os.environ | {"PYTHONPATH": str(result.ROOT)}
    command = [sys.executable, "-m", "pipeline.promote"]
    back = subprocess.run([*command, "--rollback"], env=environment, capture_output=True, text=True)
    assert back.stdout == "promote: version 1 of 'gpt2-pipeline' is the champion again instead of version 2\n"
    assert (back.returncode, back.stderr, champion()) == (0, "", "1")
    with pytest.raises(Refusal, match="no champion to go back to"):
        promote.roll_back()
    refused = subprocess.run([*command, "--version", "9"], env=environment, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (1, "") and re.fullmatch(r"promote: .*9.*\n", refused.stderr)
    with automatic():
        result.publish_here()
    assert champion() == "1", "what was rolled back does not come back by itself"
    assert "version 2 of 'gpt2-pipeline' is the champion now" in promote.promote(None), "but when asked for"


def test_a_first_model_that_learned_nothing_is_no_champion(here, capsys):
    publish_it(-0.5, auto_promote=True)
    assert champion() is None
    assert "does not become champion:\n  Its test loss" in capsys.readouterr().out


def leaking():
    report = files.read_json(Path("reports/leakage.json"))
    files.write_json(Path("reports/leakage.json"), report | {"test": report["test"] | {"near_duplicate_documents": 1}})


def damage():
    source = known().version(View().challenger).source
    (file,) = Path("mlartifacts").glob(f"**/{source.removeprefix('models:/')}/**/model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def drop(name, number=None):
    def remove():
        run_id = known().version(number or View().challenger).run_id
        (file,) = Path("mlartifacts").glob(f"**/{run_id}/**/{name}")
        file.unlink()

    return remove


def other_text():
    np.save("data/tokens/hashes.npy", np.arange(result.NUM_TEXTS, dtype=np.uint64) + 1000)


def nothing():
    """Leave everything as it is."""


@pytest.mark.parametrize(
    ("before", "keywords", "after", "reason"),
    [
        (nothing, {"skill": 0.5}, nothing, "Not better than champion version 1: .* which may be chance"),
        (nothing, {"skill": 0.3}, nothing, "Worse than champion version 1: "),
        (leaking, {}, nothing, "Leakage: .* 100.00% of the test documents"),
        (nothing, {"verdicts": ("plateau", "non_finite")}, nothing, "The verdict non_finite is refused"),
        (nothing, {}, damage, "Verification failed: data/best/model.safetensors changed"),
        (nothing, {"loss_error": 0.01}, nothing, "Loaded back from the registry, its test loss is .* was recorded"),
        (nothing, {}, drop("leakage.json"), r"cannot be judged: the run of version \d+ has no leakage.json in MLflow"),
        (nothing, {}, drop("documents.parquet", "1"), "the run of version 1 has no documents.parquet in MLflow"),
        (nothing, {}, other_text, "data/tokens holds 0 of its 20 test documents in the same tokens"),
        (nothing, {}, lambda: shutil.rmtree("data/tokens"), "there is no data/tokens; restore it with `dvc checkout`"),
    ],
    ids=[
        "equal",
        "worse",
        "leakage",
        "verdict",
        "damage",
        "another loss",
        "no report",
        "no report of the champion",
        "text",
        "no text",
    ],
)
def test_a_model_is_refused_for_any_one_reason_which_is_written_on_it(
    beside_a_champion, before, keywords, after, reason
):
    before()
    number = publish_it(**{"skill": 1.0, "seed": len(View().versions)} | keywords)
    after()
    assert re.search(reason, refusal())
    assert (champion(), View().challenger) == ("1", number)
    version = known().version(number)
    assert version.tags["pipeline.promotion"] == "refused"
    for text in (version.description, version.tags["pipeline.promotion_reasons"]):
        assert re.search(reason, text) and str(beside_a_champion) not in text
    assert version.description.startswith("Verdict: ")


def test_a_person_who_moves_the_alias_is_obeyed(here, capsys):
    publish_it(0.5, auto_promote=True)
    publish_it(1.0, auto_promote=True)
    by_hand("1")
    with automatic():
        result.publish_here()
    assert champion() == "1"
    assert known().state("1") == "chosen by hand" and known().state("2") == "withdrawn"
    assert "A person made version 1 the champion, in MLflow." in capsys.readouterr().out
    known().client.delete_registered_model_alias(View().model, "champion")
    publish_it(1.1, auto_promote=True)
    assert champion() is None, "who takes the alias away wants no champion"
    assert "a person took the alias away" in capsys.readouterr().out
    assert "is the champion now" in promote.promote("3"), "but when asked for, the gate decides"


def test_a_move_while_the_gate_looks_is_not_undone(beside_a_champion, monkeypatch):
    number = publish_it(1.0, seed=99)
    real = evidence.judge

    def judge(*arguments):
        found = real(*arguments)
        by_hand(number)
        return found

    monkeypatch.setattr(evidence, "judge", judge)
    assert "was moved meanwhile" in refusal()
    assert champion() == number and known().state(number) is None
    by_hand("1")


def test_what_cannot_be_promoted_is_one_sentence(here):
    with tracking.problems():
        assert refusal() == "MLflow has no registered model 'gpt2-pipeline' yet; run `dvc repro`"
    publish_it(0.5)
    assert refusal("7") == "'gpt2-pipeline' has no version 7; there are: 1"
    assert stage.load_params()["publish"].auto_promote is False
