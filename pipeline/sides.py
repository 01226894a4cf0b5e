"""The side of a document, train, validation or test: a function of its text, the seed and the fractions alone.

The split stage writes it down; tokenize asks for it before, to train a tokenizer on training documents alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pipeline.split import Params

Hashes = npt.NDArray[np.uint64]

SIDES = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)


def side_of(hashes: Hashes, split: Params) -> npt.NDArray[np.int8]:
    """The side of each document, as an index into SIDES, from its content hash.

    Validation takes the lowest places of [0, 2**64), test the highest, train what lies between.
    """
    places = place_of(hashes, split.seed)
    sides = np.full(len(places), TRAIN, np.int8)
    sides[places < _share(split.validation_fraction)] = VALIDATION
    sides[~places < _share(split.test_fraction)] = TEST
    return sides


def place_of(hashes: Hashes, seed: int) -> Hashes:
    """A place in [0, 2**64) for each document: a bijection of its hash, another one for every seed.

    The mixing function is the finalizer of splitmix64 (Steele, Lea and Flood 2014).
    """
    return _mixed(hashes ^ _mixed(np.array([seed], np.uint64)))


def _mixed(values: Hashes) -> Hashes:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _share(fraction: float) -> np.uint64:
    """That fraction of 2**64, exactly: a power of two only moves the exponent."""
    return np.uint64(int(fraction * 2.0**64))
