"""The whole pipeline under DVC, small: what runs, what does not, and that the bytes are the same everywhere."""

import contextlib
import csv
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.tiny import ROOT

pytestmark = pytest.mark.slow

STAGES = ["ingest", "clean", "tokenize", "split", "train", "sample", "evaluate", "publish"]
SMALL = {
    "ingest": {"demo_documents": 1500},
    "tokenize": {"vocabulary_size": 800},
    "split": {"min_documents": 50},
    "train": {
        "scratch": {"num_layers": 1, "num_heads": 2, "embedding_size": 32},
        "max_length": 64,
        "num_epochs": 1,
        "dropout": 0.1,
        "evaluation_documents": 50,
    },
    "sample": {"max_new_tokens": 10},
}


class Clone:
    """A copy of every file that git tracks or would track, as a repository of its own, with small parameters."""

    def __init__(self, folder: Path, umask: int = -1, **environment: str) -> None:
        self.folder, self.umask = folder, umask
        bin_folder = str(Path(sys.executable).parent)
        self.environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"} | environment
        self.environment.pop("MLFLOW_TRACKING_URI", None)
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0"):
            if name and name != "dvc.lock" and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        self.change(SMALL)
        self.run("git", "init", "--quiet")
        self.run("git", "add", "--all")
        self.run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "small")

    def change(self, sections: dict[str, dict[str, object]]) -> None:
        file, yaml = self.folder / "params.yaml", YAML()
        content = yaml.load(file)
        for section, values in sections.items():
            content[section].update(values)
        yaml.dump(content, file)

    def run(self, *command: str, succeeds: bool = True) -> str:
        """What a command prints, on both channels."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, umask=self.umask, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500,
        )  # fmt: skip
        assert (done.returncode == 0) == succeeds, done.stdout
        return done.stdout

    def repro(self) -> list[str]:
        """The stages that `dvc repro` ran."""
        return re.findall(r"Running stage '(\w+)'", self.run("python", "-m", "dvc", "repro"))

    def mlflow_runs(self) -> list[tuple[str, str]]:
        """Status and learning rate of every MLflow run."""
        script = (
            "from pipeline import tracking; mlflow = tracking.load_mlflow(); "
            "client = mlflow.MlflowClient(tracking.uri()); "
            "ids = [e.experiment_id for e in client.search_experiments()]; "
            "print(*(f'{r.info.status}={r.data.params.get(\"train.learning_rate\")}' for r in client.search_runs(ids)))"
        )
        return sorted(tuple(run.split("=")) for run in self.run("python", "-c", script).split() if "=" in run)  # type: ignore[misc]

    def lock(self) -> str:
        return (self.folder / "dvc.lock").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    clone = Clone(tmp_path_factory.mktemp("first") / "clone", TZ="UTC", LC_ALL="C.UTF-8", PYTHONHASHSEED="1")
    assert clone.repro() == STAGES
    return clone


def test_a_second_run_runs_nothing_and_the_summary_tells_what_came_out(first):
    assert first.repro() == []
    shown = first.run("python", "-m", "pipeline.summary")
    for word in ("validation", "test", "perplexity", "verdict", "sample", "models/best"):
        assert word in shown
    assert len(shown.strip().splitlines()) <= 12


def test_two_clones_in_other_surroundings_have_the_same_lock(first, tmp_path):
    (tmp_path / "home").mkdir()
    somebody = {"HOME": str(tmp_path / "home"), "USER": "somebody", "LOGNAME": "somebody"}
    place = tmp_path / "anderer Ort mit Ümlaut"
    other = Clone(place, umask=0o077, TZ="Asia/Kathmandu", LC_ALL="C", PYTHONHASHSEED="99", **somebody)
    assert other.repro() == STAGES
    assert other.lock() == first.lock()


def test_a_replay_trains_again_beside_the_checkout_and_comes_to_the_same_bytes(first):
    def state():
        with contextlib.closing(sqlite3.connect(first.folder / "mlflow.db")) as database:
            rows = [database.execute(f"select count(*) from {name}").fetchone() for name in ("runs", "metrics", "tags")]
        return first.lock(), first.run("git", "status", "--porcelain"), rows

    before = state()
    said = first.run("python", "-m", "pipeline.replay", "models:/gpt2-pipeline/1")
    assert re.findall(r"Running stage '(\w+)'", said) == ["train", "sample", "evaluate"]
    assert "train: before training: validation loss" in said, "it does not go on from what is there"
    found = re.search(r"replay: byte-identical: all \d+ files .* \((certificates/\w+\.md)\)", said)
    certificate = (first.folder / found[1]).read_text(encoding="utf-8")
    assert "Nothing that is recorded differs." in certificate and "'threads': 1" in certificate
    shutil.rmtree(first.folder / "certificates")
    assert state() == before
    assert first.run("git", "worktree", "list").count("\n") == 1


def test_changing_the_learning_rate_and_back_runs_only_what_follows_and_then_nothing(first):
    before, rate = first.lock(), YAML().load(first.folder / "params.yaml")["train"]["learning_rate"]
    first.change({"train": {"learning_rate": 5e-4}})
    assert first.repro() == ["train", "sample", "evaluate", "publish"]
    assert first.lock() != before
    first.change({"train": {"learning_rate": rate}})
    assert first.repro() == []
    assert first.lock() == before
    assert first.mlflow_runs() == [("FINISHED", "0.0005"), ("FINISHED", str(rate))]


def test_a_wrong_number_stops_every_stage_before_any_work(first):
    first.change({"train": {"learning_rate": -1, "warmup": 3}})
    before = first.lock()
    for stage in STAGES:
        said = first.run("python", "-m", f"pipeline.{stage}", succeeds=False)
        assert "train.learning_rate" in said and "train.warmup" in said and "Traceback" not in said
    assert first.lock() == before
    subprocess.run(["git", "checkout", "--quiet", "params.yaml"], cwd=first.folder, check=True)


def test_metrics_parameters_and_plots_show_something(first):
    assert "perplexity" in first.run("python", "-m", "dvc", "metrics", "show")
    first.run("python", "-m", "dvc", "metrics", "diff")
    first.change({"train": {"learning_rate": 5e-4}})
    assert "train.learning_rate" in first.run("python", "-m", "dvc", "params", "diff")
    subprocess.run(["git", "checkout", "--quiet", "params.yaml"], cwd=first.folder, check=True)


def test_an_experiment_of_dvc_has_its_name_in_mlflow_and_the_audit_leads_from_one_to_the_other(first):
    first.run("git", "add", "--all")
    first.run("git", "-c", "user.name=test", "-c", "user.email=test@localhost", "commit", "--quiet", "-m", "its result")
    said = first.run("python", "-m", "dvc", "exp", "run", "--name", "slower", "-S", "train.learning_rate=3e-4")
    assert re.findall(r"Running stage '(\w+)'", said) == ["train", "sample", "evaluate", "publish"]
    (row,) = [row for row in csv.DictReader(first.run("python", "-m", "dvc", "exp", "show", "--csv").splitlines())
              if row["Experiment"] == "slower"]  # fmt: skip
    assert float(row["train.learning_rate"]) == 3e-4
    assert float(row["test.loss"]) > 0

    shown = first.run("python", "-m", "pipeline.audit", "slower")
    assert "DVC experiment slower" in shown
    run_id = re.search(r"^run +(\w+)", shown, re.MULTILINE)[1]
    assert first.run("python", "-m", "pipeline.audit", run_id) == shown
    assert re.search(r"^model +models:/\S+/\d+  @challenger", shown, re.MULTILINE)
    assert re.search(r"audit: all agree \(results: \d,", first.run("python", "-m", "pipeline.audit"))
    weights = first.folder / "models" / "best" / "model.safetensors"
    weights.chmod(0o644)
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = first.run("python", "-m", "pipeline.audit", succeeds=False)
    assert "models/best/model.safetensors: train: changed" in said and "audit: disagreements: 1" in said
