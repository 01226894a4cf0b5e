"""Two models that differ by chance are equal, and a difference that is more than chance is found."""

import math
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import bootstrap, corpus, evaluate, losses, model, significance
from pipeline.losses import DocumentLosses
from pipeline.significance import Comparison
from pipeline.stage import Refusal
from tests import tiny
from tests.closure import ROOT

NUM_DOCUMENTS = 200  # every second one tests
NUM_TOKENS = np.random.default_rng(0).integers(20, 200, NUM_DOCUMENTS)
NUM_BYTES = 4 * NUM_TOKENS
HASHES = np.random.default_rng(1).integers(0, 2**64, NUM_DOCUMENTS, np.uint64)
SIDES = {"validation": np.arange(0, NUM_DOCUMENTS, 2), "test": np.arange(1, NUM_DOCUMENTS, 2)}


def a_model(seed: int = 0) -> npt.NDArray[np.float64]:
    """Nats of every document: some are far harder than others."""
    return NUM_TOKENS * np.random.default_rng(seed).normal(4.0, 1.5, NUM_DOCUMENTS)


def noise(seed: int, size: float) -> npt.NDArray[np.float64]:
    return NUM_TOKENS * np.random.default_rng(seed).normal(0.0, size, NUM_DOCUMENTS)


def write(
    path: Path,
    nats: npt.NDArray[np.float64],
    num_tokens: npt.NDArray[np.int64] = NUM_TOKENS,
    sides: dict[str, npt.NDArray[np.int64]] = SIDES,
) -> Path:
    """The file as the evaluate stage writes it."""
    tokens = corpus.Corpus(np.empty(0, np.uint16), np.zeros(1, np.int64), NUM_BYTES, HASHES, 300, 0, 0)
    measured = {side: DocumentLosses(chosen, nats[chosen], num_tokens[chosen]) for side, chosen in sides.items()}
    evaluate.write_documents(path, tokens, measured)
    return path


def compare(new: Path, old: Path, side: str = "test", seed: int = 1) -> Comparison:
    return significance.compare(new, old, side, num_samples=1000, seed=seed)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write(tmp_path / "old.parquet", a_model())


def test_two_models_that_differ_by_noise_are_called_equal(tmp_path: Path, old: Path) -> None:
    verdicts = [
        compare(write(tmp_path / "new.parquet", a_model() + noise(seed, 0.05)), old).verdict for seed in range(1, 41)
    ]
    assert verdicts.count("equal") >= 35  # 38 of 40 is what 95 % promise


def test_a_difference_far_smaller_than_that_between_documents_is_found(tmp_path: Path, old: Path) -> None:
    lower = write(tmp_path / "lower.parquet", a_model() - 0.02 * NUM_TOKENS + noise(1, 0.05))
    found = compare(lower, old)
    assert found.verdict == "better"
    assert found.low < found.difference < found.high < 0
    assert found.low < -0.02 < found.high
    assert (found.unit, found.num_documents) == ("nats per token", 100)
    turned = compare(old, lower)
    assert turned.verdict == "worse"
    assert turned.difference == pytest.approx(-found.difference)
    assert (turned.low, turned.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_a_model_is_equal_to_itself(old: Path) -> None:
    found = compare(old, old)
    assert (found.verdict, found.difference, found.low, found.high) == ("equal", 0, 0, 0)


def test_every_token_weighs_the_same(tmp_path: Path, old: Path) -> None:
    longest = SIDES["test"][np.argmax(NUM_TOKENS[SIDES["test"]])]
    nats = a_model()
    nats[longest] -= 50.0
    found = compare(write(tmp_path / "new.parquet", nats), old)
    assert found.difference == pytest.approx(-50 / NUM_TOKENS[SIDES["test"]].sum())
    assert found.verdict == "equal"  # one document is no evidence


def test_only_documents_that_both_measured_on_that_side_count_in_whatever_order(tmp_path: Path, old: Path) -> None:
    nats = a_model() - 0.02 * NUM_TOKENS + noise(1, 0.05)
    kept = SIDES["test"][20:]
    expected = compare(
        write(tmp_path / "1.parquet", nats, sides={"validation": SIDES["validation"], "test": kept}), old
    )
    assert expected.num_documents == 80
    moved = {"validation": np.concatenate([SIDES["validation"], SIDES["test"][:20]]), "test": kept[::-1]}
    nats[SIDES["validation"]] += 1e6
    assert compare(write(tmp_path / "2.parquet", nats, sides=moved), old) == expected


def test_the_same_seed_gives_the_same_interval(tmp_path: Path, old: Path) -> None:
    new = write(tmp_path / "new.parquet", a_model() + noise(1, 0.05))
    assert compare(new, old) == compare(new, old)
    assert compare(new, old) != compare(new, old, seed=2)


def test_how_many_documents_are_drawn_at_once_changes_nothing(tmp_path: Path, old: Path, monkeypatch) -> None:
    new = write(tmp_path / "new.parquet", a_model() + noise(1, 0.05))
    expected = compare(new, old)
    monkeypatch.setattr(bootstrap, "DRAWN_AT_ONCE", 150)
    assert compare(new, old) == expected


def test_models_with_different_tokens_are_compared_in_bits_per_byte(tmp_path: Path, old: Path) -> None:
    nats = a_model() - 0.1 * NUM_BYTES
    found = compare(write(tmp_path / "new.parquet", nats, num_tokens=NUM_TOKENS // 2), old)
    assert found.unit == "bits per byte"
    assert found.difference == pytest.approx(-0.1 / math.log(2))
    assert found.verdict == "better"


def test_hardly_a_document_in_common_is_refused(tmp_path: Path, old: Path) -> None:
    few = write(tmp_path / "few.parquet", a_model() - 1, sides=SIDES | {"test": SIDES["test"][:5]})
    with pytest.raises(Refusal, match="5 test documents in common, fewer than 6"):
        compare(few, old)
    assert compare(few, old, side="validation").num_documents == 100


def test_a_loss_that_is_not_finite_is_refused(tmp_path: Path, old: Path) -> None:
    nats = a_model()
    nats[SIDES["test"][3]] = math.nan
    for new, other in ((write(tmp_path / "nan.parquet", nats), old), (old, tmp_path / "nan.parquet")):
        with pytest.raises(Refusal, match=r"nan.parquet: 1 test documents have a loss that is not finite"):
            compare(new, other)


def test_a_file_that_is_none_is_refused_and_named(tmp_path: Path, old: Path) -> None:
    files = {"cut": old.read_bytes()[:-30], "empty": b"", "text": b"hash,nats\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pq.write_table(pa.table({"side": ["test"], "hash": ["0"]}), tmp_path / "columns")
    for name in (*files, "columns"):
        with pytest.raises(Refusal, match=rf"{name} is damaged or no table of document losses \("):
            compare(tmp_path / name, old)


def test_the_command_prints_one_line(tmp_path: Path, old: Path, monkeypatch, capsys) -> None:
    write(tmp_path / "new.parquet", a_model() - 0.02 * NUM_TOKENS)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["significance", str(tmp_path / "new.parquet"), str(old)])
    significance.main()
    assert capsys.readouterr().out == (
        f"significance: the test loss of {tmp_path}/new.parquet is better, -0.0200 nats per token "
        "(95 % interval -0.0200 to -0.0200, 100 documents)\n"
    )
    monkeypatch.setattr(sys, "argv", ["significance", str(tmp_path / "none.parquet"), str(old)])
    with pytest.raises(SystemExit) as ended:
        significance.main()
    assert ended.value.code == 1
    assert "none.parquet" in capsys.readouterr().err


@pytest.mark.slow
def test_real_weights_that_noise_moved_are_equal_and_trained_ones_are_better(tmp_path: Path) -> None:
    tokens = tiny.write_tokens(tmp_path / "tokens", [20, 12, 9, 30, 17] * 40)
    documents = np.arange(tokens.num_documents)
    sides = {"validation": documents[documents % 5 == 0], "test": documents[documents % 5 == 1]}
    weights = model.initial_model(model.Params(base="scratch", revision=None), tiny.params(dropout=0.0), tokens)

    def measured(name: str) -> Path:
        found = {
            side: losses.measure(weights, tokens, chosen, max_length=16, batch_size=8, device=torch.device("cpu"))
            for side, chosen in sides.items()
        }
        evaluate.write_documents(tmp_path / name, tokens, found)
        return tmp_path / name

    before = measured("before.parquet")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    moved = measured("moved.parquet")
    assert compare(moved, before).verdict == "equal"
    assert compare(moved, before).difference != 0

    optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-2)
    for step in range(20):
        ids_BT = torch.from_numpy(np.stack([tokens.document(5 * i + 2) for i in range(step % 5, 40, 5)]))
        weights(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert compare(measured("trained.parquet"), moved).verdict == "better"
