"""As much of a Docker daemon as Prefect's worker asks of one, with processes in place of containers.

A process gets what its container would get, and no more: an empty folder, the variables of the job, and a PATH, as an
image has one. Volumes must lie where they are mounted. What only the real one has is missing: image, user, network.
"""

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


class Daemon(ThreadingHTTPServer):
    """It keeps what containers were created with, the latest last."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Calls)
        self.address = f"tcp://127.0.0.1:{self.server_port}"
        self.folder = folder
        self.created: list[dict[str, Any]] = []
        self.started: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, number: int) -> None:
        asked = self.created[number]
        for source, target, *_ in (bind.split(":") for bind in asked["HostConfig"]["Binds"]):
            assert source == target, "nothing is mounted here"
        folder = self.folder / str(number)
        folder.mkdir(parents=True)
        image = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}", "HOME": str(folder)}
        self.started[number] = subprocess.Popen(
            asked["Cmd"],
            cwd=folder,
            env=image | dict(variable.split("=", 1) for variable in asked["Env"]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def state(self, number: int) -> dict[str, Any]:
        process = self.started.get(number)
        code = process.poll() if process else None
        status = "created" if process is None else "running" if code is None else "exited"
        return {"Status": status, "ExitCode": code or 0}


class Calls(BaseHTTPRequestHandler):
    """The calls that the worker makes, by the last part of their path."""

    server: Daemon

    def do_GET(self) -> None:
        *_, kind, name, what = ["", "", *urlsplit(self.path).path.split("/")]
        if what == "version":
            self.answer({"ApiVersion": "1.44", "Version": "25.0"})
        elif kind == "images":
            self.answer({"Id": name})
        elif what == "json":
            self.answer({"Id": name, "Name": name, "Config": {"Tty": False}, "State": self.server.state(int(name))})
        elif what == "logs":
            self.send_response(200)
            self.end_headers()
            process = self.server.started[int(name)]
            for line in process.stdout or []:
                self.wfile.write(struct.pack(">BxxxL", 1, len(line)) + line)  # 1: of stdout
            process.wait()

    def do_POST(self) -> None:
        *_, name, what = urlsplit(self.path).path.split("/")
        if what == "create":
            self.server.created.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer({"Id": str(len(self.server.created) - 1)})
        elif what == "start":
            self.server.start(int(name))
            self.answer({})
        elif what == "wait":
            self.answer({"StatusCode": self.server.started[int(name)].wait()})

    def answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing of it belongs on the screen of a test."""


@contextlib.contextmanager
def daemon(folder: Path) -> Iterator[Daemon]:
    """It, and at the end nothing that it started."""
    with Daemon(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
            for process in server.started.values():
                with process:
                    process.kill()
