"""What this checkout should hold, byte for byte: what dvc.lock and the manifests of checkpoints have recorded.

DVC's formats, as its documentation tells them: an object of the cache lies under the first two and the other digits of
its MD5; the object of a folder, `.dir`, is a JSON list of the MD5s and relative paths of its files, and its name is the
MD5 of that text. `dvc` itself is asked only where its cache is and which files it ignores: never for a hash.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline import files, owner, stage
from pipeline.files import MANIFEST
from pipeline.inputs import LOCK, listing_of
from pipeline.stage import Refusal

STATE, ROWS = "state.json", "train.jsonl"  # of a checkpoint, and of its run
RUNS = owner.LOCK.parent  # unfinished runs; pipeline/runs.py knows more, but costs an import of torch

# output: what a stage wrote. object: DVC's copy of it. yours: text and code. checkpoint, published: as they say.
# stale: dvc.lock itself holds two states.
Kind = Literal["output", "object", "yours", "checkpoint", "published", "stale"]


@dataclass(frozen=True)
class Record:
    """One file and the digest that it should have: MD5 where DVC recorded it, else SHA-256."""

    path: Path
    stage: str
    kind: Kind
    digest: str
    twin: Path | None = None  # of an output its object in the cache, and the other way round


@dataclass(frozen=True)
class Difference:
    """One file that is not what was recorded."""

    record: Record
    what: str

    def __str__(self) -> str:
        of = f", copy of {self.record.twin}" if self.record.kind == "object" and self.record.twin else ""
        yours = " (yours)" if self.record.kind == "yours" else ""
        return f"{self.record.path}: {self.record.stage}{of}: {self.what}{yours}"


@dataclass
class Inventory:
    """All records, and the differences that showed already while they were gathered."""

    cache: Path
    definitions: Mapping[str, Any]  # the stages of dvc.yaml
    records: dict[Path, Record] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Take a record; of one file, the first counts."""
        self.records.setdefault(record.path, record)

    def differs(self, path: Path, stage_name: str, kind: Kind, what: str, digest: str = "") -> None:
        """Note a difference."""
        self.differences.append(Difference(Record(path, stage_name, kind, digest), what))


def inventory(cache: Path) -> Inventory:
    """Everything that is recorded, but for the published model.

    Raises:
        Refusal: dvc.lock is missing or damaged.
    """
    found, locked = Inventory(cache, stage.read_stages()), read_lock()
    made = {path: (name, entry["md5"]) for name, content in locked.items() for path, entry in _entries(content, "outs")}
    for name, content in locked.items():
        known = _outputs(found.definitions.get(name, {}))
        for path, entry in _entries(content, "outs"):
            if path not in known:
                found.differs(LOCK, name, "stale", f"names {path}, which dvc.yaml does not; run `dvc repro`")
            else:
                _add_output(found, name, path, entry["md5"], cached=known[path])
        for path, entry in _entries(content, "deps"):
            if path not in made:
                _add_input(found, name, path, entry["md5"])
            elif made[path][1] != entry["md5"]:
                what = f"was made from another state of {path} than {made[path][0]} left; run `dvc repro`"
                found.differs(LOCK, name, "stale", what)
    _add_checkpoints(found)
    return found


def _add_output(found: Inventory, name: str, path: Path, md5: str, cached: bool) -> None:
    """A file, or a folder with all its files; both beside their objects in the cache."""
    at = object_path(found.cache, md5)
    if not md5.endswith(".dir"):
        found.add(Record(path, name, "output", md5, at if cached else None))
        if cached:
            found.add(Record(at, name, "object", md5, path))
        return
    if cached:
        found.add(Record(at, name, "object", md5, path))
    listed = _listing(at, path, md5)
    if listed is None:
        if path.is_dir():
            found.differs(path, name, "output", f"changed; which of its files cannot be told without {at}", md5)
        else:
            found.differs(path, name, "output", "missing", md5)
        return
    for entry in listed:
        file = inside(path, entry["relpath"])
        copy = object_path(found.cache, entry["md5"])
        found.add(Record(file, name, "output", entry["md5"], copy if cached else None))
        if cached:
            found.add(Record(copy, name, "object", entry["md5"], file))
    for extra in not_ignored(files_under(path) - {inside(path, entry["relpath"]) for entry in listed}):
        found.differs(extra, name, "yours", "is no output; move it away")


def _add_input(found: Inventory, name: str, path: Path, md5: str) -> None:
    """A file or folder that no stage writes."""
    before = found.records.get(path)
    if before and before.digest == md5:
        found.records[path] = Record(path, f"{before.stage}, {name}", "yours", md5)
    elif before:
        what = f"was made from another state of {path} than {before.stage}; run `dvc repro`"
        found.differs(LOCK, name, "stale", what)
    elif not md5.endswith(".dir"):
        found.add(Record(path, name, "yours", md5))
    elif not is_whole(path, md5):
        found.differs(path, name, "yours", "changed" if path.is_dir() else "missing")


def _add_checkpoints(found: Inventory) -> None:
    """Every folder with a manifest under .runs, and checkpoints that lost theirs."""
    checkpoints = set(RUNS.glob("*/checkpoint-*"))
    for folder in sorted({manifest.parent for manifest in RUNS.rglob(MANIFEST)} | checkpoints):
        try:
            manifest = files.read_json(folder / MANIFEST)
            names, there = set(manifest), {file.relative_to(folder).as_posix() for file in files_under(folder)}
            if folder in checkpoints and names - there and there - names > {MANIFEST}:
                raise ValueError("a file that is there has another name in it")
            for name, digest in sorted(manifest.items()):
                found.add(Record(inside(folder, name), "checkpoint", "checkpoint", digest))
            if folder in checkpoints and STATE in there and files.sha256_of(folder / STATE) == manifest.get(STATE):
                _add_what_a_checkpoint_names(found, folder)
        except FileNotFoundError:
            found.differs(folder / MANIFEST, "checkpoint", "checkpoint", "missing")
        except (OSError, ValueError, AttributeError):
            found.differs(folder / MANIFEST, "checkpoint", "checkpoint", "changed")


def _add_what_a_checkpoint_names(found: Inventory, folder: Path) -> None:
    """Rows and best model of a run: its checkpoints hold their hashes. Without them a checkpoint is of no use."""
    try:
        state = files.read_json(folder / STATE)
        rows, best = state["rows"], state["best"]
        written = files.sha256_of_head(folder.parent / ROWS, rows["num_bytes"])
        right = {ROWS: written.hexdigest() == rows["sha256"]}
        if best["sha256"] is not None:
            name = f"best-{best['step']:08d}"
            right[name] = files.sha256_of(folder.parent / name) == best["sha256"]
        wrong = [name for name, is_right in right.items() if not is_right]
    except (OSError, ValueError, LookupError, TypeError):
        wrong = [f"{STATE}, {ROWS} or the best model"]
    for name in wrong:
        found.differs(folder / STATE, "checkpoint", "checkpoint", f"{name} beside it is not what it has recorded")


def run_of(path: Path) -> Path:
    """The run folder in which a file lies."""
    return RUNS / path.relative_to(RUNS).parts[0]


def _listing(at: Path, folder: Path, md5: str) -> list[dict[str, str]] | None:
    """The files of an output folder: from its object in the cache, or where that is damaged, from the folder itself."""
    text = _bytes(at)
    if text is None or _md5(text) != md5.removesuffix(".dir"):
        text = listing_text(folder)
    if _md5(text) != md5.removesuffix(".dir"):
        return None
    found: list[dict[str, str]] = json.loads(text)
    return found


def listing_text(folder: Path) -> bytes:
    """The object that DVC keeps of a folder."""
    return listing_of(folder, not_ignored(files_under(folder)))


def is_whole(folder: Path, md5: str) -> bool:
    """Whether a folder is the one that DVC recorded under this name."""
    return folder.is_dir() and _md5(listing_text(folder)) == md5.removesuffix(".dir")


def object_path(cache: Path, md5: str) -> Path:
    """Where DVC's cache keeps the object of this name."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def inside(folder: Path, name: str) -> Path:
    """The file of that name in the folder.

    Raises:
        ValueError: the name leads out of it.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts:
        raise ValueError(f"{name!r} is not inside {folder}")
    return folder / pure


def files_under(folder: Path) -> set[Path]:
    """All files under a folder."""
    return {Path(here, name) for here, _, names in os.walk(folder) for name in names}


def not_ignored(paths: set[Path]) -> set[Path]:
    """Those that DVC does not ignore (.dvcignore)."""
    return paths - _ignored(tuple(sorted(paths)))


@functools.lru_cache(maxsize=64)
def _ignored(paths: tuple[Path, ...]) -> set[Path]:
    if not paths:
        return set()
    listed = dvc("check-ignore", "--stdin", text="".join(f"{path}\n" for path in paths), codes=(0, 1))
    return {Path(line) for line in listed.splitlines()}


def cache_folder() -> Path:
    """Where DVC keeps its cache."""
    return from_here(Path(dvc("cache", "dir").strip()))


def from_here(path: Path) -> Path:
    """The path as seen from the current folder, where it lies in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def dvc(*arguments: str, text: str = "", codes: tuple[int, ...] = (0,)) -> str:
    """What a `dvc` command prints.

    Raises:
        Refusal: it fails.
    """
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode not in codes:
        raise Refusal(f"`dvc {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout


def read_lock() -> dict[str, Any]:
    """The stages of dvc.lock, checked as far as we read it.

    Raises:
        Refusal: it is missing or damaged.
    """
    content = _bytes(LOCK)
    if content is None:
        raise Refusal(f"there is no {LOCK} yet, so nothing is recorded; run `dvc repro`")
    return parse_lock(content)


@functools.lru_cache(maxsize=16)
def parse_lock(content: bytes) -> dict[str, Any]:
    """The stages of a dvc.lock, checked as far as we read it.

    Raises:
        Refusal: it is damaged.
    """
    try:
        stages: dict[str, Any] = YAML(typ="safe", pure=True).load(content.decode())["stages"]
        for locked in stages.values():
            for _, entry in (*_entries(locked, "outs"), *_entries(locked, "deps")):
                digits = entry["md5"].removesuffix(".dir")
                if len(digits) != 32 or not set(digits) <= set("0123456789abcdef"):
                    raise ValueError(f"{entry['md5']} is no MD5")
    except (YAMLError, ValueError, KeyError, TypeError, AttributeError) as problem:
        reason = str(problem).strip().splitlines()[0]
        fix = f"restore it with `git checkout {LOCK}`, or delete it and run `dvc repro`, which writes it anew"
        raise Refusal(f"{LOCK} is damaged ({reason}); {fix}") from None
    return stages


def _entries(locked: Mapping[str, Any], kind: str) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    for entry in locked.get(kind, ()):
        yield inside(Path(), entry["path"]), entry


def _outputs(definition: Mapping[str, Any]) -> dict[Path, bool]:
    """The outputs of a stage of dvc.yaml, and whether DVC keeps a copy."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in definition.get(kind, ())]
    options = [entry if isinstance(entry, Mapping) else {entry: {}} for entry in entries]
    return {Path(path): option.get("cache", True) for entry in options for path, option in entry.items()}


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
