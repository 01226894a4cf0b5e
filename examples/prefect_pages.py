"""A Prefect server of its own with a run and a sweep of the demo, in .examples/prefect, and its pages of interest."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import urllib.request
from collections.abc import Iterator
from typing import Any

from examples import run
from examples.browser import Page

FOLDER = run.ROOT / ".examples" / "prefect"
FEWER = {"ingest.demo_documents": 2500}  # than the demo has: four trainings in ten minutes
TRIALS = [{"train.learning_rate": 1e-3}, {"train.learning_rate": 4e-3}, {"train.num_epochs": 3}]
OTHERS = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")  # settings that would lead to a team's servers
AUTHOR = {f"GIT_{who}_{what}": "pictures" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
WIDTH = 1260
BUTTONS = "[...document.querySelectorAll('button')]"
FIELD = """(() => { let e = [...document.querySelectorAll('label, div, span')].find(
    e => !e.children.length && e.innerText.startsWith('%s')); while (!e.querySelector('input')) e = e.parentElement;
    return e.querySelector('input') })()"""


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of a server that has seen a run and a sweep; server and worker are ended afterwards.

    Raises:
        Refusal: one of the commands failed.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name in OTHERS:
        os.environ.pop(name, None)
    os.environ |= AUTHOR | {"PREFECT_SERVER_API_PORT": str(port), "PREFECT_HOME": str(FOLDER / ".prefect")}
    if FOLDER.exists():
        run.python(FOLDER, "-m", "flows.services", "stop")
        shutil.rmtree(FOLDER)
    run.prepare(FOLDER)
    run.change(FOLDER / "params.yaml", FEWER)
    run.git(FOLDER, "add", ".")
    run.git(FOLDER, "commit", "--quiet", "--no-verify", "--message", "Fewer documents")
    address = f"http://127.0.0.1:{port}"
    try:
        for service in ("server", "deploy", "worker"):
            run.python(FOLDER, "-m", "flows.services", service)
        os.environ["PREFECT_API_URL"] = f"{address}/api"
        start = ["-m", "prefect", "deployment", "run", "--watch"]
        run.python(FOLDER, *start, "pipeline/retrain")
        run.python(FOLDER, *start, "sweep/sweep", "-p", f"trials={json.dumps(TRIALS)}", "-p", "at_once=2")
        yield address
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        run.python(FOLDER, "-m", "flows.services", "stop")


def drawn(page: Page, address: str) -> Iterator[tuple[str, bytes]]:
    """The pages: name and picture of each."""
    pages = f"{address}/v2"
    retrain = asked(address, "deployments", deployments={"name": {"any_": ["retrain"]}})[0]["id"]
    first = asked(address, "flow_runs", deployments={"name": {"any_": ["retrain"]}})[0]["id"]
    ranking = asked(address, "artifacts", artifacts={"key": {"any_": ["ranking"]}})[0]["id"]
    result = asked(
        address, "artifacts", artifacts={"key": {"any_": ["result"]}, "flow_run_id": {"any_": [first]}}
    )[0]["id"]  # fmt: skip

    page.open(f"{pages}/runs/flow-run/{first}", WIDTH, 900, "Beginning flow run")
    yield "prefect_run", page.picture()
    page.open(f"{pages}/artifacts/artifact/{result}", WIDTH, 1500, "nats per token")
    yield "prefect_result", page.picture()
    page.open(f"{pages}/artifacts/artifact/{ranking}", WIDTH * 4 // 3, 480, "train.learning_rate", scale=0.75)
    yield "prefect_sweep", page.picture()
    page.open(f"{pages}/deployments", WIDTH, 640, "retrain-on-new-data")
    yield "prefect_deployments", page.picture()
    page.open(f"{pages}/deployments/deployment/{retrain}/run", WIDTH, 1960, "stage_limit_minutes")
    page.click(f"{BUTTONS}.find(e => e.innerText == 'change')")
    page.wait("document.body.innerText.includes('num_epochs')")
    page.click(f"{BUTTONS}.filter(e => e.innerText == 'change')[6]")  # overrides itself, five sections, train
    page.wait("document.body.innerText.includes('train.learning_rate')")
    page.click(FIELD % "train.learning_rate")
    page.type("0.003")
    page.run("document.activeElement.blur(); document.querySelectorAll('*').forEach(e => e.scrollTop = 0)")
    yield "prefect_form", page.picture()


def asked(address: str, what: str, **filters: Any) -> list[dict[str, Any]]:
    """What the server has of a kind, filtered."""
    request = urllib.request.Request(
        f"{address}/api/{what}/filter", json.dumps(filters).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    assert found, f"the server has no {what} with {filters}"
    return found
