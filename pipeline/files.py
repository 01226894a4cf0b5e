"""Whole files or none: write beside, fsync, rename.

Every output of every stage goes through this module, so that a stage killed at any moment leaves something whole or
nothing: a file is replaced in one go, an old folder is removed just before the new one takes its name. The bytes are
functions of the content alone: JSON has sorted keys and ends in one newline.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.stage import Refusal


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block ends well, it becomes `path`, durably."""
    beside = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.unlink(missing_ok=True)
    try:
        yield beside
        fsync(beside)
        beside.replace(path)
        fsync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends well, it becomes `path`, durably.

    Rename cannot replace a folder that holds files, so an old `path` is removed just before.
    """
    beside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        for entry in sorted(beside.rglob("*")):
            fsync(entry)
        fsync(beside)
        shutil.rmtree(path, ignore_errors=True)
        beside.replace(path)
        fsync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, keys sorted; NaN and infinities are refused (they are not JSON)."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 with the newlines it has."""
    with whole_file(path) as beside:
        beside.write_bytes(text.encode("utf-8"))


def read_json(path: Path) -> Any:
    """Read one JSON document.

    Raises:
        Refusal: the file is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as problem:
        raise _damaged(path, problem) from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line.

    Raises:
        Refusal: the file is damaged.
    """
    with path.open("rb") as lines:
        try:
            return [json.loads(line) for line in lines]
        except (ValueError, RecursionError) as problem:
            raise _damaged(path, problem) from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's relative names and file hashes in sorted order."""
    if path.is_dir():
        listing = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            listing.update(f"{file.relative_to(path).as_posix()}\0{sha256_of(file)}\n".encode())
        return listing.hexdigest()
    with path.open("rb") as file_bytes:
        return hashlib.file_digest(file_bytes, "sha256").hexdigest()


def _damaged(path: Path, problem: Exception) -> Refusal:
    return Refusal(f"{path} is damaged ({problem}); restore it with `dvc checkout --force`, or delete it and run again")


def fsync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
