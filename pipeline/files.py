"""Whole files or none: write beside, fsync, rename.

Every output of every stage goes through this module, so that a stage killed at any moment leaves something whole or
nothing: a file is replaced in one go, an old folder is removed just before the new one takes its name. The bytes are
functions of the content alone: JSON has sorted keys and ends in one newline.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pipeline.stage import Refusal

MANIFEST = "manifest.json"  # of a folder: the SHA-256 of each of its files, by name
BLOCK = 2**20  # bytes read at a time
MAX_JSON_BYTES = 2**22  # of a file, or of a line of one: parsing can take thirty times as much
# Where a link may lead, besides into its own folder: into stores that name a file by its content, DVC's and the Hub's.
STORES = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}|/blobs/[0-9a-f]{40,64}")


def remove(path: Path) -> None:
    """Remove a file or a folder that may be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def read_json(path: Path, *keys: str) -> Any:
    """Read one JSON document; with keys, an object that has them.

    Raises:
        Refusal: the file is damaged, or far too large.
    """
    with _regular(path).open("rb") as file:
        return _parsed(path, file.read(MAX_JSON_BYTES + 1), keys)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object a line.

    Raises:
        Refusal: the file is damaged, or a line is far too large.
    """
    with _regular(path).open("rb") as file:
        return [_parsed(path, line, ()) for line in iter(lambda: file.readline(MAX_JSON_BYTES + 1), b"")]


def _parsed(path: Path, text: bytes, keys: tuple[str, ...]) -> Any:
    try:
        if len(text) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES:,} bytes")
        content = json.loads(text)
        missing = [key for key in keys if not isinstance(content, dict) or key not in content]
        if missing:
            raise ValueError(f"no object with the key {missing[0]!r}")
    except (ValueError, RecursionError) as problem:
        raise Refusal(
            f"{path} is damaged ({problem}); restore it with `dvc checkout --force`, or delete it and run again"
        ) from None
    return content


def listing(folder: Path) -> list[Path]:
    """Every file under a folder, sorted, the ones that links stand for among them.

    Raises:
        Refusal: there is something else, or a link that leads out of the folder; reading or copying the folder would
            follow it.
    """
    found = []
    for here, folders, names in os.walk(folder, onerror=_raise):
        linked = [name for name in folders if Path(here, name).is_symlink()]
        for path in (Path(here, name) for name in names + linked):
            aim = path.resolve()
            inside = not path.is_symlink() or aim.is_relative_to(folder.resolve()) or STORES.search(str(aim))
            if not inside or not stat.S_ISREG(path.stat().st_mode):
                raise Refusal(f"{path} is a link that leads elsewhere, or no file: remove it, or put a copy there")
            found.append(path)
    return sorted(found)


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of `listing`, not their links, times or modes."""
    for file in listing(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's relative names and file hashes in sorted order."""
    if path.is_dir():
        hashes = hashlib.sha256()
        for file in listing(path):
            hashes.update(f"{file.relative_to(path).as_posix()}\0{sha256_of(file)}\n".encode())
        return hashes.hexdigest()
    with _regular(path).open("rb") as file_bytes:
        return hashlib.file_digest(file_bytes, "sha256").hexdigest()


def sha256_of_head(path: Path, num_bytes: int) -> "hashlib._Hash":
    """The running SHA-256 of the first bytes of a file, or of all where it has fewer."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while num_bytes > 0 and (block := file.read(min(num_bytes, BLOCK))):
            found.update(block)
            num_bytes -= len(block)
    return found


def _regular(path: Path) -> Path:
    """The path, if reading it can come to an end: it is no pipe and no device."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise Refusal(f"{path} is no file: remove it, restore it with `dvc checkout --force`, or run again")
    return path


def _raise(problem: OSError) -> NoReturn:
    raise problem


def fsync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
