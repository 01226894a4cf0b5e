"""Split: every document gets a side, train, validation or test, by a hash of its text.

In:  data/tokens (the content hashes of the documents)
Out: data/split/train.npy, validation.npy, test.npy (int64 document indices into data/tokens, ascending),
     reports/split.json, reports/leakage.json (what validation and test share with train)

    python -m pipeline.split

A document's side depends on its text, the seed and the fractions, on nothing else: adding or removing other
documents, or changing their order, never moves it. Changing one fraction exchanges documents between that
side and train only. Near-duplicates cannot end on two sides, because `clean` has left only one of each; what the sides
share all the same is measured here, before anything is trained.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pydantic

from pipeline import corpus, files, leakage, stage
from pipeline.leakage import Params as LeakageParams
from pipeline.sides import SIDES, TRAIN, Hashes, place_of, side_of

Ints = npt.NDArray[np.int64]


class Params(stage.Params):
    """Section `split` of params.yaml."""

    validation_fraction: float = pydantic.Field(gt=0, lt=1)
    test_fraction: float = pydantic.Field(gt=0, lt=1)
    min_documents: int = pydantic.Field(ge=1)
    leakage: LeakageParams
    seed: int = pydantic.Field(ge=0, lt=2**63)

    @pydantic.model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> Params:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction {self.validation_fraction} and test_fraction {self.test_fraction} add up to "
                f"{self.validation_fraction + self.test_fraction:g}: nothing is left to train on; "
                "keep their sum below 1 (0.1 and 0.1 are usual)"
            )
        return self


def check_sizes(hashes: Hashes, split: Params) -> None:
    """Refuse a split whose sides are too small to measure anything.

    Raises:
        Refusal: with the numbers, and the fractions or the number of documents that would do.
    """
    counts = counts_of(hashes, split)
    if counts.min() < split.min_documents:
        found = ", ".join(f"{name} {count:,}" for name, count in zip(SIDES, counts, strict=True))
        raise stage.Refusal(
            f"the {len(hashes):,} documents fall into {found}; split.min_documents wants {split.min_documents:,} on "
            f"every side, because a loss over fewer is mostly chance. {remedy(hashes, split)}"
        )


def counts_of(hashes: Hashes, split: Params) -> Ints:
    """Documents of each side."""
    return np.bincount(side_of(hashes, split), minlength=len(SIDES))


def remedy(hashes: Hashes, split: Params) -> str:
    """What a user can change: the number of documents, or the fractions if these documents are enough."""
    smallest = min(split.validation_fraction, split.test_fraction, 1 - split.validation_fraction - split.test_fraction)
    # Three standard deviations of a binomial count above the minimum: practically sure.
    num_documents = math.ceil((split.min_documents + 3 * math.sqrt(split.min_documents)) / smallest)
    advice = f"Add text (about {num_documents:,} documents are enough at these fractions)"
    fractions = enough(hashes, split)
    if fractions is not None:
        advice += f", or set split.validation_fraction: {fractions[0]} and split.test_fraction: {fractions[1]}"
    return advice + ", or lower split.min_documents."


def enough(hashes: Hashes, split: Params) -> tuple[float, float] | None:
    """Validation and test fractions, in thousandths, that leave no side of these documents too small, or None."""
    if len(hashes) < len(SIDES) * split.min_documents:
        return None
    places = np.sort(place_of(hashes, split.seed))
    validation = _above(places[split.min_documents - 1])
    test = _above(~places[-split.min_documents])
    if counts_of(hashes, split)[TRAIN] >= split.min_documents:  # what is wide enough stays as it is
        validation, test = max(validation, split.validation_fraction), max(test, split.test_fraction)
    if validation + test >= 1:
        return None
    found = split.model_copy(update={"validation_fraction": validation, "test_fraction": test})
    return (validation, test) if counts_of(hashes, found).min() >= split.min_documents else None


def _above(place: np.uint64) -> float:
    """The smallest fraction, in thousandths, above a place."""
    return (int(place) * 1000 // 2**64 + 1) / 1000


def main(paths: stage.Paths, split: Params) -> None:
    """Split data/tokens into data/split, write the sizes and what the sides share."""
    documents = corpus.load(paths["tokens"])
    check_sizes(documents.hashes, split)
    side_D = side_of(documents.hashes, split)
    sides = {name: np.flatnonzero(side_D == side).astype(np.int64) for side, name in enumerate(SIDES)}
    report = {}
    with files.whole_folder(paths["split"]) as folder:
        for name, chosen in sides.items():
            np.save(folder / f"{name}.npy", chosen, allow_pickle=False)
            report[name] = {
                "documents": len(chosen),
                "tokens": int(documents.lengths[chosen].sum()),
                "bytes": int(documents.num_bytes[chosen].sum()),
            }
    files.write_json(paths["split.json"], report)
    print("split: " + ", ".join(f"{name} {sizes['documents']:,}" for name, sizes in report.items()) + " documents")
    shared = leakage.report(documents, sides, split.leakage)
    files.write_json(paths["leakage.json"], shared)
    print(f"split: {leakage.sentence(shared)}")


if __name__ == "__main__":
    stage.run("split", main)
