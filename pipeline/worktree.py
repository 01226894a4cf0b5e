"""A work tree of its own: the files of a commit in a folder where nobody works, and DVC run there.

    .replay/<name>          the files; git and DVC ignore the folder
    .replay/<name>.lock     held by the process that uses them; free with text in it, that one was killed

What a killed process left is removed when the next one starts. What was kept on purpose stays until a work tree of the
same name is made.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from pipeline import owner, resume, stage
from pipeline.stage import Refusal

ROOT = Path(".replay")
POLL_S = 0.2
# Live curves of a training here would be a run in MLflow: they find no store, say so in their log, and end with it.
NO_STORE = "none://replay"


@dataclass
class WorkTree:
    """The files of a commit."""

    folder: Path
    keep: bool = False  # set it to let the folder stay after a good end

    def dvc(self, *arguments: str) -> None:
        """Run DVC here, what it prints passing through. Nothing that it started outlives this call.

        Raises:
            Refusal: it fails.
        """
        if not (self.folder / ".dvc").is_dir():  # DVC would look for one above, and find the checkout
            raise Refusal(f"{self.folder} has no folder .dvc, so DVC did not manage that commit")
        settings = {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "DVC_SITE_CACHE_DIR": str((self.folder / ".dvc" / "tmp" / "site").absolute()),
            "MLFLOW_TRACKING_URI": NO_STORE,
            owner.FLOW: str(os.getpid()),  # stages watch the process that started DVC, whether a flow or this
            resume.ASKED: "",
        }
        # In a session of its own, Ctrl-C at the terminal reaches this process alone, which then ends all of it.
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", *arguments],
            cwd=self.folder,
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait()
        except BaseException:
            _kill(process)
            raise
        if code:
            raise Refusal(f"`dvc {' '.join(arguments)}` failed in {self.folder}; what it printed tells why")


@contextlib.contextmanager
def of(commit: str, name: str) -> Iterator[WorkTree]:
    """Make the work tree of a commit, for this process alone, and remove it in the end, unless it is to be kept.

    Raises:
        Refusal: another process uses the work tree of this name, or git cannot make it.
    """
    ROOT.mkdir(exist_ok=True)
    _remove_stale()
    tree = WorkTree(ROOT / name)
    with held(tree.folder.with_suffix(".lock"), str(tree.folder)):
        _remove(tree.folder)  # one that was kept
        try:
            # Twice --force: also where git still knows a work tree of this place that is gone.
            git("worktree", "add", "--quiet", "--detach", "--force", "--force", str(tree.folder), commit)
            yield tree
        except BaseException:
            tree.keep = False
            raise
        finally:
            if not tree.keep:
                _remove(tree.folder)


@contextlib.contextmanager
def held(file: Path, what: str, wait: bool = False, tell: Callable[[str], object] = print) -> Iterator[None]:
    """Hold the lock of a place; its text, the process id, is there as long as the work is.

    Args:
        file: the lock; an empty file does no harm.
        what: the place, in messages.
        wait: for whoever holds it.
        tell: takes the line that says so.

    Raises:
        Refusal: another process holds it, and this one was not to wait.
    """
    file.parent.mkdir(exist_ok=True)
    with file.open("a+b", buffering=0) as lock:
        if not _take(lock):
            lock.seek(0)
            pid = lock.read().decode().strip() or "another"
            if not wait:
                raise Refusal(f"process {pid} works in {what} already; wait for it, or end it")
            tell(f"waiting for process {pid}, which works in {what}")
            while not _take(lock):
                # Asked for again and again: a signal that comes just before a call that blocks would wait with it.
                time.sleep(POLL_S)
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n".encode())
        try:
            yield
        finally:
            lock.truncate(0)


def _take(lock: IO[bytes]) -> bool:
    """Take a lock, if it is free; whether it was."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_stale() -> None:
    """Remove the work trees of processes that were killed: their locks are free, but have text."""
    for file in ROOT.glob("*.lock"):
        with file.open("r+b", buffering=0) as lock:
            if _take(lock) and lock.read(1):
                _remove(file.with_suffix(""))
                lock.truncate(0)


def _remove(folder: Path) -> None:
    """Remove a work tree, and git's note of it."""
    if folder.exists():
        shutil.rmtree(folder)
        git("worktree", "prune")


def git(*arguments: str) -> str:
    """What git prints, run without its hooks: those that DVC installs would check out data.

    Raises:
        Refusal: it fails.
    """
    command = ["git", "-c", f"core.hooksPath={os.devnull}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refusal(f"`git {' '.join(arguments)}` failed: {stage.reason(done.stderr)}")
    return done.stdout


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it started, live curves in a session of their own among them."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    psutil.wait_procs(family, timeout=5)
