"""Bigger than one machine, on one: PostgreSQL, S3 and MLflow servers, another work pool, and a second, empty clone."""

import contextlib
import copy
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.served import Served
from tests.servers import free_port, postgresql, started
from tests.test_end_to_end import STAGES, Clone

pytestmark = pytest.mark.slow

RETRAIN = "pipeline/retrain"
# A worker of another type, as a package would bring one. It starts processes, too: nothing else can be started here.
ELSEWHERE = """
from prefect.workers.process import ProcessWorker

class ElsewhereWorker(ProcessWorker):
    type = "elsewhere"
"""


@contextlib.contextmanager
def team(folder):
    """The servers that a team shares: what each of its machines has to know, and the database of a Prefect server."""
    s3, mlflow = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    addresses = {
        "MLFLOW_TRACKING_URI": mlflow,
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    more = {"cwd": folder, "env": os.environ | addresses | {"PATH": path}, "stderr": subprocess.DEVNULL}

    def server(url, health, *command):
        port = ["--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
        return started(
            [sys.executable, "-m", *command, *port],
            lambda: urllib.request.urlopen(f"{url}/{health}", timeout=5).close(),
            **more,
        )

    with contextlib.ExitStack() as stack:
        database = stack.enter_context(postgresql(folder, "prefect", "mlflow"))
        stack.enter_context(server(s3, "moto-api/", "moto.server"))
        script = "import boto3; boto3.client('s3').create_bucket(Bucket='team')"
        subprocess.run([sys.executable, "-c", script], check=True, **more)
        stores = ["--backend-store-uri", f"postgresql+psycopg://{database}/mlflow"]
        stores += ["--artifacts-destination", "s3://team/mlflow", "--workers", "1"]
        stack.enter_context(server(mlflow, "health", "mlflow", "server", *stores))
        yield addresses, f"postgresql+asyncpg://{database}/prefect"


def plugin(folder):
    """A folder for PYTHONPATH with an installed package that brings a type of worker."""
    about = folder / "elsewhere-1.dist-info"
    about.mkdir(parents=True)
    (folder / "elsewhere.py").write_text(ELSEWHERE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[prefect.collections]\nelsewhere = elsewhere\n")
    return str(folder)


def digests(clone):
    """Every file of every output, and its bytes."""
    folders = [clone.folder / name for name in ("data", "models", "reports")]
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(clone.folder)): file.read_bytes() for file in files}


def test_a_second_empty_clone_with_nothing_but_addresses_has_everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bigger")
    (folder / "shared").mkdir()
    with team(folder / "shared") as (addresses, database):
        first = Clone(folder / "first")
        first.environment |= addresses
        first.run("dvc", "remote", "add", "--default", "team", "s3://team/dvc")
        services = Served(first.folder, first.environment)
        services.environment |= {"PYTHONPATH": plugin(folder / "plugin"), "PIPELINE_POOL": "cluster"}
        there = {"PREFECT_API_URL": services.url}

        def pool(name, kind):
            command = [sys.executable, "-m", "prefect", "work-pool", "create", name, "--type", kind]
            subprocess.run(command, env=services.environment | there, check=True, capture_output=True)

        second = copy.copy(first)
        second.folder, second.environment = folder / "second", first.environment | there
        others = Served(second.folder, services.environment)
        others.environment |= there
        try:
            services.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
            services.start("server")
            pool("cluster", "elsewhere")
            services.start("deploy", "worker")
            trained = services.run(RETRAIN)
            assert services.ended(trained, 300).name == "Completed"
            assert services.task_states(trained) == dict.fromkeys(STAGES, "Completed")
            services.kill("worker")
            first.run("git", "add", "--all")
            first.run("git", "-c", "user.name=a", "-c", "user.email=a@localhost", "commit", "--quiet", "-m", "trained")
            first.run("dvc", "push")
            published = first.mlflow_runs()

            first.run("git", "clone", "--quiet", str(first.folder), str(second.folder))
            second.run("dvc", "pull")
            assert digests(second) == digests(first)
            assert second.repro() == []
            others.start("deploy", "worker")
            run = services.run(RETRAIN)
            assert services.ended(run).name == "Completed"
            assert services.task_states(run) == dict.fromkeys(STAGES, "Cached")
            assert second.run("git", "status", "--porcelain") == ""
            assert second.mlflow_runs() == published and len(published) == 1
            second.run("python", "-m", "pipeline.verify")
            said = second.run("python", "-m", "pipeline.audit", str(trained))
            commit = second.run("git", "rev-parse", "HEAD~1").strip()
            for word in (f"commit    {commit}", f"flow run  {trained}", "@champion", "dvc.lock  of"):
                assert word in said, said

            # What this machine cannot start, a server can still be told of.
            for kind in ("docker", "kubernetes"):
                pool(kind, kind)
                others.environment |= {"PIPELINE_POOL": kind, "PIPELINE_CHECKOUT": "/checkout"}
                others.start("deploy")
                deployment = services.ask(lambda client: client.read_deployment_by_name(RETRAIN))
                assert deployment.work_pool_name == kind
                assert deployment.job_variables["env"]["PYTHONPATH"] == "/checkout"
                assert "/checkout" in str(deployment.pull_steps)
        finally:
            assert others.service("stop").returncode == services.service("stop").returncode == 0
