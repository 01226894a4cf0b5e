"""The longest run of tokens that a text shares, verbatim, with one training document.

Exact, at any corpus size, in bounded memory: the token file is read in chunks, all windows of n tokens are compared
by a polynomial hash at once, and a hash that agrees is checked token by token. A run of n tokens that occurs brings
all shorter ones with it, so a binary search over n finds the longest: about log2(longest text) passes over the corpus.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.corpus import Corpus, Ints

Hashes = npt.NDArray[np.uint64]
Tokens = npt.NDArray[np.integer[Any]]
Windows = dict[int, list[tuple[int, int]]]  # (text, start) of the windows with a hash

CHUNK_TOKENS = 2**17  # hashed at once: a few arrays of 1 MiB, which stay in the processor's cache
BASE = 0x9E3779B97F4A7C15  # of the polynomial; odd, so it has an inverse modulo 2**64
FILTER_BITS = 16  # the highest bits of a hash; most windows are told apart by them alone


@dataclass(frozen=True)
class Overlap:
    """The run text[start : start + num_tokens]; of several equally long ones, the first."""

    start: int
    num_tokens: int


def longest_overlaps(texts: Sequence[Ints], corpus: Corpus, documents: Ints) -> list[Overlap]:
    """The longest run of each text that lies within a single one of `documents`.

    Args:
        texts: token ids, an array a text.
        corpus: tokens of all documents.
        documents: indices of the documents to search.
    """
    searched = np.zeros(corpus.num_documents, dtype=bool)
    searched[documents] = True
    found = [Overlap(0, 0)] * len(texts)
    longest = [len(text) for text in texts]  # found[i].num_tokens to longest[i] is what the answer can still be
    while any(best.num_tokens < most for best, most in zip(found, longest, strict=True)):
        middles = {
            i: (found[i].num_tokens + longest[i] + 1) // 2
            for i in range(len(texts))
            if found[i].num_tokens < longest[i]
        }
        starts = _first_starts(texts, middles, corpus, searched)
        for i, middle in middles.items():
            if i in starts:
                found[i] = Overlap(starts[i], middle)
            else:
                longest[i] = middle - 1
    return found


def _first_starts(
    texts: Sequence[Ints], lengths: Mapping[int, int], corpus: Corpus, searched: npt.NDArray[np.bool_]
) -> dict[int, int]:
    """Where the first window of lengths[i] tokens begins in text i that occurs in the corpus, if one does."""
    by_length: dict[int, Windows] = defaultdict(lambda: defaultdict(list))
    longest = max(lengths.values())
    powers, inverses = powers_of_base(CHUNK_TOKENS + max(map(len, texts)))
    for i, length in lengths.items():
        for start, key in enumerate(window_hashes(prefix_sums(texts[i], powers), length, inverses).tolist()):
            by_length[length][key].append((i, start))
    occurring: dict[int, int] = {}
    for begin in range(0, len(corpus.tokens), CHUNK_TOKENS):
        tokens: Tokens = np.asarray(corpus.tokens[begin : begin + CHUNK_TOKENS + longest - 1])
        sums = prefix_sums(tokens, powers)
        for length, wanted in by_length.items():
            hashes = window_hashes(sums, length, inverses)[:CHUNK_TOKENS]
            hits = _members(hashes, wanted)
            hits = hits[lie_in_one_document(begin + hits, length, corpus, searched)]
            for i, start in _verified(hits, hashes, tokens, length, texts, wanted):
                occurring[i] = min(start, occurring.get(i, start))
    return occurring


def _verified(
    hits: npt.NDArray[np.intp],
    hashes: Hashes,
    tokens: Tokens,
    length: int,
    texts: Sequence[Ints],
    wanted: Windows,
) -> list[tuple[int, int]]:
    """The wanted windows that equal a hit token by token; they are wanted no longer."""
    equal: list[tuple[int, int]] = []
    for hit in hits.tolist():
        key = int(hashes[hit])
        windows = wanted.get(key, [])
        same = [w for w in windows if np.array_equal(texts[w[0]][w[1] : w[1] + length], tokens[hit : hit + length])]
        if same:
            equal += same
            wanted[key] = [w for w in windows if w not in same]
            if not wanted[key]:
                del wanted[key]
    return equal


def _members(hashes: Hashes, wanted: Windows) -> npt.NDArray[np.intp]:
    """Positions of the hashes that are wanted, ascending; a table of the highest bits sorts most others out."""
    keys = np.array(sorted(wanted), dtype=np.uint64)
    shift = np.uint64(64 - FILTER_BITS)
    table = np.zeros(2**FILTER_BITS, dtype=bool)
    table[keys >> shift] = True
    hits = np.flatnonzero(table[hashes >> shift])
    return hits[np.isin(hashes[hits], keys)]


def lie_in_one_document(
    positions: Ints, length: int, corpus: Corpus, searched: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Whether the windows that begin at these positions of the corpus end in the same, searched, document."""
    documents = np.searchsorted(corpus.offsets, positions, side="right") - 1
    inside: npt.NDArray[np.bool_] = searched[documents] & (positions + length <= corpus.offsets[documents + 1])
    return inside


def powers_of_base(count: int) -> tuple[Hashes, Hashes]:
    """BASE**(i+1) and BASE**-i modulo 2**64; i+1 spreads single tokens over the highest bits too."""
    inverse = pow(BASE, -1, 2**64)
    powers = np.full(count, BASE, dtype=np.uint64)
    inverses = np.full(count, inverse, dtype=np.uint64)
    inverses[0] = 1
    return np.multiply.accumulate(powers), np.multiply.accumulate(inverses)


def prefix_sums(tokens: Tokens, powers: Hashes) -> Hashes:
    """Sums of tokens[j] * BASE**(j+1) over j < i, for i from 0 to all; arithmetic modulo 2**64 throughout."""
    sums = np.zeros(len(tokens) + 1, dtype=np.uint64)
    np.cumsum(tokens.astype(np.uint64) * powers[: len(tokens)], out=sums[1:])
    return sums


def window_hashes(sums: Hashes, length: int, inverses: Hashes) -> Hashes:
    """Hash of every window of `length` tokens: equal tokens have equal hashes wherever the window begins."""
    differences = sums[length:] - sums[:-length]
    return differences * inverses[: len(differences)]
