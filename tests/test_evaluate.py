import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydantic
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline import bootstrap, corpus, evaluate, files, losses, model, stage
from pipeline.losses import DocumentLosses
from tests import tiny

ROOT = Path(__file__).parent.parent
BASE = model.Params(base="scratch", revision=None)
SECTION = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")["evaluate"] | {"bootstrap_samples": 200}
PARAMS = evaluate.Params.model_validate(SECTION)
TRAIN = tiny.params(evaluation_documents=30, seed=5)
NUM_DOCUMENTS = 150
LEAKED = {
    "num_documents": 30, "num_tokens": 600, "exact_documents": 0, "near_duplicate_documents": 0, "ngram_documents": 3,
    "ngram_tokens": 60,
}  # fmt: skip
SAMPLE = {"memorised": False, "longest_overlap_num_tokens": 7}


pytestmark = pytest.mark.usefixtures("one_thread")


def rows() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"step": 0, "epoch": 0.0, "num_tokens": 0, "train_eval_loss": 4.2, "validation_loss": 4.2}
    ]
    for step in range(1, 13):
        row = {"step": step, "epoch": step / 6, "loss": 4.2 - step / 10, "learning_rate": 1e-2 / step, "grad_norm": 1.0}
        row["num_tokens"] = 100 * step
        if step % 3 == 0:
            row |= {"train_eval_loss": 4.2 - step / 10, "validation_loss": 4.2 - step / 12}
        made.append(row)
    return made


def write_model(folder: Path, tokens: corpus.Corpus, seed: int) -> None:
    model.initial_model(BASE, tiny.params(seed=seed), tokens).save_pretrained(folder)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What evaluate reads, below a folder."""
    folder = tmp_path_factory.mktemp("inputs")
    lengths = np.random.default_rng(0).integers(3, 40, NUM_DOCUMENTS).tolist()
    tokens = tiny.write_tokens(folder / "data" / "tokens", lengths)
    tiny.write_split(folder / "data" / "split", NUM_DOCUMENTS)
    write_model(folder / "models" / "best", tokens, seed=1)
    write_model(folder / "models" / "last", tokens, seed=2)
    files.write_text(folder / "reports" / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows()))
    files.write_json(folder / "reports" / "leakage.json", {"validation": LEAKED, "test": LEAKED})
    files.write_text(folder / "reports" / "samples.jsonl", json.dumps(SAMPLE) + "\n")
    return folder


def paths_in(folder: Path) -> dict[str, Path]:
    return {
        name: folder / path for name, path in stage.paths_of(stage.read_stages(ROOT / "dvc.yaml")["evaluate"]).items()
    }


def run(inputs: Path, folder: Path) -> dict[str, Path]:
    """Evaluate a copy of the inputs."""
    shutil.copytree(inputs, folder)
    paths = paths_in(folder)
    evaluate.main(paths, evaluate=PARAMS, model=BASE, train=TRAIN)
    return paths


@pytest.fixture(scope="module")
def outputs(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run(inputs, tmp_path_factory.mktemp("outputs") / "run")


def test_both_sides_have_the_numbers_of_the_contract_and_they_agree(outputs: dict[str, Path]):
    evaluation = files.read_json(outputs["evaluation.json"])
    tokens = corpus.load(outputs["tokens"])
    for side in ("validation", "test"):
        found, documents = evaluation[side], np.load(outputs["split"] / f"{side}.npy")
        assert found["num_documents"] == len(documents) == 30
        assert found["num_tokens"] == tokens.lengths[documents].sum() + 30
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        bits = found["loss"] * found["num_tokens"] / math.log(2)
        assert found["bits_per_byte"] == pytest.approx(bits / tokens.num_bytes[documents].sum())
        low, high = found["loss_ci95"]
        assert low < found["loss"] < high
        assert 0 < found["calibration_error"] < 1
    assert "calibration_error" not in evaluation["train"]
    assert evaluation["verdict"] == files.read_json(outputs["diagnostics.json"])["verdict"]


def test_the_losses_are_those_of_each_model_on_the_same_documents_in_float32(outputs: dict[str, Path]):
    evaluation, tokens = files.read_json(outputs["evaluation.json"]), corpus.load(outputs["tokens"])
    for side in ("validation", "test"):
        documents = np.load(outputs["split"] / f"{side}.npy")
        for seed, found in (
            (1, evaluation[side]["loss"]),
            (2, evaluation["baselines"][side]["last"]),
            (5, evaluation["baselines"][side]["initial"]),
        ):
            expected = measure(model.initial_model(BASE, tiny.params(seed=seed), tokens), tokens, documents)
            assert found == pytest.approx(expected.mean, rel=1e-6)


def measure(made: Any, tokens: corpus.Corpus, documents: np.ndarray) -> DocumentLosses:
    return losses.measure(
        made,
        tokens,
        documents,
        max_length=TRAIN.max_length,
        batch_size=1,
        device=torch.device("cpu"),
    )


def test_every_held_out_document_has_a_row_that_adds_up_to_the_loss(outputs: dict[str, Path]):
    evaluation, tokens = files.read_json(outputs["evaluation.json"]), corpus.load(outputs["tokens"])
    table = pq.read_table(outputs["documents.parquet"]).to_pydict()
    for side in ("validation", "test"):
        chosen = [row for row, its_side in enumerate(table["side"]) if its_side == side]
        nats, num_tokens = (sum(table[key][row] for row in chosen) for key in ("nats", "num_tokens"))
        assert nats / num_tokens == pytest.approx(evaluation[side]["loss"], rel=1e-12)
        documents = [table["document"][row] for row in chosen]
        assert documents == np.load(outputs["split"] / f"{side}.npy").tolist()
        assert [int(table["hash"][row], 16) for row in chosen] == tokens.hashes[documents].tolist()
        assert [table["num_bytes"][row] for row in chosen] == tokens.num_bytes[documents].tolist()


def test_evaluating_again_gives_the_same_bytes(inputs: Path, outputs: dict[str, Path], tmp_path: Path):
    again = run(inputs, tmp_path / "elsewhere")
    pictures = ("loss_curve.png", "document_losses.png", "calibration.png")
    for name in ("evaluation.json", "diagnostics.json", "documents.parquet", "curves", *pictures):
        assert files.sha256_of(again[name]) == files.sha256_of(outputs[name]), name


def test_the_lines_printed_say_losses_perplexities_and_the_verdict(
    outputs: dict[str, Path], capsys: pytest.CaptureFixture[str]
):
    evaluation = files.read_json(outputs["evaluation.json"])
    print(evaluate.describe(evaluation, files.read_json(outputs["diagnostics.json"])))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"evaluate: validation loss {evaluation['validation']['loss']:.3f}, perplexity ")
    assert lines[1].startswith("evaluate: test loss ") and "95 % interval" in lines[1]
    assert lines[2].startswith(f"evaluate: {evaluation['verdict']}. ")


def test_a_run_whose_last_weights_are_its_best_says_so_in_equal_losses(inputs: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(inputs, folder)
    shutil.rmtree(folder / "models" / "last")
    shutil.copytree(folder / "models" / "best", folder / "models" / "last")
    paths = paths_in(folder)
    evaluate.main(paths, evaluate=PARAMS, model=BASE, train=TRAIN)
    evaluation = files.read_json(paths["evaluation.json"])
    for side in ("validation", "test"):
        assert evaluation["baselines"][side]["last"] == evaluation[side]["loss"]


def test_weights_that_are_not_numbers_are_reported_and_not_a_crash(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "run"
    shutil.copytree(inputs, folder)
    paths = paths_in(folder)
    broken = model.load_trained(paths["best"])
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(math.nan)
    broken.save_pretrained(paths["best"])
    evaluate.main(paths, evaluate=PARAMS, model=BASE, train=TRAIN)
    test = files.read_json(paths["evaluation.json"])["test"]
    assert test["loss"] is None and test["calibration_error"] is None
    assert files.read_json(paths["diagnostics.json"])["verdict"] == "non_finite"
    assert "no finite perplexity" in capsys.readouterr().out


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.data())
def test_token_counts_are_the_same_whatever_the_size_of_a_block(lengths: list[int], data: st.DataObject):
    random = np.random.default_rng(sum(lengths))
    tokens = corpus.Corpus(
        tokens=random.integers(0, 9, sum(lengths)).astype(np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        num_bytes=np.asarray(lengths),
        hashes=np.arange(len(lengths), dtype=np.uint64),
        vocabulary_size=10,
        start_id=9,
        end_id=9,
    )
    documents = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    expected = Counter(token for document in documents for token in [*tokens.document(int(document)).tolist(), 9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "TOKENS_AT_ONCE", data.draw(st.integers(1, 40)))
        assert evaluate.token_counts(tokens, documents).tolist() == [expected[token] for token in range(10)]


def test_the_unigram_model_is_smoothed_word_frequencies(outputs: dict[str, Path]):
    tokens = corpus.load(outputs["tokens"])
    train, test = (np.load(outputs["split"] / f"{side}.npy") for side in ("train", "test"))
    seen = Counter(t for document in train for t in [*tokens.document(int(document)).tolist(), tokens.end_id])
    chances = {t: (seen[t] + 1) / (seen.total() + tiny.VOCABULARY_SIZE) for t in range(tiny.VOCABULARY_SIZE)}
    assert sum(chances.values()) == pytest.approx(1)
    predicted = [t for document in test for t in [*tokens.document(int(document)).tolist(), tokens.end_id]]
    expected = -sum(math.log(chances[t]) for t in predicted) / len(predicted)
    found = files.read_json(outputs["evaluation.json"])["baselines"]["test"]["unigram"]
    assert found == pytest.approx(expected, rel=1e-9)


def documents_of(num_documents: int, num_tokens: int = 10) -> DocumentLosses:
    nats = np.random.default_rng(0).normal(30, 5, num_documents)
    return DocumentLosses(np.arange(num_documents), nats, np.full(num_documents, num_tokens))


def test_the_interval_is_as_wide_as_theory_says():
    found = documents_of(400)
    low, high = bootstrap.interval(bootstrap.means(found.nats, found.num_tokens, 4000, (1, 0)))
    assert low is not None and high is not None
    # Documents of equal length: the mean of 400 normal numbers, whose standard error is known.
    expected = 2 * 1.96 * found.nats.std() / 10 / math.sqrt(400)
    assert high - low == pytest.approx(expected, rel=0.06)
    assert (low + high) / 2 == pytest.approx(found.mean, abs=0.02)


def test_long_documents_weigh_as_much_in_the_interval_as_in_the_loss():
    found = documents_of(400)
    long = DocumentLosses(found.documents, np.where(found.documents < 40, 200.0, 30.0), found.num_tokens.copy())
    long.num_tokens[:40] = 200  # a tenth of the documents, with one nat a token where the others have three
    low, high = bootstrap.interval(bootstrap.means(long.nats, long.num_tokens, 1000, (1, 0)))
    assert low is not None and high is not None
    assert long.mean == pytest.approx((40 * 200 + 360 * 30) / (40 * 200 + 360 * 10))
    assert low < long.mean < high < 2


def test_sides_are_resampled_independently(outputs: dict[str, Path]):
    tokens = corpus.load(outputs["tokens"])
    same = {side: documents_of(100) for side in ("validation", "test", "train")}
    none: dict[str, dict[str, float]] = {"validation": {}, "test": {}}
    gap = evaluate.evaluation_of(tokens, same, {}, none, PARAMS)["generalisation_gap"]
    assert gap["loss"] == 0
    low, high = gap["loss_ci95"]
    # Two independent means of 100 numbers: the standard error of their difference is known.
    assert high - low == pytest.approx(2 * 1.96 * same["train"].nats.std() / 10 * math.sqrt(2 / 100), rel=0.3)


def test_the_bootstrap_is_a_function_of_its_key():
    found = documents_of(50)

    def means(*key):
        return bootstrap.means(found.nats, found.num_tokens, 100, key).tolist()

    assert means(1, 0) == means(1, 0)
    assert means(1, 0) != means(1, 1)


@pytest.mark.parametrize(
    "change", [{"batch_size": 0}, {"bootstrap_samples": 10}, {"thresholds": {}}, {"seed": -1}, {"flat_slope": 0.1}]
)
def test_parameters_out_of_range_are_refused(change: dict[str, Any]):
    with pytest.raises(pydantic.ValidationError):
        evaluate.Params.model_validate(SECTION | change)


@pytest.mark.slow
def test_dvc_shows_metrics_in_columns_and_four_plots_with_their_titles(outputs: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "repository"
    shutil.copytree(outputs["best"].parents[1], folder)
    yaml = YAML(typ="safe", pure=True)
    definition = yaml.load(ROOT / "dvc.yaml")
    definition["stages"] = {"evaluate": definition["stages"]["evaluate"] | {"params": [], "deps": []}}
    yaml.dump(definition, folder / "dvc.yaml")

    def dvc(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=folder,
            env=os.environ | {"DVC_NO_ANALYTICS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    dvc("init", "--no-scm", "--quiet")
    dvc("commit", "--force", "--quiet", "evaluate")
    shown = json.loads(dvc("metrics", "show", "--json"))[""]["data"]["reports/evaluation.json"]["data"]
    assert shown["verdict"] == files.read_json(outputs["diagnostics.json"])["verdict"]
    assert {"loss", "perplexity", "bits_per_byte"} <= shown["validation"].keys()
    dvc("plots", "show", "--out", "plots")
    page = (folder / "plots" / "index.html").read_text()
    for plot in definition["plots"]:
        for name, looks in plot.items():
            assert name in page
            if looks:
                assert f'"text": "{looks["title"]}"' in page and looks["y_label"] in page
    assert page.count("var spec") == 4
