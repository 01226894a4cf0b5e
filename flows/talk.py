"""What a flow run has to do with Prefect beside its tasks: it tells, and it ends with the worker that started it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import FailedRun
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

POLL_S = 0.5


def show(line: str) -> None:
    """Print a line of a command, and log it with its task."""
    _print(line)
    get_run_logger().info("%s", line)


def say(line: str) -> None:
    """Print a line and log it with the flow run."""
    _print(f"flow: {line}")
    get_run_logger().info("%s", line)


@contextlib.contextmanager
def only_showing() -> Iterator[None]:
    """Training goes on without whoever it is shown to: a server that is gone fails nothing."""
    try:
        yield
    except (httpx.HTTPError, ConnectionError) as problem:
        _print(f"flow: the Prefect server does not answer ({problem}); the work goes on without it")


def tag(tags: Mapping[str, str]) -> None:
    """Add tags to this flow run."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(flow_run.id), tags=[*flow_run.tags, *(f"{key}={tags[key]}" for key in tags)])


def end_with_worker() -> None:
    """End this process with the worker that started it, and so everything that runs under it.

    A flow whose worker was killed could not be cancelled any more. Its heartbeats end with it, the server takes it for
    crashed, and a new run goes on from the last checkpoint.
    """
    if "PREFECT__FLOW_RUN_ID" not in os.environ:
        return  # started by hand
    worker = os.getppid()

    def look() -> None:
        while os.getppid() == worker:
            time.sleep(POLL_S)
        os._exit(1)  # stages watch this process, and end with it

    threading.Thread(target=look, name="worker", daemon=True).start()


def say_once_how_it_failed() -> None:
    """Keep Prefect from logging a run that failed once more, as an exception with its traceback.

    The state of the run says it already, in a sentence.
    """
    for name in ("prefect.flow_runs", "prefect.engine"):
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], FailedRun))


def _print(line: str) -> None:
    # A worker that was killed reads no more. This process ends with it, in a moment, and not as one that failed.
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)
