"""One try: a copy of the project, the processes that run in it, the faults that strike them, the way back."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

from chaos.project import Reference, differences, environment
from pipeline.follow import is_running

LIMIT_S = 240.0  # a command that takes longer hangs
MOST_ATTEMPTS = 8  # of the way back: a user who reads what is printed and tries again
PATIENCE_S = 60.0  # for processes that end by themselves once their work is gone; live curves do so at low priority


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    text: str


class Hung(Exception):
    """A command did not end."""


class NotHere(Exception):
    """This machine cannot do this fault; says why."""


class Trial:
    """What a fault works with. It calls `prepare` once, disturbs, and returns whether it struck."""

    def __init__(self, reference: Reference, folder: Path, seed: str) -> None:
        self.reference = reference
        self.random = random.Random(seed)
        self.began = time.monotonic()
        self.folder = folder
        self.project = folder / "project"
        self.served: Path | None = None  # the artifacts of the tracking server that was published to
        self.log = folder / "log.txt"
        self.complaint = ""  # what was not as it should be, although the bytes may be right
        self.refused = False  # the disturbed run refused, with the right reason
        self.recovery_s: float | None = None  # set by a fault that had to recover by itself
        self.surroundings: dict[str, str] = {}  # of the disturbed run and of the way back
        self.started: list[subprocess.Popen[bytes]] = []
        folder.mkdir(parents=True)

    # --- what a fault may do -------------------------------------------------------------------------------------

    def prepare(self, *stale: str) -> None:
        """Make the copy; the stages named here will really run in it."""
        self.reference.copy(self.project, stale)
        self.note(f"a copy in which {', '.join(stale) or 'nothing'} is stale")

    def note(self, line: str) -> None:
        """A line for who repeats the try."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"### {time.monotonic() - self.began:.1f} s: {line}\n")

    def start(self, *command: str, umask: int = -1, **more: str) -> subprocess.Popen[bytes]:
        """Start a command in the project, in a session of its own; an empty variable is one that is not set."""
        variables = {
            key: value for key, value in environment(self.project, **self.surroundings | more).items() if value
        }
        self.note(f"{' '.join(command)}  {' '.join(f'{key}={value}' for key, value in more.items())}")
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.project, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, umask=umask,
            )  # fmt: skip
        self.started.append(process)
        return process

    def repro(self, umask: int = -1, **more: str) -> subprocess.Popen[bytes]:
        """Start `dvc repro`."""
        return self.start("python", "-m", "dvc", "repro", umask=umask, **more)

    def end(self, process: subprocess.Popen[bytes], since: int = 0) -> Done:
        """Wait for a command; what the log says from byte `since` on is its text."""
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Hung(f"{process.args!r} did not end within {LIMIT_S:.0f} s") from None
        self.note(f"exit code {code}")
        return Done(code, self.log.read_bytes()[since:].decode("utf-8", "replace"))

    def run(self, *command: str, umask: int = -1, **more: str) -> Done:
        """Run a command to its end."""
        since = self.log.stat().st_size
        return self.end(self.start(*command, umask=umask, **more), since)

    def running(self, module: str, process: subprocess.Popen[bytes]) -> psutil.Process | None:
        """Wait for `python -m MODULE` to start in the project; None when `process` ended before it did."""
        while process.poll() is None:
            for found in self._processes():
                if ["-m", module] == _words(found)[1:3]:
                    return found
            time.sleep(0.05)
        return None

    def in_training(self, act: Callable[[psutil.Process, subprocess.Popen[bytes]], None]) -> bool:
        """Run the pipeline and `act` at a moment of the trainer's life, all alike; whether that ended the run."""
        process = self.repro()
        trainer = self.running("pipeline.train", process)
        moment_s = self.random.uniform(0, self.reference.train_s)
        if trainer is None:
            return False
        try:
            trainer.wait(moment_s)
        except psutil.TimeoutExpired:
            self.note(f"struck {moment_s:.2f} s after the trainer started")
            act(trainer, process)
        return self.end(process).code != 0

    def strike(self, mode: str, module: str, within: str = "", after: str = "") -> tuple[bool, Done]:
        """Run the pipeline with the fault library at a random file operation of a module.

        Args:
            mode: of disk.c.
            within: only calls on paths that hold this text are counted and struck.
            after: only a moment after the second call on a path that this pattern matches.
        """
        library = self.reference.library
        if library is None:
            raise NotHere("the fault library needs Linux and a C compiler (cc)")
        calls = [path for _, path in self.reference.calls.get(module, []) if within in path]
        first = [number for number, path in enumerate(calls, 1) if after and re.search(after, path)][1:2] or [0]
        if len(calls) <= first[0]:
            raise NotHere(f"the undisturbed {module} makes no such calls")
        at = self.random.randint(first[0] + 1, len(calls))
        struck = self.folder / "struck.txt"
        struck.unlink(missing_ok=True)
        done = self.run(
            "python", "-m", "dvc", "repro", LD_PRELOAD=str(library), CHAOS_ROOT=str(self.project), CHAOS_MODE=mode,
            CHAOS_MODULE=module, CHAOS_AT=str(at), CHAOS_LOG=str(struck), CHAOS_WITHIN=within,
        )  # fmt: skip
        if struck.exists():
            self.note(f"struck: {struck.read_text(encoding='utf-8')}")
        return struck.exists(), done

    def expect(self, done: Done, reason: str) -> None:
        """The disturbed command must have failed, with a sentence for people that gives this reason."""
        if done.code == 0:
            self.complaint = f"should have been refused ({reason})"
        elif "Traceback (most recent call last)" in done.text:
            self.complaint = "a traceback instead of a sentence"
        elif not re.search(reason, done.text):
            self.complaint = f"refused, but not because of: {reason}"
        else:
            self.refused = True

    # --- the way back --------------------------------------------------------------------------------------------

    def recover(self) -> float | None:
        """Do what a user does, run it again (as `make repro` does, with its check before); return how long that took.

        None if it never went well.
        """
        began = time.monotonic()
        for _ in range(MOST_ATTEMPTS):
            done = self.run("python", "-m", "dvc", "repro")
            if done.code == 0:
                return time.monotonic() - began
            if re.search(r"dvc\.lock.*(corrupted|invalid|not valid)|(corrupted|invalid).*dvc\.lock", done.text, re.S):
                self.run("git", "checkout", "--", "dvc.lock")  # what DVC's message leaves to do
            time.sleep(1)
            if (self.project / "pipeline" / "check.py").exists():
                self.run("python", "-m", "pipeline.check")
        return None

    def compare(self) -> list[str]:
        """What is not as in the undisturbed run; processes that do not end are among it."""
        left = self._wait_for_all()
        found = differences(self.reference.result, self.reference.result_of(self.project, self.served))
        return [f"still running: {' '.join(_words(process))}" for process in left] + found

    def clean_up(self, keep: bool) -> None:
        """End whatever still runs, and drop the folder."""
        kill(self._processes())
        for started in self.started:
            started.wait()
        if not keep:
            shutil.rmtree(self.folder)

    def _wait_for_all(self) -> list[psutil.Process]:
        end = time.monotonic() + PATIENCE_S
        while (left := self._processes()) and time.monotonic() < end:
            time.sleep(0.1)
        return left

    def _processes(self) -> list[psutil.Process]:
        """Every living process whose folder is the project."""
        found = []
        for process in psutil.process_iter():
            try:
                if is_running(process) and process.cwd() == str(self.project):
                    found.append(process)
            except psutil.Error:
                continue
        return found


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kill what may end by itself meanwhile."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_group(process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
    """Send a signal to a command and everything that it started in its session's group."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
