"""Pictures of MLflow's pages in docs/, with what MLflow holds here, taken by a real browser.

python -m examples.pictures
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from pipeline import champions, stage, tracking

DOCS = Path(__file__).parent.parent / "docs"
START_S, DRAW_MS = 120.0, 30_000  # how long a server may take to start, and a page to draw itself
SIZES = {"mlflow_run": (1500, 2100), "mlflow_version": (1500, 1250)}  # of the others
SIZE = (1500, 1000)


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


def take(browser: str, address: str, size: tuple[int, int], picture: Path) -> None:
    """One picture of one page."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu", "--lang=en",
                   "--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}",
                   f"--window-size={size[0]},{size[1]}", f"--virtual-time-budget={DRAW_MS}",
                   f"--screenshot={picture}", address]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=300, env=os.environ | {"TZ": "UTC"})


def main() -> None:
    """Read the command line."""
    argparse.ArgumentParser(
        prog="python -m examples.pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with stage.refusals("pictures"):
        browser = shutil.which("chromium")
        if browser is None:
            raise stage.Refusal("there is no chromium; install it (Debian: apt install chromium)")
        wanted = pages()
        with served() as address:
            for name, page in wanted.items():
                take(browser, f"{address}/{page}", SIZES.get(name, SIZE), DOCS / f"{name}.png")
                print(f"pictures: docs/{name}.png", flush=True)


if __name__ == "__main__":
    main()
