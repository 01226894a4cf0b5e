"""What the commits of this repository hold: parameters, code, and the states of dvc.lock. Read from git's objects."""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline import inputs, publication, recorded
from pipeline.stage import Refusal

Outputs = Mapping[str, Mapping[str, str]]  # stage -> path -> MD5, of every stage but publish


def commit_of(name: str) -> str | None:
    """The 40 digits of a commit, branch, tag or DVC experiment."""
    experiments = _words("for-each-ref", "--format=%(refname)", f"refs/exps/*/*/{name}")
    for one in (name, *experiments):
        found = _words("rev-parse", "--verify", "--quiet", "--end-of-options", f"{one}^{{commit}}")
        if found:
            return found[0]
    return None


@functools.lru_cache(maxsize=256)
def tree(commit: str) -> Mapping[str, str]:
    """The files of a commit, path to blob; empty where git has no such commit."""
    listed = _git("ls-tree", "-r", "-z", "--end-of-options", commit) or b""
    entries = [entry.partition("\t") for entry in listed.decode("utf-8", "surrogateescape").split("\0") if entry]
    return {path: about.split()[2] for about, _, path in entries}


def file_at(commit: str, path: str) -> bytes | None:
    """The bytes of a file, as committed."""
    blob = tree(commit).get(path)
    return None if blob is None else _git("cat-file", "blob", blob)


@functools.lru_cache(maxsize=256)
def params_at(commit: str) -> Mapping[str, str] | None:
    """All parameters under their dotted names, as text; None where there are none to be read."""
    text = file_at(commit, "params.yaml")
    try:
        return None if text is None else publication.flat(YAML(typ="safe", pure=True).load(text.decode()))
    except (YAMLError, ValueError, TypeError, AttributeError):
        return None


def lock_at(commit: str) -> Mapping[str, Any]:
    """The stages of dvc.lock, as committed; empty where there is none to be read."""
    text = file_at(commit, inputs.LOCK.name)
    try:
        return {} if text is None else recorded.parse_lock(text)
    except Refusal:
        return {}


def commits_with(outputs: Outputs) -> list[str]:
    """The commits, those of DVC's experiments among them, at which dvc.lock came to hold exactly these outputs."""
    digests = sorted({md5.removesuffix(".dir") for of_stage in outputs.values() for md5 in of_stage.values()})
    if not digests:
        return []
    changed = _words("log", "--all", "--format=%H", "-G" + "|".join(map(re.escape, digests)), "--", inputs.LOCK.name)
    return [commit for commit in changed if outputs_of(lock_at(commit)) == outputs]


def outputs_of(lock: Mapping[str, Any]) -> Outputs:
    """What dvc.lock says of the outputs of every stage but publish, as pipeline/origin.py tags it."""
    return {
        name: {out["path"]: out["md5"] for out in locked.get("outs", [])}
        for name, locked in lock.items()
        if name != "publish"
    }


def other_code(lock: Mapping[str, Any], commit: str) -> list[str]:
    """The files of code that are not in the commit as dvc.lock names them; of every stage but publish, for that one
    makes no result, and may run again long after."""
    made = {path for of_stage in outputs_of(lock).values() for path in of_stage}
    named = {
        (dep["path"], dep["md5"])
        for name, locked in lock.items()
        if name != "publish"
        for dep in locked.get("deps", [])
        if dep["path"] not in made and not dep["md5"].endswith(".dir")
    }
    files = tree(commit)
    return sorted({path for path, md5 in named if path not in files or _md5_of_blob(files[path]) != md5})


@functools.lru_cache(maxsize=4096)
def _md5_of_blob(blob: str) -> str:
    return hashlib.md5(_git("cat-file", "blob", blob) or b"", usedforsecurity=False).hexdigest()


def _words(*arguments: str) -> list[str]:
    return (_git(*arguments) or b"").decode("utf-8", "replace").split()


def _git(*arguments: str) -> bytes | None:
    """What git prints; None where it fails or is not there."""
    try:
        return subprocess.run(["git", "--no-optional-locks", *arguments], capture_output=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
