"""A stage as a task of Prefect: brought up to date by DVC, its output in the task's log, its end in the state."""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, cast

from flows import talk
from flows.place import Place
from flows.process import Executor, TimeLimit

if TYPE_CHECKING:
    from uuid import UUID

    from prefect import State

TAIL_LINES = 20  # of a failed stage's output, kept in the message of its state
SECONDS_BETWEEN_PROGRESS = 3.0
SECONDS_WITHOUT_SERVER = 60.0  # from one that does not answer to the next try

# DVC's advice to whoever typed `dvc repro`, last of all it prints; after every stage it would drown the rest.
EPILOGUE = {
    "To track the changes with git, run:",
    "Use `dvc push` to send your updates to remote storage.",
    "Data and pipelines are up to date.",
}
# What waiting a little may cure. Everything else, a wrong parameter above all, fails the same way again.
PASSING = re.compile(
    r"Unable to acquire lock|database is locked|cannot be used \(.*(?:refused|timed out|unreachable)|"
    r"Temporary failure in name resolution|cannot be reached",
    re.IGNORECASE,
)
DONE = re.compile(
    r"^(?:train: )?(?:step|epoch) ([\d.]+)/([\d.]+) "
)  # how far training is, as pipeline/progress.py says it


class Bar:
    """The progress of training, as an artifact of its task."""

    def __init__(self) -> None:
        self._artifact: UUID | None = None
        self._next_s = 0.0

    def show(self, line: str) -> None:
        """Note how far this line says that training is; at most every few seconds."""
        match = DONE.match(line)
        if match is None:
            return
        done, of = map(float, match.groups())
        if done < of and time.monotonic() < self._next_s:
            return
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percent = 100 * done / of
        self._next_s = time.monotonic() + SECONDS_WITHOUT_SERVER
        with talk.only_showing():
            if self._artifact is None:
                self._artifact = cast("UUID", create_progress_artifact(percent, key="training", description=line))
            else:
                update_progress_artifact(self._artifact, progress=percent, description=line)
            self._next_s = time.monotonic() + SECONDS_BETWEEN_PROGRESS


def bring_up_to_date(name: str, place: Place, executor: Executor, limit_s: float | None = None) -> State[Any]:
    """Let DVC bring one stage up to date, and say in the state's name what it took."""
    from prefect.states import Completed, Failed

    bar = Bar()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    ran = epilogue = False
    start_s = time.monotonic()

    def show(line: str) -> None:
        nonlocal ran, epilogue
        ran = ran or line == f"Running stage '{name}':"  # what DVC prints before a command, and only then
        epilogue = epilogue or line in EPILOGUE
        if not epilogue:
            tail.append(line)
            talk.show(line)
            bar.show(line)

    command = [sys.executable, "-m", "dvc", "repro", "--single-item", name]
    try:
        code = executor.run(command, place.environment(), show, place.folder, limit_s)
    except TimeLimit:
        message = f"ended after {limit_s:,.0f} s, the limit of a stage; what was saved is kept\n"
        return Failed(name="TimedOut", message=message + "\n".join(tail))
    if code != 0:
        return Failed(message=f"exit code {code}\n" + "\n".join(tail))
    if ran:
        return Completed(message=f"ran in {time.monotonic() - start_s:.1f} s")
    return Completed(name="Cached", message="nothing to do")


def is_passing(_task: object, _run: object, state: State[Any]) -> bool:
    """Whether another try may go better: Prefect asks this before it retries a stage that failed."""
    return state.name == "Failed" and bool(PASSING.search(state.message or ""))
