"""A real MLflow server on this machine, for the faults of tracking: one a campaign, emptied for every try."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from chaos.project import Broken, environment

START_S = 90.0


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """Started when it is first needed; one try at a time may have it."""

    def __init__(self, folder: Path, empty: Path) -> None:
        self.folder, self.empty = folder, empty
        self.database, self.artifacts = folder / "mlflow.db", folder / "artifacts"
        self.uri = f"http://127.0.0.1:{free_port()}"
        self._alone = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def emptied(self) -> Iterator[None]:
        """Have the server, running and without a single run in it."""
        with self._alone:
            if self._process is None:
                self._start()
            # SQLite's own copy, in one transaction: the server, which keeps the file open, sees it whole.
            with (
                contextlib.closing(sqlite3.connect(self.empty)) as empty,
                contextlib.closing(sqlite3.connect(self.database)) as database,
            ):
                empty.backup(database)
            try:
                yield
            finally:
                self.go_on()

    def stop(self) -> None:
        """Freeze it: connections are taken, nobody answers."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Thaw it."""
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """End it and everything that it started."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _start(self) -> None:
        self.folder.mkdir()
        shutil.copyfile(self.empty, self.database)
        with (self.folder / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                ["python", "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", self.uri.rpartition(":")[2],
                 "--workers", "1", "--backend-store-uri", f"sqlite:///{self.database}",
                 "--artifacts-destination", str(self.artifacts)],
                cwd=self.folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                env=environment(self.folder, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"),
            )  # fmt: skip
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return
            time.sleep(0.2)
        raise Broken(f"the MLflow server did not start: see {self.folder / 'log.txt'}")

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
