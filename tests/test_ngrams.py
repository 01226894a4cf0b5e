"""What is counted as shared is exactly what a brute force counts that is written to be obviously right."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import ngrams, overlap
from pipeline.corpus import Corpus
from pipeline.ngrams import num_shared_tokens
from tests.test_overlap import corpus_of, tokens


def shared(documents: list[list[int]], asked: list[int], others: list[int], n: int) -> list[int]:
    corpus = corpus_of(documents)
    return num_shared_tokens(corpus, np.array(asked, np.int64), np.array(others, np.int64), n).tolist()


def by_brute_force(documents: list[list[int]], asked: list[int], others: list[int], n: int) -> list[int]:
    known = {tuple(documents[i][j : j + n]) for i in others for j in range(len(documents[i]) - n + 1)}
    counts = []
    for document in (documents[i] for i in asked):
        covered: set[int] = set()
        for start in range(len(document) - n + 1):
            if tuple(document[start : start + n]) in known:
                covered.update(range(start, start + n))
        counts.append(len(covered))
    return counts


@given(
    st.lists(st.tuples(tokens, st.sampled_from(["asked", "other", "neither"])), max_size=10),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([overlap.BASE, 1, 3]),  # base 1 adds tokens up: anagrams collide, and must not be taken for hits
)
def test_every_count_is_the_brute_force_one_whatever_the_chunks_the_blocks_and_the_collisions(
    documents: list[tuple[list[int], str]], n: int, chunk: int, block: int, base: int
) -> None:
    texts = [document for document, _ in documents]
    asked, others = ([i for i, (_, side) in enumerate(documents) if side == wanted] for wanted in ("asked", "other"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "CHUNK_TOKENS", chunk)
        patch.setattr(overlap, "BASE", base)
        patch.setattr(ngrams, "BLOCK_TOKENS", block)
        found = shared(texts, asked, others, n)
    assert found == by_brute_force(texts, asked, others, n)


def test_a_run_never_crosses_from_one_document_into_the_next() -> None:
    assert shared([[1, 2, 3, 4], [9, 1, 2], [3, 4, 9]], [0], [1, 2], 3) == [0]
    assert shared([[9, 1, 2], [3, 4, 9], [1, 2, 3, 4]], [0, 1], [2], 3) == [0, 0]


def test_runs_that_overlap_count_every_token_once() -> None:
    assert shared([[1, 2, 3, 4, 5, 9, 7, 8], [1, 2, 3, 4, 5], [9, 7, 8]], [0], [1, 2], 3) == [8]


def test_two_documents_that_are_asked_about_do_not_tell_on_each_other() -> None:
    assert shared([[1, 2, 3], [1, 2, 3], [4, 5, 6]], [0, 1], [2], 3) == [0, 0]


@pytest.mark.parametrize("num_tokens", [1, 7, 100])
def test_blocks_hold_every_document_once_and_not_much_more_than_they_should(num_tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(0, 12, 50)
    found = list(ngrams.blocks(lengths, num_tokens))
    assert [i for block in found for i in range(50)[block]] == list(range(50))
    assert all(lengths[block].sum() < num_tokens + 12 for block in found)


def test_memory_does_not_grow_with_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "BLOCK_TOKENS", 2**16)

    def peak(num_documents: int) -> int:
        everything = np.random.default_rng(0).integers(0, 50_000, 500 * num_documents).astype(np.uint16)
        offsets = np.arange(num_documents + 1, dtype=np.int64) * 500
        nothing = np.zeros(num_documents, np.int64)
        corpus = Corpus(everything, offsets, nothing, nothing.astype(np.uint64), 50_000, 0, 0)
        documents = np.arange(num_documents)
        tracemalloc.start()
        try:
            found = num_shared_tokens(corpus, documents[documents % 5 == 0], documents[documents % 5 > 0], 13)
            assert not found.any()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(1000), peak(4000)  # 500,000 and 2,000,000 tokens, of which a fifth is asked about
    assert large < 1.25 * small
