"""Whatever lies in the source folder, the user hears of it in one message before DVC starts."""

import os
import socket

from pipeline.check import obstacles


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
