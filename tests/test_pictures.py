import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from pipeline import drawing, held_out_pictures, pictures
from pipeline.calibration import NUM_BINS, Calibration
from pipeline.losses import DocumentLosses

EVALUATION: dict[str, Any] = {"baselines": {"validation": {"unigram": 5.5, "initial": 8.3, "last": 2.4}}}
DIAGNOSIS: dict[str, Any] = {
    "verdict": "still_improving",
    "because": "Validation loss is still going down. " * 8,
    "verdicts": ["still_improving"],
    "evidence": {"last_step": 60, "flat_since_step": 40, "spike_step": 31, "spike_height": 1.5},
}


def rows(num_steps: int = 60) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"step": 0, "num_tokens": 0, "train_eval_loss": 8.3, "validation_loss": 8.3}]
    for step in range(1, num_steps + 1):
        loss = 2 + 6 * math.exp(-step / 10)
        made.append({"step": step, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0, "num_tokens": 100 * step})
        if step % 10 == 0:
            made[-1] |= {"train_eval_loss": loss, "validation_loss": loss + 0.1}
    return made


def draw(path: Path, **changes: Any) -> bytes:
    pictures.loss_curve(**({"rows": rows(), "evaluation": EVALUATION, "diagnosis": DIAGNOSIS, "path": path} | changes))
    return path.read_bytes()


def measured(seed: int = 0, num_documents: int = 300) -> dict[str, DocumentLosses]:
    random = np.random.default_rng(seed)
    documents, num_tokens = np.arange(num_documents), random.integers(20, 200, num_documents)
    return {
        side: DocumentLosses(documents, num_tokens * random.gamma(20, 0.1, num_documents), num_tokens)
        for side in ("validation", "test", "train")
    }


def draw_documents(path: Path, **changes: DocumentLosses) -> bytes:
    held_out_pictures.document_losses(measured() | changes, path)
    return path.read_bytes()


def calibration(num_right: float = 0.8) -> Calibration:
    """Of each bin with its middle's confidence, so much is right as the confidence says, times `num_right`."""
    found, middles = Calibration(), (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    found.num_tokens[:] = 1000 * np.arange(NUM_BINS)
    found.num_right[:] = found.num_tokens * middles * num_right
    found.confidence[:] = found.num_tokens * middles
    return found


def draw_calibration(path: Path, **changes: float) -> bytes:
    held_out_pictures.reliability(calibration(**changes), path)
    return path.read_bytes()


def has_colour(file: Path, colour: str) -> bool:
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return bool((abs(imread(file)[:, :, :3] - wanted).max(axis=2) < 0.01).sum() > 20)


@pytest.mark.parametrize("drawn", [draw, draw_documents, draw_calibration])
def test_the_same_run_gives_the_same_bytes_whatever_the_users_settings_are(
    tmp_path: Path, drawn: Callable[[Path], bytes]
):
    import matplotlib

    first = drawn(tmp_path / "one.png")
    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red", "savefig.dpi": 10}):
        assert drawn(tmp_path / "two.png") == first
        assert matplotlib.rcParams["font.size"] == 40
    assert b"matplotlib" not in first.lower()


def test_the_picture_is_as_large_as_promised_and_shows_each_series_in_its_colour(tmp_path: Path):
    draw(tmp_path / "curve.png")
    assert imread(tmp_path / "curve.png").shape[:2] == (660, 1080)
    for colour in (drawing.BATCH, drawing.TRAIN, drawing.VALIDATION, drawing.BEST, drawing.BASELINE):
        assert has_colour(tmp_path / "curve.png", colour), colour


def test_another_verdict_or_another_best_step_is_another_picture(tmp_path: Path):
    usual = draw(tmp_path / "curve.png")
    worse = rows()
    worse[-1]["validation_loss"] += 1.0
    assert draw(tmp_path / "curve.png", diagnosis=DIAGNOSIS | {"verdict": "overfitting"}) != usual
    assert draw(tmp_path / "curve.png", rows=worse) != usual


@pytest.mark.parametrize("unigram, initial", [(None, 8.3), (5.5, None), (None, None), (5.5, 5.5)])
def test_missing_or_equal_baselines_still_give_a_picture(tmp_path: Path, unigram: float | None, initial: float | None):
    baselines = {"validation": {"unigram": unigram, "initial": initial, "last": 2.4}}
    assert draw(tmp_path / "curve.png", evaluation={"baselines": baselines}).startswith(b"\x89PNG")


def test_losses_that_are_not_finite_are_left_out_of_the_picture(tmp_path: Path):
    broken = rows()
    broken[-1] |= {"loss": math.nan, "validation_loss": math.inf}
    assert draw(tmp_path / "curve.png", rows=broken).startswith(b"\x89PNG")
    assert draw(tmp_path / "curve.png", rows=rows(1)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("verdict", "fact"), [("overfitting", {"flat_since_step": 20}), ("loss_spike", {"spike_step": 45})]
)
def test_overfitting_and_a_spike_are_shown_where_they_began_and_only_if_they_are_found(
    tmp_path: Path, verdict: str, fact: dict[str, int]
):
    usual, elsewhere = draw(tmp_path / "curve.png"), {"evidence": DIAGNOSIS["evidence"] | fact}
    assert draw(tmp_path / "curve.png", diagnosis=DIAGNOSIS | elsewhere) == usual
    found = {"verdicts": ["still_improving", verdict]}
    shown = draw(tmp_path / "curve.png", diagnosis=DIAGNOSIS | found)
    assert shown != usual
    assert draw(tmp_path / "curve.png", diagnosis=DIAGNOSIS | found | elsewhere) not in (usual, shown)


def test_the_losses_of_documents_are_those_of_validation_and_test_alone(tmp_path: Path):
    usual = draw_documents(tmp_path / "documents.png")
    for side, differs in (("validation", True), ("test", True), ("train", False)):
        assert (draw_documents(tmp_path / "documents.png", **{side: measured(seed=1)[side]}) != usual) is differs


@pytest.mark.parametrize("nats", [math.nan, 500.0])
def test_losses_that_are_all_the_same_or_no_numbers_still_give_a_picture(tmp_path: Path, nats: float):
    same = DocumentLosses(np.arange(3), np.full(3, nats), np.full(3, 100))
    some = DocumentLosses(np.arange(3), np.array([nats, 200.0, 300.0]), np.full(3, 100))
    assert draw_documents(tmp_path / "documents.png", validation=same, test=same).startswith(b"\x89PNG")
    assert draw_documents(tmp_path / "documents.png", validation=same, test=some).startswith(b"\x89PNG")


def test_the_diagram_shows_bars_their_confidence_and_another_model_differently(tmp_path: Path):
    usual = draw_calibration(tmp_path / "calibration.png")
    for colour in (drawing.TRAIN, drawing.VALIDATION, drawing.BASELINE):
        assert has_colour(tmp_path / "calibration.png", colour), colour
    assert draw_calibration(tmp_path / "calibration.png", num_right=0.7) != usual


def test_a_model_whose_probabilities_are_no_numbers_still_gives_a_diagram(tmp_path: Path):
    broken = calibration()
    broken.confidence[-1] = math.nan
    held_out_pictures.reliability(broken, tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
