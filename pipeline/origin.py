"""Where a result comes from: the commit, and what DVC keeps of it. True at one moment only, so never in a file."""

import os
import subprocess
from pathlib import Path

from ruamel.yaml import YAML


def tags() -> dict[str, str]:
    """Commit, changes, the DVC experiment if there is one, and a tag for every stage of dvc.lock."""
    found = commit() | lock_hashes()
    if "DVC_EXP_NAME" in os.environ:
        found["dvc.experiment"] = os.environ["DVC_EXP_NAME"]
    return found


def commit() -> dict[str, str]:
    """The commit, and whether tracked files differ from it; unknown without git.

    Those that running writes do not count: dvc.lock, and the certificates of replays.
    """
    head = _git("rev-parse", "HEAD")
    excluded = (f":(exclude){path}" for path in ("dvc.lock", "certificates"))
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *excluded)
    return {
        "git.commit": (head or "unknown").strip(),
        "git.dirty": "unknown" if head is None or changes is None else str(bool(changes.strip())).lower(),
    }


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "--no-optional-locks", *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def lock_hashes() -> dict[str, str]:
    """What dvc.lock says of the outputs of every stage but this one, a tag a stage: the way back to DVC's cache."""
    lock = Path("dvc.lock")
    stages = YAML(typ="safe", pure=True).load(lock)["stages"] if lock.exists() else {}
    return {
        f"dvc.lock.{name}": "\n".join(f"{out['path']} {out.get('md5')}" for out in locked.get("outs", []))
        for name, locked in stages.items()
        if name != "publish"
    }
