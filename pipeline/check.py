"""What must hold before DVC starts: `make repro`, `make flow` and the flow itself ask here first.

params.yaml is right as a whole, and the folder for text of your own holds nothing on which DVC would hang or die while
it hashes the folder (it waits for ever for a pipe to be written, and stops at a broken link). What a killed DVC left
half written in its own notes is removed: every later DVC would refuse to start because of it. A bare `dvc repro` cannot
ask: DVC has no hook before it hashes the folder.

    python -m pipeline.check
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from pathlib import Path

from pipeline import stage


def obstacles(folder: Path) -> list[str]:
    """What DVC cannot hash under a folder: a line each, with the reason."""
    found = []
    for here, folders, names in os.walk(folder, onerror=lambda error: found.append(f"{error.filename}: no permission")):
        for name in sorted(folders + names):
            path = Path(here, name)
            shown = ascii(str(path))[1:-1]
            try:
                name.encode("utf-8")
                mode = path.stat().st_mode
            except UnicodeEncodeError:
                found.append(f"{shown}: its name is not UTF-8")
            except OSError as problem:
                found.append(f"{shown}: {'a link that leads nowhere' if path.is_symlink() else problem.strerror}")
            else:
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    found.append(f"{shown}: neither a file nor a folder")
                elif not os.access(path, os.R_OK):
                    found.append(f"{shown}: no permission to read it")
    return found


def mend_lock(lock: Path = Path(".dvc/tmp/rwlock")) -> None:
    """Remove DVC's list of who reads and writes what, if it is no JSON: it is written in place, and a kill cuts it off.

    A DVC at work holds the file beside it while it reads and writes the list, so then the list is left alone.
    """
    if not lock.exists():
        return
    with lock.with_name(f"{lock.name}.lock").open("a") as beside:
        try:
            fcntl.flock(beside, fcntl.LOCK_EX | fcntl.LOCK_NB)
            json.loads(lock.read_bytes())
        except (BlockingIOError, FileNotFoundError):
            return
        except ValueError:
            lock.unlink()
            print(f"check: removed {lock}, which a killed DVC left half written")


def refuse_obstacles() -> None:
    """Look through every folder that a stage reads and none writes.

    Raises:
        Refusal: one is not there, or holds what DVC cannot hash.
    """
    stages = stage.read_stages().values()
    written = {path for definition in stages for path in stage.paths_of({**definition, "deps": []}).values()}
    read = {path for definition in stages for path in stage.paths_of(definition).values()}
    for folder in sorted(read - written):
        if folder.suffix or any(folder.is_relative_to(output) for output in written):
            continue  # a file, or a part of what a stage will write
        if not folder.is_dir():
            raise stage.Refusal(f"there is no folder {folder}: make it (`mkdir -p {folder}`); it may be empty")
        found = obstacles(folder)
        if found:
            listing = "\n".join(f"  {line}" for line in found)
            raise stage.Refusal(f"DVC cannot read all of {folder}; move away or mend:\n{listing}")


def main() -> None:
    """Check params.yaml and the source folder, mend DVC's notes; say nothing when all is well."""
    with stage.refusals("check"):
        mend_lock()
        stage.load_params()
        refuse_obstacles()


if __name__ == "__main__":
    main()
