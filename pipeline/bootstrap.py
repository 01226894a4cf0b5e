"""How sure a mean loss is: what it would have been with other documents of the same kind (Efron, 1979).

Documents are resampled, not tokens, because tokens of one document are not independent; the mean loss is the ratio of
the summed nats to the summed tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pipeline.losses import DocumentLosses

Floats = npt.NDArray[np.float64]

DRAWN_AT_ONCE = 2**20  # documents; bounds memory for any number of them


def means(losses: DocumentLosses, num_samples: int, key: tuple[int, ...]) -> Floats:
    """Mean losses of `num_samples` resamplings of the documents with replacement; `key` seeds the generator."""
    random, num_documents = np.random.default_rng(key), len(losses.documents)
    size = max(1, DRAWN_AT_ONCE // num_documents)
    found = np.empty(num_samples)
    for first in range(0, num_samples, size):
        some = found[first : first + size]
        drawn = random.integers(num_documents, size=(len(some), num_documents))
        some[:] = losses.nats[drawn].sum(axis=1) / losses.num_tokens[drawn].sum(axis=1)
    return found


def interval(found: Floats) -> list[float | None]:
    """The middle 95 % of bootstrapped means."""
    return [number(end) for end in np.quantile(found, [0.025, 0.975])]


def number(value: float) -> float | None:
    """The value as JSON has it: None where it is no finite number."""
    return float(value) if math.isfinite(value) else None
