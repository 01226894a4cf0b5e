"""What belongs together: the commit, the dvc.lock, the MLflow run, the versions and the flow runs of each result.

A result is a publication (pipeline/publication.py), and its MLflow run is what leads to all others: its tags name the
publication, the commit, the outputs of every stage as dvc.lock had them, and the SHA-256 of the model. A version names
its model, a flow run its publication. Whether the bytes agree with the names is for pipeline/agreement.py to say.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import commits, inputs, recorded, stage, tracking
from pipeline.registry import MODEL_SHA256
from pipeline.tracking import PUBLICATION

# Tags of a run; the last begins one a stage.
COMMIT, DIRTY, VERDICT, LOCKED = "git.commit", "git.dirty", "pipeline.verdict", "dvc.lock."


class Records:
    """What DVC, MLflow and Prefect hold, asked once. Make it under `tracking.problems`."""

    def __init__(self, cache: Path, experiment: str, flow_runs: Sequence[Mapping[str, Any]]) -> None:
        self.cache = cache
        self.flow_runs = flow_runs  # as flows/history.py prints them
        self.lock: Mapping[str, Any] = recorded.read_lock() if inputs.LOCK.exists() else {}
        self.paths = stage.paths_of(stage.read_stages()["publish"])
        self.client = tracking.reader()
        ids = {one.name: one.experiment_id for one in self._all("search_experiments")}
        found = self._all("search_runs", list(ids.values()), f"tags.`{PUBLICATION}` LIKE '%'") if ids else []
        self.runs = sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))
        self.experiment_ids = [ids[experiment]] if experiment in ids else []
        self.own = [run for run in self.runs if run.info.experiment_id in self.experiment_ids]
        self.results = {run.data.tags[PUBLICATION]: run for run in self.runs if run.info.status == "FINISHED"}
        self._states: dict[Path, str] = {}
        self._versions: dict[str, list[Any]] = {}

    def _all(self, search: str, *arguments: Any) -> list[Any]:
        """Every page of what MLflow finds; nothing where there is no database."""
        found: list[Any] = []
        token = None
        while self.client:
            page = getattr(self.client, search)(*arguments, page_token=token)
            found += page
            token = page.token
            if not token:
                break
        return found

    # --- DVC ---

    def objects(self, path: str, md5: str) -> Iterator[tuple[str, Path, str]]:
        """DVC's copy of an output, and of a folder those of its files: name, place, and how it is."""
        at = recorded.object_path(self.cache, md5)
        yield path, at, self._state(at, md5)
        if md5.endswith(".dir") and self._state(at, md5) == "sound":
            for entry in json.loads(at.read_bytes()):
                copy = recorded.object_path(self.cache, entry["md5"])
                yield recorded.inside(Path(path), entry["relpath"]).as_posix(), copy, self._state(copy, entry["md5"])

    def _state(self, at: Path, md5: str) -> str:
        """How an object of the cache is: sound, changed or missing; read once it is there."""
        if self._states.get(at, "missing") == "missing":
            try:
                is_sound = inputs.digest_of(at, "md5") == md5.removesuffix(".dir")
                self._states[at] = "sound" if is_sound else "changed"
            except OSError:
                self._states[at] = "missing"
        return self._states[at]

    @property
    def num_objects(self) -> int:
        """How many objects of DVC were read."""
        return len(self._states)

    # --- MLflow ---

    def versions(self, name: str) -> list[Any]:
        """All versions of a registered model, the oldest first."""
        if name not in self._versions:
            found = self._all("search_model_versions", f"name = '{name}'")
            self._versions[name] = sorted(found, key=lambda version: int(version.version))
        return self._versions[name]

    def versions_of(self, run: Any) -> list[Any]:
        """The versions with the model of this run, and those that say they come from it."""
        sha256, run_id = run.data.tags.get(MODEL_SHA256), run.info.run_id
        versions = self.versions(model_name(run))
        return [one for one in versions if one.tags.get(MODEL_SHA256) == sha256 or one.run_id == run_id]

    def runs_of(self, version: Any) -> list[Any]:
        """The runs with the model of this version."""
        sha256 = version.tags.get(MODEL_SHA256)
        return [run for run in self.runs if sha256 and run.data.tags.get(MODEL_SHA256) == sha256]

    def aliases(self, name: str) -> dict[str, str]:
        """The aliases of a registered model, and the numbers of their versions."""
        found = self._all("search_registered_models", f"name = '{name}'")
        return {alias: str(number) for model in found for alias, number in model.aliases.items()}

    def unnamed(self, names: Iterable[str]) -> tuple[list[Any], list[Any]]:
        """The experiment's FINISHED runs without a publication, and its models that are no version of these names."""
        if not self.experiment_ids:
            return [], []
        runs = self._all("search_runs", self.experiment_ids, "attributes.status = 'FINISHED'")
        models = self._all("search_logged_models", self.experiment_ids)
        registered = {version.source for name in names for version in self.versions(name)}
        return (
            [run for run in runs if PUBLICATION not in run.data.tags],
            [model for model in models if f"models:/{model.model_id}" not in registered],
        )

    @contextlib.contextmanager
    def artifacts(self, run: Any) -> Iterator[Path]:
        """The folder with the files of a run; a server's are fetched."""
        if (folder := tracking.local_folder(run.info.artifact_uri)) is not None:
            yield folder
            return
        assert self.client is not None
        with tempfile.TemporaryDirectory() as beside:
            for artifact in self.client.list_artifacts(run.info.run_id):
                self.client.download_artifacts(run.info.run_id, artifact.path, beside)
            yield Path(beside)

    # --- Prefect, git ---

    def flow_runs_of(self, run: Any) -> list[Mapping[str, Any]]:
        """The flow runs that ended with the result of this run."""
        return [one for one in self.flow_runs if one["tags"].get(PUBLICATION) == run.data.tags[PUBLICATION]]

    def locks_of(self, run: Any) -> dict[str, Mapping[str, Any]]:
        """Every dvc.lock with the outputs of this run: the one here (""), and those of commits."""
        outputs = outputs_of(run)
        found = {"": self.lock} if self.lock and commits.outputs_of(self.lock) == outputs else {}
        return found | {commit: commits.lock_at(commit) for commit in commits.commits_with(outputs)}


def outputs_of(run: Any) -> commits.Outputs:
    """What dvc.lock said when the run was published: the tags that pipeline/origin.py wrote."""
    tags = {key.removeprefix(LOCKED): text for key, text in run.data.tags.items() if key.startswith(LOCKED)}
    return {
        name: {path: md5 for path, _, md5 in (line.rpartition(" ") for line in text.splitlines())}
        for name, text in tags.items()
    }


def model_name(run: Any) -> str:
    """The registered model of which a run published a version."""
    return str(run.data.params.get("publish.registered_model", ""))


def title(run: Any) -> str:
    """A run, in a sentence."""
    return f"run {run.info.run_id} ({run.info.run_name})"
