import io
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipeline import demo, sources
from pipeline.demo_genres import GENRES
from pipeline.records import Tally

ROOT = Path(__file__).parents[1]
NUM_DOCUMENTS = 6000


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(demo.documents(NUM_DOCUMENTS))


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def test_the_corpus_has_the_same_bytes_on_every_machine() -> None:
    code = "import hashlib; from pipeline import demo; print(hashlib.sha256(demo.corpus(300)).hexdigest())"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": "C"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    # Changes with every word of the tables: copy the new one here, and say in CHANGELOG.md that the corpus changed.
    assert printed == {"6e261ceb2487231e90eb897bb00bc822de089623d0b31dc568914e2f92504d52"}


def test_a_smaller_corpus_is_the_beginning_of_a_larger_one() -> None:
    assert demo.corpus(200).startswith(demo.corpus(100))


def test_there_are_as_many_different_documents_as_asked_for(corpus: list[str]) -> None:
    assert len(set(corpus)) == NUM_DOCUMENTS


def test_documents_are_of_readable_length_in_a_rich_vocabulary(corpus: list[str]) -> None:
    lengths = sorted(len(text.split()) for text in corpus)
    assert lengths[0] >= 30
    assert lengths[-1] <= 120
    assert 50 <= sum(lengths) / len(lengths) <= 80
    vocabulary = Counter(word for text in corpus for word in re.findall(r"[^\W\d_]+", text.lower()))
    assert len(vocabulary) >= 1200
    assert sum(map(len, corpus)) < 3_000_000


def test_documents_are_well_formed(corpus: list[str]) -> None:
    for text in corpus:
        assert not re.search(r"[\[\]{}|]|  |\n| [.,?!]|[.,]{2}|\b[Aa] [aeiou]|\b[Aa]n [^aeiouh]", text), text
        assert re.search(r'[.!?"]$|, [A-Z]\w+$', text), text
        assert re.match(r'"?[A-Z]', text), text
        assert text.count('"') % 2 == 0, text
        assert not re.search(r"[.!?] [a-z]", re.sub(r'"[^"]*"', "", text)), text


def test_every_prompt_of_the_parameters_begins_many_documents(corpus: list[str]) -> None:
    for prompt in ("Once upon a time", "In the morning,", "The old", "She opened"):
        assert sum(text.startswith(prompt) for text in corpus) >= 100, prompt


def test_every_genre_fills_its_slots_and_occurs(corpus: list[str]) -> None:
    names = {name + suffix for columns in demo.SCENE for name in columns.split() for suffix in ("", "2")}
    for genre in GENRES:
        assert {slot.lower() for slot in demo.SLOT.findall(genre)} <= names
        assert genre.count("[") == genre.count("]")


def test_documents_are_not_near_duplicates_of_each_other(corpus: list[str]) -> None:
    """Jaccard similarity of word 3-grams: of 0.8 and above in fewer than 2 percent, where `clean` would drop them."""
    all_shingles = [shingles(text) for text in corpus]
    frequency = Counter(shingle for each in all_shingles for shingle in each)
    holders: dict[tuple[str, ...], list[int]] = {}
    num_lost = 0
    for index, mine in enumerate(all_shingles):
        # Two sets with a Jaccard similarity of 0.8 share one of the rarest 20 percent (and one more) of each.
        rarest = sorted(mine, key=lambda shingle: (frequency[shingle], shingle))[: len(mine) // 5 + 1]
        near = {other for shingle in rarest for other in holders.get(shingle, ())}
        num_lost += any(len(mine & all_shingles[o]) >= 0.8 * len(mine | all_shingles[o]) for o in near)
        for shingle in rarest:
            holders.setdefault(shingle, []).append(index)
    assert num_lost < 0.02 * NUM_DOCUMENTS, num_lost


def test_the_dirt_has_every_usual_kind(corpus: list[str]) -> None:
    content = demo.corpus(1500)
    clean = set(corpus[:1500])
    lines = [
        record.content
        for record in sources.split(sources.chunks(io.BytesIO(content), "demo", Tally()), sources.LINE, "demo", 10**6)
    ]
    texts = [line.decode("utf-8", "replace") for line in lines]
    counts = Counter(texts)
    assert content.startswith(b"\xef\xbb\xbf")
    assert content.count(b"\r\n") > 100
    assert sum(1 for text in texts if text in clean) > 0.9 * 1500, "most documents are untouched"
    assert sum(counts[text] - 1 for text in clean if counts[text]) > 20, "exact duplicates"
    assert sum(1 for text in texts if 0 < len(text.strip()) < 20) > 10, "fragments"
    assert sum(1 for text in texts if not text.strip()) > 10, "blank lines"
    assert sum("\ufffd" in text for text in texts) > 5, "broken UTF-8"
    assert sum("  " in text or "\t" in text for text in texts) > 20, "stray whitespace"
    assert sum("\0" in text or "\x07" in text for text in texts) > 5, "control characters"
    near = [text for text in texts if text not in clean and len(text) > 100 and "\ufffd" not in text]
    assert len(near) > 60, "near-duplicates and stained documents"
