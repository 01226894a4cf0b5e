"""What a flow run leaves to read on its page: a table of the stages, and the result in Markdown."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prefect import State
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows import settings
from flows.place import Place
from pipeline import files, markdown, stage


def result_of(where: Place, name: str, file: str) -> dict[str, Any]:
    """A JSON file that a stage wrote there."""
    found: dict[str, Any] = files.read_json(path_of(where, name, file))
    return found


def path_of(where: Place, name: str, file: str) -> Path:
    """Where a stage's file lies."""
    return where.folder / stage.paths_of(stage.read_stages()[name])[file]


def measured(where: Place) -> dict[str, Any]:
    """What the stage `evaluate` found, and the experiment that keeps it."""
    return {"experiment": where.experiment or "", **result_of(where, "evaluate", "evaluation.json")}


def publish(
    states: Mapping[str, State[Any]], where: Place, asked: Mapping[str, Any], shown: Future[dict[str, str]] | None
) -> None:
    """Leave both artifacts; without a result in MLflow, only the table."""
    create_table_artifact(table(states), key="stages", description="what was brought up to date, and how")
    if shown:
        text = "\n".join(result(where, asked, shown.result(), path_of(where, "evaluate", "loss_curve.png")))
        create_markdown_artifact(text, key="result", description="verdict, losses, picture and samples")


def table(states: Mapping[str, State[Any]]) -> list[dict[str, Any]]:
    """A row a stage."""
    return [
        {"stage": name, "state": state.name, "how": next(iter((state.message or "").splitlines()), "")}
        for name, state in states.items()
    ]


def result(where: Place, asked: Mapping[str, Any], in_mlflow: Mapping[str, str], picture: Path) -> list[str]:
    """The lines of the result: what was asked for, the picture, and the run as MLflow describes it."""
    lines = []
    if asked:
        rows = [[f"`{key}`", markdown.escaped(str(value))] for key, value in asked.items()]
        lines += [*markdown.table(["parameter", "of this run"], rows), ""]
    lines += [f"![loss curves](data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()})", ""]
    lines += [in_mlflow["description"], ""]
    base = mlflow_pages()
    if run := in_mlflow.get("run"):
        lines.append(f"- [The run in MLflow]({base}/#/experiments/{in_mlflow['experiment']}/runs/{run})")
    if version := in_mlflow.get("version"):
        name = in_mlflow["model"]
        lines.append(f"- [Version {version} of {markdown.escaped(name)}]({base}/#/models/{name}/versions/{version})")
    if where.experiment:
        lines.append(f"- Experiment {where.experiment}: `dvc exp show`, `dvc exp apply {where.experiment}`")
    return lines


def mlflow_pages() -> str:
    """Where a browser finds MLflow: the server that is configured, or `make ui`."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    return server.rstrip("/") if server.startswith("http") else settings.MLFLOW_PAGES


def asked_of_mlflow(where: Place) -> Future[dict[str, str]]:
    """Run and version of the result in MLflow, and its description; what is wrong, where MLflow cannot be asked.

    The answer takes a few seconds, in which the caller has something else to do.
    """

    def ask() -> dict[str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.shown"],
            cwd=where.folder, env=where.environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            return {"description": markdown.escaped(stage.reason(done.stderr))}
        found: dict[str, str] = json.loads(done.stdout)
        return found

    pool = ThreadPoolExecutor(1)
    answer = pool.submit(ask)
    pool.shutdown(wait=False)
    return answer
