"""audit: which commit, dvc.lock, MLflow run, model version and Prefect flow run belong together, and do they agree.

    python -m pipeline.audit
    python -m pipeline.audit ID

ID is a commit (or a branch, tag or DVC experiment), a stage of dvc.lock, the id of an MLflow run, a version of the
registered model (models:/NAME/3, models:/NAME@champion) or the id of a Prefect flow run. Printed are the other four
of every result that ID leads to, and whatever contradicts them; hashes come from the bytes. Without an ID everything is
held against everything: all published runs, versions and flow runs, the bytes that `pipeline.verify` reads, and what
belongs to nothing (an orphan). Exit codes: 0 all agree, 1 something does not, or ID leads nowhere. Nothing is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline import agreement, commits, owner, recorded, stage, tracking, verify
from pipeline.pedigree import COMMIT, DIRTY, VERDICT, Records, model_name, outputs_of, title
from pipeline.stage import Refusal
from pipeline.tracking import PUBLICATION

FLOW_RUN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def runs_named(records: Records, name: str) -> list[Any]:
    """The runs of all results that an ID leads to.

    Raises:
        Refusal: it leads nowhere; the message says how far.
    """
    if name.startswith("models:/"):
        version = _version(records, name)
        found = records.runs_of(version) + [run for run in records.runs if run.info.run_id == version.run_id]
    elif FLOW_RUN.fullmatch(name):
        flow_run = next((one for one in records.flow_runs if one["id"] == name), None)
        if flow_run is None:
            raise Refusal(f"Prefect knows no flow run {name} of this pipeline, or it ran before flows were tagged")
        if PUBLICATION not in flow_run["tags"]:
            raise Refusal(f"flow run {name} ({flow_run['state']}) did not come to a result")
        found = [run for run in records.runs if run.data.tags[PUBLICATION] == flow_run["tags"][PUBLICATION]]
    elif name in records.lock:
        here = commits.outputs_of(records.lock)
        if name == "publish":  # what it wrote is about the outputs of all others
            found = [run for run in records.runs if outputs_of(run) == here]
        else:
            found = [run for run in records.runs if outputs_of(run).get(name) == here[name]]
    elif run := next((run for run in records.runs if run.info.run_id == name), None):
        found = [run]
    else:
        found = _runs_of_commit(records, name)
    if not found:
        raise Refusal(f"{name}: an orphan: MLflow holds no result of it")
    return list({run.info.run_id: run for run in found}.values())


def _version(records: Records, name: str) -> Any:
    """The version that models:/NAME/NUMBER or models:/NAME@ALIAS names."""
    model, separator, alias = name.removeprefix("models:/").rpartition("@")
    if not separator:
        model, _, number = alias.rpartition("/")
    else:
        number = records.aliases(model).get(alias, "")
    for version in records.versions(model):
        if str(version.version) == number:
            return version
    known = [f"models:/{model}/{version.version}" for version in records.versions(model)]
    known += [f"models:/{model}@{alias}" for alias in records.aliases(model)]
    raise Refusal(f"MLflow has no {name}; it has {', '.join(known) or f'no model {model!r}'}")


def _runs_of_commit(records: Records, name: str) -> list[Any]:
    """The runs that a commit made, or that its dvc.lock records."""
    commit = commits.commit_of(name)
    if commit is None:
        raise Refusal(
            f"{name!r} is no commit, no stage of dvc.lock ({', '.join(records.lock) or 'there is none'}), no published "
            "run of MLflow, no version (models:/NAME/3, models:/NAME@champion) and no flow run of Prefect"
        )
    there = commits.outputs_of(commits.lock_at(commit))
    of_flows = {one["tags"].get(PUBLICATION) for one in records.flow_runs if one["tags"].get(COMMIT) == commit}
    return [
        run
        for run in records.runs
        if commit == run.data.tags.get(COMMIT)
        or (there and there == outputs_of(run))
        or run.data.tags[PUBLICATION] in of_flows
    ]


def lines(records: Records, run: Any) -> Iterator[str]:
    """The pedigree of one result, a line each."""
    tags = run.data.tags
    losses = [f"test loss {value:.4f}" for name, value in run.data.metrics.items() if name == "test_loss"]
    yield "  ".join([f"result    {tags[PUBLICATION][:8]}", tags.get(VERDICT, ""), *losses])
    dirty = {"false": "", "true": " with changes"}.get(tags.get(DIRTY), " (whether changed is unknown)")
    yield f"commit    {tags.get(COMMIT, 'unknown')}{dirty}"
    places = [commit[:12] or "this checkout" for commit in records.locks_of(run)]
    yield f"dvc.lock  of {', '.join(places) or 'no commit, and not the one here'}"
    outputs = outputs_of(run)
    for name in (name for name in dict.fromkeys([*records.lock, *outputs]) if name in outputs):  # in their order
        yield f"          {name:9} " + "  ".join(f"{path} {md5[:8]}" for path, md5 in outputs[name].items())
    experiment = f", DVC experiment {tags['dvc.experiment']}" if "dvc.experiment" in tags else ""
    yield f"run       {run.info.run_id}  {run.info.run_name}{experiment}"
    aliases = records.aliases(model_name(run))
    for version in records.versions_of(run):
        names = [f"@{alias}" for alias, number in aliases.items() if number == str(version.version)]
        yield "  ".join([f"model     models:/{version.name}/{version.version}", *names])
    flow_runs = [f"{one['id']}  {one['name']} {one['state']}" for one in records.flow_runs_of(run)]
    yield from (f"flow run  {shown}" for shown in flow_runs or ["none: Prefect did not run it"])


def faults_around(records: Records, runs: list[Any]) -> Iterator[str]:
    """Whatever contradicts these runs, their versions and their flow runs."""
    for run in runs:
        yield from agreement.run_faults(records, run)
    versions = {(one.name, one.version): one for run in runs for one in records.versions_of(run)}
    for version in versions.values():
        yield from agreement.version_faults(records, version)
    for flow_run in (one for run in runs for one in records.flow_runs_of(run)):
        yield from agreement.flow_run_faults(records, flow_run)


def all_faults(records: Records, model: str) -> Iterator[str]:
    """Whatever contradicts anything, and what belongs to nothing; the files of this checkout are for `verify`."""
    yield from agreement.checkout_faults(records)
    for run in records.own:
        yield from agreement.run_faults(records, run)
    names = sorted({model, *map(model_name, records.own)})
    for name in names:
        for version in records.versions(name):
            yield from agreement.version_faults(records, version)
    for flow_run in records.flow_runs:
        yield from agreement.flow_run_faults(records, flow_run)
    runs, models = records.unnamed(names)
    yield from (f"{title(run)}: an orphan: it is FINISHED, but names no result" for run in runs)
    yield from (f"logged model {one.model_id}: an orphan: it is no registered version" for one in models)


def ask_prefect() -> list[Mapping[str, Any]]:
    """The flow runs of this pipeline; `flows` is asked as a program, as DVC is.

    Raises:
        Refusal: Prefect's server does not answer.
    """
    done = subprocess.run([sys.executable, "-m", "flows.history"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refusal(done.stderr.strip())
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    """Read the command line, print what belongs together, and what does not."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("id", nargs="?", help="what to follow; without it, everything")
    name = parser.parse_args().id
    with stage.refusals("audit"):
        publish = stage.load_params()["publish"]
        cache, flow_runs = recorded.cache_folder(), ask_prefect()
        # What an ID leads to is not written any more; all that there is may be.
        with tracking.problems(), contextlib.nullcontext() if name else owner.alone("audit"):
            records = Records(cache, publish.experiment, flow_runs)
            runs = runs_named(records, name) if name else records.own
            if name:
                print("\n\n".join("\n".join(lines(records, run)) for run in runs), flush=True)
                found: Iterator[str] = faults_around(records, runs)
            else:
                read = map(str, verify.check(cache).differences)
                found = itertools.chain(read, all_faults(records, publish.registered_model))
            faults = list(dict.fromkeys(found))
        print("\n".join(faults), end="\n" if faults else "", flush=True)
        if faults:
            raise Refusal(f"disagreements: {len(faults)}")
        print(f"audit: all agree (results: {len(runs)}, objects of DVC read: {records.num_objects:,})")


if __name__ == "__main__":
    main()
