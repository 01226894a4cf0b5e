"""How sure a mean loss is: what it would have been with other documents of the same kind (Efron, 1979).

Documents are resampled, not tokens, because tokens of one document are not independent; the mean loss is the ratio of
the summed nats to the summed tokens.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DRAWN_AT_ONCE = 2**20  # documents; bounds memory for any number of them


def means(nats_D: Floats, amounts_D: Ints, num_samples: int, key: tuple[int, ...]) -> Floats:
    """Mean losses of `num_samples` resamplings of D documents with replacement.

    Args:
        nats_D: cross-entropy of each document, or the difference of two.
        amounts_D: what its mean is over: the document's predicted tokens, or its bytes.
        key: seeds the generator.
    """
    random, num_documents = np.random.default_rng(key), len(nats_D)
    size = max(1, DRAWN_AT_ONCE // num_documents)
    found = np.empty(num_samples)
    for first in range(0, num_samples, size):
        some = found[first : first + size]
        drawn = random.integers(num_documents, size=(len(some), num_documents))
        some[:] = nats_D[drawn].sum(axis=1) / amounts_D[drawn].sum(axis=1)
    return found


def interval(found: Floats) -> list[float | None]:
    """The middle 95 % of bootstrapped means."""
    return [number(end) for end in np.quantile(found, [0.025, 0.975])]


def number(value: float) -> float | None:
    """The value as JSON has it: None where it is no finite number."""
    return float(value) if math.isfinite(value) else None
