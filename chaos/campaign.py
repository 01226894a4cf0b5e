"""Break a real run of the pipeline again and again, and compare every byte with an undisturbed one.

    make chaos                              # 30 tries
    make chaos N=500 SEED=7
    python -m chaos --only kill-in-checkpoint --seed 1234     # one try, again

A try is a copy of a tiny project in which some stages never ran: a fault strikes at a moment and place that follow from
the seed, then the same command is run again as a user would, then every output of dvc.yaml, dvc.lock, DVC's cache and
what MLflow holds are compared. Exit code 0: no difference, no refusal for a wrong reason, nothing stuck.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from chaos.faults import FAULTS, Fault
from chaos.project import Broken, Reference, trace, write_project
from chaos.server import Server
from chaos.trial import Hung, NotHere, Trial, kill

SOURCE = Path(__file__).parent / "disk.c"


@dataclass(frozen=True)
class Outcome:
    """How a try ended."""

    fault: str
    seed: int
    struck: bool = False
    refused: bool = False
    recovered: bool = False
    identical: bool = False
    recovery_s: float = 0.0
    not_here: str = ""  # why this machine cannot do it
    problem: str = ""  # why it counts as a failure
    took_s: float = 0.0

    @property
    def ending(self) -> str:
        """In a word or two."""
        if self.not_here:
            return "not run"
        if self.problem:
            return "FAILED"
        return "identical" if self.struck else "did not strike"


def plan(num_tries: int, seed: int, faults: Sequence[Fault]) -> list[tuple[Fault, int]]:
    """The faults of a campaign with the seed of each: every fault once while there is room, then by weight.

    The first try has the campaign's own seed, so `--only FAULT --seed S` is that one try again.
    """
    chance = random.Random(seed)
    first, weights = chance.sample(faults, len(faults)), [fault.weight for fault in faults]
    chosen = []
    for number in range(num_tries):
        fault = first[number] if number < len(first) else chance.choices(faults, weights)[0]
        chosen.append((fault, chance.getrandbits(32) if number else seed))
    return chosen


def attempt(reference: Reference, server: Server, folder: Path, fault: Fault, seed: int) -> Outcome:
    """One try, from the copy to the comparison. Its folder stays when it failed."""
    began = time.monotonic()
    trial = Trial(reference, folder, f"{fault.name} {seed}")
    struck, recovery_s, not_here, problem = False, None, "", ""
    found: list[str] | None = None
    try:
        struck = fault.cause(trial, server)
        recovery_s = trial.recover() if trial.recovery_s is None else trial.recovery_s
        found = trial.compare()
        problem = "; ".join(found)
        if recovery_s is None:
            problem = f"it never went well again; {problem}"
        elif found:
            problem = f"A SILENT DIFFERENCE: {problem}"
        problem = problem or trial.complaint
    except NotHere as reason:
        not_here = str(reason)
    except Hung as reason:
        problem = f"hung: {reason}"
    except Exception:  # a mistake of the campaign must not end it, and must not pass
        problem = traceback.format_exc()
    trial.note(problem or "as it should be")
    trial.clean_up(keep=bool(problem))
    return Outcome(
        fault.name, seed, struck=struck, refused=trial.refused and struck, recovered=struck and recovery_s is not None,
        identical=struck and recovery_s is not None and found == [],
        recovery_s=recovery_s or 0.0, not_here=not_here, problem=problem, took_s=time.monotonic() - began,
    )  # fmt: skip


def table(outcomes: Iterable[Outcome]) -> str:
    """The campaign as a Markdown table, a row a fault, and the sum."""
    head = [
        "fault",
        "tries",
        "struck",
        "recovered",
        "byte-identical",
        "refused with reason",
        "failed",
        "worst recovery",
    ]
    rows: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault(outcome.fault, []).append(outcome)
    lines = [row(name, rows[name]) for name in sorted(rows)]
    lines.append(row("all", [outcome for some in rows.values() for outcome in some]))
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] + ["---:"] * (len(head) - 1), *lines])


def row(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    """One row of the table; tries that this machine cannot do are not among them."""
    ran = [outcome for outcome in outcomes if not outcome.not_here]
    if not ran:
        return [name, "not run", *[""] * 6]
    counts = [[o.struck, o.recovered, o.identical, o.refused, bool(o.problem)] for o in ran]
    return [
        name,
        str(len(ran)),
        *map(str, map(sum, zip(*counts, strict=True))),
        f"{max(o.recovery_s for o in ran):.1f} s",
    ]


def compiled(folder: Path) -> Path | None:
    """The fault library, or None where it cannot be."""
    if not sys.platform.startswith("linux") or shutil.which("cc") is None:
        return None
    library = folder / "disk.so"
    done = subprocess.run(
        ["cc", "-shared", "-fPIC", "-O2", "-o", library, SOURCE, "-ldl"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"chaos: cc cannot compile {SOURCE.name}:\n{done.stderr}", file=sys.stderr)
        return None
    return library


def prepare(folder: Path) -> Reference:
    """Run the pipeline undisturbed, and once more in a copy, which must not differ.

    Raises:
        Broken: it fails or differs without any fault.
    """
    library = compiled(folder)
    reference = Reference(folder, library)
    write_project(reference.folder)
    reference.run()
    control = Trial(reference, folder / "control", "control")
    control.prepare("train", "publish")
    if library is not None:
        control.surroundings = trace(library, control.project, folder / "control.txt")
    process = control.repro()
    trainer = control.running("pipeline.train", process)
    began = time.monotonic()
    if trainer is not None:
        trainer.wait()
        reference.train_s = time.monotonic() - began
    done = control.end(process)
    reference.learn_calls(folder / "control.txt", control.project)
    found = control.compare()
    if done.code or found:
        raise Broken(f"a run without any fault is not like the first one: {'; '.join(found)}\n{done.text}")
    control.clean_up(keep=False)
    return reference


def machine() -> str:
    """Processor and its number of cores."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        model = (re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8")) or [model])[0]
    return f"{os.cpu_count()} cores, {model}"


def run(num_tries: int, seed: int, lanes: int, only: str | None, table_file: Path | None) -> int:
    """The campaign; returns the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell, and inherited
    folder = Path(tempfile.mkdtemp(prefix="chaos-")).resolve()
    faults = [FAULTS[only]] if only else list(FAULTS.values())
    print(f"chaos: {num_tries} tries, seed {seed}, {lanes} at a time, in {folder}", flush=True)
    began = time.monotonic()
    reference = prepare(folder)
    print(f"chaos: two undisturbed runs took {time.monotonic() - began:.0f} s and are identical", flush=True)
    server = Server(folder / "server", folder / "empty.db")
    outcomes: list[Outcome] = []

    def one(number: int, chosen: tuple[Fault, int]) -> None:
        fault, each = chosen
        place = folder / "tries" / f"{number:04d}-{fault.name}"
        outcome = attempt(reference, server, place, fault, each)
        outcomes.append(outcome)
        print(
            f"{number:4d} {fault.name:24s} {outcome.ending:15s} {outcome.took_s:6.1f} s  {outcome.not_here}", flush=True
        )
        if outcome.problem:
            print(f"     {outcome.problem.strip()}\n     kept in {place}, log.txt beside it\n"
                  f"     again: python -m chaos --tries 1 --only {fault.name} --seed {each}", flush=True)  # fmt: skip

    pool = ThreadPoolExecutor(lanes)
    try:
        for done in [pool.submit(one, *item) for item in enumerate(plan(num_tries, seed, faults), 1)]:
            done.result()
    except KeyboardInterrupt:
        print("chaos: interrupted; the tries that run come to their end, no other begins", flush=True)
        pool.shutdown(cancel_futures=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        server.end()
        kill(psutil.Process().children(recursive=True))
    text = table(outcomes)
    print(text)
    if table_file:
        about = (
            f"{len(outcomes)} tries, seed {seed}, {lanes} at a time, {(time.monotonic() - began) / 60:.0f} minutes; "
        )
        table_file.write_text(f"{about}{time.strftime('%d %B %Y')}, {machine()}.\n\n{text}\n", encoding="utf-8")
    failed = sum(bool(outcome.problem) for outcome in outcomes)
    missed = sum(not outcome.struck and not outcome.not_here for outcome in outcomes)
    not_run = sum(bool(outcome.not_here) for outcome in outcomes)
    print(f"chaos: {failed} of {len(outcomes)} tries failed; {missed} did not strike, {not_run} cannot be run here; "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 128 + signal.SIGINT if len(outcomes) < num_tries else 0


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--tries", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=2, help="tries at a time")
    parser.add_argument("--only", choices=sorted(FAULTS), metavar="FAULT", help=", ".join(sorted(FAULTS)))
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table there as well")
    asked = parser.parse_args()
    try:
        sys.exit(run(asked.tries, asked.seed, asked.lanes, asked.only, asked.table))
    except Broken as problem:
        sys.exit(f"chaos: {problem}")
