"""Leakage: how much of the validation and test documents stands in the training text as well.

A model is tested on text that it has not seen. Three measures, from narrow to wide: documents whose tokens are exactly
those of a training document, documents that nearly are one (pipeline/near_duplicates.py, with tokens for words), and
runs of n tokens that one training document has too (pipeline/ngrams.py). `clean` has removed what is the same by its
words; what is found here are tokens, which is what the model sees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field
from tqdm import tqdm

from pipeline import ngrams, stage
from pipeline.corpus import Corpus, Ints
from pipeline.near_duplicates import NearDuplicates

Mask = npt.NDArray[np.bool_]

HELD_OUT = ("validation", "test")
TEXT_TOKENS = 2**18  # written out as text at once


class Params(stage.Params):
    """Section `split.leakage` of params.yaml."""

    ngram_size: int = Field(ge=1, le=1000)
    # Below one half, the bands of the search would be so thin that everything is compared with everything.
    near_duplicate_similarity: float = Field(ge=0.5, le=1)
    minhash_permutations: int = Field(ge=16, le=1024)


def report(tokens: Corpus, sides: Mapping[str, Ints], params: Params) -> dict[str, Any]:
    """The content of leakage.json: for validation and test, how many documents and tokens training text has too.

    Args:
        sides: the documents of train, validation and test.
    """
    train = sides["train"]
    found: dict[str, Any] = {
        "ngram_size": params.ngram_size,
        "near_duplicate_similarity": params.near_duplicate_similarity,
    }
    documents = np.concatenate([sides[side] for side in HELD_OUT])  # of both at once: every pass reads all of train
    exact = np.isin(_digests(tokens, documents), _digests(tokens, train))
    near = _near_duplicates(tokens, documents, train, params)
    num_shared = ngrams.num_shared_tokens(tokens, documents, train, params.ngram_size)
    for side in HELD_OUT:
        here = np.isin(documents, sides[side])
        lengths = tokens.lengths[documents[here]]
        found[side] = {
            "num_documents": int(here.sum()),
            "num_tokens": int(lengths.sum()),
            "exact_documents": int(exact[here].sum()),
            "exact_tokens": int(lengths[exact[here]].sum()),
            "near_duplicate_documents": int(near[here].sum()),
            "near_duplicate_tokens": int(lengths[near[here]].sum()),
            "ngram_documents": int((num_shared[here] > 0).sum()),
            "ngram_tokens": int(num_shared[here].sum()),
        }
    return found


def sentence(found: Mapping[str, Any]) -> str:
    """What was found, in one line. Whether it is too much, the verdict and the gate of a champion say."""
    parts = [
        f"{side} {about['exact_documents']:,} documents exactly, {about['near_duplicate_documents']:,} nearly, "
        f"{about['ngram_documents']:,} by {found['ngram_size']} tokens in a row "
        f"({100 * about['ngram_tokens'] / max(1, about['num_tokens']):.1f} % of its tokens)"
        for side, about in ((side, found[side]) for side in HELD_OUT)
    ]
    return f"shared with train: {'; '.join(parts)}"


def _digests(tokens: Corpus, documents: Ints) -> npt.NDArray[np.uint64]:
    """64 bits of a cryptographic hash of every document's tokens."""
    digests = (
        hashlib.blake2b(tokens.tokens[tokens.offsets[i] : tokens.offsets[i + 1]].tobytes(), digest_size=8).digest()
        for i in documents
    )
    return np.frombuffer(b"".join(digests), np.uint64)


def _near_duplicates(tokens: Corpus, documents: Ints, others: Ints, params: Params) -> Mask:
    """Which of the documents have a near-duplicate among the others. Takes about 1 kB for every document."""
    kinds = NearDuplicates(params.near_duplicate_similarity, params.minhash_permutations)
    for texts in _texts(tokens, documents):
        kinds.add(texts)
    near = np.zeros(len(documents), dtype=bool)
    with tqdm(total=len(others), desc="near-duplicates", unit=" documents", disable=None) as progress:
        for texts in _texts(tokens, others):
            near[kinds.found_in(texts)] = True
            progress.update(len(texts))
    return near


def _texts(tokens: Corpus, documents: Ints) -> Iterator[list[str]]:
    """Documents as texts in which a token id is a word, some at a time."""
    for block in ngrams.blocks(tokens.offsets[documents + 1] - tokens.offsets[documents], TEXT_TOKENS):
        yield [" ".join(map(str, tokens.document(i).tolist())) for i in documents[block]]
