"""publish: one MLflow run for one result, and its model as a registered version with the alias challenger.

In:  models/best, all reports, all of params.yaml, and the tokens and splits for the lineage of the data.
Out: publication.json: what is published, and its SHA-256. No run id, no version number, no clock: MLflow is a view of
     these files, and whatever is missing there is written again from them.

    python -m pipeline.publish

A second time changes nothing. A run that training left live, or a publication that was killed, is completed. Then the
gate is asked whether the model becomes the champion (`pipeline/promote.py`); that it refuses is no failure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline import files, publication, stage
from pipeline.gate import Limits

if TYPE_CHECKING:
    from pipeline import registry, tracking


class Params(stage.Params):
    """Section `publish` of params.yaml."""

    experiment: str = Field(min_length=1, max_length=200)
    registered_model: str = Field(min_length=1, max_length=200, pattern=r"^[^/:'\"`%]+$")  # MLflow takes no others
    auto_promote: bool
    gate: Limits


def main(paths: stage.Paths, publish: Params, **others: stage.Params) -> None:
    """Publish the result that lies in the files, and ask the gate about its model."""
    from pipeline import promote

    sections = {"publish": publish, **others}
    result = publication.content(paths, {name: section.model_dump() for name, section in sections.items()})
    version = project(result, paths)
    files.write_json(paths["publication.json"], result)
    print(
        f"publish: experiment {publish.experiment!r} of MLflow holds this result ({result['publication'][:8]}); "
        f"its model is version {version} of {publish.registered_model!r}"
    )
    if publish.auto_promote:
        print(f"publish: {promote.at_the_end(version)}")


def ensure() -> None:
    """Make MLflow hold what publication.json names, also when DVC restored the files and no code ran.

    Raises:
        Refusal: nothing is published yet, MLflow cannot be used, or the other files belong to another result.
    """
    from pipeline import promote, registry, tracking

    paths, result = published()
    with tracking.problems():
        with tracking.alone():  # two processes at once would make the tables of a new database twice
            store = tracking.Store(result["experiment"])
        complete = store.published(result["publication"]) is not None
        if complete and registry.is_current(store, result["registered_model"], result["model_sha256"]):
            return
    _check_files(paths, result)
    version = project(result, paths)
    if stage.load_params()["publish"].auto_promote:
        promote.at_the_end(version)


def upload_again() -> None:
    """Replace the files of the published model in MLflow, which are damaged, by those of the pipeline.

    Raises:
        Refusal: as in `ensure`.
    """
    from pipeline import registry, tracking

    ensure()
    paths, result = published()
    _check_files(paths, result)
    with tracking.problems(), tracking.alone():
        registry.upload_again(tracking.Store(result["experiment"]), model_of(result, paths))


def published() -> tuple[stage.Paths, dict[str, Any]]:
    """The paths of this stage, and the content of publication.json."""
    paths = stage.paths_of(stage.read_stages()["publish"])
    if not paths["publication.json"].exists():
        raise stage.Refusal(f"there is no {paths['publication.json']} yet; run `dvc repro`")
    return paths, files.read_json(paths["publication.json"])


def _check_files(paths: stage.Paths, result: Mapping[str, Any]) -> None:
    params = {name: section.model_dump() for name, section in stage.load_params().items()}
    if publication.content(paths, params) != result:
        raise stage.Refusal(f"{paths['publication.json']} is not about the files beside it; run `dvc repro`")


def project(result: Mapping[str, Any], paths: stage.Paths) -> str:
    """Make MLflow hold the result, doing only what is not done yet; return the number of the model's version.

    Raises:
        Refusal: MLflow cannot be used.
    """
    from pipeline import machine, reaper, registry, runs, tracking

    final = publication.final_metrics(files.read_json(paths["evaluation.json"]))
    points = tracking.points_of(files.read_jsonl(paths["train.jsonl"]))
    points |= {(name, result["step"]): value for name, value in final.items()}
    with tracking.problems(), tracking.alone():
        store = tracking.Store(result["experiment"])
        run = store.published(result["publication"])
        if run is not None:
            reaper.reap(store)
            return registry.register(store, run, model_of(result, paths))
        run, held = store.adopt(result["publication"], result["fingerprint"], points, result["params"])
        store.add(
            run,
            {point: value for point, value in points.items() if point not in held},
            result["params"],
            tags_of(result),
        )
        beside = machine.Beside(runs.Run(result["fingerprint"]).folder)  # as far as its files are still here
        known = store.points(run, tracking.live_names(run))
        new = {point: value for point, value in beside.new_points().items() if point not in known}
        store.add(run, new, times_ms=beside.times_ms)
        store.add_datasets(run, result["datasets"])
        store.add_files(run, publication.reports(paths))
        describe(store, run, result, paths)
        version = registry.register(store, run, model_of(result, paths))
        store.end(run, "FINISHED")  # last: it says that nothing is missing
        reaper.reap(store)
    return version


def describe(store: tracking.Store, run: Any, result: Mapping[str, Any], paths: stage.Paths) -> None:
    """Write what a person reads of the run: its name, its description, its samples."""
    from pipeline import origin, page, registry, tracking
    from pipeline.champions import Champions

    digests = {side: about["digest"] for side, about in result["datasets"].items()}
    params = {key: value[: tracking.MAX_PARAM_CHARACTERS] for key, value in result["params"].items()}  # as MLflow's
    new = page.Made(params, digests, origin.commit()["git.commit"])
    number, champion = None, None
    if (found := registry.run_of(store, result["registered_model"], Champions.ALIAS)) is not None:
        number, theirs = found
        held = theirs.inputs.dataset_inputs if theirs.inputs else []
        digests = {known.dataset.name: known.dataset.digest for known in held}
        champion = page.Made(theirs.data.params, digests, theirs.data.tags.get("git.commit", "unknown"))
    samples = files.read_jsonl(paths["samples.jsonl"])
    text = page.description(
        run.info.run_id,
        files.read_json(paths["evaluation.json"]),
        files.read_json(paths["diagnostics.json"], "findings"),
        samples,
        new,
        champion,
        number,
    )
    store.describe(run, page.name(result["publication"], new, champion, os.environ.get("DVC_EXP_NAME")), text)
    store.add_table(run, "samples.json", page.samples_table(samples))


def tags_of(result: Mapping[str, Any]) -> dict[str, str]:
    """What a run tells besides numbers."""
    from pipeline import origin, registry

    found = origin.tags() | {registry.MODEL_SHA256: result["model_sha256"], "pipeline.verdict": result["verdict"]}
    return found | {"mlflow.source.git.commit": found["git.commit"]}  # the name that MLflow's pages look for


def model_of(result: Mapping[str, Any], paths: stage.Paths) -> registry.Model:
    """The model as the registry takes it."""
    from pipeline import origin, registry, tracking

    losses = {side: "not finite" if loss is None else f"{loss:.4f}" for side, loss in result["losses"].items()}
    return registry.Model(
        registered_model=result["registered_model"],
        folder=paths["best"],
        sha256=result["model_sha256"],
        step=result["step"],
        tags={
            tracking.FINGERPRINT: result["fingerprint"],
            tracking.PUBLICATION: result["publication"],
            "pipeline.verdict": result["verdict"],
            "git.commit": origin.commit()["git.commit"],
            **origin.lock_hashes(),
            **{f"{side}_loss": loss for side, loss in losses.items()},
        },
        description=(
            f"Verdict: {result['verdict']}. Loss {losses['validation']} on validation, {losses['test']} on test "
            f"(nats per token), at step {result['step']}. Base model: {result['params']['model.base']}."
        ),
        prompt=json.loads(result["params"]["sample.prompts"])[0],
    )


if __name__ == "__main__":
    stage.run("publish", main)
