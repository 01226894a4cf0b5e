"""Where a run of the flow happens: in the checkout, or, with parameters of its own, in a work tree beside it.

    .trials/<name>          the files of the commit, with other parameters; git and DVC ignore the folder
    .trials/<name>.lock     held by the process that runs there

A work tree shares DVC's cache and the MLflow store of the checkout, so what did not change is restored and what comes
out is kept. Its name follows from commit and parameters: a run that was interrupted or killed is found again, and goes
on from its last checkpoint. It is removed when its result is saved as an experiment of DVC.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flows import overrides, talk
from pipeline import owner, recorded, stage, worktree
from pipeline.stage import Refusal

ROOT = Path(".trials")
SAVING = ROOT / "save.lock"
LOCK, CHECKOUT = Path(".runs/flow.lock"), "this checkout"
SOURCE = Path("data/source")  # files of the user's own, which git does not have
STORE = Path("mlflow.db")  # of MLflow, where no other is named

WhenBusy = Literal["wait", "refuse"]


@dataclass
class Place:
    """A folder with the files of a commit, where one flow run works."""

    folder: Path
    experiment: str | None = None  # name of the experiment of DVC; None: the checkout
    settings: dict[str, str] = field(default_factory=dict)  # of the environment
    is_saved: bool = False  # the experiment has all of it

    def environment(self) -> dict[str, str]:
        """What a command of this place is started with."""
        # The interpreter of the flow, whether or not its environment is activated; and lines as they are written.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        ours = {"PATH": path, "PYTHONUNBUFFERED": "1", owner.FLOW: str(os.getpid())}
        return {**os.environ, **ours, **self.settings}


@contextlib.contextmanager
def checkout(when_busy: WhenBusy) -> Iterator[Place]:
    """The checkout itself, for this run alone.

    Raises:
        Refusal: another run works there, and this one was not to wait.
    """
    with worktree.held(LOCK, CHECKOUT, wait=when_busy == "wait", tell=talk.say):
        yield Place(Path.cwd())


def is_busy() -> bool:
    """Whether a run works in the checkout."""
    try:
        with worktree.held(LOCK, CHECKOUT):
            return False
    except Refusal:
        return True


@contextlib.contextmanager
def beside(asked: overrides.Flat, when_busy: WhenBusy) -> Iterator[Place]:
    """A work tree with these parameters; whoever works in the checkout does not notice it.

    Raises:
        Refusal: the parameters cannot be applied, there is no commit, tracked files have changes, git cannot make the
            work tree, or another run works in it.
    """
    text = overrides.applied(asked)
    commit = _commit()
    name = f"trial-{hashlib.sha256((commit + text).encode()).hexdigest()[:8]}"
    folder = (ROOT / name).absolute()
    ROOT.mkdir(exist_ok=True)
    with worktree.held(folder.with_suffix(".lock"), str(ROOT / name), wait=when_busy == "wait", tell=talk.say):
        aside = folder.with_suffix(".aside")  # while it is not whole; left there by one that was killed
        shutil.rmtree(aside, ignore_errors=True)
        if not folder.exists():
            worktree.git("worktree", "add", "--quiet", "--detach", "--force", "--force", str(aside), commit)
            worktree.git("worktree", "move", str(aside), str(folder))
        _furnish(folder, text)
        site = str(folder / ".dvc" / "tmp" / "site")
        here = Place(folder, name, {"DVC_SITE_CACHE_DIR": site, "DVC_EXP_NAME": name})
        yield here
        if here.is_saved:
            folder.rename(aside)
            shutil.rmtree(aside)
            worktree.git("worktree", "prune")


def save(place: Place) -> None:
    """Keep the result of a work tree as an experiment of DVC, which `dvc exp show` lists in the checkout too.

    Raises:
        Refusal: DVC cannot.
    """
    assert place.experiment is not None
    command = [sys.executable, "-m", "dvc", "exp", "save", "--force", "--name", place.experiment]
    # Two at once would write the same objects of git, and one of them would fail.
    with worktree.held(SAVING, "keeping an experiment", wait=True):
        done = subprocess.run(
            command, cwd=place.folder, env=_author() | place.environment(), capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise Refusal(f"the result cannot be saved as an experiment of DVC: {stage.reason(done.stderr)}")
    place.is_saved = True


def _author() -> dict[str, str]:
    """Who an experiment is by, which is a commit, where git was never told: else it could not be kept."""
    if all(worktree.git("config", "--get", "--default", "", f"user.{key}").strip() for key in ("name", "email")):
        return {}
    someone = {"NAME": "gpt2-pipeline", "EMAIL": "gpt2-pipeline@localhost"}
    return {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in someone.items()}


def _commit() -> str:
    """The commit of the checkout, whose files nobody has changed.

    Raises:
        Refusal: there is none, or they are changed.
    """
    about = "a run with parameters of its own works on the files of a commit"
    try:
        head = worktree.git("rev-parse", "--verify", "--quiet", "HEAD").strip()
    except Refusal:
        raise Refusal(f"{about}, and {Path.cwd()} has none: `git init && git add . && git commit`") from None
    changed = worktree.git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)dvc.lock")
    if changed.strip():
        names = ", ".join(line[3:] for line in changed.splitlines())
        raise Refusal(f"{about}, and these differ from it: {names}; commit them, or `git stash`")
    return head


def _furnish(folder: Path, params: str) -> None:
    """Bring what git does not have: parameters, DVC's settings and lock, text of the user's own."""
    (folder / overrides.FILE).write_text(params, encoding="utf-8")
    cache = os.path.relpath(recorded.cache_folder(), folder)  # DVC can write no letter beyond ASCII into its settings
    here = Path(".dvc/config.local")
    settings = here.read_text(encoding="utf-8") if here.exists() else ""
    (folder / here).write_text(settings, encoding="utf-8")
    recorded.dvc("--cd", str(folder), "config", "--local", "cache.dir", cache)
    if not (folder / ".runs").exists() and Path("dvc.lock").exists():  # once: then it has one of its own
        shutil.copy("dvc.lock", folder)
    if not (folder / STORE).is_symlink():
        (folder / STORE).symlink_to(STORE.absolute())
    if SOURCE.is_dir():
        shutil.rmtree(folder / SOURCE, ignore_errors=True)
        shutil.copytree(SOURCE, folder / SOURCE)
