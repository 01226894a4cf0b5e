"""Golden losses: the digits of a tiny run, so that a change which moves a number says so.

    python -m tests.test_golden        # writes them anew for this numeric class; say in the commit by how much and why

On a numeric class without digits of its own, those of any other must come out up to rounding.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import device, model
from pipeline.loop import train_steps
from pipeline.trainer import make_trainer
from tests import tiny

FILE = Path(__file__).parent / "golden.json"
PRECISIONS = ("none", "bf16")


def losses(folder: Path, precision: str) -> list[float]:
    tokens = tiny.write_tokens(folder / precision, [3, 11, 7, 23, 9, 14] * 10)
    place = device.Place(torch.device("cpu"), precision)
    trainer = make_trainer(
        place, tokens, np.arange(60), model.Params(base="scratch", revision=None), tiny.params(num_epochs=3)
    )
    return [step.loss for step in train_steps(trainer, 0)]


def numeric_class(precision: str) -> str:
    return json.dumps(device.numeric_class(torch.device("cpu"), precision, 1), sort_keys=True)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_losses_of_a_tiny_run_are_the_golden_ones(tmp_path, precision):
    golden = json.loads(FILE.read_text(encoding="utf-8"))
    found = losses(tmp_path, precision)
    exact = golden.get(numeric_class(precision))
    if exact is not None:
        assert found == exact
    for digits in golden.values():
        assert found == pytest.approx(digits, rel=0.02)


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)  # as tests run
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        known |= {numeric_class(precision): losses(Path(folder), precision) for precision in PRECISIONS}
    FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
