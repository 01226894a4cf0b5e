"""evidence: what the gate looks at, gathered for one registered version.

From MLflow come the reports of the version's run and of the champion's, and the model itself, fetched from the
registry, compared with its manifest, loaded and measured. From this checkout comes the text of the test documents,
found by their hashes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import files, gate, stage
from pipeline.gate import Finding
from pipeline.stage import Refusal

if TYPE_CHECKING:
    from pipeline.tracking import Store

REPORTS = ("diagnostics.json", "documents.parquet", "evaluation.json", "leakage.json")


def judge(
    store: Store, version: Any, champion: Any | None, params: Mapping[str, Any], paths: stage.Paths
) -> list[Finding]:
    """What every check of the gate finds.

    The model is fetched and measured, which may take minutes, only when nothing else speaks against it.

    Args:
        store: where to read.
        version: the version in question.
        champion: the version that is champion, if there is one.
        params: all sections of params.yaml.
        paths: those of the stage publish.
    """
    limits, evaluate = params["publish"].gate, params["evaluate"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = _reports(store, version, paths, Path(folder, "new"))
            evaluation = files.read_json(found["evaluation.json"], "test", "baselines")
            documents = found["documents.parquet"]
            if champion is None:
                better = gate.beats_baselines(evaluation)
            else:
                from pipeline import significance

                theirs = _reports(store, champion, paths, Path(folder, "old"))["documents.parquet"]
                num_samples, seed = evaluate.bootstrap_samples, evaluate.seed
                comparison = significance.compare(documents, theirs, "test", num_samples, seed)
                better = gate.improves(comparison, str(champion.version))
            findings = [
                better,
                gate.is_clean(files.read_json(found["leakage.json"], "validation", "test"), limits),
                gate.is_sound(files.read_json(found["diagnostics.json"], "verdicts"), limits),
            ]
            if all(finding.agrees for finding in findings):
                recorded = evaluation["test"]["loss"]
                findings += _read_back(store, version, recorded, documents, params, paths["tokens"])
            return findings
        except Refusal as problem:
            why = str(problem).replace(f"{folder}/", "")  # the same words every time
            return [Finding(False, f"It cannot be judged: {why}.")]


def _reports(store: Store, version: Any, paths: stage.Paths, folder: Path) -> dict[str, Path]:
    """The reports of a version's run.

    Raises:
        Refusal: one is missing.
    """
    found = store.fetch(version.run_id, [paths[name] for name in REPORTS], folder)
    missing = [name for name in REPORTS if name not in found]
    if missing:
        raise Refusal(f"the run of version {version.version} has no {' and no '.join(missing)} in MLflow")
    return found


def _read_back(
    store: Store, version: Any, recorded: float | None, documents: Path, params: Mapping[str, Any], tokens: Path
) -> list[Finding]:
    """Compare the registered files with their manifest, load the model from them, measure it."""
    from pipeline import registry, verify

    with registry.stored(version.name, version.tags.get(registry.MODEL_SHA256, "")) as stored:
        if stored is None or stored[1] is None:
            raise Refusal(f"MLflow has no files with recorded hashes for version {version.version}")
        folder, tally = stored[0], verify.Tally()
        verify.compare_published(folder, stored[1], version.tags[registry.MODEL_SHA256], tally)
        different = [f"{_name(found.record.path, folder)} {found.what}" for found in tally.differences]
        whole = gate.is_whole(different, tally.num_files)
        if not whole.agrees:
            return [whole]
        max_length = int(store.client.get_run(version.run_id).data.params["train.max_length"])
        loss = measure(registry.weights_of(folder), documents, max_length, params, tokens)
    return [whole, gate.is_reproduced(recorded, loss, params["publish"].gate)]


def _name(path: Path, folder: Path) -> str:
    return "the model" if path == folder else str(path.relative_to(folder))


def measure(weights: Path, documents: Path, max_length: int, params: Mapping[str, Any], folder: Path) -> float:
    """The loss of a model on the test documents that a documents.parquet lists, measured as `evaluate` does.

    Args:
        weights: a Hugging Face folder.
        documents: the documents.parquet.
        max_length: tokens of the window in which the model was trained.
        params: all sections of params.yaml.
        folder: the tokens of the checkout.

    Raises:
        Refusal: the checkout holds other text, or tokens of another tokenizer.
    """
    import numpy as np
    import pyarrow.parquet as pq

    from pipeline import corpus, device, losses
    from pipeline.model import load_trained

    rows = pq.read_table(documents, columns=["hash", "num_tokens"], filters=[("side", "=", "test")])
    wanted = np.array([int(digits, 16) for digits in rows["hash"].to_pylist()], np.uint64)
    order = np.argsort(wanted)
    try:
        tokens = corpus.load(folder)
    except OSError:
        raise Refusal(f"there is no {folder}; restore it with `dvc checkout`") from None
    chosen = np.flatnonzero(np.isin(tokens.hashes, wanted))
    at = order[np.searchsorted(wanted, tokens.hashes[chosen], sorter=order)]
    num_same = int((tokens.lengths[chosen] + 1 == rows["num_tokens"].to_numpy()[at]).sum())
    if num_same != len(wanted) or len(chosen) != len(wanted):
        raise Refusal(
            f"{folder} holds {num_same:,} of its {len(wanted):,} test documents in the same tokens; "
            "check out the commit and the data of this version first"
        )
    device.make_deterministic()
    place = device.choose(params["train"].device)
    return losses.measure(
        load_trained(weights).to(place),
        tokens,
        chosen,
        max_length=max_length,
        batch_size=params["evaluate"].batch_size,
        device=place,
    ).mean
