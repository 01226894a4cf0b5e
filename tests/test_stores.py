"""The same against every store that MLflow has: a server, PostgreSQL, and a server on PostgreSQL."""

import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from pipeline import agreement, follow, publication, publish, tracking
from pipeline.champions import Champions
from pipeline.pedigree import Records
from tests import result
from tests.servers import free_port, postgresql, started
from tests.test_promote import champion, publish_it
from tests.test_publish import View, complete, publish_twice_at_once

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def database_server(tmp_path_factory):
    """The URI of an empty database in a real PostgreSQL."""
    folder = tmp_path_factory.mktemp("postgresql")
    with postgresql(folder, "mlflow") as server:
        uri = f"postgresql+psycopg://{server}/mlflow"
        # MLflow makes its tables: a minute of migrations, once for all tests.
        script = "import sys, mlflow; mlflow.MlflowClient(sys.argv[1]).search_experiments()"
        subprocess.run([sys.executable, "-c", script, uri], check=True, cwd=folder)
        yield uri


@pytest.fixture(params=["a server", "PostgreSQL", "a server on PostgreSQL"])
def store(request, repository, database, tmp_path, monkeypatch):
    """A store that the repository shall use, and its name."""
    folder = tmp_path / "server"
    folder.mkdir()
    if "PostgreSQL" in request.param:
        uri = request.getfixturevalue("database_server")
    else:
        shutil.copy(database, folder)
        uri = f"sqlite:///{folder}/mlflow.db"
    # One database has the results of all tests, so each has names of its own.
    params = Path("params.yaml").read_text()
    own = f"{request.param} {request.function.__name__}".replace(" ", "-")
    Path("params.yaml").write_text(params.replace(": gpt2-pipeline ", f": {own} "))
    if "server" not in request.param:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield request.param
        return
    address = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "files"), "--port", address.rpartition(":")[2]]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)

    def ask():
        urllib.request.urlopen(f"{address}/health", timeout=5).close()

    with started(command, ask, cwd=folder, env=os.environ | {"PATH": path}):
        yield request.param
    assert not (repository / "mlartifacts").exists()


def test_results_curves_and_champions_are_kept_the_same_way(store):
    trainer = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    folder = Path(".runs") / result.FINGERPRINT[: tracking.NUM_FINGERPRINT_DIGITS]
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text(result.jsonl(result.rows(7)))
    process = psutil.Process(trainer.pid)
    with tracking.problems():
        live = follow.Live(folder.name, follow.reaper.tag_of(process))
        live.send(tracking.points_of(result.rows(7)), {})
    trainer.kill()
    trainer.communicate()
    view = View()
    (run,) = view.runs
    assert run.info.status == "RUNNING" and len(view.history(run)["curves/loss"]) == 7

    publish_twice_at_once()  # it takes the run up
    (run,) = view.runs
    assert run.info.run_id == live.run.info.run_id
    complete(view, run)
    before = view.history(run), view.versions, sorted(view.artifacts(run))
    publish.ensure()
    result.publish_here()
    assert (view.history(run), view.versions, sorted(view.artifacts(run))) == before

    with tracking.problems():
        dead = view.store.create("f" * 16)
        view.store.add(dead, tags={follow.reaper.OWNER: follow.reaper.tag_of(process)})
        follow.reaper.reap(view.store)
        assert view.client.get_run(dead.info.run_id).info.status == "KILLED"

        known = Champions(view.store, view.model)
        known.settle()
        known.crown("1", known.PROMOTED, ["It is the first."])
        known.settle()
        assert (known.holder("champion"), known.history, known.state("1")) == ("1", ["1"], known.PROMOTED)
        view.client.delete_registered_model_alias(view.model, "champion")  # a person
        known.settle()
        assert (known.holder("champion"), known.state("1")) == (None, known.WITHDRAWN)


def test_a_model_is_loaded_back_promoted_and_held_against_its_hashes_the_same_way(store, texts):
    shutil.rmtree("data")
    shutil.copytree(texts / "data", "data")
    params = Path("params.yaml").read_text()
    Path("params.yaml").write_text(params.replace("max_length: 128 ", f"max_length: {result.POSITIONS} "))
    assert publish_it(0.5, auto_promote=True) == champion() == "1"
    assert publish_it(1.0, auto_promote=True) == champion() == "2"
    view = View()
    with tracking.problems():
        records = Records(Path("none"), "unnamed", [])
        versions = records.versions(view.model)
        assert len(versions) == 2
        assert [fault for version in versions for fault in agreement.version_faults(records, version)] == []
        reports = [
            file for path in publication.reports(records.paths) for file in (path, *path.rglob("*")) if file.is_file()
        ]
        with records.artifacts(view.runs[-1]) as folder:
            assert {path: (folder / path).read_bytes() for path in reports} == {p: p.read_bytes() for p in reports}
