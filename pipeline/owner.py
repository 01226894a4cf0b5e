"""One process at a time works in a checkout, and it ends with whoever started it.

Without this, SIGKILL of `dvc repro` leaves its stage running, the next `dvc repro` starts a second one beside it, and
what the two wrote is recorded as one result. So every stage holds the lock `.runs/lock`, whose text names its owner for
people, and watches the processes that it was started by:

- by `dvc repro`: the shell in which DVC runs a command, DVC itself, and the flow if that started DVC;
- by torchrun: torchrun;
- by hand: its parent, unless told to outlive it (`nohup` ignores the hang-up, `setsid` makes a session of its own).

Whoever loses one of them ends at once with all that it started, and saves nothing: what was saved before is enough, as
after any other kill.
The kernel frees the lock of a process that ends, however it ends, so neither a dead owner nor a reused process id holds
anything up. Where locks do not reach from one machine to another (some network and virtual file systems), the file's
time does: an owner touches it every second.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import psutil

from pipeline.stage import Refusal

LOCK = Path(".runs/lock")
FLOW = "PIPELINE_FLOW"  # the process id of the flow that started DVC
STARTERS = ("DVC_STAGE", FLOW, "TORCHELASTIC_RUN_ID")  # set by programs that wait for what they start
POLL_S = 0.2
GRACE_S = 1.0  # for an owner that has just lost its parent
TOUCH_S, SILENCE_S = 1.0, 5.0
ORPHANED = 128 + signal.SIGHUP  # exit code


@contextlib.contextmanager
def alone(stage: str) -> Iterator[None]:
    """Hold the checkout's lock, and end within a second of the processes that this one depends on.

    Under torchrun the first process holds it for all.

    Raises:
        Refusal: another process holds it, named by stage, process, host and start.
    """
    _watch(lineage())
    _watch_in_forks()
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    LOCK.parent.mkdir(exist_ok=True)
    with LOCK.open("a+b", buffering=0) as lock:
        _take(lock)
        os.register_at_fork(after_in_child=lock.close)  # a fork that outlives us by a moment must not keep it
        started_s = psutil.Process().create_time()
        about = {"host": socket.gethostname(), "pid": os.getpid(), "stage": stage, "started_s": started_s}
        lock.truncate(0)
        lock.write(json.dumps(about, sort_keys=True).encode() + b"\n")
        _touch(lock)
        try:
            yield
        finally:
            lock.truncate(0)  # while it is still ours: who ends in good order leaves no name behind


def lineage() -> list[int]:
    """The processes that this one depends on, from its parent upwards; ends this one if they are gone already."""
    process = psutil.Process()
    starter = _starter(process)
    if starter is None:
        outlives = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN or os.getsid(0) == os.getpid()
        return [] if outlives else [os.getppid()]
    found: list[int] = []
    try:
        while starter is not None:
            found.append(process.ppid())
            if not _is_starter(found[-1], process, *starter):
                _end()
            process = psutil.Process(found[-1])
            starter = _starter(process)
    except (psutil.NoSuchProcess, ProcessLookupError):
        _end()
    return found


def _starter(process: psutil.Process) -> tuple[str, str] | None:
    """The variable in a process's environment that tells what started it, or None."""
    try:
        environment = process.environ()
    except psutil.AccessDenied:
        return None
    return next(((name, environment[name]) for name in STARTERS if name in environment), None)


def _is_starter(parent: int, process: psutil.Process, name: str, value: str) -> bool:
    """Whether the parent can be what the variable tells. An orphan's new one is not: it has a session of its own."""
    if name == FLOW:
        return parent == int(value)
    return name != "DVC_STAGE" or os.getsid(parent) == os.getsid(process.pid)


def _watch(pids: list[int]) -> None:
    """End with the processes that this one depends on."""

    def look() -> None:
        while _is_intact(pids):
            time.sleep(POLL_S)
        _end()

    threading.Thread(target=look, name="owner", daemon=True).start()


def _watch_in_forks() -> None:
    """Workers of a data loader are forks: they end with the process that forked them."""
    forking = 0

    def note() -> None:
        nonlocal forking
        forking = os.getpid()

    os.register_at_fork(before=note, after_in_child=lambda: _watch([forking]))


def _touch(lock: BinaryIO) -> None:
    """Touch the lock while we hold it."""

    def touch() -> None:
        with contextlib.suppress(ValueError):  # the file is closed: the stage is done
            while True:
                with contextlib.suppress(OSError):
                    os.utime(lock.fileno())
                time.sleep(TOUCH_S)

    threading.Thread(target=touch, name="owner", daemon=True).start()


def _is_intact(pids: list[int]) -> bool:
    """Whether these are still our parent, its parent and so on: whoever dies, its children get another at once."""
    child = os.getpid()
    try:
        for parent in pids:
            if psutil.Process(child).ppid() != parent:
                return False
            child = parent
    except psutil.NoSuchProcess:
        return False
    return True


def _end() -> NoReturn:
    """End this process and all that it started."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    with contextlib.suppress(OSError):
        if select.select([], [2], [], 0)[1]:  # nobody may be left to empty a full pipe
            os.write(2, b"what started this process is gone, so it ends too; nothing that was saved is lost\n")
    os._exit(ORPHANED)


def _take(lock: BinaryIO) -> None:
    deadline_s = time.monotonic() + GRACE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                raise _in_use() from None
        time.sleep(POLL_S / 4)
    host = _text().get("host")
    if isinstance(host, str) and host != socket.gethostname() and _is_touched():
        raise _in_use()


def _is_touched() -> bool:
    """Whether somebody touches the lock: the sign of life where locks do not reach from machine to machine."""
    before_ns = LOCK.stat().st_mtime_ns
    deadline_s = time.monotonic() + SILENCE_S
    while time.monotonic() < deadline_s:
        time.sleep(POLL_S)
        with LOCK.open("rb") as file:  # opening makes a network file system look again
            if os.fstat(file.fileno()).st_mtime_ns != before_ns:
                return True
    return False


def _text() -> dict[str, Any]:
    """What the lock says of its owner; nothing where it was released, or is being written."""
    try:
        found = json.loads(LOCK.read_bytes())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _in_use() -> Refusal:
    about = _text()
    if not about:
        return Refusal(f"another process works in this checkout ({LOCK}); wait for it")
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(about.get("started_s")))
    return Refusal(
        f"`python -m pipeline.{about.get('stage')}` works in this checkout already: process {about.get('pid')} on "
        f"{about.get('host')}, since {since} ({LOCK}); wait for it, or end it with `kill {about.get('pid')}`"
    )
