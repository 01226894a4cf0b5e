"""The faults. Each is a function: prepare a copy, disturb it, return whether the fault struck at all.

The docstring says what happens and, where it is not simply that the same command ends with the same bytes, what a right
ending is. `weight` is the fault's share of a campaign.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from chaos.project import objects
from chaos.server import Server, free_port
from chaos.trial import Done, NotHere, Trial, kill_group
from pipeline.follow import is_running


@dataclass(frozen=True)
class Fault:
    """A fault by its name."""

    name: str
    weight: int
    cause: Callable[[Trial, Server], bool]

    @property
    def about(self) -> str:
        """What happens, in one sentence."""
        return " ".join((self.cause.__doc__ or "").split())


FAULTS: dict[str, Fault] = {}


def fault(weight: int) -> Callable[[Callable[[Trial, Server], bool]], Callable[[Trial, Server], bool]]:
    """Enter a function into FAULTS, under its name with hyphens."""

    def enter(cause: Callable[[Trial, Server], bool]) -> Callable[[Trial, Server], bool]:
        name = cause.__name__.replace("_", "-")
        FAULTS[name] = Fault(name, weight, cause)
        return cause

    return enter


# --- killed and interrupted ------------------------------------------------------------------------------------------


@fault(weight=8)
def kill_trainer(trial: Trial, _: Server) -> bool:
    """SIGKILL of the trainer at any moment of its life; nothing was ever published."""
    trial.prepare("train", "publish")
    return trial.in_training(lambda trainer, _: trainer.kill())


@fault(weight=16)
def kill_in_checkpoint(trial: Trial, _: Server) -> bool:
    """SIGKILL inside any file operation of writing a checkpoint, writes half done."""
    trial.prepare("train")
    return trial.strike("kill", "pipeline.train", within="checkpoint-")[0]


@fault(weight=8)
def kill_in_write(trial: Trial, _: Server) -> bool:
    """SIGKILL inside any file operation of the trainer: rows, checkpoints, best weights, handing over."""
    trial.prepare("train")
    return trial.strike("kill", "pipeline.train")[0]


@fault(weight=3)
def kill_again_and_again(trial: Trial, _: Server) -> bool:
    """SIGKILL inside a file operation of the trainer, and again inside one of the run that goes on, and again."""
    trial.prepare("train")
    return any([trial.strike("kill", "pipeline.train")[0] for _ in range(3)])


@fault(weight=12)
def kill_in_publish(trial: Trial, _: Server) -> bool:
    """SIGKILL inside any file operation of publishing: the database, the artifacts, the report."""
    trial.prepare("publish")
    return trial.strike("kill", "pipeline.publish")[0]


@fault(weight=4)
def kill_in_stage(trial: Trial, _: Server) -> bool:
    """SIGKILL inside any file operation of one of the other stages."""
    name = trial.random.choice([name for name in trial.reference.stages if name not in ("train", "publish")])
    trial.prepare(name)
    return trial.strike("kill", f"pipeline.{name}")[0]


@fault(weight=6)
def kill_dvc(trial: Trial, _: Server) -> bool:
    """SIGKILL of `dvc repro` alone while the trainer runs; the next `dvc repro` starts at once."""
    trial.prepare("train")
    return trial.in_training(lambda _, dvc: dvc.kill())


@fault(weight=4)
def kill_dvc_in_write(trial: Trial, _: Server) -> bool:
    """SIGKILL of `dvc repro` inside any file operation of its own: cache, lock file, run cache."""
    trial.prepare("train")
    return trial.strike("kill", "dvc")[0]


@fault(weight=5)
def kill_group_of_processes(trial: Trial, _: Server) -> bool:
    """SIGKILL of `dvc repro` and the trainer in the same moment."""
    trial.prepare("train")
    return trial.in_training(lambda _, dvc: kill_group(dvc))


@fault(weight=5)
def sigterm(trial: Trial, _: Server) -> bool:
    """SIGTERM to `dvc repro` and the trainer; the trainer ends within a step and two seconds."""
    trial.prepare("train")

    def act(trainer: psutil.Process, dvc: subprocess.Popen[bytes]) -> None:
        kill_group(dvc, signal.SIGTERM)
        began = time.monotonic()
        while is_running(trainer) and time.monotonic() < began + 60:
            time.sleep(0.01)
        if time.monotonic() - began > 3:
            trial.complaint = f"the trainer took {time.monotonic() - began:.1f} s to end"

    return trial.in_training(act)


@fault(weight=4)
def sigint_twice(trial: Trial, _: Server) -> bool:
    """Ctrl-C, and again up to two seconds later."""
    trial.prepare("train")
    pause_s = trial.random.uniform(0, 2)

    def act(_: psutil.Process, dvc: subprocess.Popen[bytes]) -> None:
        kill_group(dvc, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            dvc.wait(pause_s)
        kill_group(dvc, signal.SIGINT)

    return trial.in_training(act)


@fault(weight=4)
def two_at_once(trial: Trial, _: Server) -> bool:
    """A second `dvc repro` beside the first; each ends well, or refuses because of the other."""
    trial.prepare("train")
    pause_s = trial.random.uniform(0, trial.reference.train_s)
    first = trial.repro()
    with contextlib.suppress(subprocess.TimeoutExpired):
        first.wait(pause_s)
    struck = first.poll() is None
    dones = [trial.end(trial.repro()), trial.end(first)]
    if any(done.code for done in dones):
        trial.expect(Done(1, dones[0].text), r"(?i)busy|blocked|works in this checkout|acquire lock")
    return struck


# --- disks -----------------------------------------------------------------------------------------------------------


def on_disk(trial: Trial, mode: str, reason: str | None) -> bool:
    """Let the disk fail under a stage or under DVC; a failure must tell the reason, or must not be."""
    others = [name for name in trial.reference.stages if name not in ("train", "publish")]
    name = trial.random.choices(["train", "publish", "dvc", trial.random.choice(others)], [5, 3, 1, 3])[0]
    trial.prepare("train" if name == "dvc" else name)
    struck, done = trial.strike(mode, "dvc" if name == "dvc" else f"pipeline.{name}")
    if done.code and reason is None:
        trial.complaint = f"failed with exit code {done.code}"
    elif done.code:
        # Of a lock that it cannot write, DVC says that it cannot acquire it.
        trial.expect(done, f"{reason}|Unable to acquire lock" if name == "dvc" else str(reason))
    return struck


@fault(weight=8)
def disk_full(trial: Trial, _: Server) -> bool:
    """No space left from any file operation of a stage, or of DVC, on; a stage says so in a sentence."""
    return on_disk(trial, "full", r"No space left|disk is full|disk I/O error|unable to open database")


@fault(weight=8)
def disk_error(trial: Trial, _: Server) -> bool:
    """Any one file operation of a stage, or of DVC, fails with EIO; a stage says so in a sentence."""
    return on_disk(trial, "error", r"Input/output error|disk I/O error|unable to open database")


@fault(weight=4)
def short_writes(trial: Trial, _: Server) -> bool:
    """Every write from one on takes only half of what it is given; nothing fails."""
    return on_disk(trial, "short", None)


# --- rot -------------------------------------------------------------------------------------------------------------


def truncate(path: Path, chance: random.Random) -> None:
    """Cut the end off."""
    os.truncate(path, chance.randrange(path.stat().st_size))


def zero(path: Path, chance: random.Random) -> None:
    """A part becomes zeros, as after a power failure."""
    size = path.stat().st_size
    start = chance.randrange(size)
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(chance.randint(1, size - start)))


def flip(path: Path, chance: random.Random) -> None:
    """One bit becomes another; size, time and mode stay, as when a disk forgets."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    path.write_bytes(content)
    path.chmod(stat.S_IMODE(before.st_mode))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def delete(path: Path, _: random.Random) -> None:
    """A file is gone."""
    path.unlink()


def damaged_checkpoint(trial: Trial, damage: Callable[[Path, random.Random], None]) -> bool:
    """Kill the trainer once it has two checkpoints, damage a file of the newest or of each, and go on."""
    trial.prepare("train")
    trial.strike("kill", "pipeline.train", after=r"\.runs/\w+/checkpoint-\w+$")
    checkpoints = sorted(trial.project.glob(".runs/*/checkpoint-*"))
    changed = False
    for checkpoint in checkpoints[-trial.random.choice([1, 1, 2]) :]:
        file = trial.random.choice(sorted(checkpoint.iterdir()))
        before = file.read_bytes()
        damage(file, trial.random)
        trial.note(f"{damage.__name__}: {file.relative_to(trial.project)}")
        changed |= not file.exists() or file.read_bytes() != before
    return changed


@fault(weight=3)
def checkpoint_truncated(trial: Trial, _: Server) -> bool:
    """The newest checkpoint, or both, are cut short between two runs."""
    return damaged_checkpoint(trial, truncate)


@fault(weight=3)
def checkpoint_zeroed(trial: Trial, _: Server) -> bool:
    """A part of the newest checkpoint, or of both, becomes zeros between two runs."""
    return damaged_checkpoint(trial, zero)


@fault(weight=3)
def checkpoint_flipped(trial: Trial, _: Server) -> bool:
    """A bit of the newest checkpoint, or of both, flips between two runs."""
    return damaged_checkpoint(trial, flip)


@fault(weight=3)
def checkpoint_deleted(trial: Trial, _: Server) -> bool:
    """A file of the newest checkpoint, or of both, is deleted between two runs."""
    return damaged_checkpoint(trial, delete)


def rotten(trial: Trial, choices: Callable[[Path], list[Path]]) -> bool:
    """Flip a bit that DVC's own notes do not see; `verify` must find it, and mend it with --repair."""
    trial.prepare()
    if not (trial.project / "pipeline" / "verify.py").exists():
        raise NotHere("there is no pipeline/verify.py")
    trial.run("python", "-m", "dvc", "repro")  # DVC notes size and time of everything
    file = trial.random.choice(sorted(choices(trial.project)))
    flip(file, trial.random)
    name = file.relative_to(trial.project)
    trial.note(f"flipped a bit of {name}")
    found = trial.run("python", "-m", "pipeline.verify")
    trial.expect(found, file.name if "cache" not in name.parts else file.name.removesuffix(".dir"))
    if trial.run("python", "-m", "pipeline.verify", "--repair").code:
        trial.complaint = trial.complaint or "verify --repair failed"
    return True


@fault(weight=3)
def flip_in_tokens(trial: Trial, _: Server) -> bool:
    """A bit of data/tokens flips, time and size unchanged; `verify` names the file, and --repair mends it."""
    return rotten(trial, lambda project: [file for file in (project / "data/tokens").iterdir() if file.is_file()])


@fault(weight=3)
def flip_in_tokenizer(trial: Trial, _: Server) -> bool:
    """A bit of the tokenizer flips; `verify` names the file, and --repair mends it."""
    return rotten(trial, lambda project: list((project / "data/tokens/tokenizer").iterdir()))


@fault(weight=3)
def flip_in_cache(trial: Trial, _: Server) -> bool:
    """A bit of a DVC cache object flips, its mode still 0444; `verify` names it, and --repair mends it."""
    return rotten(trial, objects)


@fault(weight=2)
def output_edited(trial: Trial, _: Server) -> bool:
    """A file that a stage wrote is changed or deleted by hand; `dvc repro` puts it right."""
    trial.prepare()
    out = trial.project / trial.random.choice([out for outs in trial.reference.outs.values() for out in outs])
    file = trial.random.choice(sorted(f for f in out.rglob("*") if f.is_file()) if out.is_dir() else [out])
    damage = trial.random.choice([truncate, delete])
    damage(file, trial.random)
    trial.note(f"{damage.__name__}: {file.relative_to(trial.project)}")
    return True


# --- tracking --------------------------------------------------------------------------------------------------------

OUT_OF_REACH = r"publish: the MLflow store at .* cannot be used"


@fault(weight=2)
def server_stopped(trial: Trial, server: Server) -> bool:
    """The tracking server hangs (SIGSTOP): training is unaffected, publishing says so, and succeeds afterwards."""
    with server.emptied():
        trial.prepare("train", "publish")
        trial.surroundings = {"MLFLOW_TRACKING_URI": server.uri}
        server.stop()
        trial.expect(trial.run("python", "-m", "dvc", "repro"), OUT_OF_REACH)
        check_training(trial)
        server.go_on()
        trial.recovery_s = trial.recover()
        shutil.copyfile(server.database, trial.project / "mlflow.db")
        trial.served = server.artifacts
    return True


@fault(weight=2)
def server_absent(trial: Trial, _: Server) -> bool:
    """No tracking server at its address: training is unaffected, publishing says so, and succeeds afterwards."""
    trial.prepare("train", "publish")
    done = trial.run("python", "-m", "dvc", "repro", MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}")
    trial.expect(done, OUT_OF_REACH)
    check_training(trial)
    return True


def check_training(trial: Trial) -> None:
    """Training must have ended although MLflow did not answer."""
    if not all((trial.project / out).exists() for out in trial.reference.outs["train"]):
        trial.complaint = "training did not end"


@fault(weight=3)
def database_locked(trial: Trial, _: Server) -> bool:
    """Another process holds mlflow.db for up to 20 s: publishing waits for it, or says so."""
    trial.prepare("publish")
    with contextlib.closing(sqlite3.connect(trial.project / "mlflow.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        since = trial.log.stat().st_size
        process = trial.repro()
        struck = trial.running("pipeline.publish", process) is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(trial.random.uniform(2, 20))
        holder.execute("ROLLBACK")
    done = trial.end(process, since)
    if done.code:
        trial.expect(done, OUT_OF_REACH)
    return struck


# --- surroundings ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[list[str]]:
    """What goes before a command that shall find a folder read-only. Modes do not bind root, a mount does."""
    if os.geteuid() != 0:
        mode = stat.S_IMODE(folder.stat().st_mode)
        folder.chmod(0o555)
        try:
            yield []
        finally:
            folder.chmod(mode)
        return
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    before = ["unshare", "--mount", "sh", "-c", script, str(folder)]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*before, "true"], capture_output=True, check=False).returncode
    ):
        raise NotHere("root needs the right to mount (CAP_SYS_ADMIN) to make a folder read-only")
    yield before


@fault(weight=2)
def source_read_only(trial: Trial, _: Server) -> bool:
    """The folder of the user's text cannot be written: nothing needs that."""
    trial.prepare("ingest")
    with read_only(trial.project / "data/source") as before:
        struck = trial.run(*before, "touch", "data/source/new").code != 0
        if trial.run(*before, "python", "-m", "dvc", "repro").code:
            trial.complaint = "a read-only source folder was refused"
    return struck


@fault(weight=3)
def output_unwritable(trial: Trial, _: Server) -> bool:
    """A folder that a stage writes into cannot be written: it says so in a sentence."""
    places = [
        ("train", ".runs"),
        ("train", "models"),
        ("train", "reports"),
        ("tokenize", "data"),
        ("publish", "reports"),
    ]
    name, place = trial.random.choice(places)
    trial.prepare(name)
    folder = trial.project / place
    folder.mkdir(exist_ok=True)
    with read_only(folder) as before:
        done = trial.run(*before, "python", "-m", "dvc", "repro")
    trial.expect(done, r"Read-only file system|Permission denied")
    return True


@fault(weight=2)
def home_unset(trial: Trial, _: Server) -> bool:
    """The environment has no HOME."""
    trial.prepare("train", "publish")
    if trial.run("python", "-m", "dvc", "repro", HOME="").code:
        trial.complaint = "a missing HOME was refused"
    return True


@fault(weight=4)
def clock_set_back(trial: Trial, _: Server) -> bool:
    """The trainer is killed, and the clock is a day back (or ahead) when it goes on."""
    trial.prepare("train")
    struck = trial.strike("kill", "pipeline.train")[0]
    day_s = trial.random.choice([-86400, 86400])
    trial.surroundings = {"LD_PRELOAD": str(trial.reference.library), "CHAOS_CLOCK_S": str(day_s)}
    return struck


def with_umask(trial: Trial, umask: int) -> bool:
    """Run everything from tokens to publishing under a umask."""
    trial.prepare("train", "evaluate", "publish")
    if trial.run("python", "-m", "dvc", "repro", umask=umask).code:
        trial.complaint = f"refused under umask {umask:03o}"
    return True


@fault(weight=2)
def umask_077(trial: Trial, _: Server) -> bool:
    """New files belong to the user alone."""
    return with_umask(trial, 0o077)


@fault(weight=2)
def umask_000(trial: Trial, _: Server) -> bool:
    """New files can be written by everyone."""
    return with_umask(trial, 0o000)
