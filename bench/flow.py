"""What the flow costs over `dvc repro` where nothing is to do: measured in the checkout, which must be up to date.

    python -m bench.flow [--rounds N]

`dvc repro` and the flow run in turns. First with a Prefect server that runs (one of its own, on a free port, with its
data in a temporary folder), then without one, so that each flow starts a server of its own: the first of those also
makes the database.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

REPRO = [sys.executable, "-m", "dvc", "repro"]
FLOW = [sys.executable, "-m", "flows.pipeline"]


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """How long a command takes that must find nothing to do."""
    begun_s = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "Running stage" not in done.stdout, "run `dvc repro` first: something was to do"
    return time.monotonic() - begun_s


def overhead(rounds: int, environment: dict[str, str]) -> list[float]:
    """For each round, what the flow takes more than `dvc repro`."""
    return [-seconds(REPRO, environment) + seconds(FLOW, environment) for _ in range(rounds)]


def told(what: str, overheads_s: list[float]) -> None:
    """Print one line."""
    low, middle, high = min(overheads_s), statistics.median(overheads_s), max(overheads_s)
    print(f"{what}: {middle:.1f} s ({low:.1f} to {high:.1f}, {len(overheads_s)} rounds)", flush=True)


def main() -> None:
    """Measure and print."""
    from flows.dag import read_dag

    parser = argparse.ArgumentParser(
        prog="python -m bench.flow", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["PREFECT_SERVER_API_PORT"] = str(free.getsockname()[1])
    num_stages = len(read_dag())
    print(f"nothing to do: seconds that `python -m flows.pipeline` takes over `dvc repro`, {num_stages} stages")
    for name in ("with a server", "without a server"):
        home = tempfile.mkdtemp()
        environment["PREFECT_HOME"] = home
        try:
            if name == "with a server":
                service(environment, "server")
            else:
                told("without a server, the first time", overhead(1, environment))
            told(name, overhead(rounds, environment))
        finally:
            if name == "with a server":
                service(environment, "stop")
            shutil.rmtree(home)


def service(environment: dict[str, str], name: str) -> None:
    """Start the server, or stop it."""
    subprocess.run([sys.executable, "-m", "flows.services", name], env=environment, check=True, capture_output=True)


if __name__ == "__main__":
    main()
