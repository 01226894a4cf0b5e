import contextlib
import fcntl
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

from pipeline import tracking
from pipeline.stage import Refusal
from tests import result


@pytest.fixture
def store(repository):
    with tracking.problems():
        yield tracking.Store("an experiment")


def history(store, run, name):
    return [(point.step, point.value) for point in store.client.get_metric_history(run.info.run_id, name)]


def test_every_curve_of_every_row_is_a_point():
    rows = result.rows()
    points = tracking.points_of(rows)
    for name in tracking.OF_ROWS:
        assert {step: value for (key, step), value in points.items() if key == f"curves/{name}"} == {
            row["step"]: row[name] for row in rows if name in row
        }
    gaps = {row["step"]: row["validation_loss"] - row["train_eval_loss"] for row in rows if "validation_loss" in row}
    assert {step: value for (key, step), value in points.items() if key == "curves/generalisation_gap"} == gaps


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, None])
def test_what_is_not_finite_is_no_point(value):
    assert tracking.points_of([{"step": 3, "loss": 1.0, "grad_norm": value}]) == {("curves/loss", 3): 1.0}


# A process of its own: MLflow remembers stores by their URI, and that of two such folders is the same.
WRITE_A_FILE = """
from pipeline import tracking
with tracking.problems():
    store = tracking.Store("x")
    store.client.log_text(store.create("f").info.run_id, "text", "file.txt")
"""


def test_the_default_store_lies_in_the_repository_whatever_its_name(tmp_path, monkeypatch, database):
    name = "50% of what?x=%41"  # the worst; that of the `repository` fixture is bad too
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(database, folder / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    environment = os.environ | {"PYTHONPATH": str(result.ROOT)}
    subprocess.run([sys.executable, "-c", WRITE_A_FILE], cwd=folder, env=environment, check=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert sorted(path.name for path in folder.iterdir()) == ["mlartifacts", "mlflow.db"]
    assert [path.read_text() for path in folder.glob("mlartifacts/*/artifacts/file.txt")] == ["text"]


def test_a_server_decides_itself_where_files_go(tmp_path):
    assert tracking.artifact_location("http://127.0.0.1:5000") is None
    assert tracking.artifact_location(f"sqlite:///{tmp_path}/team.db") == (tmp_path / "mlartifacts").as_uri()


def test_a_batch_larger_than_mlflow_takes_is_written_whole(store):
    run = store.create("f")
    points = {("loss", step): 1 / (step + 1) for step in range(2_500)}
    store.add(run, points, {f"p{i}": str(i) for i in range(250)}, {f"t{i}": str(i) for i in range(250)})
    assert dict(history(store, run, "loss")) == {step: value for (_, step), value in points.items()}
    found = store.client.get_run(run.info.run_id)
    assert store.points(found, ["loss"]) == points
    assert len(found.data.params) == 250 and {f"t{i}" for i in range(250)} <= set(found.data.tags)


def test_writers_that_overlap_leave_every_point_once(store):
    run = store.create("f")
    points = {("loss", step): step / 7 for step in range(50)}
    writers = [threading.Thread(target=store.add, args=(run, points)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(history(store, run, "loss")) == [(step, value) for (_, step), value in points.items()]


def test_a_deleted_experiment_is_refused_with_the_way_back(store):
    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(Refusal, match=rf"mlflow experiments restore -x {store.experiment_id}"):
        tracking.Store("an experiment")


def test_a_live_run_that_agrees_with_the_files_is_adopted(store):
    live = store.create(result.FINGERPRINT)
    store.add(live, {("curves/loss", 1): 0.1 + 0.2}, {"train.seed": "1"})
    points = {("curves/loss", 1): 0.3, ("curves/loss", 2): 0.2}
    run, held = store.adopt("p", result.FINGERPRINT, points, {"train.seed": "1", "other": "2"})
    assert run.info.run_id == live.info.run_id
    assert set(held) == {("curves/loss", 1)}


@pytest.mark.parametrize(
    ("points", "params"),
    [({("curves/loss", 1): 0.4}, {}), ({("curves/loss", 9): 0.3}, {}), ({}, {"train.seed": "2"}), ({}, {"gone": "1"})],
)
def test_a_live_run_that_contradicts_the_files_is_put_away(store, points, params):
    live = store.create(result.FINGERPRINT)
    store.add(live, points, params)
    run, held = store.adopt("p", result.FINGERPRINT, {("curves/loss", 1): 0.3}, {"train.seed": "1"})
    assert run.info.run_id != live.info.run_id and held == {}
    put_away = store.client.get_run(live.info.run_id)
    assert put_away.info.status == "KILLED" and put_away.data.tags[tracking.SUPERSEDED] == "p"
    again, _ = store.adopt("p", result.FINGERPRINT, {("curves/loss", 1): 0.3}, {"train.seed": "1"})
    assert again.info.run_id == run.info.run_id


def test_mlflow_sends_nothing_home_and_loads_no_pickle(store, monkeypatch):
    from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION, MLFLOW_DISABLE_TELEMETRY

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    tracking.load_mlflow()
    assert MLFLOW_DISABLE_TELEMETRY.get() is True
    assert MLFLOW_ALLOW_PICKLE_DESERIALIZATION.get() is False


def test_a_dead_server_is_one_sentence_without_the_password(repository, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    with pytest.raises(Refusal, match=rf"//127.0.0.1:{port} cannot be used") as refused, tracking.problems():
        tracking.Store("x")
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_hanging_server_is_given_up_within_30_s(repository, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, never answers
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        begun_s = time.monotonic()
        with pytest.raises(Refusal, match="cannot be used"), tracking.problems():
            tracking.Store("x")
        assert time.monotonic() - begun_s < 30


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:////proc/nowhere/mlflow.db",
        "nonsense://x",
        "postgresql+psycopg://me:secret@127.0.0.1:1/x",
        "sqlite:////etc/hosts",
    ],
)
def test_a_store_that_cannot_be_opened_is_one_sentence(repository, monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(Refusal, match="cannot be used") as refused, tracking.problems():
        tracking.Store("x")
    assert "secret" not in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.slow  # MLflow waits four times five seconds
def test_a_store_that_is_locked_is_one_sentence(store):
    run = store.create("f")
    with sqlite3.connect("mlflow.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Refusal, match="locked"), tracking.problems():
            store.add(run, {("curves/loss", 1): 1.0})
        other.execute("ROLLBACK")
    other.close()


def test_a_store_that_fails_halfway_is_one_sentence_without_a_traceback(repository, capfd):
    with tracking.problems():
        store = tracking.Store("x")
    with contextlib.closing(sqlite3.connect("mlflow.db")) as database:
        database.execute("DROP TABLE tags")
    with pytest.raises(Refusal, match="cannot be used"), tracking.problems():
        store.create("0" * 16)
    assert "".join(capfd.readouterr()) == ""


def test_all_work_trees_of_a_repository_hold_one_lock(tmp_path, monkeypatch):
    checkout, tree = tmp_path / "a checkout ü", tmp_path / "tree"
    (checkout / "dvc.yaml").parent.mkdir()
    (checkout / "dvc.yaml").write_text("stages: {}\n")
    git = ["git", "-C", str(checkout), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init"], ["add", "."], ["commit", "-m", "one"], ["worktree", "add", str(tree)]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    monkeypatch.chdir(tree)
    with tracking.alone(), (checkout / "dvc.yaml").open("rb") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    monkeypatch.chdir(checkout)
    with tracking.alone(), (tree / "dvc.yaml").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its own lock is nobody's
