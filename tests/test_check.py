"""Whatever lies in the source folder, the user hears of it in one message before DVC starts."""

import fcntl
import os
import socket
import subprocess
import sys

import pytest

from pipeline.check import mend_lock, obstacles, refuse_obstacles
from pipeline.stage import Refusal
from tests.closure import ROOT


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


def test_every_folder_that_a_stage_reads_and_none_writes_is_looked_through(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    definitions = "a: {cmd: x, deps: [mine, code.py, a.txt], outs: [made]}, b: {cmd: x, deps: [made, made/part]}"
    (tmp_path / "dvc.yaml").write_text(f"stages: {{{definitions}}}")
    with pytest.raises(Refusal, match="there is no folder mine: make it"):
        refuse_obstacles()
    (tmp_path / "mine").mkdir()
    refuse_obstacles()
    os.mkfifo("mine/pipe.txt")
    with pytest.raises(Refusal, match=r"cannot read all of mine; move away or mend:\n  mine/pipe.txt: neither a file"):
        refuse_obstacles()


def test_the_flow_asks_before_it_starts_anything(tmp_path):
    (tmp_path / "source").mkdir()
    os.mkfifo(tmp_path / "source" / "pipe.txt")
    (tmp_path / "dvc.yaml").write_text("stages: {a: {cmd: x, deps: [source], outs: [made]}}")
    command = [sys.executable, "-m", "flows.pipeline"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "flow: DVC cannot read all of source; move away or mend:\n  source/pipe.txt: neither a file nor a folder\n"
    )
    assert not (tmp_path / "prefect").exists()


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
