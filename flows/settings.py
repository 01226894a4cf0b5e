"""What Prefect reads when it is imported: data in this folder, no telemetry, and no console output beside ours."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
from pathlib import Path
from urllib.parse import quote

import psutil

from pipeline.stage import Refusal

HOST, PORT = "127.0.0.1", int(os.environ.get("PREFECT_SERVER_API_PORT", "4200"))
API = f"http://{HOST}:{PORT}/api"
MLFLOW_PAGES = f"http://{HOST}:5000"  # of `make ui`
SERVER = "server.pid"  # in Prefect's folder, while `make server` runs there
# Prefect takes no less. A run of a deployment that stops sending them has crashed; see flows/automations.py.
HEARTBEAT_S = 30
LOCKED_S = 10  # longer than any write of a server takes


def configure() -> None:
    """Set what is not set yet, before anything imports Prefect."""
    home = os.environ.setdefault("PREFECT_HOME", str(Path.cwd() / ".prefect"))
    defaults = {
        # Prefect would put the folder into the URL as it is, where `?` means something else. SQLite unquotes this one.
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///file:{quote(home)}/prefect.db?uri=true",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # Else any page that is open in a browser could tell the server what to run.
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{PORT},http://localhost:{PORT}",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # task logs go to the server; we print the same lines
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # making the database takes 15 s on two cores
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        "PREFECT_CLIENT_MAX_RETRIES": "3",  # 14 s, in which a server can be started again; the default of 5 is a minute
        "PREFECT_INTERNAL_LOGGING_LEVEL": "CRITICAL",  # no line for every event that a dead server missed
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # on this machine asking costs nothing; the default of 10 s is for a cloud
    }
    if running(SERVER) and answers():
        defaults["PREFECT_API_URL"] = API
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def home() -> Path:
    """The folder with all that Prefect keeps here."""
    return Path(os.environ["PREFECT_HOME"])


def running(name: str) -> psutil.Process | None:
    """The process that this file of ours names, if it is still the one that we started."""
    try:
        pid, started_s = (home() / name).read_text(encoding="utf-8").split()
        process = psutil.Process(int(pid))
        # A process id may have gone to another program; its start time has not.
        return process if f"{process.create_time():.2f}" == started_s and process.status() != "zombie" else None
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return None


def answers() -> bool:
    """Whether something listens where our server does."""
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex((HOST, PORT)) == 0


def refuse_locked_database() -> None:
    """Before a server starts, which would wait for minutes, and not say for what.

    Raises:
        Refusal: another process keeps the database in Prefect's folder for itself.
    """
    file = Path(os.environ["PREFECT_HOME"]) / "prefect.db"
    if not file.exists():
        return
    with contextlib.closing(sqlite3.connect(file, timeout=LOCKED_S)) as database:
        try:
            database.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as problem:
            raise Refusal(
                f"Prefect's database {file} cannot be used ({problem}); end the program that has it open (`fuser` "
                "names it), or name a server that runs elsewhere with PREFECT_API_URL"
            ) from None
