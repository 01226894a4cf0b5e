"""Real servers on this machine, each on a free port: PostgreSQL, and whatever a command starts."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextlib.contextmanager
def started(command, ready, **options):
    """A server that is ready once `ready` does not raise; it and its children are killed at the end."""
    server = subprocess.Popen(command, start_new_session=True, **options)
    try:
        for _ in range(600):
            assert server.poll() is None, f"{command[0]} did not start"
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ready()
                break
            time.sleep(0.2)
        else:
            pytest.fail(f"{command[0]} is not ready")
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextlib.contextmanager
def postgresql(folder, *databases):
    """USER@HOST:PORT of a PostgreSQL of the system's packages with these empty databases; it keeps its data there."""
    places = [str(folder) for folder in Path("/usr/lib/postgresql").glob("*/bin")]
    path = os.pathsep.join([os.environ["PATH"], *places])
    initdb, postgres, createdb, is_ready = programs = [
        shutil.which(name, path=path) for name in ("initdb", "postgres", "createdb", "pg_isready")
    ]
    if None in programs:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    someone = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        someone = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        for above in (folder, *folder.parents[:-2]):
            above.chmod(0o755)
        shutil.chown(folder, "nobody", "nogroup")
    data, port = folder / "data", str(free_port())
    there = ["-h", "127.0.0.1", "-p", port]
    subprocess.run(
        [initdb, "--username=pipeline", "--auth=trust", "--encoding=UTF8", "--no-sync", data],
        check=True, capture_output=True, cwd=folder, **someone,
    )  # fmt: skip
    command = [postgres, "-D", str(data), *there, "-k", str(folder), "-c", "fsync=off"]

    def ask():
        subprocess.run([is_ready, *there], check=True, capture_output=True)

    with started(command, ask, cwd=folder, stderr=subprocess.DEVNULL, **someone):
        for name in databases:
            subprocess.run([createdb, *there, "-U", "pipeline", name], check=True)
        yield f"pipeline@127.0.0.1:{port}"
