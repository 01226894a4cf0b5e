"""Bigger than one machine, on one: PostgreSQL, S3 and MLflow servers, containers, and a second, empty clone."""

import contextlib
import copy
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests import containers
from tests.served import Served
from tests.servers import free_port, postgresql, started
from tests.test_end_to_end import STAGES, Clone
from tests.tiny import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.served, pytest.mark.timeout(1200)]

RETRAIN = "pipeline/retrain"
IMAGE = "gpt2-pipeline:1"
SECRETS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret"}
PAGE = re.sub(r"[\\\s]+", " ", (ROOT / "docs/bigger.md").read_text(encoding="utf-8"))


def documented(command, **filled_in):
    """A command of docs/bigger.md, with what its reader fills in."""
    assert command in PAGE, f"docs/bigger.md does not say: {command}"
    for word, value in filled_in.items():
        command = command.replace(word, value)
    return shlex.split(command)


@contextlib.contextmanager
def team(folder):
    """The servers that a team shares: what each of its machines has to know, and the PostgreSQL behind them."""
    s3, mlflow = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    addresses = {"MLFLOW_TRACKING_URI": mlflow, "AWS_ENDPOINT_URL": s3, "AWS_DEFAULT_REGION": "us-east-1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | addresses | SECRETS | {"PATH": path}

    def server(command, url, health):
        quiet = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return started(command, lambda: urllib.request.urlopen(f"{url}/{health}", timeout=5).close(), **quiet)

    mlflow_server = (
        "mlflow server --backend-store-uri postgresql+psycopg://USER:PASSWORD@DBHOST/mlflow"
        " --artifacts-destination s3://BUCKET/mlflow --workers 1 --host 127.0.0.1 --port 5000"
    )
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(postgresql(folder, "prefect", "mlflow"))
        stack.enter_context(server(["moto_server", "--port", s3.rpartition(":")[2]], s3, "moto-api/"))
        urllib.request.urlopen(urllib.request.Request(f"{s3}/team", method="PUT")).close()
        filled_in = {"USER:PASSWORD@DBHOST": database, "BUCKET": "team", "5000": mlflow.rpartition(":")[2]}
        stack.enter_context(server(documented(mlflow_server, **filled_in), mlflow, "health"))
        yield addresses, database


def objects(s3):
    """What lies in the bucket."""
    with urllib.request.urlopen(f"{s3}/team?list-type=2") as answer:
        return re.findall(r"<Key>(.*?)</Key>", answer.read().decode())


def contents(clone):
    """Every file of every output, and its bytes."""
    folders = [clone.folder / name for name in ("data", "models", "reports")]
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(clone.folder)): file.read_bytes() for file in files}


def make_pool(clone, name, kind, **defaults):
    """A work pool whose runs have these settings."""
    template = clone.folder.parent / f"{name}.json"
    known = "prefect work-pool get-default-base-job-template --type docker --file pool.json"
    create = "prefect work-pool create containers --type docker --base-job-template pool.json"
    filled_in = {"docker": kind, "containers": name, "pool.json": str(template)}
    clone.run(*documented(known, **filled_in))
    content = json.loads(template.read_text())
    for variable, value in defaults.items():
        content["variables"]["properties"][variable]["default"] = value
    template.write_text(json.dumps(content))
    clone.run(*documented(create, **filled_in))


def test_what_a_container_trained_is_whole_in_a_second_empty_clone_with_nothing_but_addresses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bigger")
    (folder / "shared").mkdir()
    with team(folder / "shared") as (addresses, database), containers.daemon(folder / "containers") as docker:
        first = Clone(folder / "first")
        first.environment |= addresses | SECRETS
        for key, value in (("user.name", "test"), ("user.email", "test@localhost")):
            first.run("git", "config", key, value)
        services = Served(first.folder, first.environment)
        on_postgresql = documented(
            "PREFECT_SERVER_DATABASE_CONNECTION_URL=postgresql+asyncpg://USER:PASSWORD@DBHOST/prefect make server",
            **{"USER:PASSWORD@DBHOST": database},
        )[0]
        # Another person's machine: it has what the page says, and nothing of this one.
        second = copy.copy(first)
        second.folder = folder / "second"
        there = {"PREFECT_API_URL": services.url, "HOME": str(folder), "PATH": first.environment["PATH"]}
        second.environment = addresses | SECRETS | there
        others = Served(second.folder, second.environment)
        others.environment |= there
        first.environment["PREFECT_API_URL"] = services.url
        try:
            server = copy.copy(services)
            server.environment = services.environment | dict([on_postgresql.split("=", 1)])
            server.start("server")
            assert not (first.folder / ".prefect" / "prefect.db").exists()
            first.run(*documented("dvc remote add --default team s3://BUCKET/dvc", BUCKET="team"))
            first.run(*documented('git commit -m "A place for data" .dvc/config'))

            volumes = [f"{first.folder}:{first.folder}"]
            env = {"MLFLOW_TRACKING_URI": addresses["MLFLOW_TRACKING_URI"]}
            make_pool(first, "containers", "docker", image=IMAGE, volumes=volumes, env=env)
            services.environment |= {"PIPELINE_POOL": "containers", "DOCKER_HOST": docker.address}
            services.start("deploy", "worker")
            trained = services.run(RETRAIN)
            assert services.ended(trained, 300).name == "Completed", services.log("worker")
            services.wait_for_states(trained, **dict.fromkeys(STAGES, "Completed"))
            (container,) = docker.created
            assert container["Image"] == IMAGE
            assert "PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30" in container["Env"]
            assert [variable for variable in container["Env"] if re.search("AWS|secret|postgresql", variable)] == []
            services.kill("worker")

            first.run(*documented("git add dvc.lock params.yaml"))
            first.run("git", "commit", "--quiet", "-m", "trained")
            first.run(*documented("dvc push"))
            published = first.mlflow_runs()
            assert {key.split("/")[0] for key in objects(addresses["AWS_ENDPOINT_URL"])} == {"dvc", "mlflow"}

            first.run("git", "clone", "--quiet", str(first.folder), str(second.folder))
            second.run(*documented("dvc pull"))
            assert contents(second) == contents(first)
            assert second.repro() == []
            others.start("deploy", "worker")  # a process here, where the other was a container there
            run = services.run(RETRAIN)
            assert services.ended(run).name == "Completed"
            services.wait_for_states(run, **dict.fromkeys(STAGES, "Cached"))
            assert len(docker.created) == 1
            assert second.run("git", "status", "--porcelain") == ""
            assert "up to date" in second.run("dvc", "status")
            assert second.mlflow_runs() == published and len(published) == 1
            second.run("python", "-m", "pipeline.verify")
            said = second.run("python", "-m", "pipeline.audit", str(trained))
            commit = second.run("git", "rev-parse", "HEAD~1").strip()
            for word in (f"commit    {commit}", f"flow run  {trained}", "@champion", "dvc.lock  of"):
                assert word in said, said

            # What nothing here can start, a server can still be told of.
            make_pool(second, "cluster", "kubernetes", image=IMAGE)
            others.environment |= {"PIPELINE_POOL": "cluster", "PIPELINE_CHECKOUT": "/checkout"}
            others.start("deploy")
            deployment = services.ask(lambda client: client.read_deployment_by_name(RETRAIN))
            assert deployment.work_pool_name == "cluster"
            assert deployment.job_variables["env"]["PYTHONPATH"] == "/checkout"
            assert "/checkout" in str(deployment.pull_steps)
        finally:
            for one in (others, services):
                assert not one.folder.exists() or one.service("stop").returncode == 0
