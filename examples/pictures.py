"""Pictures of the pages of MLflow and Prefect in docs/, taken by a real browser.

python -m examples.pictures            # MLflow's, with what it holds here
python -m examples.pictures prefect    # Prefect's, after a run and a sweep in .examples/prefect
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from examples import browser, prefect_pages
from pipeline import champions, stage, tracking

DOCS = Path(__file__).parent.parent / "docs"
START_S, SETTLE_S = 120.0, 5.0  # how long a server may take to start, and a page to look the same
VIEW = "?workflowType=machine_learning"  # of the two that MLflow's pages have
WIDTH, PANEL = 1260, 440  # pixels; of a panel on the right, which says nothing of what is here and is cut off
HEIGHTS = {"mlflow_run": 1700, "mlflow_version": 1200}
HEIGHT = 900  # of the other pages


def pages() -> dict[str, str]:
    """The pages of interest: name of the picture, and the address on the server.

    Raises:
        Refusal: MLflow holds no champion, or no version that was refused.
    """
    publish = stage.load_params()["publish"]
    with tracking.problems():
        known = champions.Champions(tracking.Store(publish.experiment), publish.registered_model)
        crowned = known.holder(known.ALIAS)
        versions = known.client.search_model_versions(f"name = '{known.name}'")
        refused = [one.version for one in versions if one.tags.get(known.STATE) == known.REFUSED]
        if crowned is None or not refused:
            raise stage.Refusal("there is no champion, or no version that the gate refused, to take pictures of")
        experiment, run = known.store.experiment_id, known.version(crowned).run_id
    model = f"#/models/{known.name}"
    return {
        "mlflow_runs": f"#/experiments/{experiment}/runs",
        "mlflow_run": f"#/experiments/{experiment}/runs/{run}",
        "mlflow_curves": f"#/experiments/{experiment}/runs/{run}/model-metrics",
        "mlflow_model": model,
        "mlflow_version": f"{model}/versions/{max(refused, key=int)}",
    }


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The address of a server of MLflow's pages, on this machine alone."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    server = subprocess.Popen(
        [*command, "--backend-store-uri", tracking.uri(), "--artifacts-destination", "mlartifacts"],
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            assert time.monotonic() < end and server.poll() is None, "MLflow's server does not start"
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def drawn(page: browser.Page, address: str) -> Iterator[tuple[str, bytes]]:
    """The pages: name and picture of each."""
    for name, path in pages().items():
        page.open(f"{address}/{path}{VIEW}", WIDTH + PANEL, HEIGHTS.get(name, HEIGHT), "gpt2-pipeline")
        yield name, page.picture(SETTLE_S)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("whose", nargs="?", choices=("mlflow", "prefect"), default="mlflow")
    whose = parser.parse_args().whose
    with stage.refusals("pictures"):
        browser.find()
        if whose == "mlflow":
            pages()  # before a server is started
        server, draw = (served, drawn) if whose == "mlflow" else (prefect_pages.served, prefect_pages.drawn)
        with server() as address, browser.opened() as page:
            for name, png in draw(page, address):
                browser.save(png, DOCS / f"{name}.png", WIDTH)
                print(f"pictures: docs/{name}.png", flush=True)


if __name__ == "__main__":
    main()
