"""follow: show a training's curves in MLflow while it runs.

    python -m pipeline.follow RUN_FOLDER PID

`train` starts it and forgets it: a process of its own, at low priority, that reads the files which training writes
anyway, so nothing here can hold training up or fail it. It ends with the process PID. The run stays RUNNING when
training finished (publishing completes it), and becomes KILLED when it did not; the next attempt takes it up again.
A store that cannot be reached is tried again later, and the machine is measured all the same: publishing writes
whatever is missing then.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline import machine, publication, reaper, stage, tracking
from pipeline.tail import Tail

INTERVAL_S = 3.0
RETRY_S = 30.0


class Live:
    """The run of a training in progress, found by its fingerprint or created."""

    def __init__(self, fingerprint: str, trainer: str) -> None:
        params = stage.load_params()
        self.trainer = trainer
        with tracking.alone():  # two processes at once would make the tables of a new database twice
            self.store = tracking.Store(params["publish"].experiment)
            known = self.store.runs(tracking.FINGERPRINT, fingerprint)
            if not known:
                known = [self.store.create(fingerprint)]
            # None: this training is published already
            self.run: Any = next((run for run in known if tracking.PUBLICATION not in run.data.tags), None)
            if self.run is not None:
                # The owner first: a process killed between the two leaves a run that is known to be dead.
                sections = {name: params[name].model_dump() for name in ("model", "train")}
                self.store.add(self.run, params=publication.flat(sections), tags={reaper.OWNER: trainer})
                self.store.client.update_run(self.run.info.run_id, status="RUNNING")
                self.held = set(self.store.points(self.run, tracking.live_names(self.run)))
        reaper.reap(self.store, self.run)

    def send(self, points: tracking.Points, times_ms: Mapping[int, int]) -> None:
        """Write the points that the run does not hold yet, unless another attempt has taken it up meanwhile.

        Args:
            times_ms: when the machine was measured, by step.
        """
        new = {at: value for at, value in points.items() if at not in self.held}
        if new:
            with tracking.alone():  # an attempt that takes it up now finds all of these, or writes all of them
                if self._now().data.tags.get(reaper.OWNER) == self.trainer:
                    self.store.add(self.run, new, times_ms=times_ms)
            self.held |= set(new)

    def end_killed(self) -> None:
        """End the run, unless another attempt has taken it up meanwhile."""
        tags = self._now().data.tags
        if tags.get(reaper.OWNER) == self.trainer and tracking.PUBLICATION not in tags:
            self.store.end(self.run, "KILLED")

    def _now(self) -> Any:
        return self.store.client.get_run(self.run.info.run_id)


def follow(folder: Path, trainer: psutil.Process) -> None:
    """Send rows until the trainer is gone, and once more after that; a training without any has no run."""
    tail, beside = Tail(folder / "train.jsonl"), machine.Beside(folder)
    tag = reaper.tag_of(trainer)
    waiting: tracking.Points = {}
    step = 0
    live: Live | None = None
    measured: machine.Machine | None = None
    while True:
        training = is_running(trainer)  # asked before reading, so the last reading misses nothing
        waiting |= tracking.points_of(tail.new_rows())
        step = max([step, *(at for _, at in waiting)])
        pause_s = INTERVAL_S
        if live is None and not waiting:  # MLflow takes seconds to import, and there is nothing to show yet
            if not training:
                return
            _wait(trainer, pause_s)
            continue
        try:
            with tracking.problems():
                measured = measured or machine.Machine(folder)
                measured.measure(step)
                live = live or Live(folder.name[: tracking.NUM_FINGERPRINT_DIGITS], tag)
                if live.run is None:
                    return
                waiting |= beside.new_points()
                live.send(waiting, beside.times_ms)
                waiting = {}
                if not training:
                    if folder.exists() and not (folder / "last").is_dir():  # unfinished
                        live.end_killed()
                    return
        except stage.Refusal as problem:
            print(f"follow: {problem}", file=sys.stderr, flush=True)
            live, pause_s = None, RETRY_S
            if not training:
                return
        _wait(trainer, pause_s)


def is_running(process: psutil.Process) -> bool:
    """Whether it does anything yet: one that has ended is listed until somebody collects its exit code."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _wait(process: psutil.Process, seconds: float) -> None:
    try:
        process.wait(timeout=seconds)
    except psutil.Error:  # still running after that long
        return


def main() -> None:
    """Read the command line."""
    os.nice(10)
    folder, pid = Path(sys.argv[1]), int(sys.argv[2])
    with stage.refusals("follow"), contextlib.suppress(psutil.NoSuchProcess):
        follow(folder, psutil.Process(pid))


if __name__ == "__main__":
    main()
