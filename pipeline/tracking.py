"""The one place that talks to MLflow about experiments and runs; `registry` adds models, nobody else imports it.

MLflow is a projection of files: a run holds what the files say and nothing that only it knows. So everything here can
be repeated: a run is found again by its tags, and each point of a curve, (metric, step), is written once. Its
timestamp is the run's start plus one millisecond a step, because the files hold no clock; and because the store's key
is (metric, step, timestamp, value), two processes that write the same point at the same moment leave one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import psutil

from pipeline import reaper
from pipeline.stage import Refusal

Points = dict[tuple[str, int], float]  # (metric, step) -> value

OF_ROWS = ("loss", "learning_rate", "grad_norm", "train_eval_loss", "validation_loss")
# MLflow's pages show what is before a slash as a section of its own, and those sections first.
CURVE, SYSTEM = "curves/", "system/"  # of a training, and of the machine
CURVES = tuple(CURVE + name for name in (*OF_ROWS, "generalisation_gap"))
CONTEXTS = {"train": "training", "validation": "validation", "test": "test"}  # as MLflow names them
FINGERPRINT, PUBLICATION, SUPERSEDED = "pipeline.fingerprint", "pipeline.publication", "pipeline.superseded_by"
NUM_FINGERPRINT_DIGITS = 16  # the run folder's name has as many
MAX_PARAM_CHARACTERS = 6000  # MLflow's limit
OUT_OF_REACH = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")  # MLflow's codes for a store that fails
BATCH_METRICS, BATCH_OTHERS = 1000, 100  # MLflow's limits for one log_batch

# Forced: nothing phones home, no pickle is ever loaded. Otherwise a user's own setting wins.
FORCED = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
DEFAULTS = {
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what it logs as an error it also raises, and `problems` says it in a sentence
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # A dead or hanging server is given up after two tries, not after four minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}


def uri() -> str:
    """Where the runs are: MLFLOW_TRACKING_URI, by default a database in the repository."""
    database = Path.cwd() / "mlflow.db"
    # SQLAlchemy reads % as an escape and ? as the start of options, but both may be in a folder's name.
    default = database if not {"%", "?"} & set(str(database)) else database.name
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{default}"


def is_server(store_uri: str) -> bool:
    """Whether a server stands between us and the store."""
    return store_uri.startswith(("http:", "https:", "databricks"))


def reader() -> Any | None:
    """A client that only reads; None where the database is a file that is not there, for asking would make it."""
    if uri().startswith("sqlite:///") and not Path(unquote(uri().removeprefix("sqlite:///").split("?")[0])).exists():
        return None
    return load_mlflow().MlflowClient(uri(), uri())


def artifact_location(store_uri: str) -> str | None:
    """Where a new experiment keeps its files: beside the database, or where the server decides (None)."""
    if is_server(store_uri):
        return None
    folder = Path.cwd()
    if store_uri.startswith("sqlite:///"):
        folder = Path(unquote(store_uri.removeprefix("sqlite:///").split("?")[0])).resolve().parent
    return (folder / "mlartifacts").as_uri()


def local_folder(place: str) -> Path | None:
    """The folder of artifacts that lie on this machine; None where a server has them."""
    return Path(unquote(urlsplit(place).path)) if place.startswith("file:") else None


def drop_half_copies(place: str) -> None:
    """Remove what an MLflow that was killed while it copied left among artifacts on this machine."""
    folder = local_folder(place)
    for left in folder.rglob(".artifact.uploading.*") if folder else []:
        left.unlink()


@contextlib.contextmanager
def unless_gone() -> Iterator[None]:
    """Pass over what MLflow does not have, or has no longer."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as problem:
        if problem.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def points_of(rows: Iterable[Mapping[str, Any]]) -> Points:
    """Every curve that rows of train.jsonl hold; a value that is missing or not finite is no point."""
    points: Points = {}
    for row in rows:
        values = {name: row.get(name) for name in OF_ROWS}
        if values["validation_loss"] is not None and values["train_eval_loss"] is not None:
            values["generalisation_gap"] = values["validation_loss"] - values["train_eval_loss"]
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                points[CURVE + name, row["step"]] = float(value)
    return points


def live_names(run: Any) -> set[str]:
    """The metrics of a run that training, and what watches it, wrote; not the final ones."""
    return {name for name in run.data.metrics if name.startswith((CURVE, SYSTEM))}


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hold the repository's lock: one process at a time looks for a run and creates what it misses.

    All work trees of a repository hold the same one, that of its checkout, for they write to the same store.
    """
    with (_checkout() / "dvc.yaml").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _checkout() -> Path:
    """The first of the work trees of this repository: the others have a file .git that leads there."""
    here, git = Path(), Path(".git")
    if git.is_file():
        first = Path(git.read_text(encoding="utf-8").removeprefix("gitdir: ").strip()).parents[2]
        here = first if (first / "dvc.yaml").is_file() else here
    return here


@contextlib.contextmanager
def problems() -> Iterator[None]:
    """Turn what MLflow raises when its store is out of reach into one sentence; keep its warnings quiet.

    Raises:
        Refusal: the store cannot be reached, opened or written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow = load_mlflow()
        from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException as UnknownStore
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
            return
        except mlflow.exceptions.MlflowException as problem:
            if not isinstance(problem, UnknownStore) and problem.error_code not in OUT_OF_REACH:
                raise
            reason = str(problem)
        except (OSError, ImportError, SQLAlchemyError) as problem:  # ImportError: of a database's driver
            reason = str(problem) or type(problem).__name__
    shown = re.sub(r"//[^/@]*@", "//", uri())  # without a password
    reason = re.sub(r"//[^/@]*@", "//", reason).strip().splitlines()[0][:300]
    raise Refusal(
        f"the MLflow store at {shown} cannot be used ({reason}). Start it, or set or unset MLFLOW_TRACKING_URI; "
        "then run this again, nothing else is repeated"
    )


def load_mlflow() -> Any:
    """MLflow, imported quietly and with telemetry and pickles off."""
    os.environ.update(FORCED)
    for key, value in DEFAULTS.items():
        os.environ.setdefault(key, value)
    import mlflow

    if not is_server(uri()):
        import mlflow.store.db.utils

        # A database that cannot be opened is tried ten times, for 100 s; four times take one.
        mlflow.store.db.utils.MAX_RETRY_COUNT = 4
    for name in ("mlflow", "alembic", "sqlalchemy.engine"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return mlflow


class Store:
    """One experiment of the tracking store. Call under `problems`."""

    def __init__(self, experiment: str) -> None:
        mlflow = load_mlflow()
        self.entities = mlflow.entities
        self.client = mlflow.MlflowClient(uri(), uri())
        self.experiment_id = self._experiment(experiment)

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            location = artifact_location(uri())
            # So that MLflow's pages show it as the training of models, not as traces of an application.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(self.client.create_experiment(name, artifact_location=location, tags=kind))
        if found.lifecycle_stage == "deleted":
            raise Refusal(
                f"publish.experiment: {name!r} was deleted in MLflow; bring it back with "
                f"`mlflow experiments restore -x {found.experiment_id}`, or choose another name in params.yaml"
            )
        return str(found.experiment_id)

    def runs(self, tag: str, value: str) -> list[Any]:
        """All runs with this tag, the oldest first."""
        found = self.client.search_runs([self.experiment_id], f"tags.`{tag}` = '{value}'", max_results=1000)
        return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    def running(self) -> list[Any]:
        """All runs of the experiment that are RUNNING."""
        return list(self.client.search_runs([self.experiment_id], "attributes.status = 'RUNNING'", max_results=1000))

    def published(self, publication: str) -> Any | None:
        """The complete run of this publication: FINISHED is set last, and only by publishing."""
        return next((run for run in self.runs(PUBLICATION, publication) if run.info.status == "FINISHED"), None)

    def create(self, fingerprint: str) -> Any:
        """A new run, RUNNING, named after the fingerprint of its training."""
        short = fingerprint[:NUM_FINGERPRINT_DIGITS]
        tags = {FINGERPRINT: short, "mlflow.source.name": "dvc.yaml", reaper.OWNER: reaper.tag_of(psutil.Process())}
        return self.client.create_run(self.experiment_id, run_name=f"training {short[:8]}", tags=tags)

    def points(self, run: Any, names: Iterable[str]) -> Points:
        """What the run holds of these metrics."""
        found: Points = {}
        for name in sorted(set(names) & set(run.data.metrics)):
            for metric in self.client.get_metric_history(run.info.run_id, name):
                found[name, metric.step] = metric.value
        return found

    def add(
        self,
        run: Any,
        points: Points | None = None,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        times_ms: Mapping[int, int] | None = None,
    ) -> None:
        """Write points, the parameters that are missing, and tags, in as few calls as MLflow allows.

        What the machine does has a clock, `times_ms` by step; results have none.
        """
        start_ms = run.info.start_time
        missing = {
            key: value[:MAX_PARAM_CHARACTERS] for key, value in (params or {}).items() if key not in run.data.params
        }
        clock = times_ms or {}
        metrics = [
            self.entities.Metric(
                name, value, clock.get(step, start_ms + step) if name.startswith(SYSTEM) else start_ms + step, step
            )
            for (name, step), value in (points or {}).items()
        ]
        for some in chunks(metrics, BATCH_METRICS):
            self.client.log_batch(run.info.run_id, metrics=some)
        for some in chunks([self.entities.Param(*item) for item in missing.items()], BATCH_OTHERS):
            self.client.log_batch(run.info.run_id, params=some)
        for some in chunks([self.entities.RunTag(*item) for item in (tags or {}).items()], BATCH_OTHERS):
            self.client.log_batch(run.info.run_id, tags=some)

    def adopt(
        self, publication: str, fingerprint: str, points: Points, params: Mapping[str, str]
    ) -> tuple[Any, Points]:
        """The run to publish into, claimed by its tag, and the points that it holds.

        That is the one that a killed publication left, or the one that was live while training, or a new one. A live
        run that contradicts the files (a training resumed elsewhere, other parameters) is put away: points and
        parameters of MLflow cannot be taken back.
        """
        left = self.runs(PUBLICATION, publication)
        live = self.runs(FINGERPRINT, fingerprint[:NUM_FINGERPRINT_DIGITS])
        for run in left + [run for run in live if PUBLICATION not in run.data.tags]:
            held = self.points(run, {name for name, _ in points} | set(CURVES))
            agrees = all(math.isclose(points.get(at, math.nan), value, rel_tol=1e-9) for at, value in held.items())
            if agrees and all(
                params.get(key, "")[:MAX_PARAM_CHARACTERS] == value for key, value in run.data.params.items()
            ):
                break
            self.client.set_terminated(run.info.run_id, status="KILLED")
            self.client.set_tag(run.info.run_id, SUPERSEDED, publication)
            for tag in (FINGERPRINT, PUBLICATION):
                if tag in run.data.tags:
                    self.client.delete_tag(run.info.run_id, tag)
        else:
            run, held = self.create(fingerprint), {}
        self.client.set_tag(run.info.run_id, PUBLICATION, publication)
        return run, held

    def describe(self, run: Any, name: str, text: str) -> None:
        """Give a run its name and its description, in Markdown."""
        self.client.update_run(run.info.run_id, name=name)
        self.client.set_tag(run.info.run_id, "mlflow.note.content", text)

    def add_table(self, run: Any, file: str, table: Mapping[str, Any]) -> None:
        """Write a table where MLflow's pages look for tables; its own log_table would add the same rows once more."""
        self.client.log_dict(run.info.run_id, dict(table), file)
        self.client.set_tag(run.info.run_id, "mlflow.loggedArtifacts", json.dumps([{"path": file, "type": "table"}]))

    def add_datasets(self, run: Any, datasets: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the lineage: a dataset for each side, named by it."""
        held = {known.dataset.name for known in run.inputs.dataset_inputs} if run.inputs else set()
        missing = [
            self.entities.DatasetInput(
                self.entities.Dataset(
                    name=side,
                    digest=about["digest"],
                    source_type="local",
                    source=json.dumps({"uri": about["source"]}),
                    profile=json.dumps({key: value for key, value in about.items() if key.startswith("num_")}),
                ),
                tags=[self.entities.InputTag("mlflow.data.context", CONTEXTS[side])],
            )
            for side, about in datasets.items()
            if side not in held
        ]
        if missing:
            self.client.log_inputs(run.info.run_id, datasets=missing)

    def add_files(self, run: Any, paths: Iterable[Path]) -> None:
        """Upload files and folders under their own paths."""
        drop_half_copies(run.info.artifact_uri)
        for path in paths:
            if path.is_dir():
                self.client.log_artifacts(run.info.run_id, str(path), path.as_posix())
            else:
                self.client.log_artifact(run.info.run_id, str(path), path.parent.as_posix())

    def fetch(self, run_id: str | None, paths: Iterable[Path], folder: Path) -> dict[str, Path]:
        """Those of a run's files that are there, by name, copied into a new folder; none of a run that is gone."""
        folder.mkdir()
        found: dict[str, Path] = {}
        for path in paths:
            with unless_gone():
                held = self.client.list_artifacts(run_id, path.parent.as_posix()) if run_id else []
                if path.as_posix() in {file.path for file in held}:
                    found[path.name] = Path(self.client.download_artifacts(run_id, path.as_posix(), str(folder)))
        return found

    def end(self, run: Any, status: str) -> None:
        """End a run as FINISHED or KILLED."""
        self.client.set_terminated(run.info.run_id, status=status)


def chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive pieces of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
