"""replay: make a published result again, from its commit, data and parameters, and certify what came out.

    python -m pipeline.replay models:/NAME@champion
    python -m pipeline.replay ID --keep

ID is whatever `pipeline.audit` follows to one result. The files of its commit go into a work tree of their own, under
.replay/; the data that training read comes from DVC's cache, or from its remote where the cache lost it, and is held
against the MD5s that the run recorded. There DVC runs train and what follows from it, publishing aside: never from a
cache, and storing nothing in one. The checkout, DVC's cache and MLflow stay as they are. What is written here:

    certificates/<publication>.md      and .json, for machines: pipeline/certificate.py tells what the outcomes mean

Refused are: a commit that git no longer has, a work tree with changes that nobody committed (pipeline/recipe.py has the
rule), other parameters in the commit than in the run, missing or damaged data. A base model in a folder has to be named
by its absolute path, for the work tree lies elsewhere. Exit codes: 0 byte-identical or within tolerance; 1 refused, or
not reproduced, and then the work tree is kept, as with --keep.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import audit, certificate, files, inputs, publication, recipe, recorded, stage, tracking, worktree
from pipeline.pedigree import Records, outputs_of, title
from pipeline.registry import MODEL_SHA256
from pipeline.stage import Refusal
from pipeline.tracking import PUBLICATION

LOCKED = Path("requirements.lock")


def replay(records: Records, run: Any, tolerance: float, keep: bool = False) -> dict[str, Any]:
    """Make the result of a run again; what the certificate says of it.

    Raises:
        Refusal: it cannot be made again.
    """
    commit, named = recipe.commit_of(records, run), run.data.tags[PUBLICATION]
    with worktree.of(commit, named[: certificate.NUM_DIGITS]) as tree:
        stages = stage.read_stages(tree.folder / "dvc.yaml")
        again, given = recipe.plan(stages, outputs_of(run))
        recipe.restore(records, given, tree.folder)
        (tree.folder / inputs.LOCK).unlink(missing_ok=True)  # it is of whatever ran before that commit
        print(f"replay: {title(run)}: {', '.join(again)} at commit {commit} in {tree.folder}", flush=True)
        tree.dvc("repro", "--single-item", "--force", "--no-run-cache", "--no-commit", *again)
        found = certify(records, run, tree.folder, {name: stages[name] for name in again}, given, tolerance)
        tree.keep = keep or found["outcome"] == certificate.NOT_REPRODUCED
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return found | {"commit": commit, "date": date, "publication": named, "run": run.info.run_id}


def certify(
    records: Records, run: Any, folder: Path, stages: Mapping[str, Any], given: Mapping[str, str], tolerance: float
) -> dict[str, Any]:
    """What came out beside what was recorded, and the outcome.

    Args:
        folder: the work tree in which the pipeline ran again.
        stages: those that did, in their order, as dvc.yaml defines them.
        given: path -> MD5 of the data that they were given.
        tolerance: the difference of test losses that rounding may make, in nats per token.
    """
    recorded_outputs, best = outputs_of(run), stage.paths_of(stages[recipe.FIRST])["best"]
    # A stage writes files of rows as it goes, and folders in the end.
    written = {
        path: md5
        for name in stages
        for path, md5 in sorted(recorded_outputs[name].items(), key=lambda item: item[1].endswith(".dir"))
    }
    compared = certificate.compare(recipe.digests(records, {**given, **written}), folder, written)
    sha256 = publication.model_sha256(folder / best)
    compared.append(certificate.File(f"{best} ({MODEL_SHA256})", run.data.tags.get(MODEL_SHA256), sha256))

    evaluation = files.read_json(folder / stage.paths_of(stages[recipe.MEASURED])["evaluation.json"])
    losses = certificate.losses(run.data.metrics, publication.final_metrics(evaluation))
    outcome, why = certificate.judge(compared, losses["test_loss"]["difference"], tolerance)

    held = records.objects(str(best), written[str(best)]) if str(best) in written else ()
    copies = {name: at for name, at, state in held if state == "sound"}
    then = certificate.environment(copies.get(f"{best}/training.json"), folder / LOCKED)
    now = certificate.environment(folder / best / "training.json", LOCKED)
    differences = certificate.differences(then, now, (folder / LOCKED).read_text(encoding="utf-8"))
    return {
        "environment": {"then": then, "now": now, "differences": differences},
        "files": [asdict(file) for file in compared],
        "losses": losses,
        "outcome": outcome,
        "tolerance": tolerance,
        "why": why,
    }


def main() -> None:
    """Read the command line, replay, and write the certificate."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.replay", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("id", help="what leads to the result")
    parser.add_argument("--keep", action="store_true", help="let the work tree stay")
    arguments = parser.parse_args()
    with stage.refusals("replay"):
        publish = stage.load_params()["publish"]
        cache, flow_runs = recorded.cache_folder(), audit.ask_prefect()
        with tracking.problems():
            records = Records(cache, publish.experiment, flow_runs)
            run = recipe.one_result(records, arguments.id)
            versions = [f"models:/{version.name}/{version.version}" for version in records.versions_of(run)]
        found = replay(records, run, publish.gate.max_loss_difference, arguments.keep)
        written = certificate.write({"asked": arguments.id, "versions": versions, **found})
        if found["outcome"] == certificate.NOT_REPRODUCED:
            kept = worktree.ROOT / written.stem
            raise Refusal(f"not reproduced: {found['why']}; {written} tells all, and the work tree {kept} is kept")
        print(f"replay: {found['outcome']}: {found['why']} ({written})")


if __name__ == "__main__":
    main()
