"""One command at a time, in a session of its own: its output as it comes, and nothing left behind when stopped."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

GRACE_S = 8.0  # from the interrupt to the kill: enough to save a checkpoint, and less than the 10 s a user waits


class Stopped(Exception):
    """`stop` was called before the command could start."""


class Executor:
    """Runs commands, one at a time; any thread may stop it for good."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, command: Sequence[str], environment: dict[str, str], show: Callable[[str], None]) -> int:
        """Run the command, hand every line that it prints to `show`, and return its exit code.

        Raises:
            Stopped: `stop` came first.
        """
        with self._lock:
            if self._stopped:
                raise Stopped
            # A session of its own makes it the leader of a group that holds all it starts, and keeps the
            # terminal's Ctrl-C from reaching it before we know of it.
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        with self._process as process:
            assert process.stdout is not None
            for line in process.stdout:
                show(line.decode("utf-8", errors="replace").rstrip("\r\n"))
        return process.returncode

    def stop(self) -> None:
        """End the running command and everything it started, and start no other.

        An interrupt first, as Ctrl-C would send it: DVC tidies up and training saves a checkpoint. What is
        left after GRACE_S, or at a second Ctrl-C, is killed.
        """
        with self._lock:
            self._stopped = True
            process = self._process
        if process is None or process.poll() is not None:
            return
        try:
            _signal_group(process, signal.SIGINT)
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, number)
