"""Which progress a training goes on from, and if from none, why not: the difference, key by key.

A run folder holds what its fingerprint was made of. A training with another fingerprint starts clean and says in one
line which progress it leaves behind. Whoever would rather be refused asks for it in the environment:

    PIPELINE_RESUME=1 dvc repro          # or make repro, make flow, python -m pipeline.train

It is no parameter, for it changes no result, and DVC would take a changed parameter for a changed result.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import files, runs
from pipeline.stage import Refusal

ASKED = "PIPELINE_RESUME"
MADE_OF = "fingerprint.json"
NUM_SHOWN = 3
PREFIXES = {"data and code": "", "params": "params.", "numeric class": "numeric class "}


def check(run: runs.Run, made_of: Mapping[str, Any]) -> None:
    """Before the run's folder is made: say what a clean start leaves behind.

    Raises:
        Refusal: the user asked to resume, and there is nothing to resume, or only a run of another fingerprint.
    """
    if run.folder.is_dir():
        return
    asked = os.environ.get(ASKED, "") not in ("", "0")
    other = _newest_unfinished()
    if other is None:
        if asked:
            raise Refusal(f"there is no unfinished run in {runs.ROOT} to resume; without {ASKED} this starts clean")
        return
    what = f"{other} (after step {_step(other)})"
    lines = _differences_from(other, made_of)
    if asked:
        listing = "\n".join(f"  {line}" for line in lines)
        raise Refusal(
            f"no unfinished run has this fingerprint; the newest one, {what}, differs:\n{listing}\n"
            f"Change that back to go on with it; without {ASKED} a new run starts clean. Nothing was touched"
        )
    shown = "; ".join(lines[:NUM_SHOWN]) + (f"; and {len(lines) - NUM_SHOWN} more" if len(lines) > NUM_SHOWN else "")
    print(f"train: starting clean, not from {what}, which differs: {shown}", flush=True)


def remember(run: runs.Run, made_of: Mapping[str, Any]) -> None:
    """Write into the run's folder what its fingerprint was made of."""
    files.write_json(run.folder / MADE_OF, made_of)


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each key that differs: parameters and numeric class with their values, files without."""
    lines = []
    for group, prefix in PREFIXES.items():
        before, after = _flat(was.get(group, {})), _flat(now.get(group, {}))
        for key in sorted(before.keys() | after.keys()):
            if key in before and key in after and before[key] == after[key]:
                continue
            if group == "data and code":
                change = "is new" if key not in before else "is gone" if key not in after else "changed"
                lines.append(f"{prefix}{key}: {change}")
            else:
                lines.append(f"{prefix}{key}: was {before.get(key, 'not there')}, is {after.get(key, 'not there')}")
    return lines


def _differences_from(folder: Path, made_of: Mapping[str, Any]) -> list[str]:
    try:
        was = files.read_json(folder / MADE_OF)
    except (OSError, Refusal):
        return [f"{MADE_OF}, which would tell how, is missing or damaged"]
    return differences(was, made_of)


def _newest_unfinished() -> Path | None:
    """The run folder with the newest checkpoint that has not come to its end."""
    unfinished = [folder for folder in runs.ROOT.glob("*/checkpoint-*") if not (folder.parent / "last").is_dir()]
    newest = max(unfinished, key=lambda folder: (folder.stat().st_mtime_ns, folder), default=None)
    return newest and newest.parent


def _step(folder: Path) -> int:
    return max(int(checkpoint.name.removeprefix("checkpoint-")) for checkpoint in folder.glob("checkpoint-*"))


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings under dotted keys. File names have dots too, but nothing is nested in them."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
