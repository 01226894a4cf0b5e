"""What the whole of it never does: read or write a pickle, look beyond this machine, be seen from beyond it."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.closure import ROOT
from tests.test_end_to_end import STAGES, Clone

WATCH = ROOT / "tests" / "watch"


def events(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def listening(root: psutil.Process) -> set[str]:
    """The addresses on which a process or any that it started waits for connections."""
    found = set()
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            found |= {each.laddr.ip for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN}
    return found


@contextlib.contextmanager
def watched(process: subprocess.Popen[Any]) -> Iterator[set[str]]:
    """The addresses on which the process listens at any moment meanwhile."""
    found: set[str] = set()

    def look() -> None:
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                found.update(listening(psutil.Process(process.pid)))
            time.sleep(0.3)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        thread.join()


def test_the_watch_sees_pickles_and_refuses_other_machines(tmp_path: Path) -> None:
    code = """
import collections, pickle, socket, urllib.request
pickle.loads(pickle.dumps(collections.Counter()))
for what in (lambda: socket.socket().connect(("192.0.2.1", 9)), lambda: urllib.request.urlopen("http://example.org"),
             lambda: socket.create_connection(("192.0.2.1", 9), 1), lambda: socket.gethostbyname("example.org")):
    try:
        what()
        raise SystemExit("not refused")
    except OSError as problem:
        assert "is not this machine" in str(problem), problem
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
"""
    environment = {**os.environ, "PYTHONPATH": str(WATCH), "WATCH": str(tmp_path / "log")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    kinds = [event["event"] for event in events(tmp_path / "log")]
    assert kinds[:3] == ["pickle.dumps", "pickle.loads", "pickle.find_class"]
    assert kinds[3:] == ["socket.connect", *["socket.getaddrinfo"] * 2, "socket.gethostbyname"]


@pytest.mark.slow
def test_a_whole_run_unpickles_nothing_and_looks_nowhere_but_at_this_machine(tmp_path: Path) -> None:
    """As a flow, so that DVC and Prefect run as well; and without the Makefile, which sets some of the environment."""
    quiet = ("MLFLOW", "DVC", "PREFECT", "DO_NOT_TRACK", "HF_")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(quiet)]:
            patch.delenv(name)
        clone = Clone(tmp_path / "clone", PYTHONPATH=str(WATCH), WATCH=str(tmp_path / "log"))
    command = [sys.executable, "-m", "flows.pipeline"]
    process = subprocess.Popen(
        command, cwd=clone.folder, env=clone.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with watched(process) as addresses:
        said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said
    assert f"8 Completed ({', '.join(STAGES)})" in said
    assert addresses == {"127.0.0.1"}, "Prefect's temporary server"

    found = events(tmp_path / "log")
    assert [event for event in found if event["event"].startswith("socket")] == []
    assert [event for event in found if event["event"] == "pickle.find_class"] == []
    ours = [event for event in found if re.search(r" -m pipeline\.\w+", event["process"])]
    # Two numbers that jinja2 pickles into a constant when it is imported. (DVC pickles into its own state database,
    # Prefect's server into its memory.)
    pickled = [event for event in ours if event["event"].startswith("pickle")]
    assert {(event["event"], event["callers"][0]) for event in pickled} == {("pickle.dumps", "jinja2.bccache")}
    assert {re.search(r"pipeline\.(\w+)", event["process"])[1] for event in pickled} > {"tokenize", "train", "sample"}
    mlflow = [event for event in ours if event["event"] == "import"]
    assert {re.search(r"pipeline\.(\w+)", event["process"])[1] for event in mlflow} == {"publish", "follow", "shown"}
    assert {event["what"] for event in mlflow} == {"['false', 'true']"}, "pickles off, telemetry off"


@pytest.mark.slow
def test_the_pages_that_make_ui_serves_are_seen_from_this_machine_alone(tmp_path: Path) -> None:
    for name in ("Makefile", "pipeline"):
        (tmp_path / name).symlink_to(ROOT / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")} | {"PATH": path}
    command = ["make", "--old-file=setup", "ui", f"PORT={port}"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True) as process:
        try:
            found: set[str] = set()
            for _ in range(300):
                found = found or listening(psutil.Process(process.pid))
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.2)
            assert listening(psutil.Process(process.pid)) | found == {"127.0.0.1"}
        finally:
            os.killpg(process.pid, signal.SIGKILL)
