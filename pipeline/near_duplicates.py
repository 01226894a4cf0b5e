"""Near-duplicates: documents whose sets of word 3-grams are nearly the same, found without comparing all pairs.

The Jaccard similarity of two sets is estimated by MinHash: the share of P random permutations under
which both sets have the same smallest element (Broder 1997; standard error sqrt(s(1-s)/P)). Here two
documents are near-duplicates if that estimate reaches the threshold, that is, if at least `num_equal`
of P positions of their signatures agree.

Locality-sensitive hashing finds the pairs. It cuts a signature into bands and compares only documents that
agree in a whole band. Two near-duplicates differ in at most P - num_equal positions, so with one band
more than that, some band is untouched: by the pigeonhole principle no pair is ever missed.

The signatures are datasketch's. The index is ours: datasketch's MinHashLSH takes 10 kB a document in Python
sets; sorted arrays take 4 * P bytes for the signature and 12 for each band, about 1 kB in all.

Shapes: N documents of one batch, P permutations, K bands, R rows of a band (positions of the signature).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]
Signatures = npt.NDArray[np.uint32]
Keys = npt.NDArray[np.uint64]  # one for every document and band: equal where the band is
Mask = npt.NDArray[np.bool_]

NGRAM = 3  # words
SEED = 1  # of the permutations: any will do, as long as it stays
BATCH = 512  # documents compared with each other at once
MAX_PAIRS = 2**15  # pairs compared at once: bounds memory
ODD = np.uint64(0x9E3779B97F4A7C15)  # multiplying by it scrambles 64 bits and loses none

# A word is a run of characters without a space. In scripts that put no spaces between words (Thai,
# Lao, Tibetan, Myanmar, Khmer, Japanese, Chinese) every character counts as a word.
_SPACELESS = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_SPACELESS}]|[^\\s{_SPACELESS}]+")


class NearDuplicates:
    """Remembers documents, and tells which others resemble them.

    `first_of_their_kind` keeps one of each kind. `add` and `found_in` look for the documents of one set in another one:
    add the smaller, search the larger.
    """

    def __init__(self, similarity: float, num_permutations: int) -> None:
        self.num_permutations = num_permutations
        self.num_equal = math.ceil(similarity * num_permutations)
        self.num_rows = num_permutations // (num_permutations - self.num_equal + 1)
        self.num_bands = num_permutations // self.num_rows
        assert self.num_bands > num_permutations - self.num_equal
        self._num_kept = 0
        self._signatures = np.empty((1024, num_permutations), np.uint32)  # of the kept, and room for more
        self._runs: list[tuple[Keys, Ints]] = []  # sorted keys, and the kept document of each

    def first_of_their_kind(self, texts: Sequence[str]) -> Mask:
        """Which of the texts resemble no text kept before them, in this call or an earlier one.

        A text that resembles only texts that were dropped is kept: its duplicate is not in the result.
        """
        kept = [self._batch(*batch) for batch in self._batches(texts)]
        return np.concatenate(kept) if kept else np.empty(0, np.bool_)

    def add(self, texts: Sequence[str]) -> None:
        """Remember all of the texts, whatever they resemble; they are numbered from 0, in order, over all calls."""
        for batch in self._batches(texts):
            self._add(*batch)

    def found_in(self, texts: Sequence[str]) -> Ints:
        """The numbers of the remembered documents that resemble one of the texts; what was found is forgotten.

        Otherwise, time would grow with the square of the documents of one kind.
        """
        found = np.zeros(self._num_kept, np.bool_)
        for batch in self._batches(texts):
            num_found = np.count_nonzero(found)
            for _, kept in self._alike(*batch):
                found[kept] = True
            if np.count_nonzero(found) > num_found:
                runs = [(keys, documents, ~found[documents]) for keys, documents in self._runs]
                self._runs = [(keys[left], documents[left]) for keys, documents, left in runs]
        return np.flatnonzero(found)

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[Signatures, Keys]]:
        for start in range(0, len(texts), BATCH):
            signatures_NP = signatures(texts[start : start + BATCH], self.num_permutations)
            yield signatures_NP, self._band_keys(signatures_NP)

    def _batch(self, signatures_NP: Signatures, keys_NK: Keys) -> Mask:
        new_N = np.ones(len(signatures_NP), np.bool_)
        for rows, _ in self._alike(signatures_NP, keys_NK):
            new_N[rows] = False

        # Within the batch: the documents that share a band with another, each against those before it.
        _, inverse, counts = np.unique(keys_NK, return_inverse=True, return_counts=True)
        shares_N = (counts[inverse].reshape(keys_NK.shape) > 1).any(axis=1)
        among = np.flatnonzero(new_N & shares_N)
        for position, row in enumerate(among):
            before = among[:position][new_N[among[:position]]]
            equal = np.count_nonzero(signatures_NP[before] == signatures_NP[row], axis=1)
            new_N[row] = not (equal >= self.num_equal).any()

        self._add(signatures_NP[new_N], keys_NK[new_N])
        return new_N

    def _band_keys(self, signatures_NP: Signatures) -> Keys:
        """A 64-bit key for every band. Equal bands have equal keys; a rare accident costs one comparison."""
        used = signatures_NP[:, : self.num_bands * self.num_rows].astype(np.uint64)
        bands_NKR = used.reshape(-1, self.num_bands, self.num_rows)
        keys_NK = np.tile(np.arange(self.num_bands, dtype=np.uint64) * ODD, (len(bands_NKR), 1))
        for row in range(self.num_rows):
            keys_NK = (keys_NK ^ bands_NKR[:, :, row]) * ODD
            keys_NK ^= keys_NK >> np.uint64(29)
        return keys_NK

    def _alike(self, signatures_NP: Signatures, keys_NK: Keys) -> Iterator[tuple[Ints, Ints]]:
        """Pairs (row of the batch, remembered document) that are near-duplicates."""
        for rows, kept in self._pairs(keys_NK):
            equal = np.count_nonzero(signatures_NP[rows] == self._signatures[kept], axis=1)
            alike = equal >= self.num_equal
            yield rows[alike], kept[alike]

    def _pairs(self, keys_NK: Keys) -> Iterator[tuple[Ints, Ints]]:
        """Pairs (row of the batch, kept document) that agree in a band, in pieces of bounded size."""
        keys = keys_NK.ravel()
        for run_keys, run_documents in self._runs:
            first = np.searchsorted(run_keys, keys, "left")
            counts = np.searchsorted(run_keys, keys, "right") - first
            ends = np.cumsum(counts)
            for start in range(0, int(ends[-1]), MAX_PAIRS):
                pairs = np.arange(start, min(start + MAX_PAIRS, int(ends[-1])))
                key = np.searchsorted(ends, pairs, "right")
                places = first[key] + pairs - (ends - counts)[key]
                yield key // self.num_bands, run_documents[places]

    def _add(self, signatures_NP: Signatures, keys_NK: Keys) -> None:
        """Remember documents. Runs of similar length are merged, so there are only logarithmically many."""
        old, self._num_kept = self._num_kept, self._num_kept + len(signatures_NP)
        if self._num_kept > len(self._signatures):
            self._signatures.resize((2 * self._num_kept, self.num_permutations), refcheck=False)
        self._signatures[old : self._num_kept] = signatures_NP
        documents = np.repeat(np.arange(old, self._num_kept, dtype=np.uint32), self.num_bands)
        self._runs.append(_sorted(keys_NK.ravel(), documents))
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            last, previous = self._runs.pop(), self._runs.pop()
            self._runs.append(_sorted(*(np.concatenate(parts) for parts in zip(previous, last, strict=True))))


def signatures(texts: Sequence[str], num_permutations: int) -> Signatures:
    """The MinHash signatures of the texts: (N, P), the same on every machine."""
    from datasketch import MinHash

    sketches = MinHash.generator(map(shingles, texts), num_perm=num_permutations, seed=SEED, scheme="affine32")
    return np.array([sketch.hashvalues for sketch in sketches], np.uint32).reshape(len(texts), num_permutations)


def shingles(text: str) -> set[bytes]:
    """The set of word 3-grams of a text, without regard to case; all its words if they are fewer."""
    words = _WORD.findall(text.casefold())
    return {" ".join(words[i : i + NGRAM]).encode() for i in range(max(1, len(words) - NGRAM + 1))}


def _sorted(keys: Keys, documents: Ints) -> tuple[Keys, Ints]:
    order = np.argsort(keys, kind="stable")  # fast on two runs that are sorted already
    return keys[order], documents[order]
