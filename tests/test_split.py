import hashlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import clean, documents, files, split
from pipeline.near_duplicates import signatures
from pipeline.sides import SIDES, TEST, TRAIN, VALIDATION, _mixed, place_of, side_of
from pipeline.stage import Refusal
from pipeline.tokenize import content_hash

ROOT = Path(__file__).parent.parent
LEAKAGE = {"ngram_size": 13, "near_duplicate_similarity": 0.8, "minhash_permutations": 128}
PARAMS = {"validation_fraction": 0.2, "test_fraction": 0.1, "min_documents": 10, "leakage": LEAKAGE, "seed": 1}
CLEAN = {
    "unicode_form": "NFC",
    "min_characters": 1,
    "max_characters": 10000,
    "max_broken_share": 1.0,
    "near_duplicate_similarity": 0.8,
    "minhash_permutations": 128,
    "min_documents": 0,
}
HASHES = st.lists(st.integers(0, 2**64 - 1), max_size=50).map(lambda values: np.array(values, np.uint64))
SHARES = st.floats(1e-6, 0.49)


def params(**changes):
    return split.Params.model_validate(PARAMS | changes)


def some_hashes(number, seed=0):
    return np.random.default_rng(seed).integers(0, 2**64, number, np.uint64)


def sides_of_texts(texts):
    """Each kept text and its side, as the stages clean, tokenize and split decide it."""
    kept = list(clean.cleaned([texts], clean.Params.model_validate(CLEAN), clean.Tally()))
    hashes = np.array([content_hash(sha256) for _, sha256 in kept], np.uint64)
    return dict(zip((text for text, _ in kept), side_of(hashes, params()).tolist(), strict=True))


@settings(deadline=None)
@given(
    st.lists(st.text(max_size=20), max_size=20),
    st.lists(st.tuples(st.integers(0, 20), st.text(max_size=20)), max_size=20),
)
def test_adding_documents_anywhere_moves_no_other_document(texts, additions):
    before = sides_of_texts(texts)
    more = list(texts)
    for place, text in additions:
        more.insert(place, text)
    after = sides_of_texts(more)
    assert {text: after[text] for text in before if text in after} == {t: s for t, s in before.items() if t in after}


@given(HASHES, HASHES, st.integers(0, 2**63 - 1))
def test_the_side_of_a_document_depends_on_no_other_document(some, others, seed):
    alone = side_of(some, params(seed=seed))
    together = side_of(np.concatenate([others, some]), params(seed=seed))
    assert (together[len(others) :] == alone).all()


@given(st.integers(0, 2**32), SHARES, SHARES, SHARES)
def test_changing_one_fraction_exchanges_documents_with_train_only(seed, validation, test, other):
    hashes = some_hashes(200, seed)
    before = side_of(hashes, params(validation_fraction=validation, test_fraction=test))
    for changes, side in (({"test_fraction": test}, VALIDATION), ({"test_fraction": other}, TEST)):
        fractions = {"validation_fraction": other if side == VALIDATION else validation} | changes
        after = side_of(hashes, params(**fractions))
        moved = before != after
        assert set(before[moved]) | set(after[moved]) <= {TRAIN, side}


def test_the_sides_have_their_fractions_of_the_documents():
    counts = split.counts_of(np.arange(100_000, dtype=np.uint64), params())  # hashes that are no hashes: the worst case
    assert np.abs(counts / 100_000 - [0.7, 0.2, 0.1]).max() < 0.005


def test_two_seeds_split_independently():
    one, other = (side_of(some_hashes(100_000), params(seed=seed)) for seed in (1, 2))
    both = np.mean((one == VALIDATION) & (other == VALIDATION))
    assert abs(both - 0.2 * 0.2) < 0.005


def test_places_are_the_same_on_every_machine():
    # The finalizer of splitmix64 is well known: from state 0 its first output is e220a8397b1dcdaf.
    assert hex(_mixed(np.zeros(1, np.uint64))[0]) == "0xe220a8397b1dcdaf"
    places = place_of(np.array([0, 1, 2**64 - 1], np.uint64), seed=1)
    assert [hex(place) for place in places] == ["0x5e41ab087439611e", "0xe9fd6049d65af21e", "0xa562df66c82c649a"]


@pytest.mark.parametrize(("validation", "test"), [(0.5, 0.5), (0.9, 0.2)])
def test_fractions_that_leave_nothing_to_train_on_are_a_fault(validation, test):
    with pytest.raises(pydantic.ValidationError, match="nothing is left to train on"):
        params(validation_fraction=validation, test_fraction=test)


def test_a_side_too_small_to_measure_anything_is_refused_with_numbers_and_a_fix():
    hashes = some_hashes(400)
    wanted = params(validation_fraction=0.05, test_fraction=0.02, min_documents=30)
    train, validation, test = split.counts_of(hashes, wanted)
    with pytest.raises(Refusal) as refusal:
        split.check_sizes(hashes, wanted)
    message = str(refusal.value)
    assert f"400 documents fall into train {train}, validation {validation}, test {test}" in message
    assert "about 2,322 documents" in message  # (30 + 3 sqrt(30)) / 0.02
    validation, test = split.enough(hashes, wanted)
    assert f"split.validation_fraction: {validation} and split.test_fraction: {test}" in message


@given(st.integers(0, 2**32), st.integers(0, 300), SHARES, SHARES, st.integers(1, 60))
def test_the_fractions_that_a_refusal_proposes_are_accepted(seed, number, validation, test, min_documents):
    hashes = some_hashes(number, seed)
    wanted = params(validation_fraction=validation, test_fraction=test, min_documents=min_documents)
    proposed = split.enough(hashes, wanted)
    if proposed is None:
        assert number < 4 * min_documents + 60  # only where there is hardly enough for three sides
    else:
        fractions = dict(zip(("validation_fraction", "test_fraction"), proposed, strict=True))
        split.check_sizes(hashes, split.Params.model_validate(wanted.model_dump() | fractions))


def test_an_empty_corpus_is_refused():
    with pytest.raises(Refusal, match="the 0 documents"):
        split.check_sizes(np.empty(0, np.uint64), params())


OUTPUTS = ("tokens", "split", "split.json", "leakage.json")


def write_tokens(folder, hashes):
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(0, 300, 3 * len(hashes))
    (folder / "tokens.bin").write_bytes(tokens.astype("<u2").tobytes())
    np.save(folder / "offsets.npy", np.arange(len(hashes) + 1) * 3)
    np.save(folder / "num_bytes.npy", np.full(len(hashes), 7))
    np.save(folder / "hashes.npy", hashes)
    files.write_json(folder / "tokens.json", {"vocabulary_size": 300, "start_id": 0, "end_id": 0})


def test_every_document_is_on_exactly_one_side_in_ascending_order(tmp_path):
    paths = {name: tmp_path / name for name in OUTPUTS}
    write_tokens(paths["tokens"], some_hashes(1000))
    split.main(paths, split=params())
    sides = [np.load(paths["split"] / f"{name}.npy", allow_pickle=False) for name in SIDES]
    assert sorted(np.concatenate(sides)) == list(range(1000))
    report = files.read_json(paths["split.json"])
    for name, side in zip(SIDES, sides, strict=True):
        assert side.dtype == np.int64
        assert (np.diff(side) > 0).all()
        assert report[name] == {"documents": len(side), "tokens": 3 * len(side), "bytes": 7 * len(side)}


def test_what_the_sides_share_is_written_and_told(tmp_path, capsys):
    paths = {name: tmp_path / name for name in OUTPUTS}
    write_tokens(paths["tokens"], some_hashes(200))
    split.main(paths, split=params())
    report, told = files.read_json(paths["leakage.json"]), capsys.readouterr()
    assert (report["ngram_size"], report["near_duplicate_similarity"]) == (13, 0.8)
    assert told.out.startswith("split: train ") and "validation 0 documents exactly" in told.out
    for side in ("validation", "test"):
        size = len(np.load(paths["split"] / f"{side}.npy", allow_pickle=False))
        assert report[side]["num_documents"] == size
        assert report[side]["num_tokens"] == 3 * size
        assert not any(count for name, count in report[side].items() if not name.startswith("num_"))

    (paths["tokens"] / "tokens.bin").write_bytes(bytes(2 * 3 * 200))  # every document the same three tokens
    split.main(paths, split=params())
    found, told = files.read_json(paths["leakage.json"])["test"], capsys.readouterr()
    assert found["exact_documents"] == found["near_duplicate_documents"] == found["num_documents"]
    assert f"test {found['num_documents']} documents exactly" in told.out


def test_a_refused_split_leaves_the_old_one(tmp_path):
    paths = {name: tmp_path / name for name in OUTPUTS}
    write_tokens(paths["tokens"], some_hashes(20))
    paths["split"].mkdir()
    with pytest.raises(Refusal):
        split.main(paths, split=params())
    assert paths["split"].exists()


def documents_with_near_duplicates():
    """200 documents, and of each of them copies with zero to nine words changed."""
    rng = random.Random(1)
    texts = []
    for _ in range(200):
        words = [f"w{rng.randrange(3000)}" for _ in range(60)]
        texts.append(" ".join(words))
        for _ in range(3):
            changed = list(words)
            for place in rng.sample(range(60), rng.randrange(10)):
                changed[place] = "changed"
            texts.append(" ".join(changed))
    rng.shuffle(texts)
    return texts


def test_no_two_near_duplicates_lie_on_different_sides():
    sides = sides_of_texts(documents_with_near_duplicates())
    sketches = signatures(list(sides), 128)
    side = np.array(list(sides.values()))
    assert set(side) == {TRAIN, VALIDATION, TEST}
    most_alike = 0
    for index in range(len(sides)):
        across = np.count_nonzero(sketches[side != side[index]] == sketches[index], axis=1)
        most_alike = max(most_alike, int(across.max()))
    assert 0.6 < most_alike / 128 < 0.8  # there are cousins, but no pair at or above the threshold


@pytest.mark.slow
def test_two_machines_write_the_same_bytes_in_every_data_stage(tmp_path):
    texts = [*documents_with_near_duplicates(), "a <|endoftext|> in the text\0 \u2028 of some document " * 3]
    digests = []
    for name, environment in {
        "one": {"PYTHONHASHSEED": "1", "TZ": "UTC", "LC_ALL": "C", "RAYON_NUM_THREADS": "1"},
        "the other ü": {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo", "TOKENIZERS_PARALLELISM": "false"},
    }.items():
        folder = tmp_path / name
        shutil.copytree(ROOT / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "dvc.yaml", folder)
        small = (ROOT / "params.yaml").read_text().replace("min_documents: 100 ", "min_documents: 10 ")
        (folder / "params.yaml").write_text(small)
        (folder / "data" / "raw").mkdir(parents=True)
        documents.write(folder / "data/raw/documents.parquet", ("text", "source"), ((text, "here") for text in texts))
        for stage in ("clean", "tokenize", "split"):
            subprocess.run(
                [sys.executable, "-m", f"pipeline.{stage}"], cwd=folder, env=os.environ | environment, check=True
            )
        digests.append({name: files.sha256_of(folder / name) for name in ("data", "reports")})
    assert digests[0] == digests[1]


def test_the_hash_of_a_text_is_the_beginning_of_its_sha256():
    digest = hashlib.sha256(b"text")
    assert content_hash(digest.hexdigest()) == int.from_bytes(digest.digest()[:8], "big")
