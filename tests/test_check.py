"""Whatever lies in the source folder, the user hears of it in one message before DVC starts."""

import fcntl
import os
import socket

import pytest

from pipeline.check import mend_lock, obstacles


def test_an_ordinary_folder_has_no_obstacles(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "tëxt with space.txt").write_text("text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "inner" / "tëxt with space.txt")
    assert obstacles(tmp_path) == []


def test_what_dvc_would_hang_or_die_on_is_named_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    os.mkfifo("pipe.txt")
    (tmp_path / "nowhere.txt").symlink_to("missing")
    (tmp_path / "itself.txt").symlink_to("itself.txt")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        found = dict(line.removeprefix(f"{tmp_path}/").split(": ") for line in obstacles(tmp_path))
    assert found == {
        "caf\\udce9.txt": "its name is not UTF-8",
        "itself.txt": "a link that leads nowhere",
        "nowhere.txt": "a link that leads nowhere",
        "pipe.txt": "neither a file nor a folder",
        "socket.txt": "neither a file nor a folder",
    }


@pytest.mark.parametrize("half", ["", '{"read": {"data/tokens": [{"pi'])
def test_a_list_of_locks_that_a_killed_dvc_cut_off_is_removed(tmp_path, half, capsys):
    lock = tmp_path / "rwlock"
    mend_lock(lock)  # none there
    lock.write_text('{"read": {}, "write": {}}')
    mend_lock(lock)
    assert lock.exists()
    lock.write_text(half)
    with (tmp_path / "rwlock.lock").open("a") as beside:
        fcntl.flock(beside, fcntl.LOCK_EX)  # a DVC that is just writing it
        mend_lock(lock)
        assert lock.exists()
    assert capsys.readouterr().out == ""
    mend_lock(lock)
    assert not lock.exists()
    assert "rwlock" in capsys.readouterr().out
