"""How many tokens of a document lie in n-grams that also occur, verbatim, inside one document of another set.

Exact, at any corpus size, in bounded memory: the documents asked about are taken in blocks. The hashes of a block's
windows (pipeline/overlap.py) are sorted, the token file is read once a block, in chunks, and a hash that agrees is
checked token by token. Windows of a block that share their hash but not their tokens wait for another round, so
that every hash stands for one window.

Letters: D documents of a block, T their tokens, W windows of n tokens, K distinct hashes of these.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pipeline import overlap
from pipeline.corpus import Corpus, Ints
from pipeline.overlap import Hashes, Tokens

Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]

BLOCK_TOKENS = 2**22  # of the documents asked about, for every pass over the others; takes about 80 bytes each
TABLE_BYTES = 8  # for every hash: more sort more of the other windows out, without a search


def num_shared_tokens(corpus: Corpus, documents: Ints, others: Ints, n: int) -> Ints:
    """Of each of `documents`, how many tokens lie in runs of n that occur inside one of `others` too.

    Args:
        documents: indices into the corpus.
        others: indices of the documents to search.
        n: tokens of a run; it never crosses from one document into the next.
    """
    searched = np.zeros(corpus.num_documents, dtype=bool)
    searched[others] = True
    lengths = corpus.offsets[documents + 1] - corpus.offsets[documents]
    found = [_of_block(corpus, documents[block], searched, n) for block in blocks(lengths, BLOCK_TOKENS)]
    return np.concatenate([np.empty(0, np.int64), *found])


def blocks(lengths: Ints, num_tokens: int) -> Iterator[slice]:
    """Consecutive documents, whole, of about so many tokens together."""
    ends = np.cumsum(lengths)
    borders = np.searchsorted(ends, np.arange(num_tokens, ends[-1] if len(ends) else 0, num_tokens)) + 1
    for first, end in itertools.pairwise(np.unique([0, *borders, len(lengths)]).tolist()):
        yield slice(first, end)


def _of_block(corpus: Corpus, documents_D: Ints, searched: Mask, n: int) -> Ints:
    tokens_T = np.concatenate([corpus.tokens[corpus.offsets[i] : corpus.offsets[i + 1]] for i in documents_D])
    lengths_D = corpus.offsets[documents_D + 1] - corpus.offsets[documents_D]
    ends_D = np.cumsum(lengths_D)
    # A window begins wherever its document has n tokens left.
    starts_W = np.flatnonzero(np.repeat(ends_D, lengths_D) - np.arange(len(tokens_T)) >= n)
    changes_T = np.zeros(len(tokens_T) + 1, np.int32)  # how many more windows cover a token than the one before it
    while len(starts_W):
        hashes_W = np.concatenate([hashes for _, _, hashes in _hashed(tokens_T, n)])[starts_W]
        keys_K, first_K, key_W = np.unique(hashes_W, return_index=True, return_inverse=True)
        same_W = _equal(tokens_T, starts_W, tokens_T, starts_W[first_K][key_W], n)
        occurring_K = _occurring(keys_K, tokens_T, starts_W[first_K], corpus, searched, n)
        shared = starts_W[same_W & occurring_K[key_W]]
        changes_T[shared] += 1
        changes_T[shared + n] -= 1
        starts_W = starts_W[~same_W]
    num_covered = np.concatenate([[0], np.cumsum(np.cumsum(changes_T[:-1]) > 0)])
    return np.asarray(num_covered[ends_D] - num_covered[ends_D - lengths_D], dtype=np.int64)


def _occurring(keys_K: Hashes, tokens_T: Tokens, starts_K: Places, corpus: Corpus, searched: Mask, n: int) -> Mask:
    """Which windows tokens_T[start : start + n], their hashes ascending, occur inside one searched document."""
    num_bits = (TABLE_BYTES * len(keys_K)).bit_length()
    shift = np.uint64(64 - num_bits)
    table = np.zeros(2**num_bits, dtype=bool)  # by the highest bits of a hash: whether to look it up at all
    table[keys_K >> shift] = True
    occurring_K = np.zeros(len(keys_K), dtype=bool)
    for begin, tokens, hashes in _hashed(corpus.tokens, n):
        hits = np.flatnonzero(table[hashes >> shift])
        keys = np.minimum(np.searchsorted(keys_K, hashes[hits]), len(keys_K) - 1)
        new = (keys_K[keys] == hashes[hits]) & ~occurring_K[keys]
        hits, keys = hits[new], keys[new]
        inside = overlap.lie_in_one_document(begin + hits, n, corpus, searched)
        hits, keys = hits[inside], keys[inside]
        occurring_K[keys[_equal(tokens, hits, tokens_T, starts_K[keys], n)]] = True
    return occurring_K


def _hashed(tokens: Tokens, n: int) -> Iterator[tuple[int, Tokens, Hashes]]:
    """Chunk by chunk: where it begins, its tokens, and the hashes of all windows of n tokens that begin in it."""
    powers, inverses = overlap.powers_of_base(overlap.CHUNK_TOKENS + n)
    for begin in range(0, len(tokens), overlap.CHUNK_TOKENS):
        chunk: Tokens = np.asarray(tokens[begin : begin + overlap.CHUNK_TOKENS + n - 1])
        yield begin, chunk, overlap.window_hashes(overlap.prefix_sums(chunk, powers), n, inverses)


def _equal(tokens: Tokens, starts: Places, others: Tokens, other_starts: Places, n: int) -> Mask:
    """Whether the windows of n tokens at these starts are equal, pair by pair."""
    equal = np.ones(len(starts), dtype=bool)
    for i in range(n):
        equal &= tokens[starts + i] == others[other_starts + i]
    return equal
