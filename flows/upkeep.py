"""What a schedule does beside training: look for new text, promote, verify."""

from __future__ import annotations

import json
import sys
from collections import deque
from pathlib import Path
from typing import Any

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from flows import place, talk, training
from flows.process import Executor
from flows.stages import TAIL_LINES
from flows.training import ATTEMPTS_A_DAY, Minutes
from pipeline import check, recorded


@flow(name="retrain-on-new-data", persist_result=False)
def retrain_on_new_data(stage_limit_minutes: Minutes | None = None, attempts_a_day: int = ATTEMPTS_A_DAY) -> Any:
    """Run the pipeline if a file under data/source is new, changed or gone since the last run; else do nothing."""

    def work(is_again: bool) -> Any:
        # While a long training runs, one look after the other would line up behind it.
        if not is_again and place.is_busy():
            return Completed(name="Cached", message="a run works in this checkout; the next look tells what is new")
        check.refuse_obstacles()
        # One that crashed may have come as far as ingest, and nothing is new since.
        if not is_again and not is_source_changed():
            return Completed(name="Cached", message=f"nothing new under {place.SOURCE}")
        return as_own(training.pipeline(None, "wait", stage_limit_minutes, return_state=True))

    return training.refused(work, attempts_a_day)


@flow(name="promote", persist_result=False)
def promote(version: int | None = None, rollback: bool = False) -> Any:
    """Ask the gate, and move the alias champion if it agrees.

    Args:
        version: of the registered model; left out, the challenger.
        rollback: give the alias back to the champion before this one.
    """
    arguments = (["--rollback"] if rollback else []) + (["--version", str(version)] if version is not None else [])
    # Never started again by itself: a second rollback would be one too many.
    return training.refused(lambda _: as_own(program("pipeline.promote", *arguments, return_state=True)), 0)


@flow(name="verify", persist_result=False)
def verify() -> Any:
    """Read again every byte that is recorded, and fail with the names of the files that differ."""
    return training.refused(lambda _: as_own(program("pipeline.verify", return_state=True)))


def as_own(state: Any) -> State[Any]:
    """What a task or another run came to, as the end of this run: Prefect would only say that one of one failed."""
    return State(type=state.type, name=state.name, message=state.message)


def is_source_changed() -> bool:
    """Whether DVC finds other text under data/source than the last run read.

    Raises:
        Refusal: DVC cannot tell.
    """
    for changes in json.loads(recorded.dvc("status", "--json")).get("ingest", []):
        if isinstance(changes, dict) and str(place.SOURCE) in changes.get("changed deps", {}):
            return True
    return False


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="{module}")
def program(module: str, *arguments: str) -> Any:
    """Run a command of the pipeline, its lines in the log."""
    tail: deque[str] = deque(maxlen=TAIL_LINES)

    def show(line: str) -> None:
        tail.append(line)
        talk.show(line)

    code = Executor().run([sys.executable, "-m", module, *arguments], place.Place(Path.cwd()).environment(), show)
    message = "\n".join(tail)
    return Completed(message=message) if code == 0 else Failed(message=f"exit code {code}\n{message}")
