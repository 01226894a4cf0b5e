"""What a stage reads is what the stage before wrote, down to the bytes.

DVC takes a file for unchanged as long as its size and time are: a byte that rots on the disk, or a damaged object of
the cache that it links or copies into place, would go into the next result unseen. So a stage that DVC runs first reads
its inputs again and compares them with dvc.lock, where DVC has written what the stages before left.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.stage import Refusal, read_stages

LOCK = Path("dvc.lock")


def check(stage: str) -> None:
    """Compare the inputs of a stage with what dvc.lock says of those who wrote them.

    Nothing is compared when the stage was not started by DVC: then dvc.lock tells of another time.

    Raises:
        Refusal: one differs.
    """
    if os.environ.get("DVC_STAGE") != stage or not LOCK.exists():
        return
    stages = (YAML(typ="safe", pure=True).load(LOCK.read_bytes()) or {}).get("stages") or {}
    written = {out["path"]: (name, out["md5"]) for name, entry in stages.items() for out in entry.get("outs", [])}
    for path in map(str, read_stages()[stage]["deps"]):
        if path in written and md5_of(Path(path)) != written[path][1]:
            raise Refusal(
                f"{path} is not what stage {written[path][0]} wrote: its bytes differ from dvc.lock, though DVC takes "
                "it for unchanged. `make verify REPAIR=1` restores it"
            )


def md5_of(path: Path) -> str:
    """The name that DVC gives to a file or folder."""
    if not path.is_dir():
        return digest_of(path, "md5")
    listing = listing_of(path, (file for file in path.rglob("*") if file.is_file()))
    return hashlib.md5(listing, usedforsecurity=False).hexdigest() + ".dir"


def listing_of(folder: Path, found: Iterable[Path]) -> bytes:
    """What DVC keeps of a folder with these files: a JSON list of their MD5s and relative paths."""
    entries = [{"md5": digest_of(file, "md5"), "relpath": file.relative_to(folder).as_posix()} for file in found]
    return json.dumps(sorted(entries, key=lambda entry: entry["relpath"]), sort_keys=True).encode()


def digest_of(path: Path, algorithm: str) -> str:
    """The digest of a file's bytes, read now."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
