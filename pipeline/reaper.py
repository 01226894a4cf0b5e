"""Runs whose process is gone: MLflow shows them as RUNNING for ever, unless the next start ends them.

Who writes into a run is a tag of it, there from the run's beginning. Every training and every publication looks for
runs whose owner died on this machine, and ends them as KILLED; of another machine's processes nothing is known here.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from pipeline.tracking import Store

OWNER = "pipeline.owner"  # tag


def tag_of(process: psutil.Process) -> str:
    """Host, process and its start time, for a process id alone is given again."""
    return f"{socket.gethostname()} {process.pid} {process.create_time():.0f}"


def is_gone(tag: str) -> bool:
    """Whether the tag names a process of this machine that is no longer there."""
    host, _, process = tag.partition(" ")
    if host != socket.gethostname():
        return False
    pid, start_s = map(int, process.split())
    try:
        return bool(abs(psutil.Process(pid).create_time() - start_s) > 2)
    except psutil.Error:
        return True


def reap(store: Store, mine: Any = None) -> None:
    """End what crashes left RUNNING, except the run `mine`. Whoever takes one up again makes it RUNNING again."""
    for run in store.running():
        if (mine is None or run.info.run_id != mine.info.run_id) and is_gone(run.data.tags.get(OWNER, "")):
            store.end(run, "KILLED")
