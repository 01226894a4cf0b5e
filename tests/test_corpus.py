"""Token files that somebody tampered with are refused in one sentence, before room is made for what they claim."""

import io
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import corpus, files
from pipeline.stage import Refusal
from tests import tiny
from tests.test_fuzz import EDITS, FUZZ, edited

GOOD = {"vocabulary_size": 64, "start_id": 63, "end_id": 63}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "tokens"
    tiny.write_tokens(folder, [3, 5, 2])
    tiny.write_split(folder.parent / "split", 3)
    return folder


def header(shape, kind="<i8"):
    """A .npy file that claims a shape and holds nothing."""
    file = io.BytesIO()
    np.lib.format.write_array_header_2_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


def array(values, kind="<i8"):
    file = io.BytesIO()
    np.save(file, np.array(values, kind), allow_pickle=False)
    return file.getvalue()


def archive():
    file = io.BytesIO()
    np.savez(file, np.arange(4))
    return file.getvalue()


HOSTILE = {
    "2**60 numbers": header((2**60,)),
    "a shape that overflows": header((2**40, 2**40)),
    "a negative shape": header((-1,)),
    "a pickle": header((2,), "|O") + b'cbuiltins\nexec\n(S\'open("executed","w")\'\ntR.',
    "an archive": archive(),
    "a header of code": b"\x93NUMPY\x01\x00\x40\x00" + b"__import__('os').system('touch executed')".ljust(64),
    "a deep header": b"\x93NUMPY\x02\x00\x00\x20\x00\x00" + b"(" * 8192,
    "no numbers of that kind": array([0.0, 1.0, 2.0, 3.0], "<f8"),
    "two dimensions": array([[0, 3], [8, 10]]),
    "not ascending": array([0, 8, 3, 10]),
    "negative": array([-1, 3, 8, 10]),
    "nothing": b"",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("name", ["offsets.npy", "train.npy"])
def test_hostile_arrays_are_refused(tokens, tmp_path, monkeypatch, name, content):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ("tokens" if name == "offsets.npy" else "split")
    files.copy_folder(tokens, tmp_path / "tokens")
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    tracemalloc.start()
    with pytest.raises(Refusal, match=rf"{name} is damaged \(.*dvc repro --force (tokenize|split)") as caught:
        corpus.load(folder) if folder.name == "tokens" else corpus.read_side(folder, "train", 3)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert tracemalloc.get_traced_memory()[1] < 30_000_000
    tracemalloc.stop()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("wrong", [{"vocabulary_size": "64"}, {"end_id": -1}, {"start_id": 2**40}, {"end_id": True}])
def test_numbers_of_tokens_that_are_none_are_refused(tokens, tmp_path, wrong):
    files.copy_folder(tokens, tmp_path)
    files.write_json(tmp_path / "tokens.json", GOOD | wrong)
    with pytest.raises(Refusal, match=r"tokens.json is damaged \(vocabulary_size, start_id, end_id are not all"):
        corpus.load(tmp_path)


def test_a_side_of_another_corpus_is_refused(tokens):
    assert corpus.read_side(tokens.parent / "split", "train", 3).tolist() == [2]
    with pytest.raises(Refusal, match="no ascending indices of 2 documents"):
        corpus.read_side(tokens.parent / "split", "train", 2)


@given(name=st.sampled_from(["offsets.npy", "num_bytes.npy", "hashes.npy", "tokens.json", "tokens.bin"]), edits=EDITS)
@FUZZ
def test_any_damage_to_the_token_files_is_refused_or_fits_together(tokens, name, edits):
    folder = tokens.parent / "damaged"
    files.copy_folder(tokens, folder)
    (folder / name).write_bytes(edited((folder / name).read_bytes(), edits))
    try:
        found = corpus.load(folder)
    except Refusal as refusal:
        assert "\n" not in str(refusal)
    else:
        assert sum(len(found.document(i)) for i in range(found.num_documents)) == len(found.tokens)
        assert len(found.num_bytes) == len(found.hashes) == found.num_documents
