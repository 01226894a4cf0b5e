"""One command at a time, in a session of its own: its output as it comes, and nothing left behind when stopped."""

import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

LINE = re.compile(rb"[^\r\n]*(?:\r?\n|\r(?=[^\n]))")
SECONDS_BETWEEN_BARS = 5.0
POLL_S = 0.5
GRACE_S = 8.0  # from the interrupt to the kill: enough to save a checkpoint, and less than the 10 s a user waits


class Stopped(Exception):
    """`stop` was called before the command could start."""


class TimeLimit(Exception):
    """The command took longer than it may; it and everything that it started have ended."""


class Executor:
    """Runs commands, one at a time; any thread may stop it for good."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        show: Callable[[str], None],
        folder: Path | None = None,
        limit_s: float | None = None,
    ) -> int:
        """Run the command, hand every line that it prints to `show`, and return its exit code.

        Raises:
            Stopped: `stop` came first.
            TimeLimit: it ran for `limit_s` seconds, and was ended as `stop` does.
        """
        with self._lock:
            if self._stopped:
                raise Stopped
            # A session of its own makes it the leader of a group that holds all it starts, and keeps the
            # terminal's Ctrl-C from reaching it before we know of it.
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        late = threading.Event()

        def ring() -> None:
            late.set()
            _end(process)

        with self._process as process, _alarm(limit_s, ring):
            assert process.stdout is not None
            try:
                for line in _lines(process.stdout):
                    show(line)
            except BaseException:  # Ctrl-C, a termination, cancelled
                self.stop()
                for line in _lines(process.stdout):  # what it says while it ends
                    show(line)
                raise
        if late.is_set():
            raise TimeLimit
        return process.returncode

    def stop(self) -> None:
        """End the running command and everything it started, and start no other.

        An interrupt first, as Ctrl-C would send it: DVC tidies up and training saves a checkpoint. What is
        left after GRACE_S, or at a second Ctrl-C, is killed.
        """
        with self._lock:
            self._stopped = True
            process = self._process
        if process is not None and process.poll() is None:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        _signal_group(process, signal.SIGINT)
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal_group(process, signal.SIGKILL)


@contextmanager
def _alarm(limit_s: float | None, ring: Callable[[], object]) -> Iterator[None]:
    """Ring when what is inside takes longer than that."""
    if limit_s is None:
        yield
        return
    timer = threading.Timer(limit_s, ring)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _lines(output: IO[bytes]) -> Iterator[str]:
    """The lines of an output as they come; of those written one over the other, as bars are, one every few seconds."""
    rest, shown_s = b"", 0.0
    while chunk := _what_is_there(output):
        rest, used = rest + chunk, 0
        for match in LINE.finditer(rest):
            used, final = match.end(), match[0].endswith(b"\n")
            if final or time.monotonic() - shown_s >= SECONDS_BETWEEN_BARS:
                shown_s = shown_s if final else time.monotonic()
                yield _text(match[0])
        rest = rest[used:]
    if rest:
        yield _text(rest)


def _what_is_there(output: IO[bytes]) -> bytes:
    """What a pipe holds, once there is something; nothing at its end."""
    # Asked again and again: a signal that comes just before a call that blocks would wait with it.
    while not select.select([output], [], [], POLL_S)[0]:
        continue
    return os.read(output.fileno(), 2**16)


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace").rstrip("\r\n")


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, number)
