"""A Prefect server and a worker on this machine, in the background.

    python -m flows.services server | worker | deploy | stop

server   starts the server and its pages on 127.0.0.1:4200
worker   starts a worker, which runs what is scheduled, in this checkout
deploy   tells the server of the deployments in prefect.yaml and of the automations that go with them
stop     ends worker and server

Data, logs and process ids lie in .prefect/. PREFECT_API_URL names another server for worker and deploy, PIPELINE_POOL
another work pool, which must exist, and PIPELINE_CHECKOUT the checkout of its runs. Exit codes: 0 done, 1 refused.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from flows import overrides, settings
from pipeline import stage, worktree
from pipeline.stage import Refusal

if TYPE_CHECKING:
    import httpx

POOL = os.environ.get("PIPELINE_POOL", "training")  # docs/bigger.md tells of others
IS_OURS = POOL == "training"
START_S = 120  # making the database takes 15 s on two cores
STOP_S = 15
POLL_S = 0.2
WORKER = "worker.pid"


def server() -> None:
    """Start the server, and wait until it answers.

    Raises:
        Refusal: the port or the database is in use, or the server does not start.
    """
    with _one_start_at_a_time():
        if settings.running(settings.SERVER):
            print(f"the server runs already: {pages()}")
            return
        if settings.answers():
            raise Refusal(
                f"port {settings.PORT} of {settings.HOST} is in use by another program; end it, or name a server that "
                "runs elsewhere with PREFECT_API_URL"
            )
        settings.refuse_locked_database()
        os.environ.pop("PREFECT_API_URL", None)
        process = _start(settings.SERVER, ["server", "start", "--host", settings.HOST, "--port", str(settings.PORT)])
        _wait(settings.SERVER, process, "Prefect server", healthy)
    print(f"Prefect's pages: {pages()} (`make stop` ends the server)")


def worker() -> None:
    """Start a worker for the work pool of our deployments; ours is made where there is none.

    Raises:
        Refusal: no server answers, or the worker does not start.
    """
    reach()
    name = f"{socket.gethostname()} {Path.cwd().name}".replace("%", "-")  # Prefect takes none in the name of a worker
    kind = ["--type", "process"] if IS_OURS else []
    # A worker gives up after twelve calls that reach no server, and its runs end with it: so it tries each for longer.
    patience = {"PREFECT_CLIENT_MAX_RETRIES": "6"}
    with _one_start_at_a_time():
        if settings.running(WORKER):
            print("the worker runs already")
            return
        before = _heartbeat(name)
        process = _start(WORKER, ["worker", "start", "--pool", POOL, *kind, "--name", name], **patience)
        _wait(WORKER, process, "worker", lambda: _heartbeat(name) != before)
    print(f"a worker waits for runs of the pool {POOL} (`make stop` ends it)")


def deploy() -> None:
    """Register deployments and automations; what the server has of them already is brought up to date.

    Raises:
        Refusal: no server answers, params.yaml or dvc.yaml is not right, or Prefect refuses prefect.yaml.
    """
    reach()
    overrides.form()  # a part of the deployments; where Prefect meets its faults, it tells them at length
    pool = ["work-pool", "create", POOL, "--type", "process", "--overwrite"]
    environment = {"PIPELINE_CHECKOUT": str(Path.cwd()), **os.environ, "PIPELINE_POOL": POOL}
    for command in ([pool] if IS_OURS else []) + [["--no-prompt", "deploy", "--all"]]:
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *command], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Refusal(f"`prefect {' '.join(command)}` failed:\n{done.stdout}{done.stderr}".rstrip())
    from flows import automations

    names = automations.bring_up_to_date()
    print(f"the server has the deployments of prefect.yaml, and the automations {' and '.join(names)}: {pages()}")


def stop() -> None:
    """End worker and server, and whatever they run: it goes on from its checkpoints."""
    for name in (WORKER, settings.SERVER):
        print(f"{Path(name).stem}: {'ended' if stop_one(name) else 'does not run'}")


def reach() -> None:
    """Make sure of a server.

    Raises:
        Refusal: none answers.
    """
    is_named = "PREFECT_API_URL" in os.environ or settings.running(settings.SERVER)  # not one of another checkout
    os.environ.setdefault("PREFECT_API_URL", settings.API)
    if not is_named or not healthy():
        raise Refusal(f"no Prefect server answers at {os.environ['PREFECT_API_URL']}: start one with `make server`")


def healthy() -> bool:
    """Whether the server that is named, or else ours, answers."""
    answer = _ask("GET", "health")
    return answer is not None and answer.status_code == 200


def _heartbeat(worker_name: str) -> str | None:
    """When the server last heard of a worker of ours."""
    answer = _ask("POST", f"work_pools/{POOL}/workers/filter", json={})
    if answer is None or answer.status_code != 200:
        return None
    return next((one["last_heartbeat_time"] for one in answer.json() if one["name"] == worker_name), None)


def _ask(method: str, path: str, **more: Any) -> httpx.Response | None:
    """What the server that is named, or else ours, answers; None, where there is none."""
    import httpx

    url = os.environ.get("PREFECT_API_URL", settings.API)
    try:
        return httpx.request(method, f"{url.rstrip('/')}/{path}", timeout=2, **more)
    except httpx.HTTPError:
        return None


def pages() -> str:
    """The address of the server's pages."""
    return os.environ.get("PREFECT_API_URL", settings.API).removesuffix("/").removesuffix("/api")


def stop_one(name: str) -> bool:
    """End a service with all that it started; whether it ran."""
    process = settings.running(name)
    if process is not None:
        family = [process, *process.children(recursive=True)]
        process.terminate()
        psutil.wait_procs(family, STOP_S)
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, STOP_S)
    (settings.home() / name).unlink(missing_ok=True)
    return process is not None


def log_of(name: str) -> Path:
    """Where a service writes."""
    return (settings.home() / name).with_suffix(".log")


@contextlib.contextmanager
def _one_start_at_a_time() -> Iterator[None]:
    """Else two would both find nothing running, and the file of the first name the second."""
    settings.home().mkdir(parents=True, exist_ok=True)
    with worktree.held(settings.home() / "start.lock", "starting a service", wait=True):
        yield


def _start(name: str, command: list[str], **more: str) -> subprocess.Popen[bytes]:
    with log_of(name).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *command],
            env=os.environ | more,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C and the end of the terminal are not meant for it
        )
    started_s = psutil.Process(process.pid).create_time()
    (settings.home() / name).write_text(f"{process.pid} {started_s:.2f}\n", encoding="utf-8")
    return process


def _wait(name: str, process: subprocess.Popen[bytes], what: str, is_there: Callable[[], bool]) -> None:
    """Wait until a service that was started is there.

    Raises:
        Refusal: it ended, or is not there in time.
    """
    deadline_s = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline_s:
        if is_there():
            return
        time.sleep(POLL_S)
    stop_one(name)
    raise Refusal(f"the {what} did not start; why is in {log_of(name)}")


def main() -> None:
    """Do one of them."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.services", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("service", choices=("server", "worker", "deploy", "stop"))
    service = parser.parse_args().service
    settings.configure()
    with stage.refusals(service):
        {"server": server, "worker": worker, "deploy": deploy, "stop": stop}[service]()


if __name__ == "__main__":
    main()
