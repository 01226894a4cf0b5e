import hashlib
import json
import math
import random
import time
import unicodedata

import numpy as np
import pydantic
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import clean, documents, near_duplicates
from pipeline.near_duplicates import NearDuplicates, shingles, signatures
from pipeline.stage import Refusal

PARAMS = {
    "unicode_form": "NFC",
    "min_characters": 5,
    "max_characters": 1000,
    "max_broken_share": 0.01,
    "near_duplicate_similarity": 0.8,
    "minhash_permutations": 128,
    "min_documents": 0,
}
FORMS = st.sampled_from(["NFC", "NFKC", "none"])
# Plain letters, and everything that has ever confused a normaliser.
NASTY = st.text(
    st.one_of(
        st.sampled_from(
            "ab \t\n\r\v\f\0\u0085\u2028\u2029\u00a0\u3000\u200b\u200c\u200d\ufeff\ufffd\u00ad\u0301\u0323"
        ),
        st.sampled_from("\u1e9b\u0344\ufb01\ufdfa\u2126\uac00\u1100\u1161\u11a8\u0958\u0340\U0001f1e9\U0001f468\ufe0f"),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=40,
)


def params(**changes):
    return clean.Params.model_validate(PARAMS | changes)


def run(texts, **changes):
    """The kept texts and the counts."""
    tally = clean.Tally()
    return [text for text, _ in clean.cleaned([list(texts)], params(**changes), tally)], tally


def sentence(rng, num_words=70):
    return " ".join(f"w{rng.randrange(5000)}" for _ in range(num_words))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a\r\nb\rc\u2028d\u2029e\u0085f\vg\fh", "a\nb\nc\nd\ne\nf\ng\nh"),
        ("  \u3000a \u00a0\t b  \n\n\n\n c\u2003 \n\n", "a b\n\n c"),
        ("\ufeffno\u200bth\0ing\u00ad\x1b \x9f\ufdd0\U0010ffffhere", "nothing here"),
        ("r\0\n\0o\0w", "r\now"),
        ("\r\0\n\0", ""),
        ("cafe\u0301 e\u200b\u0301", "café é"),
        ("if x:\n\tif y:\n        return  1 \n", "if x:\n\tif y:\n        return 1"),
        ("👨\u200d👩\u200d👧 क्\u200dष می\u200cخواهم \u200fא\u200e 🏴\U000e0067\U000e007f ❤\ufe0f", None),  # noqa: RUF001
        ("ﬁne ½", None),
    ],
)
def test_normalising_changes_what_says_nothing_and_keeps_the_rest(raw, expected):
    assert clean.normalise(raw, "NFC") == (raw if expected is None else expected)


def test_nfkc_folds_look_alikes_and_none_keeps_the_characters_as_they_are():
    assert clean.normalise("ﬁne \uff12", "NFKC") == "fine 2"
    assert clean.normalise("e\u0301", "none") == "e\u0301"


@given(NASTY, FORMS)
@example("\u1e9b\u0323", "NFKC")
def test_normalising_twice_is_normalising_once(text, form):
    once = clean.normalise(text, form)
    assert clean.normalise(once, form) == once
    assert form == "none" or unicodedata.is_normalized(form, once)


def test_no_character_of_unicode_is_normalised_differently_the_second_time():
    every = "".join(f"a{chr(code)}b" for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    once = clean.normalise(every, "NFKC")
    assert clean.normalise(once, "NFKC") == once


@settings(deadline=None)  # the first example imports datasketch
@given(st.lists(NASTY, max_size=12), FORMS, st.integers(1, 10), st.integers(10, 30))
def test_bytes_in_are_bytes_kept_and_bytes_dropped_whatever_comes(texts, form, shortest, longest):
    kept, tally = run(texts, unicode_form=form, min_characters=shortest, max_characters=longest)
    assert tally.bytes_in == sum(len(text.encode()) for text in texts)
    assert tally.bytes_kept == sum(len(text.encode()) for text in kept)
    assert tally.bytes_in == tally.bytes_kept + sum(tally.bytes_dropped.values())
    assert tally.documents_in == len(texts) == len(kept) + sum(tally.documents_dropped.values())
    assert all(shortest <= len(text) <= longest for text in kept)
    assert len(set(kept)) == len(kept)


def test_normalising_to_a_longer_spelling_counts_as_negative_bytes():
    kept, tally = run(["\ufdfa, said he"], unicode_form="NFKC")
    assert len(kept[0].encode()) > tally.bytes_in
    assert tally.bytes_dropped["normalised"] == tally.bytes_in - tally.bytes_kept < 0


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("\ufeff \r\n\0", "empty"),
        (" four ", "too_short"),
        ("word " * 300, "too_long"),
        ("two broken \ufffd\ufffd characters", "broken"),
        ("a" + "\u0301\u0323" * 600 + " pile", "broken"),
        ("the  first one", "exact_duplicate"),
    ],
)
def test_every_reason_to_drop_a_document_is_counted_with_its_raw_bytes(raw, reason):
    kept, tally = run(["the first one\n", raw])
    assert kept == ["the first one"]
    assert {key for key, value in tally.documents_dropped.items() if value} == {reason}
    assert tally.bytes_dropped == dict.fromkeys(clean.REASONS, 0) | {reason: len(raw.encode()), "normalised": 1}


@pytest.mark.parametrize(
    "marks",
    [
        "\u0301\u0323",
        "\u0301\u200b\u0323\u200b",  # no pile until the invisible characters between them go
        "\u0f73\u0f81",  # not combining by themselves, but what they are composed of is
        "\uff9e\u0334",  # the same under NFKC alone
    ],
)
def test_a_pile_of_combining_marks_does_not_stop_the_pipeline(marks):
    start_s = time.monotonic()
    _, tally = run(["a" + marks * 250_000], max_characters=10**7, unicode_form="NFKC")
    assert tally.documents_dropped["broken"] == 1
    assert time.monotonic() - start_s < 10  # putting them in order takes minutes


def test_the_first_of_several_near_duplicates_is_kept():
    rng = random.Random(1)
    one, other = sentence(rng), sentence(rng)
    words = one.split()
    nearly = " ".join([*words[:30], "changed", *words[31:]])
    kept, tally = run([one, other, nearly, one.upper(), other + " more"])
    assert kept == [one, other]
    assert tally.documents_dropped["near_duplicate"] == 3


def test_what_resembles_only_a_dropped_document_is_kept():
    rng = random.Random(2)
    words = sentence(rng).split()
    step = [f"new{i}" for i in range(len(words))]
    chain = [" ".join(step[:changed] + words[changed:]) for changed in (0, 5, 10)]
    assert run(chain, minhash_permutations=1024)[0] == [chain[0], chain[2]]


def test_near_duplicates_are_found_in_text_without_spaces():
    rng = random.Random(3)
    chinese = ["".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(200)) for _ in range(20)]
    edited = [text[:50] + "\u4e00" + text[51:] for text in chinese]
    kept, tally = run(chinese + edited)
    assert kept == chinese
    assert tally.documents_dropped["near_duplicate"] == len(edited)


@pytest.mark.parametrize("similarity", [0.5, 0.65, 0.8, 0.95, 1.0])
@pytest.mark.parametrize(("num_permutations", "size", "max_pairs"), [(16, 1, 7), (50, 90, 2**15), (128, 400, 7)])
def test_the_search_misses_no_pair_that_comparing_all_with_all_finds(
    monkeypatch, similarity, num_permutations, size, max_pairs
):
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", max_pairs)
    rng = random.Random(num_permutations)
    bases = [sentence(rng, 30).split() for _ in range(25)]
    texts = [" ".join(word if rng.random() < 0.97 else "new" for word in rng.choice(bases)) for _ in range(400)]
    sketches = signatures(texts, num_permutations)
    kept: list[int] = []
    for index, sketch in enumerate(sketches):
        equal = np.count_nonzero(sketches[kept] == sketch, axis=1)
        if not (equal >= math.ceil(similarity * num_permutations)).any():
            kept.append(index)
    search = NearDuplicates(similarity, num_permutations)
    parts = [search.first_of_their_kind(texts[start : start + size]) for start in range(0, len(texts), size)]
    assert np.flatnonzero(np.concatenate(parts)).tolist() == kept


@pytest.mark.parametrize("similarity", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("max_pairs", [7, 2**15])
def test_the_documents_found_in_another_set_are_those_that_comparing_all_with_all_finds(
    monkeypatch, similarity, max_pairs
):
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", max_pairs)
    monkeypatch.setattr(near_duplicates, "BATCH", 40)
    rng = random.Random(1)
    bases = [sentence(rng, 30).split() for _ in range(25)]
    texts = [" ".join(word if rng.random() < 0.97 else "new" for word in rng.choice(bases)) for _ in range(300)]
    texts += [sentence(rng, 30) for _ in range(100)]
    rng.shuffle(texts)
    some, others = texts[:150], texts[150:]
    sketches = signatures(texts, 50)
    equal = np.count_nonzero(sketches[:150, None] == sketches[None, 150:], axis=2)
    expected = np.flatnonzero((equal >= math.ceil(similarity * 50)).any(axis=1))
    assert 0 < len(expected) < 150
    search = NearDuplicates(similarity, 50)
    search.add(some[:60])
    search.add(some[60:])
    found = np.concatenate([search.found_in(others[:7]), search.found_in(others[7:])])
    assert sorted(found) == expected.tolist()  # each once: what was found is forgotten


def test_the_index_returns_every_pair_that_agrees_in_a_band(monkeypatch):
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", 3)
    sketches = np.random.default_rng(1).integers(0, 3, (60, 16)).astype(np.uint32)
    search = NearDuplicates(0.8, 16)
    keys = search._band_keys(sketches)
    for part in (slice(0, 5), slice(5, 35), slice(35, 40)):
        search._add(sketches[part], keys[part])
    found = [pair for rows, kept in search._pairs(keys[40:]) for pair in zip(rows.tolist(), kept.tolist(), strict=True)]
    bands = sketches.reshape(60, search.num_bands, search.num_rows)
    agree = (bands[40:, None] == bands[None, :40]).all(axis=-1)
    assert sorted(found) == sorted((row, kept) for row, kept, _ in np.argwhere(agree).tolist())


def test_the_estimate_is_the_jaccard_similarity_within_its_standard_error():
    rng = random.Random(4)
    errors = []
    for changed in range(0, 70, 2):
        words = sentence(rng).split()
        texts = [" ".join(words), " ".join(["x"] * changed + words[changed:])]
        one, other = map(shingles, texts)
        exact = len(one & other) / len(one | other)
        sketches = signatures(texts, 1024)
        errors.append(np.mean(sketches[0] == sketches[1]) - exact)
    assert np.abs(errors).max() < 4 * 0.5 / 32
    assert abs(np.mean(errors)) < 0.01


def test_signatures_are_the_same_on_every_machine():
    sketches = signatures(["The quick brown fox", "the QUICK brown fox", "ein kurzer Satz", "你好世界"], 64)
    assert (sketches[0] == sketches[1]).all()
    assert hashlib.sha256(sketches.astype("<u4").tobytes()).hexdigest()[:16] == "fa5d2a7f8fe17a7e"


def test_the_search_remembers_about_one_kilobyte_a_document():
    rng = random.Random(5)
    search = NearDuplicates(0.8, 128)
    kept = search.first_of_their_kind([sentence(rng, 20) for _ in range(3000)])
    num_bytes = sum(keys.nbytes + places.nbytes for keys, places in search._runs) + search._num_kept * 4 * 128
    assert kept.all()
    assert num_bytes < 1000 * len(kept)
    assert len(search._runs) < 10


def write_raw(folder, texts):
    (folder / "raw").mkdir()
    rows = ((text, f"{index}.txt") for index, text in enumerate(texts))
    documents.write(folder / "raw" / "documents.parquet", ("text", "source"), rows)
    return {"raw": folder / "raw", "clean": folder / "clean", "clean.json": folder / "clean.json"}


def test_the_stage_writes_texts_with_their_hashes_and_the_counts(tmp_path, capsys):
    paths = write_raw(tmp_path, ["A  first document", "\ufeffA first document", "Ein zweiter, längerer Text", "x"])
    clean.main(paths, clean=params())
    ((texts, sha256s),) = documents.read(tmp_path / "clean" / "documents.parquet", "text", "sha256")
    assert texts == ["A first document", "Ein zweiter, längerer Text"]
    assert sha256s == [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    report = json.loads((tmp_path / "clean.json").read_text())
    assert report["documents_kept"] == 2
    assert report["documents_dropped"]["exact_duplicate"] == 1
    assert report["bytes_in"] == report["bytes_kept"] + sum(report["bytes_dropped"].values())
    assert capsys.readouterr().out == "clean: kept 2 of 4 documents (too_short 1, exact_duplicate 1)\n"


def test_many_row_groups_come_out_as_one_list(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "ROW_GROUP_ROWS", 7)
    monkeypatch.setattr(documents, "ROW_GROUP_CHARACTERS", 500)
    rng = random.Random(6)
    texts = [sentence(rng, 5 + 3 * (i % 9)) for i in range(60)]
    clean.main(write_raw(tmp_path, texts + texts), clean=params())
    file = tmp_path / "clean" / "documents.parquet"
    groups = [group for (group,) in documents.read(file, "text")]
    assert len(groups) > 9
    assert [text for group in groups for text in group] == texts
    assert documents.count(file) == 60


def test_few_documents_are_a_warning_and_no_failure(tmp_path, capsys):
    clean.main(write_raw(tmp_path, ["only one document"]), clean=params(min_documents=1000))
    warning = capsys.readouterr().err
    assert "1 documents are left" in warning
    assert "clean.min_documents (1,000)" in warning
    assert "by heart" in warning


@pytest.mark.parametrize(
    ("texts", "message"), [([], "holds no document"), (["x", "", "\ufffd" * 9], "empty 1, too_short 1, broken 1")]
)
def test_nothing_left_is_refused_with_the_counts(tmp_path, texts, message):
    paths = write_raw(tmp_path, texts)
    with pytest.raises(Refusal, match=message):
        clean.main(paths, clean=params())
    assert not paths["clean"].exists()


def test_a_damaged_file_is_refused_with_the_way_back(tmp_path):
    paths = write_raw(tmp_path, [f"document number {i}, of some length" for i in range(50)])
    file = paths["raw"] / "documents.parquet"
    sound = file.read_bytes()
    for damaged in (sound[:-20], b""):
        file.write_bytes(damaged)
        with pytest.raises(Refusal, match=r"damaged \(.*dvc checkout"):
            clean.main(paths, clean=params())


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    file = tmp_path / "documents.parquet"
    documents.write(file, ("text", "source"), [(f"document number {i}, of some length", "here") for i in range(50)])
    sound, rows = file.read_bytes(), list(documents.read(file, "text", "source"))
    num_refused = 0
    for place in range(0, len(sound), 3):
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        try:
            assert list(documents.read(file, "text", "source")) == rows
        except Refusal:
            num_refused += 1
    assert num_refused > len(sound) / 3 / 2


def test_contradicting_lengths_are_a_fault_of_the_parameters():
    with pytest.raises(pydantic.ValidationError, match="every document would be dropped"):
        params(min_characters=50, max_characters=49)
