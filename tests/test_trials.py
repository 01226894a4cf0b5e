"""Runs with parameters of their own, in work trees beside the checkout, and a sweep that ranks them."""

import csv
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.closure import ROOT
from tests.test_end_to_end import Clone


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a checkout, but for what DVC, git and the flow keep for themselves."""
    own = {".git", ".dvc", ".trials", ".prefect", ".runs", "mlflow.db", "mlartifacts", "__pycache__"}
    files = [file for file in folder.rglob("*") if file.is_file() and not own & set(file.relative_to(folder).parts)]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.slow
def test_trials_share_what_they_have_in_common_and_are_ranked_and_the_checkout_notices_nothing(tmp_path: Path) -> None:
    clone = Clone(tmp_path / "a clone ü")
    clone.run("python", "-m", "dvc", "repro", "split")
    before = contents(clone.folder)
    trials = [
        "ingest.demo_documents=1400",
        "ingest.demo_documents=1400 train.learning_rate=1e-4",
        "split.min_documents=99999999",
    ]
    names = [trial.replace(" ", ", ").replace("1e-4", "0.0001") for trial in trials]
    command = ["python", "-m", "flows.pipeline", "--at-once", "2"]
    for trial in trials:
        command += ["--trial", trial]
    said = clone.run(*command, succeeds=False)

    assert contents(clone.folder) == before
    assert clone.run("git", "status", "--porcelain") == "?? dvc.lock\n"
    assert said.splitlines()[-1] == "flow: 1 of 3 trials failed: split.min_documents=99999999"
    ran = re.findall(r"Running stage '(\w+)'", said)
    # ingest and what follows up to split: once for the two trials that share it. tokenize reads the section split too.
    assert {name: ran.count(name) for name in sorted(set(ran))} == {
        "ingest": 1, "clean": 1, "tokenize": 2, "split": 2, "train": 2, "sample": 2, "evaluate": 2, "publish": 2,
    }  # fmt: skip

    *rows, last = [line.split("  ") for line in said.splitlines() if re.match(r"flow: \d*  ", line)]
    assert names[2] in "  ".join(last)
    assert [row[1] for row in rows] == names[:2]
    losses = [float(row[2]) for row in rows]
    assert losses[0] < losses[1]
    for row, loss in zip(rows, losses, strict=True):
        low, high = map(float, row[3].split(" to "))
        assert low < loss < high

    shown = list(csv.DictReader(io.StringIO(clone.run("python", "-m", "dvc", "exp", "show", "--csv"))))
    found = {row["Experiment"]: row for row in shown}
    for row, loss, rate in zip(rows, losses, ["0.002", "0.0001"], strict=True):
        trial = found[row[5]]
        assert float(trial["validation.loss"]) == pytest.approx(loss, abs=1e-4)
        assert (trial["train.learning_rate"], trial["ingest.demo_documents"]) == (rate, "1400")
    assert [rate for _, rate in clone.mlflow_runs()] == ["0.0001", "0.002"]
    # What came to a result is an experiment; what failed stays, to go on when it is mended.
    kept = [file for file in (clone.folder / ".trials").iterdir() if file.is_dir()]
    assert [(file / "params.yaml").read_text().count("min_documents: 99999999") for file in kept] == [1]


def test_stages_are_shared_where_their_parameters_come_to_the_same_however_they_are_asked_for(monkeypatch):
    from flows.dag import read_dag
    from flows.sweep import shared

    monkeypatch.chdir(ROOT)
    as_it_is = YAML(typ="safe").load(ROOT / "params.yaml")["ingest"]["demo_documents"]
    one, spelled, other = shared(
        read_dag(),
        [
            {"train.learning_rate": 1e-4},
            {"train.learning_rate": 1e-4, "ingest.demo_documents": as_it_is},
            {"train.learning_rate": 1e-4, "split.seed": 99},
        ],
    )
    assert all(one[name] is spelled[name] for name in one)
    assert {name for name in one if one[name] is other[name]} == {"ingest", "clean"}


def test_trials_do_not_take_what_is_for_one_run(tmp_path):
    command = [sys.executable, "-m", "flows.pipeline", "--trial", "train.seed=1", "--when-busy", "refuse"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PREFECT_HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(
        "error: --when-busy refuse: trials always wait for a run that works in the same place\n"
    )
