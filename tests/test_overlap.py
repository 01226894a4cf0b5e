"""The longest verbatim overlap is exact: held against a brute force that is written to be obviously right."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import overlap
from pipeline.corpus import Corpus
from pipeline.overlap import Overlap, longest_overlaps

# Few distinct tokens, so that runs do occur by chance.
tokens = st.lists(st.integers(0, 3), max_size=30)


def corpus_of(documents: list[list[int]], dtype: type = np.uint16) -> Corpus:
    return Corpus(
        tokens=np.array([token for document in documents for token in document], dtype=dtype),
        offsets=np.cumsum([0, *map(len, documents)], dtype=np.int64),
        num_bytes=np.zeros(len(documents), np.int64),
        hashes=np.zeros(len(documents), np.uint64),
        vocabulary_size=4,
        start_id=0,
        end_id=0,
    )


def overlaps(texts: list[list[int]], documents: list[list[int]], searched: list[int]) -> list[Overlap]:
    as_arrays = [np.array(text, dtype=np.int64) for text in texts]
    return longest_overlaps(as_arrays, corpus_of(documents), np.array(searched, dtype=np.int64))


def by_brute_force(text: list[int], documents: list[list[int]]) -> Overlap:
    for length in range(len(text), 0, -1):
        for start in range(len(text) - length + 1):
            run = text[start : start + length]
            for document in documents:
                if any(document[i : i + length] == run for i in range(len(document) - length + 1)):
                    return Overlap(start, length)
    return Overlap(0, 0)


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(tokens, max_size=4),
    st.lists(st.tuples(tokens, st.booleans()), max_size=8),
    st.integers(1, 40),
    st.sampled_from([overlap.BASE, 1, 3]),  # base 1 adds tokens up: anagrams collide, and must not be taken for hits
)
def test_every_overlap_is_the_brute_force_one_whatever_the_chunks_and_the_collisions(
    texts: list[list[int]], documents: list[tuple[list[int], bool]], chunk: int, base: int
) -> None:
    searched = [i for i, (_, counts) in enumerate(documents) if counts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "CHUNK_TOKENS", chunk)
        patch.setattr(overlap, "BASE", base)
        found = overlaps(texts, [document for document, _ in documents], searched)
    assert found == [by_brute_force(text, [documents[i][0] for i in searched]) for text in texts]


def test_a_run_never_crosses_from_one_document_into_the_next() -> None:
    assert overlaps([[1, 2, 3, 4]], [[9, 1, 2], [3, 4, 9]], [0, 1]) == [Overlap(0, 2)]


def test_documents_outside_the_training_split_do_not_count() -> None:
    assert overlaps([[1, 2, 3]], [[1, 2, 3], [2, 3]], [1]) == [Overlap(1, 2)]


def test_a_text_says_the_same_alone_and_among_others() -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 5, 50).tolist() for _ in range(40)]
    texts = [rng.integers(0, 5, n).tolist() for n in (0, 1, 7, 30, 60)] + [documents[3][10:45]]
    together = overlaps(texts, documents, list(range(0, 40, 3)))
    assert together == [overlaps([text], documents, list(range(0, 40, 3)))[0] for text in texts]
    assert together[-1] == Overlap(0, 35)


def test_a_mapped_file_of_wide_tokens_is_searched_like_an_array(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    everything = rng.integers(0, 200_000, 300_000).astype("<u4")  # more than one chunk
    everything.tofile(tmp_path / "tokens.bin")
    offsets = np.arange(0, 300_001, 300, dtype=np.int64)
    corpus = Corpus(
        tokens=np.memmap(tmp_path / "tokens.bin", dtype=np.uint32, mode="r"),
        offsets=offsets,
        num_bytes=np.zeros(1000, np.int64),
        hashes=np.zeros(1000, np.uint64),
        vocabulary_size=200_000,
        start_id=0,
        end_id=0,
    )
    begin = int(offsets[436]) + 130  # a window that lies across the border of two chunks
    assert begin < overlap.CHUNK_TOKENS < begin + 150
    text = everything[begin : begin + 150].astype(np.int64)
    assert longest_overlaps([text], corpus, np.arange(1000)) == [Overlap(0, 150)]
