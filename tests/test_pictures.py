import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from pipeline import pictures

EVALUATION: dict[str, Any] = {"baselines": {"validation": {"unigram": 5.5, "initial": 8.3, "last": 2.4}}}
DIAGNOSIS = {"verdict": "still_improving", "because": "Validation loss is still going down. " * 8}


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


def test_the_same_run_gives_the_same_bytes_whatever_the_users_settings_are(tmp_path: Path):
    import matplotlib

    first = draw(tmp_path / "one.png")
    with matplotlib.rc_context({"font.size": 40, "axes.facecolor": "red", "savefig.dpi": 10}):
        assert draw(tmp_path / "two.png") == first
        assert matplotlib.rcParams["font.size"] == 40
    assert b"matplotlib" not in first.lower()


def test_the_picture_is_as_large_as_promised_and_shows_each_series_in_its_colour(tmp_path: Path):
    draw(tmp_path / "curve.png")
    pixels = imread(tmp_path / "curve.png")[:, :, :3]
    assert pixels.shape[:2] == (660, 1080)
    for colour in (pictures.BATCH, pictures.TRAIN, pictures.VALIDATION, pictures.BEST, pictures.BASELINE):
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels - wanted).max(axis=2) < 0.01).sum() > 20, colour


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
