"""Whole files or none, the same bytes for the same content, and one message for a damaged one."""

import json
import os
import tracemalloc

import pytest

from pipeline import files
from pipeline.stage import Refusal


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "inner" / "file.txt"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.whole_file(path) as beside:
        beside.write_text("half of the n")
        raise RuntimeError("killed")
    assert path.read_text() == "old"
    with files.whole_file(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


def test_a_folder_appears_whole_or_not_at_all_and_holds_nothing_of_an_older_one(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises(RuntimeError), files.whole_folder(path) as beside:
        (beside / "a").write_text("a")
        raise RuntimeError("killed")
    assert not path.exists()
    for name in ("a", "b"):
        with files.whole_folder(path) as beside:
            (beside / name).write_text(name)
    assert [entry.name for entry in path.iterdir()] == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_json_has_sorted_keys_and_one_newline_and_no_nan(tmp_path):
    files.write_json(tmp_path / "x.json", {"b": 1, "a": "ü"})
    assert (tmp_path / "x.json").read_bytes() == '{\n  "a": "ü",\n  "b": 1\n}\n'.encode()
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"a": "ü", "b": 1}


@pytest.mark.parametrize("read", [files.read_json, files.read_jsonl])
@pytest.mark.parametrize("content", [b'{"a": 1', b"\xff\xfe{}"])
def test_a_damaged_file_is_refused_with_the_fix(tmp_path, read, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(Refusal, match=r"x is damaged .*dvc checkout --force"):
        read(tmp_path / "x")


def test_the_hash_of_a_folder_depends_on_names_and_bytes_alone(tmp_path):
    for name, order in (("one", "ab"), ("two", "ba")):
        (tmp_path / name / "inner").mkdir(parents=True)
        for letter in order:
            (tmp_path / name / "inner" / letter).write_text(letter)
    assert files.sha256_of(tmp_path / "one") == files.sha256_of(tmp_path / "two")
    (tmp_path / "two" / "inner" / "a").rename(tmp_path / "two" / "inner" / "c")
    assert files.sha256_of(tmp_path / "one") != files.sha256_of(tmp_path / "two")


HOSTILE = {
    "nested too deeply": b"[" * 200_000,
    "no JSON": b"\xff\xfe{",
    "a number of thousands of digits": b'{"a": ' + b"9" * 5000 + b"}",
    "cut": b'{"a": 1',
    "another kind": b'["a"]',
    "without the key": b'{"b": 1}',
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_json_is_refused_in_one_sentence(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(Refusal, match=r"a.json is damaged \(.*restore it with") as caught:
        files.read_json(tmp_path / "a.json", "a")
    assert "\n" not in str(caught.value) and len(str(caught.value).replace(str(tmp_path), "")) < 240


def test_json_of_gigabytes_is_refused_before_it_is_read(tmp_path):
    for name, read in {"a.json": files.read_json, "a.jsonl": files.read_jsonl}.items():
        with (tmp_path / name).open("wb") as file:
            file.truncate(40 * 10**9)  # a hole: it takes no room on the disk
        tracemalloc.start()
        with pytest.raises(Refusal, match=r"is damaged \(more than 4,194,304 bytes\)"):
            read(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
        tracemalloc.stop()


@pytest.mark.parametrize("read", [files.read_json, files.read_jsonl, files.sha256_of])
def test_pipes_and_devices_are_refused_where_a_file_should_be(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(Refusal, match=f"{name} is no file"):
            read(tmp_path / name)


def test_a_copy_of_a_folder_has_its_files_and_not_its_links(tmp_path):
    (tmp_path / "one" / "inner").mkdir(parents=True)
    (tmp_path / "one" / "inner" / "file").write_text("text")
    (tmp_path / "one" / "link").symlink_to("inner/file")
    files.copy_folder(tmp_path / "one", tmp_path / "two")
    assert not (tmp_path / "two" / "link").is_symlink()
    assert files.sha256_of(tmp_path / "one") == files.sha256_of(tmp_path / "two")
