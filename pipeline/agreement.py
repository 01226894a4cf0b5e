"""Whether the bytes are what the names say: everything that contradicts a run, a version, a flow run or this checkout.

Held against bytes are the MD5s that a run has of dvc.lock (DVC's objects, and the reports in MLflow), the SHA-256 of
its model (DVC's copy of models/best, and the files of the version), its parameters (params.yaml of the commit), the
commit itself (the code that a dvc.lock with these outputs names), and the tags that repeat what a file says. Where the
work tree differed from the commit when the result was published, the commit is no witness of either.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import commits, inputs, publication, verify
from pipeline.pedigree import COMMIT, DIRTY, LOCKED, VERDICT, Records, model_name, outputs_of, title
from pipeline.registry import MODEL_SHA256
from pipeline.tracking import FINGERPRINT, MAX_PARAM_CHARACTERS, NUM_FINGERPRINT_DIGITS, PUBLICATION


def run_faults(records: Records, run: Any) -> Iterator[str]:
    """Whatever contradicts a published run, a sentence each."""
    if run.info.status != "FINISHED":
        yield f"{title(run)}: publishing it did not come to its end ({run.info.status}); `dvc repro` completes it"
        return
    other = records.results[run.data.tags[PUBLICATION]]
    if other.info.run_id != run.info.run_id:
        yield f"{title(run)}: {title(other)} holds the same result"
    yield from _commit_faults(title(run), run.data.tags, run.data.params)
    if run.data.tags.get(DIRTY) == "false":
        yield from _code_faults(records, run)
    yield from _copy_faults(records, run)
    yield from _report_faults(records, run)
    yield from _tag_faults(records, run)
    if not records.versions_of(run):
        yield f"{title(run)}: no version of {model_name(run)!r} holds its model; `python -m pipeline.summary` adds it"


def version_faults(records: Records, version: Any) -> Iterator[str]:
    """Whatever contradicts a registered version: its run, an older twin, its bytes."""
    here, tags = f"models:/{version.name}/{version.version}", version.tags
    if MODEL_SHA256 not in tags:
        yield f"{here}: an orphan: it has no tag {MODEL_SHA256}, so the pipeline did not register it"
        return
    run = next((run for run in records.runs if run.info.run_id == version.run_id), None)
    if run is None:
        yield f"{here}: an orphan: MLflow has no published run {version.run_id}"
    else:
        there = run.data.tags | (said := _said(records, run))
        locked = {tag for tag in tags if tag.startswith(LOCKED)}  # the first versions have none of these
        for tag in sorted({MODEL_SHA256, PUBLICATION, COMMIT, VERDICT} | said.keys() | locked):
            yield from _unlike(f"{here}: its tag {tag} is not that of {title(run)}", tags.get(tag), there.get(tag))
    for other in records.versions(version.name):
        if other.tags.get(MODEL_SHA256) == tags[MODEL_SHA256] and int(other.version) < int(version.version):
            yield f"{here}: version {other.version} claims the same bytes"
    tally = verify.Tally()
    verify.check_model(version.name, tags[MODEL_SHA256], tally)
    yield from (f"{here}: {difference}" for difference in tally.differences)


def flow_run_faults(records: Records, flow_run: Mapping[str, Any]) -> Iterator[str]:
    """Whatever contradicts a flow run: its result, its commit."""
    here, named = f"flow run {flow_run['id']}", flow_run["tags"].get(PUBLICATION)
    if named and named not in records.results:
        yield f"{here}: an orphan: no run of MLflow holds its result {named[:8]}"
    params = records.results[named].data.params if named in records.results else {}
    yield from _commit_faults(here, flow_run["tags"], params)


def checkout_faults(records: Records) -> Iterator[str]:
    """Whatever contradicts the dvc.lock that lies here: its result, and what the run of it names."""
    report = records.paths["publication.json"].as_posix()
    entries = {out["path"]: out["md5"] for locked in records.lock.values() for out in locked.get("outs", [])}
    if report not in entries:
        yield f"{inputs.LOCK}: it names no {report}, so nothing of it is published; run `dvc repro`"
        return
    _, at, state = next(records.objects(report, entries[report]))
    if state != "sound":
        yield f"{inputs.LOCK}: {at}, DVC's copy of {report}, is {state}; `make verify` tells more"
        return
    named = json.loads(at.read_bytes())["publication"]
    if named not in records.results:
        yield f"{inputs.LOCK}: no run of MLflow holds its result {named[:8]}; `python -m pipeline.summary` adds it"
        return
    run, here = records.results[named], commits.outputs_of(records.lock)
    there = outputs_of(run)
    others = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    yield from (f"{inputs.LOCK}: {title(run)} names other outputs of stage {name}" for name in others)


def _commit_faults(here: str, tags: Mapping[str, str], params: Mapping[str, str]) -> Iterator[str]:
    """The commit is there, and its params.yaml holds these parameters."""
    commit = tags.get(COMMIT, "unknown")
    if not commits.tree(commit):
        yield f"{here}: git has no commit {commit}"
    elif params and tags.get(DIRTY) == "false":
        there = commits.params_at(commit) or {}
        if others := other_params(params, there):
            key, rest = others[0], f" and {len(others) - 1} more" if others[1:] else ""
            was = f"{key} is {there.get(key)} there, {params.get(key)} here{rest}"
            yield f"{here}: params.yaml of commit {commit} has other parameters ({was})"


def other_params(params: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """The names of the parameters in which a run and a commit differ."""
    return sorted(key for key in params.keys() | there.keys() if not _same(params.get(key), there.get(key)))


def _same(one: str | None, other: str | None) -> bool:
    """Whether two parameters are the same, as text or as numbers (0 and 0.0)."""
    if one is None or other is None:
        return False
    if one == other[:MAX_PARAM_CHARACTERS]:
        return True
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def _code_faults(records: Records, run: Any) -> Iterator[str]:
    """One dvc.lock with these outputs names the code of the commit; where none is left, nothing can be told."""
    commit = run.data.tags.get(COMMIT, "unknown")
    others = [commits.other_code(lock, commit) for lock in records.locks_of(run).values()]
    if others and all(others) and commits.tree(commit):
        files = ", ".join(min(others, key=len)[:3])
        yield f"{title(run)}: commit {commit} is not the code that dvc.lock names for these outputs ({files})"


def _copy_faults(records: Records, run: Any) -> Iterator[str]:
    """DVC still has every output of the run, as it was, and the model among them is the one that the run names."""
    outputs = _outputs(run)
    copies = [copy for path, md5 in outputs.items() for copy in records.objects(path, md5)]
    for name, at, state in copies:
        if state == "changed":
            yield f"{title(run)}: {at}, DVC's copy of {name}, was changed; `make verify` tells more"
    missing = [name for name, _, state in copies if state == "missing"]
    if missing:
        rest = f" and {len(missing) - 1} more" if missing[1:] else ""
        yield f"{title(run)}: DVC no longer has {missing[0]}{rest}; `dvc fetch --all-commits` may bring it back"
    best = records.paths["best"].as_posix()
    if best not in outputs:
        yield f"{title(run)}: no tag of it names {best} of dvc.lock"
    elif not missing and _model_sha256(best, records.objects(best, outputs[best])) != run.data.tags.get(MODEL_SHA256):
        yield f"{title(run)}: {best} of dvc.lock is not the model that its tag {MODEL_SHA256} names"


def _tag_faults(records: Records, run: Any) -> Iterator[str]:
    """The tags of a run repeat what its files say; of the fingerprint they have the first digits, of losses nothing."""
    said = _said(records, run)
    for tag, num_characters in ((FINGERPRINT, NUM_FINGERPRINT_DIGITS), (VERDICT, None)):
        if tag in said:
            fault = f"{title(run)}: its tag {tag} is not what its files say"
            yield from _unlike(fault, run.data.tags.get(tag), said[tag][:num_characters])


def _said(records: Records, run: Any) -> dict[str, str]:
    """What DVC's copies of a run's files say, by the tags of its version that repeat it."""
    copies = {
        name: at
        for path, md5 in _outputs(run).items()
        for name, at, state in records.objects(path, md5)
        if state == "sound"
    }
    readers: dict[Path, Callable[[Any], dict[str, str]]] = {
        records.paths["best"] / "training.json": lambda told: {FINGERPRINT: told["fingerprint"]},
        records.paths["diagnostics.json"]: lambda told: {VERDICT: told["verdict"]},
        records.paths["evaluation.json"]: lambda told: {
            f"{side}_loss": as_tag(told[side]["loss"]) for side in ("validation", "test")
        },
    }
    said: dict[str, str] = {}
    for path, read in readers.items():
        # DVC no longer has it, or a tag was changed and names something else: another fault says so.
        with contextlib.suppress(KeyError, TypeError, ValueError):
            said |= read(json.loads(copies[path.as_posix()].read_bytes()))
    return said


def as_tag(loss: float | None) -> str:
    """A loss, as publish writes it into a tag."""
    return "not finite" if loss is None else f"{loss:.4f}"


def _unlike(fault: str, here: str | None, there: str | None) -> Iterator[str]:
    """The fault with both values if they differ; of tags with many lines, those that differ."""
    ours, theirs = (set((text or "").splitlines()) for text in (here, there))
    if ours != theirs:
        shown = [", ".join(sorted(lines)) or "nothing" for lines in (theirs - ours, ours - theirs)]
        yield f"{fault} ({shown[0]} there, {shown[1]} here)"


def _outputs(run: Any) -> dict[str, str]:
    """The outputs of all stages, path to MD5."""
    return {path: md5 for of_stage in outputs_of(run).values() for path, md5 in of_stage.items()}


def _model_sha256(folder: str, copies: Iterator[tuple[str, Path, str]]) -> str:
    """SHA-256 of a model of which only the objects of DVC's cache are there."""
    with tempfile.TemporaryDirectory() as beside:
        Path(beside, folder).mkdir(parents=True)
        for name, at, _ in copies:
            if name != folder:
                Path(beside, name).parent.mkdir(parents=True, exist_ok=True)
                Path(beside, name).symlink_to(at.resolve())
        return publication.model_sha256(Path(beside, folder))


def _report_faults(records: Records, run: Any) -> Iterator[str]:
    """The reports in MLflow are those of dvc.lock."""
    named = {path.as_posix() for path in publication.reports(records.paths)}
    with records.artifacts(run) as folder:
        for path, md5 in _outputs(run).items():
            if path in named and not (folder / path).exists():
                yield f"{title(run)}: its artifact {path} is missing"
            elif path in named and inputs.md5_of(folder / path) != md5:
                yield f"{title(run)}: its artifact {path} is not the file of dvc.lock"
