"""A Prefect server, a worker and the deployments of a project, as `make server worker deploy` starts them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil

from tests.servers import free_port


class Served:
    """Services of a project, on a free port; and what its server knows."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        port = str(free_port())
        clean = {name: value for name, value in environment.items() if not name.startswith("PREFECT")}
        self.folder, self.url = folder, f"http://127.0.0.1:{port}/api"
        self.environment = clean | {"PREFECT_HOME": str(folder / ".prefect"), "PREFECT_SERVER_API_PORT": port}

    def service(self, name: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m flows.services NAME`."""
        command = [sys.executable, "-m", "flows.services", name]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=200
        )

    def start(self, *names: str) -> None:
        """Start these services."""
        for name in names:
            done = self.service(name)
            assert done.returncode == 0, done.stderr

    def log(self, name: str) -> str:
        """What a service, and the runs that a worker started, have written."""
        return (self.folder / ".prefect" / f"{name}.log").read_text(encoding="utf-8")

    def kill(self, name: str) -> None:
        """SIGKILL, to the service alone."""
        psutil.Process(int((self.folder / ".prefect" / f"{name}.pid").read_text().split()[0])).kill()

    def ask(self, question: Callable[[Any], Any]) -> Any:
        """The answer of this server."""
        os.environ.setdefault("PREFECT_HOME", self.environment["PREFECT_HOME"])
        from prefect.client.orchestration import SyncPrefectClient

        with SyncPrefectClient(self.url) as client:
            return question(client)

    def run(self, deployment: str, **parameters: Any) -> UUID:
        """Start a run of a deployment."""

        def start(client: Any) -> UUID:
            found: UUID = client.create_flow_run_from_deployment(
                client.read_deployment_by_name(deployment).id, parameters=parameters
            ).id
            return found

        run: UUID = self.ask(start)
        return run

    def runs(self, deployment: str) -> list[Any]:
        """All runs of a deployment, the oldest first."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId

        def find(client: Any) -> list[Any]:
            chosen = FlowRunFilterDeploymentId(any_=[client.read_deployment_by_name(deployment).id])
            found: list[Any] = client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id=chosen))
            return sorted(found, key=lambda run: run.created)

        runs: list[Any] = self.ask(find)
        return runs

    def task_states(self, run: UUID) -> dict[str, str]:
        """The name of the final state of every task of a flow run."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
        return {task.name: task.state_name for task in self.ask(lambda it: it.read_task_runs(flow_run_filter=chosen))}

    def wait_for_states(self, run: UUID, **expected: str) -> None:
        """Until the tasks of a run have these states: the server learns of them a moment later."""
        deadline_s = time.monotonic() + 10
        while (found := self.task_states(run)) != expected:
            assert time.monotonic() < deadline_s, found
            time.sleep(0.2)

    def ended(self, run: UUID, timeout_s: float = 200) -> Any:
        """The final state of a run."""
        return wait_for(lambda: is_final(self.ask(lambda client: client.read_flow_run(run)).state), timeout_s)


def is_final(state: Any) -> Any:
    return state if state is not None and state.is_final() else None


def wait_for(look: Callable[[], Any], timeout_s: float) -> Any:
    """What it sees, once it sees something."""
    deadline_s = time.monotonic() + timeout_s
    while not (seen := look()):
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.2)
    return seen


@contextmanager
def served(folder: Path, environment: Mapping[str, str]) -> Iterator[Served]:
    """All of it; ended in the end."""
    services = Served(folder, environment)
    try:
        services.start("server", "worker", "deploy")
        yield services
    finally:
        assert services.service("stop").returncode == 0
