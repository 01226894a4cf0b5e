"""significance: is one model better than another, or is the difference chance?

    python -m pipeline.significance NEW OLD

NEW and OLD are the documents.parquet of two evaluations: reports/documents.parquet of this checkout, an artifact of a
run in MLflow, a copy of your own. Prints one line about the test documents that both have measured.

Some documents are hard for every model, so two losses on the same documents go up and down together. Their difference
document by document is free of that: it is what is resampled (a paired bootstrap; Efron and Tibshirani 1993). One
model is better if the whole 95 % interval of its mean difference is below 0; else the two are equal as far as these
documents can tell. A document counts only where both files have it on the same side, so that neither model
has been trained on it.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline import bootstrap, stage
from pipeline.stage import Refusal

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Of five differences with the same sign, chance alone gives as much in 1 of 16 cases: more than 5 %.
MIN_DOCUMENTS = 6


@dataclass(frozen=True)
class Comparison:
    """The loss of a new model minus that of an old one: below 0, the new one is better."""

    difference: float
    low: float  # ends of the 95 % interval
    high: float
    unit: str
    num_documents: int

    @property
    def verdict(self) -> str:
        """What the interval says of the new model: better, worse or equal."""
        return "better" if self.high < 0 else "worse" if self.low > 0 else "equal"

    def __str__(self) -> str:
        return (
            f"{self.verdict}, {self.difference:+.4f} {self.unit} "
            f"(95 % interval {self.low:+.4f} to {self.high:+.4f}, {self.num_documents:,} documents)"
        )


@dataclass(frozen=True)
class _Measured:
    """The documents of one side, each field an array of them."""

    hashes: npt.NDArray[np.str_]
    nats: Floats
    num_tokens: Ints
    num_bytes: Ints


def compare(new: Path, old: Path, side: str, num_samples: int, seed: int) -> Comparison:
    """Compare two models on the documents of a side that both have measured.

    Args:
        new: documents.parquet of the model that may be better.
        old: documents.parquet of the other one.
        side: validation or test.
        num_samples: resamplings behind the interval.

    Returns:
        The difference in nats per token; in bits per byte where the models cut the same text into different tokens.

    Raises:
        Refusal: a file is damaged, holds losses that are no numbers, or the two have hardly a document in common.
    """
    ours, theirs = _measured(new, side), _measured(old, side)
    _, here, there = np.intersect1d(ours.hashes, theirs.hashes, return_indices=True)
    if len(here) < MIN_DOCUMENTS:
        raise Refusal(
            f"{new} and {old} have {len(here)} {side} documents in common, fewer than {MIN_DOCUMENTS}: nothing can be "
            "said about so few; evaluate both models on the same split of the same text"
        )
    nats = ours.nats[here] - theirs.nats[there]
    if np.array_equal(ours.num_tokens[here], theirs.num_tokens[there]):
        unit, amounts = "nats per token", ours.num_tokens[here]
    else:
        unit, nats, amounts = "bits per byte", nats / math.log(2), ours.num_bytes[here]
    low, high = np.quantile(bootstrap.means(nats, amounts, num_samples, (seed,)), [0.025, 0.975])
    return Comparison(float(nats.sum() / amounts.sum()), float(low), float(high), unit, len(here))


def _measured(path: Path, side: str) -> _Measured:
    """The documents of one side, as the evaluate stage wrote them."""
    import pyarrow.parquet as pq

    def damaged(problem: object) -> Refusal:
        return Refusal(
            f"{path} is damaged or no table of document losses ({stage.reason(problem)}): restore it, or write "
            "it again with `dvc repro evaluate`"
        )

    with path.open("rb") as file, stage.refused_as(damaged):
        table = pq.ParquetFile(file, page_checksum_verification=True).read()
        chosen = np.flatnonzero(np.array(table["side"].to_pylist()) == side)
        found = _Measured(
            hashes=np.array(table["hash"].to_pylist(), dtype=np.str_)[chosen],
            nats=np.asarray(table["nats"].to_numpy(), dtype=np.float64)[chosen],
            num_tokens=np.array(table["num_tokens"].to_pylist(), dtype=np.int64)[chosen],
            num_bytes=np.array(table["num_bytes"].to_pylist(), dtype=np.int64)[chosen],
        )
        if not (found.num_tokens > 0).all() or not (found.num_bytes > 0).all():
            raise ValueError("a document of no tokens or no bytes")
    if not np.isfinite(found.nats).all():
        raise Refusal(
            f"{path}: {np.count_nonzero(~np.isfinite(found.nats))} {side} documents have a loss that is not finite; "
            "such a model cannot be compared: train it again with a lower train.learning_rate"
        )
    return found


def main() -> None:
    """Read the command line; print the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.significance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("new", type=Path, metavar="NEW", help="documents.parquet of the model that may be better")
    parser.add_argument("old", type=Path, metavar="OLD", help="documents.parquet of the model that it is compared with")
    arguments = parser.parse_args()
    with stage.refusals("significance"):
        evaluate = stage.load_params()["evaluate"]
        found = compare(arguments.new, arguments.old, "test", evaluate.bootstrap_samples, evaluate.seed)
        print(f"significance: the test loss of {arguments.new} is {found}")


if __name__ == "__main__":
    main()
