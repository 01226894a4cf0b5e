"""Leaks of every kind, planted among random documents, are counted, each as what it is."""

import numpy as np
import pytest

from pipeline import leakage
from tests.test_overlap import corpus_of

PARAMS = leakage.Params(ngram_size=13, near_duplicate_similarity=0.8, minhash_permutations=128)
NONE = {f"{kind}_{what}": 0 for kind in ("exact", "near_duplicate", "ngram") for what in ("documents", "tokens")}


def some_documents(number: int, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, 5000, (number, 80)).tolist()


def report(train: list[list[int]], validation: list[list[int]], test: list[list[int]]):
    documents = corpus_of([*train, *validation, *test])
    numbers = np.split(np.arange(len(documents.lengths)), np.cumsum([len(train), len(validation)]))
    return leakage.report(documents, dict(zip(("train", "validation", "test"), numbers, strict=True)), PARAMS)


def test_documents_that_share_nothing_are_no_leak() -> None:
    found = report(some_documents(300, 1), some_documents(40, 2), some_documents(50, 3))
    assert found == {
        "ngram_size": 13,
        "near_duplicate_similarity": 0.8,
        "validation": {"num_documents": 40, "num_tokens": 3200} | NONE,
        "test": {"num_documents": 50, "num_tokens": 4000} | NONE,
    }
    assert leakage.sentence(found) == (
        "shared with train: validation 0 documents exactly, 0 nearly, 0 by 13 tokens in a row (0.0 % of its tokens); "
        "test 0 documents exactly, 0 nearly, 0 by 13 tokens in a row (0.0 % of its tokens)"
    )


def test_every_kind_of_leak_is_counted_as_what_it_is() -> None:
    train, validation, test = some_documents(300, 1), some_documents(40, 2), some_documents(50, 3)
    validation[7] = train[100]
    validation[8] = [*train[200][:10], 4999, *train[200][11:]]  # 10 tokens, another one, the other 69
    validation[9][20:40] = train[5][50:70]
    test[0][3:16] = train[6][:13]
    test[1][3:15] = train[6][:12]  # one too few
    test[2] = test[3]  # within a side is no leak
    test[4] = validation[20]  # nor is it between validation and test
    found = report(train, validation, test)
    assert found["validation"] == {
        "num_documents": 40,
        "num_tokens": 3200,
        "exact_documents": 1,
        "exact_tokens": 80,
        "near_duplicate_documents": 2,
        "near_duplicate_tokens": 160,
        "ngram_documents": 3,
        "ngram_tokens": 80 + 69 + 20,
    }
    assert found["test"] == {"num_documents": 50, "num_tokens": 4000} | NONE | {
        "ngram_documents": 1,
        "ngram_tokens": 13,
    }
    assert leakage.sentence(found) == (
        "shared with train: validation 1 documents exactly, 2 nearly, 3 by 13 tokens in a row (5.3 % of its tokens); "
        "test 0 documents exactly, 0 nearly, 1 by 13 tokens in a row (0.3 % of its tokens)"
    )


def test_documents_too_short_for_a_run_are_found_all_the_same() -> None:
    found = report([[1, 2, 3], *some_documents(20, 1)], [[1, 2, 3], [1, 2]], [[4]])
    assert found["validation"] == {"num_documents": 2, "num_tokens": 5} | NONE | {
        "exact_documents": 1,
        "exact_tokens": 3,
        "near_duplicate_documents": 1,
        "near_duplicate_tokens": 3,
    }


@pytest.mark.parametrize("size", [1, 500])
def test_how_many_documents_are_written_out_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    train, test = some_documents(60, 1), some_documents(40, 2)
    test[3], test[30] = train[59], train[0]
    monkeypatch.setattr(leakage, "TEXT_TOKENS", size)
    assert report(train, some_documents(10, 3), test)["test"]["near_duplicate_documents"] == 2
