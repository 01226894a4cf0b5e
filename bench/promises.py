"""What the promises cost, measured: checkpoints beside training, deterministic algorithms, going on, stopping.

    python -m bench.promises [--rounds N]

With the model and the batch of params.yaml, on random documents:

- checkpoints: blocks of steps with and without one saved in them, in turns; the share is that of a checkpoint every
  train.checkpoint_interval_steps.
- deterministic algorithms: single steps with and without them, in turns.
- going on: from the end of the imports to the end of the first step after a checkpoint at step 10, and at step
  1,000,000 with as many rows.
- SIGTERM: from the signal to the exit of a training process, and the longest step that it had done before.
- SIGKILL of the process that started a training: until the trainer has ended too.
- a tracking server that hangs, or is not there: the processor time that the process of the live curves takes beside
  training while it tries to reach it, as a share of one core; blocks of steps beside that process, and while it is
  stopped, in turns; and the processor time that it took to start.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

NUM_BLOCK_STEPS = 10
NUM_TRIES = 3  # to reach a server out of reach, each with the pause before it

Way = Callable[[int], object]  # what is done before the steps of a block, given the step


def make_project(folder: Path, **changes: Any) -> Any:
    """A project with the training parameters of params.yaml."""
    from pipeline import stage
    from tests import tiny

    params = stage.load_params()["train"].model_dump() | {"evaluation_interval_steps": 0, "num_epochs": 100_000}
    return tiny.Project(folder, num_documents=6000, **(params | changes))


@dataclass(frozen=True)
class Cost:
    """What one way to train a block of steps takes more than another."""

    extra_s: float  # a block, median over the rounds
    low_s: float  # 95 % interval of that (bootstrap over the rounds)
    high_s: float
    step_s: float  # the other way, median

    def share(self, num_steps: int) -> str:
        """Of `num_steps` steps, with its interval."""
        extra, low, high = (value / (self.step_s * num_steps) for value in (self.extra_s, self.low_s, self.high_s))
        return f"{extra:+.2%} (95 % interval {low:+.2%} to {high:+.2%})"


def in_turns(trainer: Any, num_rounds: int, num_steps: int, ways: tuple[Way, Way]) -> Cost:
    """Train a block of steps the first way and one the second way, in each round in the other order.

    A machine that is slower for a while is so for both blocks of a round, so their difference is what counts.
    """
    from pipeline.loop import train_step

    step, seconds = 0, np.empty((num_rounds + 1, 2))
    for number in range(num_rounds + 1):
        for way in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            ways[way](step)
            for _ in range(num_steps):
                train_step(trainer, step, trainer.batches.batch_at(step))
                step += 1
            seconds[number, way] = time.perf_counter() - began
    differences = np.diff(seconds[1:]).ravel()  # the first round warms up
    drawn = np.random.default_rng(1).choice(differences, (2000, num_rounds))
    low_s, high_s = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Cost(float(np.median(differences)), low_s, high_s, float(np.median(seconds[1:, 0])) / num_steps)


@contextmanager
def begun() -> Iterator[Any]:
    """A training in a project of its own, before its first step: its writer, which holds run and trainer."""
    from pipeline import device, runs, stage
    from pipeline.checkpoints import Checkpoints
    from pipeline.corpus import load, read_side
    from pipeline.model import Params
    from pipeline.trainer import make_trainer
    from pipeline.writer import Writer

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary) / "project"
        make_project(folder)
        stack.callback(os.chdir, Path.cwd())
        os.chdir(folder)
        params = stage.load_params()["train"]
        place = stack.enter_context(device.join_processes(params))
        tokens = load(Path("data/tokens"))
        documents = read_side(Path("data/split"), "train", tokens.num_documents)
        trainer = make_trainer(place, tokens, documents, Params(base="scratch", revision=None), params)
        run = runs.Run("0" * 16)
        stack.enter_context(run.opened())
        checkpoints = Checkpoints(run.folder, run.rows_file, params.checkpoint_interval_steps)
        writer = stack.enter_context(Writer(run, checkpoints, Path("data/tokens"), params, {}))
        writer.start(trainer, None)
        yield writer


def costs(num_rounds: int) -> None:
    """Checkpoints and deterministic algorithms."""
    import torch

    from pipeline import fit

    with begun() as writer:

        def save(step: int) -> None:
            writer.save({"step": step}, fit.Standing(), best=False, checkpoint=True)

        checkpoint = in_turns(writer.trainer, num_rounds, NUM_BLOCK_STEPS, (lambda _: None, save))
        writer.background.wait()
        interval = writer.params.checkpoint_interval_steps
        print(f"checkpoints, one every {interval} steps: {checkpoint.share(interval)}, {checkpoint.extra_s:.3f} s each")

        exact = in_turns(
            writer.trainer,
            num_rounds * NUM_BLOCK_STEPS,
            1,
            (lambda _: torch.use_deterministic_algorithms(False), lambda _: torch.use_deterministic_algorithms(True)),
        )
        print(f"deterministic algorithms: {exact.share(1)} of a step of {exact.step_s:.3f} s")


def out_of_reach(num_rounds: int) -> None:
    """Live curves for a server that takes connections and never answers, and for one that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with begun() as writer:
            beside_curves("hangs", port, writer, num_rounds)
    with begun() as writer:  # nobody listens any more
        beside_curves("is not there", port, writer, num_rounds)


def beside_curves(what: str, port: int, writer: Any, num_rounds: int) -> None:
    """Train beside the process of the live curves, whose server is out of reach."""
    writer.run.add_row({"step": 1, "loss": 8.0})  # it waits for something to show
    said = Path("said.txt")  # a file, for a pipe cannot be counted without emptying it
    with said.open("w") as stderr:
        follower = psutil.Popen(
            [sys.executable, "-m", "pipeline.follow", str(writer.run.folder.resolve()), str(os.getpid())],
            env=os.environ | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}", "PYTHONPATH": sys.path[0]},
            stderr=stderr,
        )

    def num_tries() -> int:
        assert follower.poll() is None, said.read_text()
        return said.read_text().count("cannot be used")

    while not num_tries():  # it is started when it has given up for the first time
        time.sleep(0.1)
    start_s = processor_s(follower)
    taken_s, elapsed_s = taken(follower, writer, num_tries)
    ways = (lambda _: follower.suspend(), lambda _: follower.resume())
    cost = in_turns(writer.trainer, num_rounds, NUM_BLOCK_STEPS, ways)
    follower.kill()
    follower.wait()
    print(
        f"a server that {what}: {taken_s:.2f} s of a core in {elapsed_s:.0f} s of training, {taken_s / elapsed_s:.2%}; "
        f"by the clock {cost.share(NUM_BLOCK_STEPS)}; and {start_s:.1f} s of a core once, to start"
    )


def taken(follower: psutil.Process, writer: Any, num_tries: Callable[[], int]) -> tuple[float, float]:
    """The processor time that the process takes during whole tries, and the time elapsed, training beside it.

    A step waits for its slowest thread, so training loses no more than what is taken from its cores. Clocks on a busy
    machine wander by more than that; processor time does not.
    """
    from pipeline.loop import train_step

    trainer, step = writer.trainer, 0
    began, before_s, enough = time.perf_counter(), processor_s(follower), num_tries() + NUM_TRIES
    while num_tries() < enough:
        train_step(trainer, step, trainer.batches.batch_at(step))
        step += 1
        writer.run.add_row({"step": step, "loss": 8.0, "learning_rate": 0.001, "grad_norm": 1.0})  # which it reads
    return processor_s(follower) - before_s, time.perf_counter() - began


def processor_s(process: psutil.Process) -> float:
    """Processor time that a process has taken, its own and the kernel's for it."""
    times = process.cpu_times()
    return float(times.user + times.system)


def resume(folder: Path) -> None:
    """Go on from the newest checkpoint in the folder, as `train` does, and print when the first step is done."""
    import numpy  # noqa: F401  # what training imports, so that the clock starts after it
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from pipeline import device, fit, runs, stage, writer
    from pipeline.model import Params

    os.chdir(folder)
    params = stage.load_params()["train"]
    paths = stage.paths_of(stage.read_stages()["train"])
    began = time.perf_counter()

    def first_row(self: Any, *_: object) -> None:
        print(time.perf_counter() - began)
        os._exit(0)

    writer.Writer.add_row = first_row  # type: ignore[method-assign]
    run = runs.Run("0" * 16)
    with device.join_processes(params) as place, run.opened():
        fit.fit(run, place, paths, Params(base="scratch", revision=None), params, {})


def going_on(step: int) -> None:
    """Make a checkpoint at that step, with as many rows, and time a process that goes on from it."""
    from pipeline import fit

    with begun() as writer:
        row = {"step": step, "epoch": 0.123456789, "loss": 1.23456789, "learning_rate": 0.001, "grad_norm": 0.987654321,
               "num_tokens": 123456789}  # fmt: skip
        for _ in range(step):
            writer.run.add_row(row)
        writer.save(row, fit.Standing(), best=False, checkpoint=True)
        writer.background.wait()
        num_bytes = writer.run.rows_file.stat().st_size
        command = [sys.executable, "-m", "bench.promises", "--resume", str(Path.cwd())]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
        print(f"first step after step {step:,} ({num_bytes:,} bytes of rows): {float(done.stdout.split()[-1]):.2f} s")


def stopping() -> None:
    """SIGTERM to a training process in the middle of a step."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:  # live curves end a moment later
        project = make_project(Path(temporary) / "project")
        process = project.start("pipeline.train")
        times: list[float] = []
        num_rows = 0
        while len(times) < 8:
            time.sleep(0.005)
            for rows in project.folder.glob(".runs/*/train.jsonl"):
                seen = rows.read_bytes().count(b"\n")
                if seen > num_rows:
                    num_rows = seen
                    times.append(time.perf_counter())
        longest_s = max(after - before for before, after in itertools.pairwise(times))
        began = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        process.communicate()
        took_s = time.perf_counter() - began
        state = max(project.folder.glob(".runs/*/checkpoint-*/state.json"))
        assert process.returncode == 128 + signal.SIGTERM and json.loads(state.read_text())["step"] >= num_rows - 1
        print(f"SIGTERM to exit: {took_s:.2f} s (the longest of the steps before: {longest_s:.2f} s), resumable")


def orphaned(num_times: int = 5) -> None:
    """SIGKILL of the process that started a training."""
    from pipeline.follow import is_running

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        project = make_project(Path(temporary) / "project")
        times_s = []
        for _ in range(num_times):
            shell = subprocess.Popen(["sh", "-c", f"{sys.executable} -m pipeline.train; true"], cwd=project.folder,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
            begun_at_s = time.time()
            while not any(rows.stat().st_mtime > begun_at_s for rows in project.folder.glob(".runs/*/train.jsonl")):
                time.sleep(0.05)
            (trainer,) = psutil.Process(shell.pid).children()
            shell.kill()
            began = time.perf_counter()
            while is_running(trainer):
                time.sleep(0.005)
            times_s.append(time.perf_counter() - began)
            shell.wait()
        print(f"SIGKILL of its parent to the trainer's end: {max(times_s):.2f} s, the longest of {num_times}")


MEASUREMENTS: dict[str, Callable[[int], None]] = {
    "costs": costs,
    "early": lambda _: going_on(10),
    "late": lambda _: going_on(1_000_000),
    "stopping": lambda _: stopping(),
    "orphaned": lambda _: orphaned(),
    "out-of-reach": out_of_reach,
}


def main() -> None:
    """Measure everything, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench.promises", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--one", choices=MEASUREMENTS)
    parser.add_argument("--resume", type=Path)
    arguments = parser.parse_args()
    if arguments.resume:
        resume(arguments.resume)
    elif arguments.one:
        from pipeline import launcher

        launcher.settle()
        MEASUREMENTS[arguments.one](arguments.rounds)
    else:
        for one in MEASUREMENTS:
            command = [sys.executable, "-m", "bench.promises", "--one", one, "--rounds", str(arguments.rounds)]
            subprocess.run(command, cwd=Path(__file__).parent.parent, check=True)


if __name__ == "__main__":
    main()
