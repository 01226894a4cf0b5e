"""What a published result was made of: its run leads to the commit, to the stages that trained it, and to their data.

The commit is the one that the run names, if the work tree had no changes then. If it had, a result can be made again
only where they were committed: at a commit with the run's parameters, and with the code that a dvc.lock with the run's
outputs names.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import agreement, audit, commits, inputs, recorded
from pipeline.pedigree import COMMIT, DIRTY, Records, title
from pipeline.stage import Refusal
from pipeline.tracking import PUBLICATION

FIRST, MEASURED, LAST = "train", "evaluate", "publish"  # what runs again begins with the first and ends before the last


def one_result(records: Records, name: str) -> Any:
    """The run of the one result that an ID leads to; of several with the same model, the one that registered it.

    Raises:
        Refusal: it leads to none, or to several.
    """
    named = dict.fromkeys(run.data.tags[PUBLICATION] for run in audit.runs_named(records, name))
    runs = [records.results[one] for one in named if one in records.results]
    if not runs:
        raise Refusal(f"{name}: publishing its result did not come to its end; `dvc repro` completes it")
    if len(runs) > 1:
        ids = {version.run_id for run in runs for version in records.versions_of(run)}
        runs = [run for run in runs if run.info.run_id in ids or not records.versions_of(run)] or runs
    if len(runs) > 1:
        raise Refusal(f"{name} leads to {len(runs)} results; name one of them: {', '.join(map(title, runs))}")
    return runs[0]


def commit_of(records: Records, run: Any) -> str:
    """The commit at which a result can be made again.

    Raises:
        Refusal: git has none with all that made it.
    """
    named, dirty = run.data.tags.get(COMMIT, "unknown"), run.data.tags.get(DIRTY, "unknown")
    if dirty == "false":
        if not commits.tree(named):
            raise Refusal(f"{title(run)}: git has no commit {named}; fetch the branch or tag that holds it")
        if others := _other_params(named, run):
            listing = "\n".join(f"  {line}" for line in others)
            raise Refusal(f"{title(run)}: params.yaml of commit {named} has other parameters:\n{listing}")
        return str(named)
    locks = records.locks_of(run)
    for commit in [named, *filter(None, locks)]:
        if any(not commits.other_code(lock, commit) for lock in locks.values()) and not _other_params(commit, run):
            return str(commit)
    had = "had changes" if dirty == "true" else "may have had changes"
    raise Refusal(
        f"{title(run)}: the work tree {had} when it was published, so commit {named} is not all that there was; and no "
        "commit holds its parameters and the code that a dvc.lock with its outputs names"
    )


def _other_params(commit: str, run: Any) -> list[str]:
    there, here = commits.params_at(commit) or {}, run.data.params
    return [
        f"{key}: {there.get(key, 'not there')} in the commit, {here.get(key, 'not there')} in the run"
        for key in agreement.other_params(here, there)
    ]


def plan(stages: Mapping[str, Any], outputs: commits.Outputs) -> tuple[list[str], dict[str, str]]:
    """The stages to run again, in their order, and the outputs of the others that they read, path -> MD5.

    Args:
        stages: of dvc.yaml of the commit, in the order in which they run.
        outputs: what the run says of them.

    Raises:
        Refusal: a stage is missing, or its outputs are.
    """
    again: list[str] = []
    for name, definition in stages.items():
        made = {path for one in again for path in outputs[one]}
        if name == FIRST or (name != LAST and made & set(definition.get("deps", []))):
            if name not in outputs:
                raise Refusal(f"no tag of the run names the outputs of stage {name}, so nothing can be compared")
            again.append(name)
    for name in (FIRST, MEASURED):
        if name not in again:
            raise Refusal(f"dvc.yaml of the commit has no stage {name} that could run again")
    read = {dep for name in again for dep in stages[name]["deps"]}
    others = [outputs[name] for name in stages if name in outputs and name not in again]
    return again, {path: md5 for written in others for path, md5 in written.items() if path in read}


def restore(records: Records, outputs: Mapping[str, str], folder: Path) -> None:
    """Copy outputs from DVC's cache, and read the copies: they have the bytes that the MD5s name.

    Raises:
        Refusal: DVC has them no longer, or changed.
    """
    for path, md5 in outputs.items():
        copies = list(records.objects(path, md5))
        if any(state == "missing" for _, _, state in copies) and recorded.dvc("remote", "list").strip():
            print(f"replay: fetching {path} from DVC's remote", flush=True)
            with contextlib.suppress(Refusal):  # it fails for want of an object of any commit
                recorded.dvc("fetch", "--all-commits")
            copies = list(records.objects(path, md5))
        for name, at, state in copies:
            if state == "missing":
                raise Refusal(f"DVC no longer has {name} ({at}), which training read; get it back from a remote")
            if state == "changed":
                raise Refusal(f"{at}, DVC's copy of {name}, was changed; `make verify REPAIR=1` may restore it")
            if name != path or not md5.endswith(".dir"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(at, folder / name)
        if inputs.md5_of(folder / path) != md5:
            raise Refusal(f"{folder / path} is not what was copied there; try again")


def digests(records: Records, outputs: Mapping[str, str]) -> dict[str, str]:
    """The MD5 of every file of the outputs; of a folder itself, where DVC no longer knows its files."""
    found: dict[str, str] = {}
    for path, md5 in outputs.items():
        copies = {name: at.parent.name + at.name for name, at, _ in records.objects(path, md5)}
        found |= {name: digest for name, digest in copies.items() if name != path or len(copies) == 1}
    return found
