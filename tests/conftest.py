import os
import shutil
import signal
import time

import numpy as np
import pytest
from hypothesis import settings

from tests import result

# Products as tiny as the tests' are slower on two threads; set before torch is imported, and inherited by subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"
# Ignored in the background of a shell, and inherited: then what the tests interrupt would not hear it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine is no failure; what else the surroundings chose (CI: the same examples every time) stays.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """An empty MLflow database; making one takes seconds, copying it nothing."""
    from pipeline import tracking

    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch, tracking.problems():
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
        tracking.load_mlflow().MlflowClient(tracking.uri()).search_experiments()
    return file


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    return result.write(tmp_path_factory.mktemp("result"))


@pytest.fixture(scope="module")
def texts(written, database, tmp_path_factory):
    """The usual repository with text enough to compare models on; nothing is published."""
    folder = tmp_path_factory.mktemp("texts") / "here"
    shutil.copytree(written, folder)
    shutil.copy(database, folder)
    for name in ("tokens", "split"):
        shutil.rmtree(folder / "data" / name)
    random = np.random.default_rng(1)
    result.write_tokens(
        folder / "data" / "tokens", [" ".join(random.choice(result.WORDS, 6)) for _ in range(result.NUM_TEXTS)]
    )
    (folder / "data" / "split").mkdir()
    for side, (first, end) in {
        "train": (0, 10),
        "validation": (10, result.FIRST_TEST),
        "test": (result.FIRST_TEST, result.NUM_TEXTS),
    }.items():
        np.save(folder / "data" / "split" / f"{side}.npy", np.arange(first, end))
    params = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(params.replace("max_length: 128 ", f"max_length: {result.POSITIONS} "))
    return folder


@pytest.fixture
def repository(written, database, tmp_path, monkeypatch):
    """A repository in which every stage but publish has run, as the current folder, with an empty MLflow database."""
    folder = tmp_path / "répository #1, it's"
    shutil.copytree(written, folder)
    shutil.copy(database, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture(scope="module")
def one_thread():
    """Models this small gain nothing from threads, and threads that wait for each other make a busy machine crawl."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(made, monkeypatch):
    """The repository that a module makes, as the current folder; every test puts back what it broke."""
    monkeypatch.chdir(made)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return made


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    """Toy stages, server, worker, deployments, in a folder whose name is not plain; nothing starts by the clock."""
    from tests.toy import NEW_DATA, VERIFY, Toy

    here = Toy(tmp_path_factory.mktemp("served") / "ein Örtchen, 100%25")
    try:
        here.start("server", "worker", "deploy")
        here.schedules = {
            one["name"]: [(plan["active"], plan["schedule"]) for plan in one["schedules"]]
            for one in here.post("/deployments/filter")
        }
        for name in (NEW_DATA, VERIFY):
            here.ask(lambda client, name=name: client.pause_deployment(client.read_deployment_by_name(name).id))
        yield here
    finally:
        here.service("stop")


@pytest.fixture
def toy(services):
    """The same, whatever a test that failed has left."""
    services.recover()
    return services


@pytest.fixture
def checkout(toy):
    """The same, with a long stage that has not run yet."""
    from tests.toy import LONG_STAGE, write

    (toy.folder / "go").unlink(missing_ok=True)
    (toy.folder / "turn.txt").write_text(str(time.time_ns()))  # else DVC would restore what it did before
    write(toy.folder, long=LONG_STAGE)
    return toy
