"""The project that a campaign breaks: this pipeline, made tiny, in a folder of its own, run once undisturbed.

`Reference` holds what came out (a SHA-256 of every output that dvc.yaml names, of dvc.lock, and what MLflow holds) and
makes copies of the project in which chosen stages have never run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from ruamel.yaml import YAML

from pipeline import files, stage

ROOT = Path(__file__).parent.parent
NEEDED = ("pipeline", ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore", "data/source/README.md",
          "dvc.yaml", "params.yaml", "requirements.lock")  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "ingest": {"demo_documents": 300},
    "tokenize": {"vocabulary_size": 400},
    "split": {"min_documents": 5},
    "train": {
        "scratch": {"num_layers": 2, "num_heads": 2, "embedding_size": 32},
        "max_length": 64,
        "batch_size": 8,
        "num_epochs": 1,
        "dropout": 0.1,
        "evaluation_documents": 10,
        "evaluation_interval_steps": 20,
        "checkpoint_interval_steps": 8,
    },
    "evaluate": {"bootstrap_samples": 100},
    "sample": {"max_new_tokens": 5, "samples_per_prompt": 1},
}

Result = dict[str, str]  # what is compared: a name, and a hash or a few words


class Broken(Exception):
    """The campaign cannot go on: the undisturbed run failed, or differs from itself."""


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The environment of every command: one thread, nothing of the user's settings, nothing left elsewhere."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MLFLOW_", "DVC_", "PIPELINE_", "CHAOS_"))
    }
    temporary = folder.parent / "temporary"
    temporary.mkdir(exist_ok=True)
    return kept | {
        "TMPDIR": str(temporary),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "OMP_NUM_THREADS": "1",
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(folder / ".dvc" / "tmp" / "site"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **more,
    }


def write_project(folder: Path) -> None:
    """The code of this repository with tiny parameters, and an MLflow database without runs."""
    for name in NEEDED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, folder / name)
    yaml, params = YAML(), folder / "params.yaml"
    content = yaml.load(params)
    for section, values in TINY.items():
        content[section].update(values)
    yaml.dump(content, params)
    # Making a database takes seconds, copying it nothing.
    script = "from pipeline import tracking as t; t.load_mlflow().MlflowClient(t.uri()).search_experiments()"
    subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment(folder), check=True)


class Reference:
    """The undisturbed run, and copies of it.

    Attributes:
        result: what every try is compared with.
        calls: of every module, the calls that changed files, as (call, path below the project), in order.
        train_s: how long the trainer lived.
    """

    def __init__(self, campaign: Path, library: Path | None) -> None:
        self.folder, self.library = campaign / "reference", library
        self.trace = campaign / "trace.txt"
        self.stages: list[str] = []
        self.outs: dict[str, list[str]] = {}
        self.locks: dict[str, bytes] = {}  # of every stage: dvc.lock before it first ran
        self.result: Result = {}
        self.calls: dict[str, list[tuple[str, str]]] = {}
        self.train_s = 0.0

    def run(self) -> None:
        """Run every stage of the project in the folder, undisturbed, and take note of what comes out."""
        self._run("git", "init", "--quiet")
        self._commit("tiny")
        definitions = stage.read_stages(self.folder / "dvc.yaml")
        self.stages = list(definitions)
        self.outs = {name: outputs(definition) for name, definition in definitions.items()}
        shutil.copyfile(self.folder / "mlflow.db", self.folder.parent / "empty.db")
        tracing = {} if self.library is None else trace(self.library, self.folder, self.trace)
        for name in self.stages:
            lock = self.folder / "dvc.lock"
            self.locks[name] = lock.read_bytes() if lock.exists() else b""
            began = time.monotonic()
            self._run("python", "-m", "dvc", "repro", name, **tracing)
            if name == "train":
                self.train_s = time.monotonic() - began - 2  # less what DVC takes
        self._commit("lock")
        files.remove(self.folder / ".runs")
        self.learn_calls(self.trace, self.folder)
        self.result = self.result_of(self.folder)

    def learn_calls(self, log: Path, folder: Path) -> None:
        """Read a trace of the fault library."""
        if not log.exists():
            return
        found: dict[str, list[tuple[str, str]]] = {}
        for line in log.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            module, _, call, path = line.split(" ", 3)
            found.setdefault(module, []).append((call, path.removeprefix(f"{folder}/")))
        self.calls |= found

    def copy(self, to: Path, stale: Collection[str]) -> None:
        """A copy in which these stages never ran, and what follows them waits in DVC's run cache."""
        shutil.copytree(self.folder, to, symlinks=True)
        if not stale:
            return
        shutil.rmtree(to / ".dvc" / "tmp", ignore_errors=True)
        first = min(map(self.stages.index, stale))
        if self.locks[self.stages[first]]:
            (to / "dvc.lock").write_bytes(self.locks[self.stages[first]])
        else:
            (to / "dvc.lock").unlink()
        for name in self.stages[first:]:
            for out in self.outs[name]:
                files.remove(to / out)
        for entry in (to / ".dvc" / "cache" / "runs").glob("*/*/*"):
            if entry.read_bytes().split(b"\n")[0].decode() in {f"cmd: python -m pipeline.{name}" for name in stale}:
                shutil.rmtree(entry.parent)
        lock = YAML(typ="safe", pure=True).load(self.folder / "dvc.lock")["stages"]
        needed = {key for name in self.stages if name not in stale for key in self._objects(lock[name])}
        for name in stale:
            for key in self._objects(lock[name]) - needed:
                object_path(to, key).unlink()
        if "publish" in stale:
            shutil.copyfile(self.folder.parent / "empty.db", to / "mlflow.db")
            shutil.rmtree(to / "mlartifacts")

    def result_of(self, folder: Path, served: Path | None = None) -> Result:
        """What a project holds (see the module's docstring); `served`: the artifacts of the server it published to."""
        found = {}
        for out in [*(out for outs in self.outs.values() for out in outs), "dvc.lock"]:
            there = (folder / out).exists()
            found[out] = files.sha256_of(folder / out) if there else "missing"
        found["objects of DVC's cache that are not what their name says"] = listing(
            path.name for path in objects(folder) if files_md5(path) != path.name.removesuffix(".dir")
        )
        beside = (path for top in ("data", "models", "reports") for path in (folder / top).rglob("*.partial"))
        found["unfinished files beside outputs"] = listing(
            path.relative_to(folder).as_posix() for path in [*folder.glob("*.partial"), *beside]
        )
        return found | published(folder / "mlflow.db", served)

    def _objects(self, locked: Mapping[str, Any]) -> set[str]:
        """The cache objects of a stage's outputs."""
        found = set()
        for out in locked["outs"]:
            found.add(out["md5"])
            if out["md5"].endswith(".dir"):
                found |= {entry["md5"] for entry in files.read_json(object_path(self.folder, out["md5"]))}
        return found

    def _run(self, *command: str, **more: str) -> None:
        done = subprocess.run(
            command, cwd=self.folder, env=environment(self.folder, **more),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise Broken(f"{' '.join(command)} failed in {self.folder}, without any fault:\n{done.stdout}")

    def _commit(self, message: str) -> None:
        self._run("git", "add", "--all")
        self._run(
            "git", "-c", "user.name=chaos", "-c", "user.email=chaos@localhost", "commit", "--quiet", "-m", message
        )


def trace(library: Path, folder: Path, log: Path) -> dict[str, str]:
    """The environment in which the fault library only takes notes."""
    return {"LD_PRELOAD": str(library), "CHAOS_ROOT": str(folder), "CHAOS_MODE": "trace", "CHAOS_LOG": str(log)}


def outputs(definition: Mapping[str, Any]) -> list[str]:
    """The paths that a stage of dvc.yaml writes."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in definition.get(kind, [])]
    return [next(iter(entry)) if isinstance(entry, Mapping) else entry for entry in entries]


def objects(folder: Path) -> list[Path]:
    """Every object of the project's DVC cache; what DVC left unfinished is not named like one."""
    found = sorted((folder / ".dvc" / "cache" / "files" / "md5").glob("??/*"))
    return [path for path in found if len(path.name.removesuffix(".dir")) == 30]


def object_path(folder: Path, md5: str) -> Path:
    """Where DVC keeps an object."""
    return folder / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]


def files_md5(path: Path) -> str:
    """MD5 of an object, without the two digits that are its folder's name."""
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    return digest[2:] if digest[:2] == path.parent.name else "another"


def listing(names: Iterable[str]) -> str:
    """Names in one line."""
    return ", ".join(sorted(names)) or "none"


def published(database: Path, served: Path | None = None) -> Result:
    """What an MLflow database holds about results: everything but ids, clocks, paths and speeds."""

    def place(uri: str) -> Path:
        path = Path(unquote(urlparse(uri).path))
        return path if served is None else served / path.relative_to("/")

    with contextlib.closing(sqlite3.connect(database)) as db:
        runs = db.execute("SELECT run_uuid, status, artifact_uri FROM runs WHERE lifecycle_stage = 'active'").fetchall()
        found = {"MLflow: runs": listing(status for _, status, _ in runs)}
        finished = [(run, uri) for run, status, uri in runs if status == "FINISHED"]
        for run, uri in finished:
            points = db.execute("SELECT key, step, value FROM metrics WHERE run_uuid = ?", [run]).fetchall()
            points = sorted(point for point in points if not point[0].startswith(("curves/tokens_per_s", "system/")))
            found["MLflow: points"] = f"{len(points)} {digest_of(points)}"
            found["MLflow: parameters"] = digest_of(
                sorted(db.execute("SELECT key, value FROM params WHERE run_uuid = ?", [run]))
            )
            reports = place(uri)
            found["MLflow: reports"] = files.sha256_of(reports) if reports.is_dir() else "missing"
        datasets = db.execute("SELECT name, digest FROM datasets").fetchall()
        found["MLflow: datasets"] = digest_of(sorted(datasets))
        versions = db.execute("SELECT name, version, status, source, run_id FROM model_versions").fetchall()
        found["MLflow: versions"] = listing(f"{name} {number} {status}" for name, number, status, _, _ in versions)
        found["MLflow: aliases"] = listing(
            " ".join(map(str, alias))
            for alias in db.execute("SELECT name, alias, version FROM registered_model_aliases")
        )
        found["MLflow: versions of finished runs"] = str(
            sum(run == known for *_, run in versions for known, _ in finished)
        )
        models = db.execute("SELECT status, artifact_location FROM logged_models WHERE lifecycle_stage = 'active'")
        weights = [path for _, uri in models for path in place(uri).rglob("*.safetensors")]
        found["MLflow: weights"] = listing(map(files.sha256_of, weights))
    return found


def digest_of(content: object) -> str:
    """A short digest of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def differences(expected: Result, found: Result) -> list[str]:
    """A line for everything that is not as in the undisturbed run."""
    return [
        f"{name}: {found.get(name, 'nothing')} instead of {expected.get(name, 'nothing')}"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]
